"""Against a real SuperLink with four SuperNode processes: one sleeps, one is killed, one raises."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import UNTIL_WOKEN, Run, all_nodes, distance, on_engine, plain_fedavg, run_straggling

pytestmark = [pytest.mark.slow, on_engine("fleet")]

Events = Callable[[], list[dict[str, Any]]]

# The groups of fractional_repetition(4, 1) are (0, 2) and (1, 3): killed and raising workers have a partner each.
SLEEPER, KILLED, RAISER = 1, 2, 3
ROUNDS, PAUSE = 5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trouble")


@pytest.fixture(scope="module")
def slept(engine: Engine, folder: Path) -> Run:
    """Worker 1 sleeps whenever it trains. It is woken after three rounds; then the other two begin."""
    all_nodes(engine)

    def wake_the_sleeper_after_the_third_round(events: Events) -> None:
        if any((event["what"], event["round"]) == ("ended", PAUSE) for event in events()):
            (folder / "slept" / "wake-up-round-1").touch()
        if any(event["what"] == "awake" for event in events()):
            (folder / "slept" / f"go-{PAUSE}").touch()

    config = {
        "num-server-rounds": ROUNDS,
        "fraction-evaluate": 0.0,
        "pauses": str(PAUSE),
        "sleeper": SLEEPER,
        "sleep-seconds": UNTIL_WOKEN,
    }
    return run_straggling(engine, folder / "slept", config, while_waiting=wake_the_sleeper_after_the_third_round)


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
        "sleep-seconds": UNTIL_WOKEN,
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
    ended, woke = slept.times("ended"), slept.times("awake", SLEEPER)
    assert ended[PAUSE] < woke[1]
    # It slept again in one of the last two rounds, until the run was over.
    assert len(woke) == 2 and slept.times("went on")[ROUNDS] < woke[max(woke)]


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
        assert told > elapsed / 2  # the rest is for finding the nodes, making and sending messages
        assert seconds["decoding"] + seconds["aggregating"] < 0.1 * seconds["waiting"]
        # The round ended with the reply that completed it.
        assert 0 <= seconds["waiting"] - row["train"]["decodable-after-seconds"] < seconds["waiting"] / 2


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
