"""The ServerApp is killed, the SuperLink is killed: `flwr run` again goes on, and no round is lost or run twice."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.engine import Engine
from fl_gradcode import Ledger
from tests.end_to_end.apps.straggling.straggling.client import read_notes
from tests.end_to_end.conftest import (
    copy_of_the_app,
    distance,
    plain_fedavg,
    prepared,
    saved_arrays,
)

pytestmark = pytest.mark.slow

# It is the server that dies here: nodes are few, so that rounds are short.
NODES = 2
_PATIENCE = 200.0  # seconds


class InterruptedRun:
    """A run that is killed, again and again, and submitted again."""

    def __init__(self, engine: Engine, folder: Path, rounds: int) -> None:
        self.engine, self.folder, self.all_rounds = engine, folder, rounds
        self.app = copy_of_the_app(folder)
        self.ledger = folder / "ledger.jsonl"
        self.config: dict[str, Any] = {
            "num-server-rounds": rounds,
            "nodes": NODES,
            "fraction-evaluate": 0.0,
            "checkpoint": str(folder / "run.ckpt"),
            "folder": str(folder),
        }
        self.run_id = ""

    def submit(self) -> None:
        """What an operator types, each time the same."""
        self.run_id = self.engine.submit(self.app, self.config)

    def rounds(self) -> list[int]:
        """As the ledger has them."""
        return [row["round"] for row in Ledger.read(self.ledger)] if self.ledger.exists() else []

    def wait_into_a_round(self) -> None:
        """Until one more has ended than now; then a random part of what it took."""
        before, deadline = len(self.rounds()), time.monotonic() + _PATIENCE
        while len(self.rounds()) == before:
            assert time.monotonic() < deadline, self.engine.flwr.log(self.run_id)
            time.sleep(0.05)
        took = sum(Ledger.read(self.ledger)[-1]["train"]["seconds"].values())
        time.sleep(float(np.random.default_rng().uniform(0, took)))

    def check(self) -> None:
        """Each round once, each exact, and the model that nobody disturbed."""
        outcome = self.engine.wait(self.run_id, _PATIENCE)
        assert outcome.completed, outcome.log
        rows = Ledger.read(self.ledger)
        assert [row["round"] for row in rows] == [*range(1, self.all_rounds + 1)]
        assert len({row["run"] for row in rows}) == 1
        assert all(row["train"]["outcome"] == "exact" for row in rows)
        assert distance(saved_arrays(self.folder / "final.npz"), plain_fedavg(self.all_rounds, NODES)) < 1e-6

    def run_again(self) -> list[int]:
        """Rounds whose function at the end of a round was called more than once: they were under way at a kill."""
        ended = Counter(e["round"] for e in read_notes(self.folder) if e["what"] == "ended")
        return [number for number, times in ended.items() if times > 1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("recovery")
    with prepared(Engine(NODES, deployed=True, database=True, folder=folder)) as engine:
        yield engine


def test_a_serverapp_that_is_killed_at_random_moments(engine: Engine, tmp_path: Path) -> None:
    run = InterruptedRun(engine, tmp_path / "run", rounds=5)
    for _ in range(2):
        run.submit()
        run.wait_into_a_round()
        engine.kill_serverapp()
        assert len(run.rounds()) < run.all_rounds
    run.submit()
    run.check()
    assert len(run.run_again()) <= 2


def test_a_superlink_that_is_killed_and_keeps_its_database(engine: Engine, tmp_path: Path) -> None:
    run = InterruptedRun(engine, tmp_path / "run", rounds=3)
    run.submit()
    run.wait_into_a_round()
    engine.kill_superlink()
    assert len(run.rounds()) < run.all_rounds
    engine.start_superlink()
    run.submit()
    run.check()
    assert len(run.run_again()) <= 1
