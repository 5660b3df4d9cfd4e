"""Keys through the server with four SuperNodes: one comes later and begins a new epoch, and another is killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.engine import Engine
from fl_gradcode import Ledger, fractional_repetition
from tests.end_to_end.conftest import on_engine, prepared
from tests.enrolment.fleet import enrolled, manifest_of

pytestmark = pytest.mark.slow

#: For both tests: what the app trains with.
ARRAYS: Any = [("w", "float64", (5,))]
APP = Path(__file__).resolve().parent / "apps" / "enrolled"
CODE = fractional_repetition(4, 1)  # classes (0, 2) and (1, 3): the two that drop out have a partner each
LATE, KILLED, ROUNDS = 0, 3, 5


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("enrolled")
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    enrolled(folder / "nodes", CODE, min_classes=2, largest_weight=4.0, arrays=ARRAYS, metrics=[])

    def node_config(number: int) -> str:
        own, listed = folder / "nodes" / f"node-{number}", folder / "nodes" / "allow-list"
        return f'secagg-dir="{own}" secagg-allow-list="{listed}" secagg-min-classes=2'

    ledger, state = folder / "ledger.jsonl", {"joined": False, "killed": False}
    engine = prepared(Engine(CODE.n, deployed=True, folder=folder / "engine", node_config=node_config))
    with engine:
        engine.wait_for_nodes(CODE.n)
        engine.kill_node(LATE)

        def join_and_kill() -> None:
            rows = Ledger.read(ledger) if ledger.exists() else []
            if len(rows) >= 2 and not state["joined"]:
                engine.start_node(LATE)
                state["joined"] = True
            if len(rows) >= 3 and not state["killed"]:
                engine.kill_node(KILLED)
                state["killed"] = True

        config = {"folder": str(folder), "rounds": ROUNDS}
        outcome = engine.run(folder / "app", config, timeout=400.0, while_waiting=join_and_kill)
    assert outcome.completed, outcome.log
    return folder, json.loads((folder / "told.json").read_text())


def assert_mean(model: list[float], rows: list[dict[str, Any]]) -> None:
    updates = [np.random.default_rng(shard).standard_normal(5) for shard in range(CODE.k)]
    plain = len(rows) * np.average(updates, axis=0, weights=np.arange(1, CODE.k + 1))
    assert np.abs(np.array(model) - plain).max() <= sum(row["train"]["quantisation-error"] for row in rows)


def test_every_round_is_exact_before_and_after_the_late_worker(told: tuple[Path, dict[str, Any]]) -> None:
    rows = told[1]["rows"]
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * ROUNDS
    assert_mean(told[1]["model"], rows)


def test_the_rows_have_the_epochs_and_nothing_is_simulated(told: tuple[Path, dict[str, Any]]) -> None:
    folder, found = told
    secure = [row["train"]["secure"] for row in found["rows"]]
    assert [one["epoch"] for one in secure] == [1, 1, 2, 2, 2]
    assert {one["setup"] for one in secure} == {"allow-list"} and not any(one["simulated"] for one in secure)
    assert manifest_of(folder / "nodes", LATE, found["run"]).digest.hex() == secure[-1]["manifest"]


@on_engine("simulation")
def test_in_the_simulation_engine_too(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(APP, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    enrolled(tmp_path / "nodes", CODE, min_classes=2, largest_weight=4.0, arrays=ARRAYS, metrics=[])
    config = {"folder": str(tmp_path), "secagg-dir": str(tmp_path / "nodes"), "rounds": 2, "patience": 0.0}
    outcome = engine.run(tmp_path / "app", config, timeout=300.0, nodes=CODE.n, cpus=2)
    assert outcome.completed, outcome.log
    told = json.loads((tmp_path / "told.json").read_text())
    assert_mean(told["model"], told["rows"])
    assert all(row["train"]["secure"]["simulated"] for row in told["rows"])
