"""Of four SuperNodes one at a time is killed at random and started again, and each round decodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import (
    Run,
    distance,
    plain_fedavg,
    run_straggling,
    with_the_library_on_its_path,
)

pytestmark = pytest.mark.slow

Events = Callable[[], list[dict[str, Any]]]

# The groups of fractional_repetition(4, 1) are (0, 2) and (1, 3).
NODES, ROUNDS = 4, 12


class Killer:
    """Kills a node by SIGKILL and starts it again; it is down until the SuperLink has taken its new incarnation.

    The next is killed at a random moment within about a round from then: another one, until each had its turn.
    """

    def __init__(self, engine: Engine, rng: np.random.Generator) -> None:
        self._engine, self._rng = engine, rng
        self._order = [int(worker) for _ in range(ROUNDS) for worker in rng.permutation(NODES)]
        self._down = False
        self._next = 0.0
        #: Workers, in the order in which they were killed.
        self.kills: list[int] = []

    def __call__(self, events: Events) -> None:
        ended = [event["time"] for event in events() if event["what"] == "went on"]
        if len(ended) < 2 or len(ended) > ROUNDS:
            return
        if self._down:
            if self._engine.node_id(self.kills[-1]) is not None:
                self._down = False
                a_round = (ended[-1] - ended[0]) / (len(ended) - 1)
                self._next = time.monotonic() + float(self._rng.uniform(0, 1.2)) * a_round
        elif time.monotonic() >= self._next:
            worker = self._order[len(self.kills)]
            self._engine.kill_node(worker)
            self.kills.append(worker)
            self._engine.start_node(worker)
            self._down = True


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Killer]:
    folder = tmp_path_factory.mktemp("killed") / "run"
    config = {"num-server-rounds": ROUNDS, "nodes": NODES, "fraction-evaluate": 0.0}
    engine = Engine(NODES, deployed=True, folder=folder.parent / "engine")
    with with_the_library_on_its_path(engine):
        killer = Killer(engine, np.random.default_rng(4))
        return run_straggling(engine, folder, config, while_waiting=killer, timeout=500), killer


def test_every_round_decodes_while_nodes_are_killed_at_random(killed: tuple[Run, Killer]) -> None:
    run, killer = killed
    assert run.outcome.completed, run.outcome.log
    print(f"\n{len(killer.kills)} kills in {run.events[-1]['time'] - run.events[0]['time']:.0f} s")
    assert len(set(killer.kills)) >= 3
    assert [row["round"] for row in run.rows] == list(range(1, ROUNDS + 1))
    assert [row["train"]["outcome"] for row in run.rows] == ["exact"] * ROUNDS
    assert distance(run.final, plain_fedavg(ROUNDS, NODES)) < 1e-6


def test_no_reply_is_used_twice_or_in_another_round(killed: tuple[Run, Killer]) -> None:
    run, _ = killed
    for row in run.rows:
        entry = row["train"]
        assert len(entry["used"]) == len(set(entry["used"])) == NODES // 2
        assert len(entry["answered"]) == len(set(entry["answered"]))
        assert all(one["from"] != f"train {row['round']}" for one in entry["late"])
        for one in entry["rejected"]:
            assert one["reason"].startswith(("error ", "duplicate"))
