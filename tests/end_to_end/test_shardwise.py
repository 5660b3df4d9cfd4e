"""One shard a message in the real engines: the partner of a sleeping node does its shard too, first copy wins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import Run, distance, plain_fedavg, run_straggling, with_the_library_on_its_path

pytestmark = pytest.mark.slow

# The groups of fractional_repetition(4, 1) are (0, 2) and (1, 3): worker 3 has to do shards 1 and 3.
SLEEPER, PARTNER, ROUNDS = 1, 3, 3


@pytest.fixture(scope="module", params=["simulation", "deployment"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    deployed = request.param == "deployment"
    folder = tmp_path_factory.mktemp("shardwise")
    config = {
        "num-server-rounds": ROUNDS,
        "fraction-evaluate": 0.0 if deployed else 1.0,
        "send": "shards",
        "sleeper": SLEEPER,
        "sleep-seconds": 60.0,
    }

    def nothing_to_do(events: Callable[[], list[dict[str, Any]]]) -> None:
        pass

    engine = Engine(4, deployed=True, folder=folder / "engine") if deployed else Engine(4, cpus=6)
    with with_the_library_on_its_path(engine) as running:
        return run_straggling(running, folder / "run", config, while_waiting=nothing_to_do)


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
