"""Coded products in the simulation engine, where a node sleeps, and against real SuperNodes, where one raises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.engine import Engine, Outcome
from tests.end_to_end.conftest import UNTIL_WOKEN, all_nodes, on_engine

pytestmark = pytest.mark.slow

TEMPLATE = Path(__file__).resolve().parent / "apps" / "products"
NODES, COUNT = 4, 2


def run(engine: Engine, folder: Path, **trouble: Any) -> tuple[Outcome, dict[str, np.ndarray], dict[str, Any]]:
    app = folder / "app"
    shutil.copytree(TEMPLATE, app, ignore=shutil.ignore_patterns("__pycache__"))
    try:
        config = {"folder": str(folder), "nodes": NODES, "count": COUNT, **trouble}
        outcome = engine.run(app, config, timeout=500.0, nodes=NODES, cpus=NODES + 2)
    finally:
        (folder / "wake-up").touch()
    assert outcome.completed, outcome.log
    with np.load(folder / "products.npz") as saved:
        return outcome, dict(saved), json.loads((folder / "reports.json").read_text())


def check(products: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    """NumPy is the oracle: the server's draws, again."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((50, 40))
    for number in range(COUNT):
        assert np.abs(products[f"product-{number}"] - A @ rng.standard_normal((40, 30))).max() < 1e-11
    assert np.abs(products["other"] - A.T @ A).max() < 1e-11
    assert told["seconds"] < UNTIL_WOKEN  # nobody waited for the sleeper
    # Each node was sent its part of A once; all but one have said so when the second product begins.
    downs = [report["bytes_down"] for report in told["reports"]]
    assert max(downs[1:]) <= downs[0] - (NODES - 1) * (A.nbytes // (NODES - 1))
    for report in told["reports"]:
        assert len(set(report["used"])) == NODES - 1
        assert len(report["stragglers"]) + len(report["rejected"]) == 1


@on_engine(stress=("simulation",))
def test_in_the_simulation_engine_nobody_waits_for_the_sleeper(engine: Engine, tmp_path: Path) -> None:
    _, products, told = run(engine, tmp_path, sleeper=1, **{"sleep-seconds": UNTIL_WOKEN})
    check(products, told)
    stragglers = [report["stragglers"] for report in told["reports"]]
    assert stragglers == [stragglers[0]] * COUNT


@on_engine("fleet")
def test_against_supernodes_an_error_is_a_straggler(engine: Engine, tmp_path: Path) -> None:
    all_nodes(engine)
    _, products, told = run(engine, tmp_path, raiser=2)
    check(products, told)
    reasons = [reason for report in told["reports"] for _, reason in report["rejected"]]
    assert all("error 2: " in reason and "out of disk" in reason for reason in reasons)
