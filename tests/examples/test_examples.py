"""The examples: two lines turn the plain app into the coded one, and a client that never answers changes nothing."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from difflib import unified_diff
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import Strategy

from fl_gradcode import GradientCoding, VirtualGrid, fractional_repetition
from fl_gradcode.appcheck import check_app
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.privacy import write_keys
from fl_gradcode.testing import InProcessGrid
from tests.conftest import relative

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
EXACT = [name for name in NAMES if name != "private"]
#: Examples that shuffle with torch's global generator. The mod seeds it, so plain Flower draws other numbers.
SHUFFLING = ("lora", "personal-heads")
QUICK: dict[str, dict[str, Any]] = {"lora": {"local-epochs": 1}}
NODES = 6
ROUNDS = 2
#: What may differ, apart from imports: the line of the ClientApp, and that of the strategy.
TWO_LINES = ("app = ClientApp(", "strategy = ")


def package(name: str) -> str:
    return name.replace("-", "_")


def settings(name: str, kind: str) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((EXAMPLES / name / kind / "pyproject.toml").read_text())
    return {**project["tool"]["flwr"]["app"]["config"]}


@cache
def load(name: str, kind: str) -> tuple[ModuleType, ModuleType]:
    """The modules of the ServerApp and of the ClientApp, imported under a name that no other example has."""
    folder = EXAMPLES / name / kind / package(name)
    alias = f"example_{package(name)}_{kind}"
    spec = importlib.util.spec_from_file_location(
        alias, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return importlib.import_module(f"{alias}.server_app"), importlib.import_module(f"{alias}.client_app")


def run(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch, *, silent: int | None = None, **config: Any
) -> tuple[Any, Any]:
    """The result of an app on six nodes, one of which may never answer; and its strategy."""
    server, client = load(name, kind)
    run_config = {**settings(name, kind), "num-server-rounds": ROUNDS, **QUICK.get(name, {}), **config}
    kept: list[tuple[Any, Any]] = []
    starts = {kind: kind.start for kind in (Strategy, GradientCoding)}

    def kept_of(start: Any) -> Any:
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            kept.append((start(self, *args, **kwargs), self))
            return kept[-1][0]

        return noted

    # An app's main() returns nothing: the result is taken where Flower's loop returns it.
    for owner, start in starts.items():
        monkeypatch.setattr(owner, "start", kept_of(start))
    with InProcessGrid(client.app, NODES, run_config=run_config) as nodes:
        latency = Latency(compute=scaled(lognormal(), {} if silent is None else {silent: float("inf")}))
        grid = nodes if silent is None else VirtualGrid(nodes, latency)
        server.main(grid, Context(1, 0, {}, RecordDict(), run_config))
    for owner, start in starts.items():
        monkeypatch.setattr(owner, "start", start)
    return kept[-1]


def changed_lines(name: str) -> Iterator[tuple[str, str, str]]:
    """(file, "+" or "-", line) for each line that differs between plain and coded, but for free lines."""
    plain, coded = EXAMPLES / name / "plain", EXAMPLES / name / "coded"
    files = {
        path.relative_to(root).as_posix()
        for root in (plain, coded)
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for file in sorted(files):
        before, after = ((root / file).read_text().splitlines() for root in (plain, coded))
        for line in unified_diff(before, after, n=0, lineterm=""):
            if line[:1] in "+-" and line[:3] not in ("+++", "---") and line[1:].strip():
                yield file, line[0], line[1:].strip()


@pytest.mark.parametrize("name", EXACT)
def test_plain_and_coded_differ_by_two_lines_and_imports(name: str) -> None:
    changed = list(changed_lines(name))
    assert {(Path(file).name, sign) for file, sign, _ in changed} == {
        ("client_app.py", "+"), ("client_app.py", "-"), ("server_app.py", "+"), ("server_app.py", "-"),
    }  # fmt: skip
    lines = [(sign, line) for _, sign, line in changed if not line.startswith("from fl_gradcode import ")]
    assert len(lines) == 4
    for begins in TWO_LINES:
        assert sorted(sign for sign, line in lines if line.startswith(begins)) == ["+", "-"]


def test_the_private_example_changes_the_training_loop_and_nothing_else() -> None:
    """Private training takes batches, optimizer and loss from the library: more than two lines, all in two files."""
    files = {Path(file).name for file, _, _ in changed_lines("private")}
    assert files == {"client_app.py", "server_app.py"}
    assert sum(sign == "+" for _, sign, _ in changed_lines("private")) < 25


@pytest.mark.parametrize("name", EXACT)
def test_a_client_that_never_answers_does_not_change_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coded, strategy = run(name, "coded", monkeypatch, silent=1)
    everybody, _ = run(name, "coded" if name in SHUFFLING else "plain", monkeypatch)
    assert relative(coded.arrays, everybody.arrays) < 1e-5
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * ROUNDS
    assert all(1 not in row["train"]["used"] for row in strategy.ledger.rows)


def test_plain_and_coded_learn_alike_where_they_draw_other_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, coded = (run("personal-heads", kind, monkeypatch)[0] for kind in ("plain", "coded"))
    losses = [result.evaluate_metrics_clientapp[ROUNDS]["loss"] for result in (plain, coded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.3)


def test_the_private_example_spends_what_its_noise_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = fractional_repetition(n=6, s=1)
    write_keys(tmp_path / "keys", [code.shards_of(worker) for worker in range(6)])
    result, strategy = run("private", "coded", monkeypatch, silent=1, **{"privacy-dir": str(tmp_path / "keys")})
    row = strategy.ledger.rows[-1]["train"]
    assert row["outcome"] == "exact" and 0.5 < row["privacy"]["epsilon"] < 5
    assert result.evaluate_metrics_serverapp[ROUNDS]["loss"] < result.evaluate_metrics_serverapp[0]["loss"]


def test_links_of_the_pages_beside_the_docs_lead_somewhere() -> None:
    root = EXAMPLES.parent
    pages = [root / "CONTRIBUTING.md", root / "SECURITY.md", *EXAMPLES.rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(root)} links to {target}"


def test_the_examples_pass_the_check() -> None:
    """`fl-gradcode check` on the plain app; the others differ in model and data only."""
    report = check_app(EXAMPLES / "quickstart-sklearn" / "plain", partitions=NODES)
    assert report.passed, [one for one in report.findings if one.verdict != "ok"]
