"""In Flower's simulation engine, in real time: one of four clients sleeps whenever it is asked to train."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import UNTIL_WOKEN, Run, distance, on_engine, plain_fedavg, run_straggling

pytestmark = [pytest.mark.slow, on_engine("simulation")]

SLEEPER, ROUNDS = 1, 7
PAUSES = (2, 5)


@pytest.fixture(scope="module")
def run(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The sleeper is woken after each of two pauses, and sleeps again as soon as it is asked."""
    folder = tmp_path_factory.mktemp("simulation") / "run"

    def wake_the_sleeper_at_each_pause(events: Callable[[], list[dict[str, Any]]]) -> None:
        ended, asleep, awake = (
            [event["round"] for event in events() if event["what"] == what] for what in ("ended", "asleep", "awake")
        )
        for pause, sleep in zip(PAUSES, asleep, strict=False):
            if pause in ended:
                (folder / f"wake-up-round-{sleep}").touch()
        for pause in PAUSES[: len(awake)]:
            (folder / f"go-{pause}").touch()

    config = {
        "num-server-rounds": ROUNDS,
        "pauses": ",".join(map(str, PAUSES)),
        "sleeper": SLEEPER,
        "sleep-seconds": UNTIL_WOKEN,
    }
    return run_straggling(engine, folder, config, while_waiting=wake_the_sleeper_at_each_pause)


def test_every_round_ends_without_the_sleeper(run: Run) -> None:
    assert run.outcome.completed, run.outcome.log
    assert [row["round"] for row in run.rows] == list(range(1, ROUNDS + 1))
    for row in run.rows:
        assert row["train"]["outcome"] == row["evaluate"]["outcome"] == "exact"
        assert row["train"]["ended"] == row["evaluate"]["ended"] == "decoded"
        assert SLEEPER not in row["train"]["used"]
        assert SLEEPER in row["train"]["stragglers"]


def test_rounds_were_over_before_the_sleeper_woke(run: Run) -> None:
    asked, awake, ended = run.times("began", SLEEPER), run.times("awake", SLEEPER), run.times("ended")
    assert len(asked) >= 2
    assert all(ended[server_round] < moment for server_round, moment in awake.items())
    assert all(ended[pause] < awake[slept] for pause, slept in zip(PAUSES, sorted(asked), strict=False))


def test_late_replies_are_recorded_with_the_round_they_belong_to(run: Run) -> None:
    late = [answers for _, _, answers in run.late(SLEEPER) if answers.startswith("train")]
    assert len(late) == len(PAUSES)
    # The client's own account: these are the rounds in which it was asked, in order.
    assert late == [f"train {number}" for number in sorted(run.times("began", SLEEPER))][: len(late)]


def test_a_late_reply_never_enters_another_round(run: Run) -> None:
    assert distance(run.final, plain_fedavg(ROUNDS)) < 1e-6
    for server_round, kind, answers in run.late(SLEEPER):
        row = run.rows[server_round - 1][kind]
        assert answers != f"{kind} {server_round}"
        assert row["rejected"] == []


def test_a_sleeper_that_owes_a_reply_is_asked_nothing_else(run: Run) -> None:
    began, awake = run.times("began", SLEEPER), run.times("awake", SLEEPER)
    # The client's own account comes first.
    assert all(began[after] > awake[before] for before, after in pairwise(sorted(began)))
    # Asked for the second time in round 3, or in 4 if its late reply came after round 3 had begun, it slept through 5.
    assert not {2, 5} & began.keys()
    assert SLEEPER in run.rows[4]["train"]["held-back"]
    assert SLEEPER in run.rows[4]["train"]["never-sent"]
    for server_round, kind, _ in run.late(SLEEPER):
        row = run.rows[server_round - 1][kind]
        assert SLEEPER in row["held-back"]
        assert SLEEPER in row["asked"]
