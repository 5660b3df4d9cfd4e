"""Four SuperNodes, one of them behind a slow link: its reply of 2 MB would take minutes, and nobody waits for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from experiments.engine import Engine, Outcome
from fl_gradcode import Ledger
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat
from tests.end_to_end.apps.links.links import client
from tests.end_to_end.conftest import all_nodes, on_engine
from tests.end_to_end.throttle import SlowLink

#: In the long suite, for its minute. What it shows in an engine, tests of the waiting loop show in virtual time.
pytestmark = [pytest.mark.slow, on_engine(stress=("fleet",))]

APP = Path(__file__).resolve().parent / "apps" / "links"
# The groups of fractional_repetition(4, 1) are (0, 2) and (1, 3).
SLOW, ROUNDS, PAUSE = 1, 3, 2
UPLOAD = 300.0  # seconds, if the link stayed as it is
RATE = 4 * client.PARAMETERS / UPLOAD  # bytes a second


class Run:
    """What the run left behind."""

    def __init__(self, outcome: Outcome, folder: Path, sent_up: int) -> None:
        self.outcome, self.sent_up = outcome, sent_up
        self.rows: list[dict[str, Any]] = Ledger.read(folder / "ledger.jsonl")
        self.events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        with np.load(folder / "final.npz") as saved:
            self.final = saved["arr_0"].astype(np.float64)
        self.worker = {e["node"]: e["worker"] for e in self.events if e["what"] == "began"}

    def pulled(self, server_round: int) -> dict[int, float]:
        """Worker -> when the pull that brought its reply to this round returned."""
        pulls = [e for e in self.events if e["what"] == "pulled" and e["round"] == server_round]
        return {self.worker[e["node"]]: e["time"] for e in pulls}

    @property
    def ended(self) -> dict[int, float]:
        """Round -> when its model was there."""
        return {e["round"]: e["time"] for e in self.events if e["what"] == "ended"}


@pytest.fixture(scope="module")
def run(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("links")
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    all_nodes(engine)
    with SlowLink(engine.address, up=RATE) as link:
        engine.stop_node(SLOW)
        engine.start_node(SLOW, superlink=link.address)
        all_nodes(engine)
        events = folder / "events.jsonl"

        def speed_up_in_the_pause() -> None:
            noted = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
            if any((event["what"], event.get("round")) == ("ended", PAUSE) for event in noted):
                link.become(up=100 * RATE)

        config = {"folder": str(folder), "num-server-rounds": ROUNDS, "slow": SLOW, "pause": PAUSE}
        outcome = engine.run(folder / "app", config, timeout=500.0, while_waiting=speed_up_in_the_pause)
        passed, _ = link.passed
        engine.stop_node(SLOW)
    assert outcome.completed, outcome.log
    return Run(outcome, folder, passed)


def test_the_slow_reply_was_on_its_way_until_the_link_became_faster(run: Run) -> None:
    assert run.sent_up > 0.9 * 4 * client.PARAMETERS  # Flower compresses, and the exponents of noise are alike
    (done,) = [e["time"] for e in run.events if e["what"] == "done" and e["worker"] == SLOW][:1]
    assert done < run.ended[PAUSE] < run.pulled(1)[SLOW]


def test_rounds_decode_without_the_slow_link(run: Run) -> None:
    assert [row["round"] for row in run.rows] == list(range(1, ROUNDS + 1))
    for row in run.rows:
        assert row["train"]["outcome"] == "exact" and row["train"]["ended"] == "decoded"
    assert all(SLOW not in row["train"]["used"] for row in run.rows[:PAUSE])
    # All by the clock of the server: a round and a half at least pass while one reply is on its way.
    assert run.ended[1] < run.ended[2] < run.pulled(1)[SLOW]


def test_a_round_ends_soon_after_the_reply_that_decides_it(run: Run) -> None:
    for row in run.rows:
        # A second on an idle machine, where a round takes five; no more of a round where all takes longer.
        soon = max(1.0, row["train"]["seconds"]["waiting"] / 5)
        pulled = run.pulled(row["round"])
        deciding = max(pulled[worker] for worker in row["train"]["used"])
        assert 0 <= run.ended[row["round"]] - deciding < soon


def test_the_slow_reply_is_late_once_and_enters_no_other_round(run: Run) -> None:
    late = [(row["round"], one) for row in run.rows for one in row["train"]["late"] if one["worker"] == SLOW]
    ((server_round, one),) = late
    assert server_round > 1 and one["from"] == "train 1"
    pushed = [e for e in run.events if e["what"] == "pushed" and run.worker[e["node"]] == SLOW]
    assert pushed[0]["round"] == 1
    assert all(e["time"] > run.pulled(1)[SLOW] for e in pushed[1:])  # one message at a time


def test_the_model_is_that_of_fedavg_with_equal_links(run: Run) -> None:
    with InProcessGrid(client.app, 4, run_config={"folder": "", "slow": -1}) as grid:
        result = FedAvg(fraction_evaluate=0.0).start(grid, client.initial_arrays(), num_rounds=ROUNDS)
    expected = flat(result.arrays)
    assert float(np.linalg.norm(run.final - expected) / np.linalg.norm(expected)) < 1e-6
