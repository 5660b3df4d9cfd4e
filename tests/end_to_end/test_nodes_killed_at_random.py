"""Of four SuperNodes one of each group at a time is killed at random and started again, and each round decodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import Run, distance, plain_fedavg, prepared, run_straggling

pytestmark = [pytest.mark.slow, pytest.mark.stress]

Events = Callable[[], list[dict[str, Any]]]

# The groups of fractional_repetition(4, 1): one node of each must answer.
GROUPS = ((0, 2), (1, 3))
NODES, ROUNDS = 4, 6


class Killer:
    """Kills a node of a group by SIGKILL and starts it again; it is down until the SuperLink has taken its new
    incarnation. The other node of the group is next, at a random moment within about a round from then.
    """

    def __init__(self, engine: Engine, group: tuple[int, int], rng: np.random.Generator) -> None:
        self._engine, self._group, self._rng = engine, group, rng
        self._down = False
        self._next = 0.0
        #: Workers, in the order in which they were killed.
        self.kills: list[int] = []

    def look(self, ended: list[float]) -> None:
        """Do what is due, when rounds have ended at these times."""
        if self._down:
            if self._engine.node_id(self.kills[-1]) is not None:
                self._down = False
                a_round = (ended[-1] - ended[0]) / (len(ended) - 1)
                self._next = time.monotonic() + float(self._rng.uniform(0, 1.2)) * a_round
        elif time.monotonic() >= self._next:
            worker = self._group[len(self.kills) % 2]
            self._engine.kill_node(worker)
            self.kills.append(worker)
            self._engine.start_node(worker)
            self._down = True


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[int]]:
    """The run, and the workers that were killed. The SuperLink counts them as online for a minute more."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    config = {"num-server-rounds": ROUNDS, "nodes": NODES, "fraction-evaluate": 0.0}
    engine = prepared(Engine(NODES, deployed=True, folder=folder.parent / "engine"))
    killers = [Killer(engine, group, np.random.default_rng(group)) for group in GROUPS]

    def look(events: Events) -> None:
        ended = [event["time"] for event in events() if event["what"] == "went on"]
        if 2 <= len(ended) <= ROUNDS:
            for killer in killers:
                killer.look(ended)

    with engine:
        run = run_straggling(engine, folder, config, while_waiting=look, timeout=500)
    return run, [worker for killer in killers for worker in killer.kills]


def test_every_round_decodes_while_nodes_are_killed_at_random(killed: tuple[Run, list[int]]) -> None:
    run, kills = killed
    assert run.outcome.completed, run.outcome.log
    print(f"\n{len(kills)} kills in {run.events[-1]['time'] - run.events[0]['time']:.0f} s")
    assert len(kills) >= 4 and len(set(kills)) >= 3
    assert [row["round"] for row in run.rows] == list(range(1, ROUNDS + 1))
    assert [row["train"]["outcome"] for row in run.rows] == ["exact"] * ROUNDS
    assert distance(run.final, plain_fedavg(ROUNDS, NODES)) < 1e-6


def test_no_reply_is_used_twice_or_in_another_round(killed: tuple[Run, list[int]]) -> None:
    run, _ = killed
    for row in run.rows:
        entry = row["train"]
        assert len(entry["used"]) == len(set(entry["used"])) == NODES // 2
        assert len(entry["answered"]) == len(set(entry["answered"]))
        assert all(one["from"] != f"train {row['round']}" for one in entry["late"])
        for one in entry["rejected"]:
            assert one["reason"].startswith(("error ", "duplicate"))
