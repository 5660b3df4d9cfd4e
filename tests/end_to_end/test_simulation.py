"""In Flower's simulation engine, in real time: one of four clients sleeps whenever it is asked to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import Run, distance, plain_fedavg, run_straggling, with_the_library_on_its_path

pytestmark = pytest.mark.slow

SLEEPER, SECONDS, ROUNDS = 1, 10.0, 6
PAUSES = (2, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("simulation") / "run"

    def go_on_when_the_sleeper_wakes(events: Callable[[], list[dict[str, Any]]]) -> None:
        awake = sum(event["what"] == "awake" for event in events())
        for server_round in PAUSES[:awake]:
            (folder / f"go-{server_round}").touch()

    config = {
        "num-server-rounds": ROUNDS,
        "pauses": ",".join(map(str, PAUSES)),
        "sleeper": SLEEPER,
        "sleep-seconds": SECONDS,
    }
    # More actors than nodes: a sleeping client occupies one.
    with with_the_library_on_its_path(Engine(4, cpus=6)) as engine:
        return run_straggling(engine, folder, config, while_waiting=go_on_when_the_sleeper_wakes)


def test_every_round_ends_without_the_sleeper(run: Run) -> None:
    assert run.outcome.completed, run.outcome.log
    assert [row["round"] for row in run.rows] == list(range(1, ROUNDS + 1))
    for row in run.rows:
        assert row["train"]["outcome"] == row["evaluate"]["outcome"] == "exact"
        assert row["train"]["ended"] == row["evaluate"]["ended"] == "decoded"
        assert SLEEPER not in row["train"]["used"]
        assert SLEEPER in row["train"]["stragglers"]
    # The first round also starts Ray.
    waiting = [row["train"]["seconds"]["waiting"] for row in run.rows[1:]]
    assert max(waiting) < SECONDS / 2


def test_rounds_were_over_before_the_sleeper_woke(run: Run) -> None:
    asked, awake, ended = run.times("began", SLEEPER), run.times("awake", SLEEPER), run.times("ended")
    assert len(asked) >= 2
    for server_round, moment in awake.items():
        assert moment - asked[server_round] >= SECONDS * 0.99 or server_round == max(awake)
        assert ended[server_round] < moment


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
    # Rounds 2 and 4 began and ended while it slept; the client's own account comes first.
    assert not {2, 4} & run.times("began", SLEEPER).keys()
    assert SLEEPER in run.rows[3]["train"]["held-back"]
    assert SLEEPER in run.rows[3]["train"]["never-sent"]
    for server_round, kind, _ in run.late(SLEEPER):
        row = run.rows[server_round - 1][kind]
        assert SLEEPER in row["held-back"]
        assert SLEEPER in row["asked"]
