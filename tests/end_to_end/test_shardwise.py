"""One shard a message in the real engines: the partner of a sleeping node does its shard too, first copy wins."""

from __future__ import annotations

from collections import Counter

import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import UNTIL_WOKEN, Run, all_nodes, distance, on_engine, plain_fedavg, run_straggling

pytestmark = [pytest.mark.slow, on_engine("simulation", stress=("fleet",))]

# The groups of fractional_repetition(4, 1) are (0, 2) and (1, 3): worker 3 has to do shards 1 and 3.
SLEEPER, PARTNER, ROUNDS = 1, 3, 3


@pytest.fixture(scope="module")
def run(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Run:
    if engine.deployed:
        all_nodes(engine)
    config = {
        "num-server-rounds": ROUNDS,
        "fraction-evaluate": 0.0 if engine.deployed else 1.0,
        "send": "shards",
        "sleeper": SLEEPER,
        "sleep-seconds": UNTIL_WOKEN,
    }

    return run_straggling(
        engine, tmp_path_factory.mktemp("shardwise") / "run", config, while_waiting=lambda events: None
    )


def test_every_round_ends_without_the_sleeper(run: Run) -> None:
    assert run.outcome.completed, run.outcome.log
    assert [row["round"] for row in run.rows] == list(range(1, ROUNDS + 1))
    began, ended = run.times("began", SLEEPER), run.times("ended")
    for row in run.rows:
        assert row["train"]["outcome"] == "exact"
        assert row["train"]["ended"] == "decoded"
        assert SLEEPER not in row["train"]["used"] and PARTNER in row["train"]["used"]
    awake = run.times("awake", SLEEPER)
    assert list(began)[:1] == [1]
    assert all(ended[server_round] < moment for server_round, moment in awake.items() if server_round < ROUNDS)


def test_the_partner_does_the_sleepers_shard_after_its_own(run: Run) -> None:
    messages = Counter((e["worker"], e["round"]) for e in run.events if e["what"] == "began")
    for row in run.rows:
        assert messages[PARTNER, row["round"]] == 2
        assert row["train"]["answered"].count(PARTNER) == 2
        assert Counter(row["train"]["asked"])[PARTNER] >= 1  # the first message of a run goes to a node not known yet


def test_the_model_is_that_of_full_participation(run: Run) -> None:
    assert distance(run.final, plain_fedavg(ROUNDS)) < 1e-6
