# Every command of the project; `make` alone lists them.
#
# The first target that needs it creates .venv and installs everything there with plain pip, from wherever pip is set up
# to look. PyTorch comes first and alone, so that pip takes a CPU build (torch 2.13.0+cpu) if it finds one. On Linux the
# default index offers only the CUDA build, several GB; for the CPU build from PyTorch's own index:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
# Another interpreter: `make PYTHON=python3.12 test`. Arguments of a command: `make test ARGS='-k codes'`.

ifndef PYTHON
PYTHON := $(shell command -v python3.11 || command -v python3)
endif

BIN   := .venv/bin
STAMP := .venv/.installed
# Not -q, which hides the progress of downloads too.
PIP   := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Nothing here talks to a server that the user did not name.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
# Ray leaves the accelerators of a task that asks for none alone: its own next default; unset, it warns at each start.
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0
# Many nodes share the cores: one thread each. More would only contend, and would change the order of float sums.
export OMP_NUM_THREADS := 1
# Flower's configuration, unpacked apps and local state stay out of the user's home.
export FLWR_HOME := $(CURDIR)/.flwr-home
# Flower starts flower-superexec and others by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo deploy-demo chapter compare privacy report test test-all check lint format bench matrix dist clean venv

help: ## list every command
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
	    while IFS="$$(printf '\t')" read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done

demo: $(STAMP) ## run the demonstration (first run installs)
	$(BIN)/python -m experiments.demo $(ARGS)

deploy-demo: $(STAMP) ## watch a deployment: TLS, keys, a slow node, a killed one; 2 minutes
	$(BIN)/python -m experiments.deploy_demo $(ARGS)

chapter: $(STAMP) ## recompute the source chapter's results
	$(BIN)/python -m experiments.chapter $(ARGS)

compare: $(STAMP) ## run the missing parts of the comparison, 1 minute; ARGS='--suite main --data-dir DIR': 40 minutes
	$(BIN)/python -m experiments.compare $(ARGS)

privacy: $(STAMP) ## run the missing parts of accuracy against epsilon; ARGS=--quick: a minute, ARGS='--data-dir DIR': 25 minutes
	$(BIN)/python -m experiments.privacy $(ARGS)

report: $(STAMP) ## turn rows of the comparison into a page (runs nothing)
	$(BIN)/python -m experiments.report $(ARGS)

# Three worker processes: tests with engines run one after the other in one of them, which waits for most of its time
# (tests/conftest.py).
test: $(STAMP) ## run the tests, slow ones included, except a few that repeat others under more stress
	$(BIN)/python -m pytest -q -n 3 -m "not stress" $(ARGS)

test-all: $(STAMP) ## run every test
	$(BIN)/python -m pytest -q -n 3 $(ARGS)

check: lint ## what CI runs first: lint, types, architecture, public API
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_public_api.py

# Not in `make venv`: only building the site needs Sphinx.
DOCS := .venv/.installed-docs
.PHONY: docs
docs: $(DOCS) ## build the documentation site into out/docs; warnings are errors (first run installs Sphinx)
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d out/doctrees docs out/docs
	@echo "Open out/docs/index.html"

$(DOCS): $(STAMP)
	$(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

lint: $(STAMP) ## ruff and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## run the benchmarks
	$(BIN)/python -m experiments.bench $(ARGS)

matrix: $(STAMP) ## the core suite under each Python and Flower found here (docs/versions.md); ARGS='3.12+1.42' for one
	$(BIN)/python -m experiments.matrix $(ARGS)

dist: $(STAMP) ## build wheel and sdist, check them, and run a coded app with the wheel in an empty environment
	$(BIN)/python -m experiments.dist $(ARGS)

clean: ## remove caches, out/, dist/ and Flower's state; .venv stays
	rm -rf out dist .flwr-home .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info *.fab
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

venv: $(STAMP) ## create .venv and install everything

# hatchling is installed from the pins, and the project without build isolation, so that the pins hold for the build too.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No python3 found: install Python 3.11 or newer, or say PYTHON=/path/to/python." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; Python 3.11 or newer is needed: say PYTHON=/path/to/python." % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Creating .venv with $(PYTHON)"; "$(PYTHON)" -m venv --clear .venv; }
	@echo "Installing into .venv: once, some minutes, about 2 GB on disk (several GB more with CUDA, see the Makefile's head)"
	$(PIP) torch==2.13.0 hatchling
	$(PIP) --no-build-isolation -e '.[app,dev]'
	@touch $@
