"""Who is slow, silent or fails in a run that is under way, and what a person must see."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fl_gradcode.cli.status_page import heading
from fl_gradcode.runlog.reader import LedgerReader
from fl_gradcode.runlog.status import status_of
from fl_gradcode.runlog.workers import FailureLine
from tests.runlog.ledger_rows import CODE, Made, late, notices, phase, rejected, row, status_of_rows, worker, write


@pytest.fixture
def status(tmp_path: Path) -> Made:
    return partial(status_of_rows, tmp_path)


# Workers


def test_who_is_always_slow_and_who_only_sometimes_are_told_apart(status: Made) -> None:
    rows = [row(i, seconds=[3.0, 9.0 if i % 4 == 0 else 1.0, 1.0, 1.1, 0.9, 1.0]) for i in range(1, 21)]
    told = status(rows)
    assert [one.mark for one in told.workers] == ["always slow", "sometimes slow", "", "", "", ""]
    slow, moody = told.workers[:2]
    assert (slow.worker, slow.seconds, slow.slower, slow.computing) == (0, 3.0, 3.0, 0.5)
    assert moody.worker == 1 and moody.note == "5 of 20 jobs took 4 times the usual"


def test_jobs_of_several_shards_are_compared_by_what_one_would_take(status: Made) -> None:
    rows = [row(i) for i in range(1, 6)]
    for one in rows:  # half of a second is computing: three shards are twice as long
        one["train"]["timings"][2].update({"shards": 3, "seconds": 2.0, "computing": 1.5})
    assert worker(status(rows), 2).slower == 1.0


def test_in_time_and_late_are_counted_and_late_ones_of_another_run_are_not(status: Made) -> None:
    came = [late(5, f"train {i}") for i in (1, 8)]
    told = status([row(1, straggling=[5]), row(2, straggling=[5], late=came), row(3)])
    assert (worker(told, 5).rounds, worker(told, 5).in_time, worker(told, 5).late) == (3, 1, 1)


def test_who_fails_again_and_again_is_first_with_each_reason_once(status: Made) -> None:
    reasons = [("gave-up", "gave up after 3.1 s"), ("gave-up", "gave up after 4.5 s"), ("error", "ValueError: no file")]
    rows = [
        row(i, straggling=[4], rejected=[rejected(4, text, kind=kind)]) for i, (kind, text) in enumerate(reasons, 1)
    ]
    told = status(rows)
    assert told.workers[0].worker == 4 and told.workers[0].mark == "failing" and told.workers[0].failed == 3
    assert told.workers[0].reasons == (
        FailureLine("error", "ValueError: no file", 1),
        FailureLine("gave-up", "gave up after 4.5 s", 2),
    )


def test_a_failure_in_training_and_in_evaluation_is_one_round(status: Made) -> None:
    wrong = [rejected(4, "ValueError: no file")]
    rows = [row(i, straggling=[4], rejected=wrong, evaluate=phase(rejected=wrong, straggling=[4])) for i in (1, 2)]
    assert worker(status(rows), 4).failed == 2
    assert worker(status(rows), 4).reasons == (FailureLine("error", "ValueError: no file", 2),)


def test_one_failure_long_ago_is_no_failing(status: Made) -> None:
    rows = [row(1, straggling=[4], rejected=[rejected(4, "x")]), *(row(i) for i in range(2, 9))]
    assert worker(status(rows), 4).mark == "failed"


def test_an_error_that_comes_late_is_a_failure(status: Made) -> None:
    came = [late(4, "train 1", "error 2: boom")]
    told = worker(status([row(1, straggling=[4]), row(2, straggling=[4], late=came)]), 4)
    assert (told.failed, told.late, told.reasons) == (1, 0, (FailureLine("error", "error 2: boom", 1),))


def test_a_node_that_the_server_forgot_after_a_failure_counts_as_the_worker_that_it_was(status: Made) -> None:
    who = [4, None, None]
    told = status([row(i, straggling=[4], rejected=[rejected(one, "x")]) for i, one in enumerate(who, 1)])
    assert worker(told, 4).failed == 3 and all(one.worker is not None for one in told.workers)


def test_a_node_that_never_said_who_it_is_has_a_line_of_its_own(status: Made) -> None:
    rows = []
    for i in range(1, 5):
        one = row(i, straggling=[4], seconds=[1, 1, 1, 1, None, 1], rejected=[rejected(None, "x", node=77)])
        one["train"]["asked"] = [0, 1, 2, 3, 5, None]
        rows.append(one)
    told = status(rows)
    unknown, silent = told.workers[:2]
    assert (unknown.worker, unknown.node, unknown.mark, unknown.failed) == (None, "77", "failing", 4)
    assert (silent.worker, silent.mark, silent.heard) == (4, "silent", None)
    assert silent.note == "no node has said that it is this worker"


def test_who_is_silent_is_told_and_whether_its_node_is_gone(status: Made) -> None:
    rows = [row(1), row(2)]
    for i in range(3, 8):
        one = row(i, straggling=[2, 3], seconds=[1, 1, None, None, 1, 1])
        one["train"]["asked"] = [0, 1, 4, 5]
        one["train"]["held-back"] = [2]
        one["train"]["owing"] = [
            {"worker": 2, "kind": "train", "round": 3, "shards": 1, "seconds": 60.0 * i, "computing": None}
        ]
        rows.append(one)
    told = status(rows)
    assert {one.worker: one.mark for one in told.workers if one.mark} == {2: "silent", 3: "silent"}
    assert worker(told, 2).note == "owes the reply of round 3, for 420 s so far"
    assert worker(told, 3).note == "its node is not there: last asked in round 2" and worker(told, 3).heard == 2


def test_who_is_slow_is_not_called_silent_between_two_replies(status: Made) -> None:
    rows = [row(i, straggling=[1], seconds=[1, 50.0 if i % 6 == 0 else None, 1, 1, 1, 1]) for i in range(1, 24)]
    assert worker(status(rows), 1).mark == "always slow"


def test_a_worker_that_the_code_has_no_more_is_not_listed(status: Made) -> None:
    smaller = {**CODE, "n": 5, "k": 5}
    told = status([*(row(i) for i in (1, 2)), *(row(i, code=smaller, seconds=[1.0] * 5) for i in (3, 4, 5, 6))])
    assert sorted(one.worker or 0 for one in told.workers) == [0, 1, 2, 3, 4]
    assert told.notices == ()


def test_who_was_not_asked_is_not_called_silent(status: Made) -> None:
    """Of a worker whose shards were not sampled nothing is to be heard."""
    asked_of_all = [row(i) for i in (1, 2, 3)]
    without = [row(i, seconds=[1.0] * 5) for i in range(4, 20)]  # worker 5 has no sampled shard
    assert worker(status([*asked_of_all, *without]), 5).mark == ""
    now_and_then = [row(i) if i % 4 == 0 else row(i, seconds=[1.0] * 5) for i in range(1, 20)]
    assert worker(status(now_and_then), 5).mark == ""
    gone = [*now_and_then, *(row(i, straggling=[5], seconds=[1.0] * 5 + [None]) for i in (20, 21, 22))]
    assert worker(status(gone), 5).mark == "silent"


def test_a_newcomer_that_fails_is_listed_before_the_code_has_it(status: Made) -> None:
    wrong = [rejected(6, "ShardMismatch: other data")]
    rows = [row(i, rejected=wrong, holders=[[0, 1], [2, 3], [4, 5]] if i == 1 else []) for i in range(1, 9)]
    assert worker(status(rows), 6).mark == "failing"


def test_workers_that_have_left_a_code_that_follows_holdings_are_not_listed(status: Made) -> None:
    wrong = [rejected(5, "ValueError: no file")]
    before = [
        row(i, straggling=[5], rejected=wrong, holders=[[0, 5], [1, 2], [3, 4]] if i == 1 else []) for i in (1, 2)
    ]
    after = [row(i, seconds=[1.0] * 5, holders=[[0, 4], [1, 2], [3, 4]] if i == 3 else []) for i in range(3, 8)]
    told = status([*before, *after])
    assert sorted(one.worker or 0 for one in told.workers) == [0, 1, 2, 3, 4]
    assert told.notices == ()


# What a person must see


def test_whoever_fails_to_evaluate_alone_is_no_risk_for_a_round(status: Made) -> None:
    wrong = [rejected(i, "ValueError: no test set") for i in (1, 2, 3)]
    rows = [row(i, evaluate=phase(rejected=wrong, straggling=[1, 2, 3])) for i in range(1, 6)]
    told = status(rows)
    assert [one.worker for one in told.workers if one.mark == "failing"] == [1, 2, 3]
    assert "spare" not in notices(told)
    both = [row(i, straggling=[1, 2, 3], rejected=wrong) for i in range(1, 6)]
    assert "each round is at risk" in notices(status(both))["spare"]


def test_whoever_trains_late_and_fails_to_evaluate_does_answer(status: Made) -> None:
    wrong, code = [rejected(5, "ValueError: no test set")], {**CODE, "s": 1}
    rows = [
        row(i, code=code, straggling=[5], late=[late(5, f"train {i - 1}")], evaluate=evaluated)
        for i in range(2, 10)
        for evaluated in [phase(rejected=wrong, straggling=[5])]
    ]
    told = status(rows)
    assert worker(told, 5).mark == "failing" and "spare" not in notices(told)


def test_a_code_that_makes_no_sense_is_no_crash(status: Made) -> None:
    told = status([row(i, code={**CODE, "s": -1}, straggling=[1, 2]) for i in (1, 2, 3, 4)])
    assert [*heading(told, now=0.0)]


def test_estimates_of_a_code_that_promises_no_more_are_no_warning(status: Made) -> None:
    estimates = {**CODE, "name": "bernoulli", "exact": False}
    assert status([row(i, code=estimates, outcome="approximate") for i in (1, 2)]).notices == ()
    assert "undecoded" in notices(status([row(i, code=estimates, outcome="skipped") for i in (1, 2)]))
    assert "undecoded" in notices(status([row(i, outcome="approximate") for i in (1, 2)]))


def test_shards_that_are_filled_in_are_counted(status: Made) -> None:
    one = row(1, outcome="approximate", **{"filled-in": [{"shards": [1, 4], "round": 0}]})  # as in a ledger
    assert "2 shards filled in" in status([one]).rounds[0].events


def test_a_run_in_order_has_no_warning(status: Made) -> None:
    assert status([row(i, straggling=[0, 1]) for i in range(1, 9)]).notices == ()


def test_shards_that_nobody_answers_for_are_named_with_their_holders(status: Made) -> None:
    told = [[0, 2, 4], [1, 3, 5]] * 3
    lost = [row(i, straggling=[0, 2, 4], outcome="skipped", ended="hopeless") for i in (3, 4)]
    assert notices(status([row(1, holders=told), row(2), *lost]))["undecoded"] == (
        "Rounds 3 to 4 were not exact (skipped): nobody answered in time for shards 0, 2 and 4 (held by workers 0, 2 "
        "and 4)."
    )


def test_holders_are_those_of_the_code_as_it_is_now(status: Made) -> None:
    before, now = [[0, 2, 4], [1, 3, 5]] * 3, [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
    rows = [row(1, holders=before), row(2), row(3, holders=now)]
    lost = row(4, straggling=[0, 1, 2], outcome="skipped", ended="hopeless")
    assert "shards 0, 1 and 2 (held by workers 0, 1 and 2)" in notices(status([*rows, lost]))["undecoded"]


def test_holders_are_known_however_long_ago_they_were_told(tmp_path: Path) -> None:
    rows = [row(1, holders=[[0, 2, 4], [1, 3, 5]] * 3), *(row(i) for i in range(2, 30))]
    reader = LedgerReader(write(tmp_path / "l", [*rows, row(30, straggling=[1, 3, 5], outcome="skipped")]), window=5)
    reader.read()
    assert "shards 1, 3 and 5 (held by" in notices(status_of(reader.runs["one"]))["undecoded"]


def test_where_nobody_lost_all_holders_those_not_in_time_are_named(status: Made) -> None:
    told = [[0, 2, 4], [1, 3, 5]] * 3
    lost = row(3, straggling=[0, 2, 3], outcome="skipped", ended="hopeless")
    assert notices(status([row(1, holders=told), row(2), lost]))["undecoded"] == (
        "Round 3 was not exact (skipped): workers 0, 2 and 3 not in time, and the code covers any 2."
    )


def test_that_no_spare_worker_is_left_is_told(status: Made) -> None:
    def failing(*workers: int) -> list[dict[str, Any]]:
        wrong = [rejected(i, "x", node=i) for i in workers]
        return [row(i, straggling=workers, rejected=wrong) for i in range(1, 5)]

    assert "spare" not in notices(status(failing(0)))
    assert notices(status(failing(0, 3)))["spare"] == (
        "Workers 0 and 3 do not answer, and the code covers any 2: no spare is left, the next failure may cost a round."
    )
    assert notices(status(failing(0, 3, 4)))["spare"].endswith("each round is at risk.")


def test_holders_that_disagree_and_nodes_with_one_number_are_told(status: Made) -> None:
    twin = rejected(3, "duplicate: node 11 answered as worker 3", node=12, kind="duplicate-worker")
    again = rejected(4, "duplicate", node=13, kind="duplicate")
    told = status(
        [row(1, **{"replica-disagreement": 1e-9}), row(2, **{"replica-disagreement": 2e-3}, rejected=[twin, again])]
    )
    assert "up to 2.0e-03 (relative), most in round 2" in notices(told)["disagreement"]
    (twins,) = [text for key, text in notices(told).items() if key.startswith("twins")]
    assert twins.startswith(
        "Two nodes answered as worker 3, last in round 2 (node 12 was rejected as a duplicate: node 11 answered as "
        "worker 3): give each its own partition-id"
    )
    assert (worker(told, 3).failed, worker(told, 4).failed, told.last.events) == (0, 0, ())


def test_why_a_run_ended_comes_first(status: Made) -> None:
    text = "RoundFailed: Nodes 1 and 2 both answer as worker 0"
    told = status([row(1), row(2, outcome="raised", **{"ended-by": text})])
    assert told.notices[0].text == f"The run ended in round 2: {text}."
    assert status([row(1, **{"ended-by": "KeyboardInterrupt: "})]).notices[0].text.endswith(": KeyboardInterrupt.")
