"""TLS and SuperNodes with keys: a node is killed, another stopped and started again, and the model is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import Run, all_nodes, distance, on_engine, plain_fedavg, run_straggling

pytestmark = [pytest.mark.slow, on_engine("secure fleet")]

# The groups of fractional_repetition(4, 1) are (0, 2) and (1, 3).
KILLED, STOPPED = 2, 1
ROUNDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secure")


@pytest.fixture(scope="module")
def run(engine: Engine, folder: Path) -> Run:
    """After round 1 one node is killed, and another leaves and returns with its key; then its partner leaves."""
    all_nodes(engine)
    done: list[str] = []

    def look(events: Callable[[], list[dict[str, Any]]]) -> None:
        if not done and any(event["what"] == "ended" for event in events()):
            engine.kill_node(KILLED)
            engine.restart_node(STOPPED)
            engine.stop_node(3)  # from now on worker 1 is the only holder of shards 1 and 3
            done.append("all of it")
            (folder / "run" / "go-1").touch()

    config = {"num-server-rounds": ROUNDS, "fraction-evaluate": 0.0, "pauses": "1"}
    return run_straggling(engine, folder / "run", config, while_waiting=look)


def test_every_round_is_the_update_of_all_shards(run: Run) -> None:
    assert run.outcome.completed, run.outcome.log
    assert [row["train"]["outcome"] for row in run.rows] == ["exact"] * ROUNDS
    assert distance(run.final, plain_fedavg(ROUNDS)) < 1e-6


def test_a_node_that_returned_with_its_key_is_used_and_one_that_was_killed_is_not(run: Run) -> None:
    for row in run.rows[1:]:
        assert {0, STOPPED} == set(row["train"]["used"])


def test_nodes_are_listed_under_the_ids_of_their_keys(run: Run, engine: Engine) -> None:
    listed = {node["number"]: (node["id"], node["status"]) for node in engine.listed_nodes()}
    assert engine.node_ids.items() <= {number: node_id for number, (node_id, _) in listed.items()}.items()
    assert listed[STOPPED][1] == "online"
    assert listed[3][1] == "offline"
