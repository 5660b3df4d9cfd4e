"""The core suite under several versions of Python and Flower: python -m experiments.matrix.

Each pair has a virtual environment of its own below out/matrix, which uv makes and fills. The last pair takes the
oldest version of each package that pyproject.toml allows.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fl_gradcode._versions import TESTED_FLOWER

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
#: Codes, protocol, client, grids, rounds in process, command line, and one run in Flower's simulation engine.
CORE = (
    "tests/codes/test_codes.py",
    "tests/codes/test_decoder.py",
    "tests/codes/test_general_codes.py",
    "tests/codes/test_linalg.py",
    "tests/codes/test_reals.py",
    "tests/codes/test_rounding.py",
    "tests/protocol",
    "tests/client/test_held_shards.py",
    "tests/grid",
    "tests/roster",
    "tests/copies/test_copies.py",
    "tests/strategy/test_any_strategy.py",
    "tests/strategy/test_codes_in_rounds.py",
    "tests/strategy/test_shardwise.py",
    "tests/strategy/test_wrapped.py",
    "tests/cli/test_command_line.py",
    "tests/test_flower_internals.py",
    "tests/test_versions.py",
    "tests/end_to_end/test_simulation.py",
)
#: With --torch: the mod with torch's generators, and private rounds.
WITH_TORCH = (
    "tests/client",
    "tests/privacy/test_opacus.py",
    "tests/privacy/test_private_rounds.py",
    "tests/privacy/test_dp_optimizer.py",
)
#: What the suite needs besides the library.
TOOLS = ("hypothesis>=6.140", "pytest>=8.3", "pytest-timeout>=2.3")


@dataclass(frozen=True)
class Pair:
    """A version of Python and one of Flower.

    Attributes:
        python: Such as "3.12".
        flower: Such as "1.42"; "lowest" for the oldest version of every package.
    """

    python: str
    flower: str

    def __str__(self) -> str:
        return f"{self.python}+{self.flower}"


@dataclass(frozen=True)
class Passed:
    """What a pair's suite said.

    Attributes:
        versions: Of Python, Flower and NumPy.
        told: The last line of pytest, or of the installation that failed.
        seconds: How long the suite took.
        ok: Whether all tests passed.
    """

    versions: str
    told: str
    seconds: float
    ok: bool


def interpreters() -> dict[str, Path]:
    """Minor version -> the newest interpreter found on the PATH and below pyenv's folder."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found: dict[str, Path] = {}
    for minor in PYTHONS:
        inside = sorted(pyenv.glob(f"{minor}.*/bin/python"), key=lambda path: _numbers(path.parts[-3]))
        on_path = shutil.which(f"python{minor}")
        for path in [*reversed(inside), *([Path(on_path)] if on_path else [])]:
            if _runs(path, minor):
                found[minor] = path
                break
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _runs(path: Path, minor: str) -> bool:
    asked = subprocess.run(
        [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=False
    )
    return asked.returncode == 0 and asked.stdout.strip() == minor


def pairs(pythons: Iterable[str]) -> list[Pair]:
    """Every pair for these versions of Python, and the oldest packages for the oldest of them."""
    known = [*pythons]
    oldest = [Pair(known[0], "lowest")] if known else []
    return [Pair(python, flower) for python in known for flower in TESTED_FLOWER] + oldest


def install(pair: Pair, interpreter: Path, folder: Path, *, torch: bool) -> Path:
    """Makes the environment of a pair; returns its interpreter.

    Raises:
        subprocess.CalledProcessError: Something cannot be installed.
    """
    uv = [sys.executable, "-m", "uv", "--no-progress"]
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([*uv, "venv", "--quiet", "--python", interpreter, folder / "venv"], check=True)
    extras = "[privacy]" if torch else ""
    lowest = pair.flower == "lowest"
    flower = "flwr[simulation]>=1.41" if lowest else f"flwr[simulation]=={pair.flower}.*"
    wanted = [f".{extras}", flower, *TOOLS]
    # Compiled here: Ray gives its processes a limited time to start, and would compile itself within it.
    how = ["--quiet", "--compile-bytecode", *(["--resolution", "lowest-direct"] if lowest else [])]
    command: list[str | Path] = [*uv, "pip", "install", *how, "--python", python, *wanted]
    subprocess.run(command, check=True, cwd=ROOT)
    return python


def run(pair: Pair, python: Path, folder: Path, tests: tuple[str, ...]) -> Passed:
    """Runs tests in the environment of a pair."""
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder / "flwr-home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_agent_register_timeout_ms": "180000",  # a first start on a busy machine takes longer than Ray's 15 s
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # the log shows how far it is
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    asked = (
        "import platform; from importlib.metadata import version as v; "
        "print(f\"Python {platform.python_version()}, flwr {v('flwr')}, numpy {v('numpy')}, scipy {v('scipy')}\")"
    )
    versions = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    started = time.perf_counter()
    log = folder / "pytest.log"
    with log.open("w") as file:
        code = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    told = lines[-1] if lines and code in (0, 1) else f"pytest ended with exit code {code}"
    return Passed(versions, told, time.perf_counter() - started, code == 0)


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite in each pair; returns 0 if all passed."""
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("pairs", nargs="*", help="only these, such as 3.12+1.42 or 3.11+lowest")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "matrix")
    parser.add_argument("--torch", action="store_true", help="with PyTorch and Opacus, several GB for each Python")
    options = parser.parse_args(arguments)
    found = interpreters()
    for minor in PYTHONS:
        print(f"Python {minor}: {found.get(minor, 'not found, left out')}", flush=True)
    chosen = [pair for pair in pairs(found) if not options.pairs or str(pair) in options.pairs]
    if unknown := {*options.pairs} - {str(pair) for pair in chosen}:
        parser.error(f"{', '.join(sorted(unknown))}: no such pair here; there are {', '.join(map(str, pairs(found)))}")
    tests = CORE + (WITH_TORCH if options.torch else ())
    rows, failed = [], False
    for pair in chosen:
        folder = options.out / str(pair).replace("+", "-")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{pair}: installing", flush=True)
        try:
            python = install(pair, found[pair.python], folder, torch=options.torch)
        except subprocess.CalledProcessError:
            passed = Passed("", "cannot be installed, see above", 0.0, False)
        else:
            print(f"{pair}: testing, log in {folder / 'pytest.log'}", flush=True)
            passed = run(pair, python, folder, tests)
        failed |= not passed.ok
        print(f"{pair}: {passed.told}", flush=True)
        today = datetime.date.today().isoformat()
        rows.append(f"| {passed.versions} | {today} | {passed.told.strip('= ')} |")
    print("\n".join(["", "| versions | run on | core suite |", "|---|---|---|", *rows]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
