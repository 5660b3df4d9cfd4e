"""Against a real SuperLink with four SuperNode processes: one sleeps, one is killed, one raises."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import Run, distance, plain_fedavg, run_straggling, with_the_library_on_its_path

pytestmark = pytest.mark.slow

Events = Callable[[], list[dict[str, Any]]]

# The groups of fractional_repetition(4, 1) are (0, 2) and (1, 3): killed and raising workers have a partner each.
SLEEPER, SECONDS = 1, 30.0
KILLED, RAISER = 2, 3
ROUNDS, PAUSE = 5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployment")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with with_the_library_on_its_path(Engine(4, deployed=True, folder=folder / "engine")) as engine:
        yield engine


@pytest.fixture(scope="module")
def slept(engine: Engine, folder: Path) -> Run:
    """Worker 1 sleeps whenever it trains. Three rounds pass; when it has woken, the other two begin."""

    def go_on_when_the_sleeper_wakes(events: Events) -> None:
        if any(event["what"] == "awake" for event in events()):
            (folder / "slept" / f"go-{PAUSE}").touch()

    config = {
        "num-server-rounds": ROUNDS,
        "fraction-evaluate": 0.0,
        "pauses": str(PAUSE),
        "sleeper": SLEEPER,
        "sleep-seconds": SECONDS,
    }
    return run_straggling(engine, folder / "slept", config, while_waiting=go_on_when_the_sleeper_wakes)


@pytest.fixture(scope="module")
def broken(engine: Engine, folder: Path, slept: Run) -> Run:
    """Worker 3 raises in each round; worker 2 is killed while it trains in round 2. Runs after the sleeper's run."""
    killed: list[float] = []

    def kill_in_round_two(events: Events) -> None:
        if not killed and any((e["what"], e.get("worker"), e["round"]) == ("began", KILLED, 2) for e in events()):
            engine.kill_node(KILLED)
            killed.append(time.time())
            (folder / "broken" / "go-2").touch()

    config = {
        "num-server-rounds": 4,
        "fraction-evaluate": 0.0,
        "pauses": "2",
        "sleeper": KILLED,  # so that the kill finds it at work
        "sleeps-from": 2,
        "sleep-seconds": 120.0,
        "raiser": RAISER,
    }
    return run_straggling(engine, folder / "broken", config, while_waiting=kill_in_round_two)


def test_every_round_ends_without_the_sleeper(slept: Run) -> None:
    assert slept.outcome.completed, slept.outcome.log
    assert [row["round"] for row in slept.rows] == list(range(1, ROUNDS + 1))
    for row in slept.rows:
        assert row["train"]["outcome"] == "exact"
        assert SLEEPER not in row["train"]["used"]
        assert SLEEPER in row["train"]["stragglers"]
        assert row["train"]["seconds"]["waiting"] < SECONDS
    woke = slept.times("awake", SLEEPER)
    assert woke[1] - slept.times("began", SLEEPER)[1] >= SECONDS * 0.99


def test_the_sleeper_is_asked_for_the_current_round_once_its_late_reply_is_in(slept: Run) -> None:
    (server_round, _, answers), *_ = slept.late(SLEEPER)
    assert answers == "train 1"
    assert SLEEPER in slept.rows[server_round - 1]["train"]["asked"]
    # What the client says: after round 1 it worked on the round in which its reply came, on none in between.
    assert sorted(slept.times("began", SLEEPER))[:2] == [1, server_round]
    assert server_round > PAUSE


def test_late_replies_never_enter_another_round(slept: Run) -> None:
    assert all(answers != f"{kind} {server_round}" for server_round, kind, answers in slept.late(SLEEPER))
    assert all(row["train"]["rejected"] == [] for row in slept.rows)
    assert distance(slept.final, plain_fedavg(ROUNDS)) < 1e-6


def test_the_ledger_says_where_the_time_went(slept: Run) -> None:
    began, ended = slept.times("went on"), slept.times("ended")
    for row in slept.rows:
        seconds = row["train"]["seconds"]
        elapsed = ended[row["round"]] - began[row["round"] - 1]
        told = sum(seconds.values())
        assert told <= elapsed + 0.1
        assert elapsed - told < SECONDS / 5  # finding the nodes, making and sending messages
        assert seconds["decoding"] + seconds["aggregating"] < 0.1 * seconds["waiting"]
        # The round ended with the reply that completed it.
        assert 0 <= seconds["waiting"] - row["train"]["decodable-after-seconds"] < SECONDS / 5


def test_a_node_that_is_killed_does_not_stop_the_run(broken: Run) -> None:
    assert broken.outcome.completed, broken.outcome.log
    assert [row["round"] for row in broken.rows] == [1, 2, 3, 4]
    assert KILLED not in broken.times("awake")
    for row in broken.rows[1:]:
        assert row["train"]["outcome"] == "exact"
        assert KILLED in row["train"]["stragglers"]
        assert KILLED not in row["train"]["used"]
    assert distance(broken.final, plain_fedavg(4)) < 1e-6


def test_a_client_that_raises_is_a_straggler_with_its_reason_in_the_ledger(broken: Run) -> None:
    assert len(broken.times("began", RAISER)) >= 2
    # In time, or after the others had completed the round: the ledger keeps the reason of both.
    entries = [one for row in broken.rows for one in [*row["train"]["rejected"], *row["train"]["late"]]]
    reasons = [one["reason"] for one in entries if "reason" in one]
    assert len(reasons) >= 2
    for reason in reasons:
        assert reason.startswith("error 2: ")
        assert f"worker {RAISER} is out of disk" in reason
    assert all(RAISER not in row["train"]["used"] for row in broken.rows)
