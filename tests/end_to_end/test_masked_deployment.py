"""Three SuperNodes under masks: the server is killed in a round, a node answers from its cache, another one is gone."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.engine import Engine
from fl_gradcode import Ledger
from fl_gradcode.cli.app import app as command_line
from fl_gradcode.codes import reed_solomon
from fl_gradcode.secagg import AnsweredRequests
from tests.end_to_end.conftest import prepared

pytestmark = pytest.mark.slow
APP = Path(__file__).resolve().parent / "apps" / "masked"
NODES, ROUNDS = 3, 4
CODE = reed_solomon(NODES, 1)  # any two of three replies decode
CACHED, KILLED = 0, 2
_PATIENCE = 200.0  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masked")


def answered(folder: Path, worker: int) -> list[tuple[str, int]]:
    """Kind and round of all requests that a node has answered."""
    return [(row.kind, row.round) for row in AnsweredRequests(folder / f"keys/node-{worker}/answered").rows()]


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    """In round 2 only one node answers before the server is killed, and that node with it; the node returns.

    Another node never answers round 2, and is killed after it.
    """
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    layout = {"arrays": [["w", "float64", [5]]], "metrics": {"keys-seen": -1}, "evaluation": {"shard": -1}}
    (folder / "layout.json").write_text(json.dumps(layout))
    make = f"secure make {folder / 'keys'} --layout {folder / 'layout.json'} -n {NODES} -s 1 --code reed-solomon"
    make += " --largest-weight 3 --bound 4 --colluders 0 --pin-machine"
    found = CliRunner().invoke(command_line, make.split())
    assert found.exit_code == 0, found.output
    for worker in range(NODES):
        (folder / f"notes-{worker}").mkdir()
        if worker != CACHED:
            (folder / f"notes-{worker}" / "wait-2").touch()

    def node_config(number: int) -> str:
        keys, notes = folder / "keys" / f"node-{number}", folder / f"notes-{number}"
        return f'secagg-dir="{keys}" secagg-app-config="notes-dir" notes-dir="{notes}"'

    config = {"folder": str(folder), "nodes": NODES, "rounds": ROUNDS, "code": "reed-solomon"}
    engine = prepared(Engine(NODES, deployed=True, folder=folder / "engine", node_config=node_config))
    killed: list[int] = []
    with engine:
        engine.submit(folder / "app", config)
        deadline = time.monotonic() + _PATIENCE
        while ("train", 2) not in answered(folder, CACHED):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        engine.kill_serverapp()
        engine.kill_node(CACHED)
        # The third node still waits, so that round 2 needs both others.
        (folder / f"notes-{3 - CACHED - KILLED}" / "wait-2").unlink()
        engine.start_node(CACHED)

        def look() -> None:
            if not killed and len(Ledger.read(folder / "ledger.jsonl")) >= 2:
                killed.append(KILLED)
                engine.kill_node(KILLED)

        outcome = engine.run(folder / "app", config, timeout=400.0, while_waiting=look)
        assert outcome.completed, outcome.log
    assert killed
    return json.loads((folder / "told.json").read_text())  # type: ignore[no-any-return]


def test_the_model_is_that_of_plain_flower_up_to_rounding(told: dict[str, Any]) -> None:
    updates = [np.random.default_rng(shard).standard_normal(5) for shard in range(NODES)]
    plain = ROUNDS * np.average(updates, axis=0, weights=np.arange(1, NODES + 1))
    bound = sum(row["train"]["quantisation-error"] for row in told["rows"])
    assert 0 < np.abs(np.array(told["model"]) - plain).max() <= bound < 1e-5


def test_every_round_and_every_evaluation_is_the_sum_over_all_shards(told: dict[str, Any]) -> None:
    assert [row["round"] for row in told["rows"]] == [*range(1, ROUNDS + 1)]
    for row in told["rows"]:
        for kind in ("train", "evaluate"):
            assert row[kind]["outcome"] == "exact" and not row[kind]["secure"]["simulated"]
    assert all(one["shard"] == pytest.approx(1.0, abs=1e-8) for one in told["evaluated"])


def test_a_killed_node_answers_from_its_cache_and_one_that_stays_away_is_not_needed(
    told: dict[str, Any], folder: Path
) -> None:
    assert told["rows"][1]["resumed"] and CACHED in told["rows"][1]["train"]["used"]
    trained = Counter(tuple(path.name.split("-")[:2]) for path in (folder / f"notes-{CACHED}").iterdir())
    assert [trained["2", str(shard)] for shard in CODE.shards_of(CACHED)] == [1, 1]
    assert answered(folder, CACHED).count(("train", 2)) == 1
    assert KILLED not in told["rows"][-1]["train"]["used"]
