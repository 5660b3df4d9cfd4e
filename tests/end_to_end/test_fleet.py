"""Of six SuperNodes no round waits for one that needs 30 s; of four, killed at random, each decodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import (
    Run,
    distance,
    plain_fedavg,
    run_straggling,
    saved_arrays,
    with_the_library_on_its_path,
)

pytestmark = pytest.mark.slow

Events = Callable[[], list[dict[str, Any]]]

NODES = 6
# The groups of fractional_repetition(6, 1) are (0, 3), (1, 4) and (2, 5).
SLEEPER, SECONDS = 1, 30.0
BLOCKS, ROUNDS = 4, 5
KILL_NODES, KILL_ROUNDS = 4, 20


def fleet(nodes: int, folder: Path) -> Engine:
    return with_the_library_on_its_path(Engine(nodes, deployed=True, folder=folder))


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Ten rounds of plain FedAvg with nobody late and ten coded ones with the sleeper, in blocks of five by turns."""
    folder = tmp_path_factory.mktemp("turns") / "run"
    config = {
        "num-server-rounds": ROUNDS,
        "nodes": NODES,
        "blocks": BLOCKS,
        "sleeper": SLEEPER,
        "sleep-seconds": SECONDS,
    }
    with fleet(NODES, folder.parent / "engine") as engine:
        return run_straggling(engine, folder, config, while_waiting=lambda events: None, timeout=500), folder


def seconds_of(run: Run, block: int) -> list[float]:
    """How long each round of a block took."""
    over = {e["round"]: e["time"] for e in run.events if e["what"] == "over" and e["block"] == block}
    return [over[number] - over[number - 1] for number in range(1, ROUNDS + 1)]


def test_no_round_waits_for_a_node_that_needs_thirty_seconds(turns: tuple[Run, Path]) -> None:
    run, _ = turns
    assert run.outcome.completed, run.outcome.log
    plain = [s for block in range(0, BLOCKS, 2) for s in seconds_of(run, block)]
    coded = [s for block in range(1, BLOCKS, 2) for s in seconds_of(run, block)]
    print(f"\nplain, nobody late: {np.round(plain, 1)}; coded, one sleeper: {np.round(coded, 1)} s")
    assert len(plain) == len(coded) == 10
    ratio = np.median(coded) / np.median(plain)
    print(f"ratio of the medians: {ratio:.2f}")
    assert ratio <= 1.1
    assert max(coded) < SECONDS
    asleep = [e for e in run.events if e["what"] == "asleep"]
    assert {e["block"] for e in asleep} == {1, 3} and {e["worker"] for e in asleep} == {SLEEPER}


def test_a_round_ends_within_a_second_of_the_pull_that_decided_it(turns: tuple[Run, Path]) -> None:
    run, _ = turns
    for block in range(1, BLOCKS, 2):
        for end in (e["time"] for e in run.events if e["what"] == "over" and e["block"] == block and e["round"]):
            pulled = [e["time"] for e in run.events if e["what"] == "pulled" and e["block"] == block]
            assert min(end - moment for moment in pulled if moment <= end) < 1.0


def test_the_models_are_equal(turns: tuple[Run, Path]) -> None:
    run, folder = turns
    expected = plain_fedavg(ROUNDS, NODES)
    for block in range(BLOCKS):
        assert distance(saved_arrays(folder / f"block-{block}.npz"), expected) < 1e-6
    assert all(SLEEPER not in row["train"]["used"] for row in run.rows)


class Killer:
    """Kills a node by SIGKILL and starts it again; it is down until the SuperLink lists its new incarnation.

    The next is killed at a random moment within about a round from then.
    """

    def __init__(self, engine: Engine, rng: np.random.Generator) -> None:
        self._engine, self._rng = engine, rng
        self._down = False
        self._next = 0.0
        #: (when it was killed, worker, when it was listed again)
        self.kills: list[list[float]] = []

    def __call__(self, events: Events) -> None:
        ended = [event["time"] for event in events() if event["what"] == "went on"]
        if len(ended) < 2 or len(ended) > KILL_ROUNDS:
            return
        if self._down:
            node = self._engine.node_id(int(self.kills[-1][1]))
            if node is not None and node in self._online():
                self._down = False
                self.kills[-1].append(time.time())
                a_round = (ended[-1] - ended[0]) / (len(ended) - 1)
                self._next = time.monotonic() + float(self._rng.uniform(0, 1.2)) * a_round
        elif time.monotonic() >= self._next:
            worker = int(self._rng.integers(KILL_NODES))
            self._engine.kill_node(worker)
            self.kills.append([time.time(), worker])
            self._engine.start_node(worker)
            self._down = True

    def _online(self) -> set[int]:
        return {node["id"] for node in self._engine.listed_nodes() if node["status"] == "online"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Killer]:
    folder = tmp_path_factory.mktemp("killed") / "run"
    config = {"num-server-rounds": KILL_ROUNDS, "nodes": KILL_NODES, "fraction-evaluate": 0.0}
    with fleet(KILL_NODES, folder.parent / "engine") as engine:
        killer = Killer(engine, np.random.default_rng(4))
        return run_straggling(engine, folder, config, while_waiting=killer, timeout=500), killer


def test_every_round_decodes_while_nodes_are_killed_at_random(killed: tuple[Run, Killer]) -> None:
    run, killer = killed
    assert run.outcome.completed, run.outcome.log
    print(f"\n{len(killer.kills)} kills in {run.events[-1]['time'] - run.events[0]['time']:.0f} s")
    assert len(killer.kills) >= 5 and len({int(kill[1]) for kill in killer.kills}) >= 3
    assert [row["round"] for row in run.rows] == list(range(1, KILL_ROUNDS + 1))
    assert [row["train"]["outcome"] for row in run.rows] == ["exact"] * KILL_ROUNDS
    assert distance(run.final, plain_fedavg(KILL_ROUNDS, KILL_NODES)) < 1e-6


def test_no_reply_is_used_twice_or_in_another_round(killed: tuple[Run, Killer]) -> None:
    run, _ = killed
    for row in run.rows:
        entry = row["train"]
        assert len(entry["used"]) == len(set(entry["used"])) == KILL_NODES // 2
        assert len(entry["answered"]) == len(set(entry["answered"]))
        assert all(one["from"] != f"train {row['round']}" for one in entry["late"])
        for one in entry["rejected"]:
            assert one["reason"].startswith(("error ", "duplicate"))
