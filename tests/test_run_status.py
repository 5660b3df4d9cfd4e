"""What a ledger says of a run that is under way: whatever version wrote it, and while it is being written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, VirtualGrid, cyclic_repetition, fractional_repetition
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.planner import make_plan
from fl_gradcode.run_advice import LEAST, advise
from fl_gradcode.run_rows import LedgerReader, RunRows
from fl_gradcode.run_status import RunStatus, as_json, status_of
from fl_gradcode.run_workers import WorkerLine
from fl_gradcode.sources import read_source
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app

CODE = {"name": "fractional repetition", "n": 6, "k": 6, "s": 2, "m": 1}


def phase(*, seconds: Any = (1.0,) * 6, straggling: Any = (), asked: Any = 1, **fields: Any) -> dict[str, Any]:
    """An entry in which worker i took seconds[i]; None: it left no time."""
    good = [i for i in range(len(seconds)) if i not in straggling]
    timings = [
        {"worker": i, "kind": "train", "round": asked, "shards": 1, "seconds": one, "computing": one / 2}
        for i, one in enumerate(seconds)
        if one is not None
    ]
    told = {"waiting": 2.0, "decoding": 0.25, "aggregating": 0.75}
    return {
        "outcome": "exact", "ended": "decoded", "workers": len(seconds), "shards": [*range(len(seconds))],
        "asked": [*range(len(seconds))], "held-back": [], "answered": good, "unread": [], "used": good[:2],
        "stragglers": [*straggling], "rejected": [], "late": [], "decodable-after-replies": 2,
        "decodable-after-seconds": 1.5, "decoding-error": 0.0, "kappa": 1.0, "coverage": [1.0] * len(seconds),
        "timings": timings, "owing": [], "bytes-down": 100, "bytes-up": 10, "seconds": told, **fields,
    }  # fmt: skip


def row(server_round: int, *, run: Any = "one", code: Any = CODE, **fields: Any) -> dict[str, Any]:
    way = {"send": "coded", "patience": None, "load": 3}
    extra: dict[str, Any] = {
        name: fields.pop(name) for name in ("ended-at", "resumed", "ended-by", "evaluate") if name in fields
    }
    train = phase(asked=server_round, **fields)
    return {"run": run, "round": server_round, "code": code, "train": train, "evaluate": None, "way": way, **extra}


def rejected(worker: int | None, reason: str, node: int = 7) -> dict[str, Any]:
    return {"worker": worker, "node": str(node), "reason": reason}


def write(path: Path, rows: Sequence[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows) + tail)
    return path


def read(path: Path) -> LedgerReader:
    reader = LedgerReader(path)
    reader.read()
    return reader


@pytest.fixture
def status(tmp_path: Path) -> Callable[[Sequence[dict[str, Any]]], RunStatus]:
    def made(rows: Sequence[dict[str, Any]]) -> RunStatus:
        reader = read(write(tmp_path / "ledger.jsonl", rows))
        assert reader.last is not None
        return status_of(reader.runs[reader.last])

    return made


Made = Callable[[Sequence[dict[str, Any]]], RunStatus]


def worker(status: RunStatus, number: int) -> WorkerLine:
    (found,) = [one for one in status.workers if one.worker == number]
    return found


def notices(status: RunStatus) -> dict[str, str]:
    return {one.key: one.text for one in status.notices}


# Reading


def test_a_line_that_is_being_written_is_left_out_until_it_is_whole(tmp_path: Path) -> None:
    last = json.dumps(row(3)) + "\n"
    path = write(tmp_path / "ledger.jsonl", [row(1), row(2)], tail=last[:50])
    reader = read(path)
    assert [one.round for one in reader.runs["one"].rounds] == [1, 2]
    assert not reader.read()
    with path.open("a") as file:
        file.write(last[50:])
    assert reader.read()
    assert [one.round for one in reader.runs["one"].rounds] == [1, 2, 3]


def test_a_whole_row_without_a_line_end_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", [row(1)], tail=json.dumps(row(2)))
    reader = read(path)
    assert len(reader.runs["one"].rounds) == 2
    with path.open("a") as file:
        file.write("\n" + json.dumps(row(3)) + "\n")
    assert reader.read()
    assert [one.round for one in reader.runs["one"].rounds] == [1, 2, 3]


@pytest.mark.parametrize("again", [[1], [1, 2, 3, 4, 5]])
def test_a_file_that_lost_its_last_row_is_read_anew(again: list[int], tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", [row(1), row(2), row(3)])
    reader = read(path)
    write(path, [row(i, seconds=[2.0] * 6) for i in again])  # shorter, or already longer again
    assert reader.read()
    assert [one.round for one in reader.runs["one"].rounds] == again


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", [row(1), row(2)])
    reader = read(path)
    write(tmp_path / "new", [row(1), row(2), row(3)]).replace(path)
    assert reader.read()
    assert [one.round for one in reader.runs["one"].rounds] == [1, 2, 3]


def test_a_last_row_that_was_written_anew_is_seen_though_it_is_as_long(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", [row(1), row(2, outcome="exact")])
    reader, size = read(path), path.stat().st_size
    write(path, [row(1), row(2, outcome="excat")])
    assert path.stat().st_size == size and reader.read()
    assert [one.outcome for one in reader.runs["one"].rounds] == ["exact", "excat"]


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", [row(i) for i in range(1, 6)])
    reader = read(path)
    before = reader.runs["one"].rounds[:]
    with path.open("a") as file:
        file.write(json.dumps(row(6)) + "\n")
    assert reader.read()
    assert all(now is one for now, one in zip(reader.runs["one"].rounds, before, strict=False))


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(row(1)) + "\n" + '{"run": "o\n' + json.dumps(row(2)) + "\n")
    with pytest.raises(InvalidSetting, match="Line 2 of the ledger .* is not JSON"):
        read(path)


@pytest.mark.parametrize(
    "line", ["[1, 2]", "3", '"text"', "null", '{"event": "start"}', '{"round": null, "train": {}}', '{"train": 5}']
)
def test_a_file_of_something_else_is_no_ledger(line: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidSetting, match="Line 1 of .* is no row of a ledger"):
        read(path)


def test_a_reason_with_brackets_and_quotes_is_read_as_it_is(status: Made) -> None:
    reason = 'KeyError: "asked": [1, 2], "timings": [] \\'
    told = status([row(i, rejected=[rejected(1, reason)], straggling=[1]) for i in (1, 2, 3)])
    assert worker(told, 1).reasons == ((reason, 3),)


def test_two_runs_that_write_in_turns_are_kept_apart(tmp_path: Path) -> None:
    rows = [row(i, run=run) for i in (1, 2, 3) for run in ("a", "b")]
    reader = read(write(tmp_path / "ledger.jsonl", rows))
    assert reader.last == "b"
    assert {name: [one.round for one in run.rounds] for name, run in reader.runs.items()} == {
        "a": [1, 2, 3],
        "b": [1, 2, 3],
    }


def test_a_round_that_was_run_again_counts_once(status: Made) -> None:
    told = status([row(1), row(2), row(3, outcome="skipped"), row(3, resumed=True), row(4)])
    assert [one.round for one in told.rounds] == [1, 2, 3, 4]
    assert told.outcomes == {"exact": 4} and told.looked_at == 4
    assert told.rounds[2].resumed


def test_only_the_last_rows_are_kept_whole(tmp_path: Path) -> None:
    reader = LedgerReader(write(tmp_path / "ledger.jsonl", [row(i) for i in range(1, 31)]), window=10)
    reader.read()
    told = status_of(reader.runs["one"])
    assert (len(told.rounds), told.looked_at, worker(told, 0).rounds) == (30, 10, 10)


# Totals


def test_time_is_split_and_what_passed_between_rounds_is_the_rest(status: Made) -> None:
    told = status([row(i, **{"ended-at": 1000.0 + 4 * i}) for i in (1, 2, 3)])
    assert told.seconds == {"waiting": 6.0, "decoding": 0.75, "aggregating": 2.25, "between rounds": 2.0}
    assert not told.virtual and (told.bytes_down, told.bytes_up) == (300, 30)


def test_a_pause_before_a_resume_and_a_clock_that_is_set_back_are_no_time_between_rounds(status: Made) -> None:
    moments = [(1, 1000.0, False), (2, 1004.0, False), (3, 9000.0, True), (4, 500.0, False), (5, 504.0, False)]
    told = status([row(i, **{"ended-at": at, "resumed": resumed}) for i, at, resumed in moments])
    assert told.seconds["between rounds"] == 2.0


def test_a_virtual_clock_has_no_time_between_rounds(status: Made) -> None:
    told = status([row(i, **{"ended-at": 1000.0 + i / 100}) for i in range(1, 6)])
    assert told.virtual and told.seconds["between rounds"] is None


def test_rows_of_an_older_version_are_shown_as_far_as_they_tell(status: Made) -> None:
    told = status(
        [{"run": "old", "round": 1, "train": {"outcome": "exact"}}, {"round": 2, "run": "old", "train": None}]
    )
    assert told.outcomes == {"exact": 1, "ended": 1} and told.workers == () and told.sending == "not said"
    assert told.last.waiting is None and told.seconds["between rounds"] is None
    json.dumps(as_json(told, 10), allow_nan=False)


def test_seconds_that_were_not_finite_count_as_none(status: Made) -> None:
    nothing = {"waiting": None, "decoding": 0.0, "aggregating": 0.0}
    timing = {"worker": 1, "kind": "train", "round": 2, "shards": 1, "seconds": None, "computing": None}
    told = status([row(1), row(2, seconds=[None] * 6), row(3)])
    assert worker(told, 1).jobs == 2
    broken = row(2)
    broken["train"].update({"seconds": nothing, "timings": [timing], "owing": [timing]})
    told = status([row(1), broken])
    assert told.seconds["waiting"] == 2.0 and told.last.waiting is None and worker(told, 1).jobs == 1


def test_privacy_is_what_the_last_row_says_that_has_it(status: Made) -> None:
    spent = [{"epsilon": 0.5 * i, "delta": 1e-5, "unit": "record", "noise": "shared"} for i in (1, 2)]
    told = status([row(1, privacy=spent[0]), row(2, privacy=spent[1]), row(3, privacy=None)])
    assert told.privacy is not None and told.privacy["epsilon"] == 1.0


def test_how_it_sends_is_told_also_where_it_is_chosen_anew(status: Made) -> None:
    rows = [row(1), row(2)]
    assert status(rows).sending == "coded vectors of 3 shards"
    rows[1]["way"] = {"send": "shards", "patience": 2.0, "load": 1}
    assert status(rows).sending == "chosen from round to round, now one shard a message, patience 2"


# Workers


def test_who_is_always_slow_and_who_only_sometimes_are_told_apart(status: Made) -> None:
    rows = [row(i, seconds=[3.0, 9.0 if i % 4 == 0 else 1.0, 1.0, 1.1, 0.9, 1.0]) for i in range(1, 21)]
    told = status(rows)
    assert [one.mark for one in told.workers] == ["slow for good", "sometimes slow", "", "", "", ""]
    slow, moody = told.workers[:2]
    assert (slow.worker, slow.seconds, slow.slower, slow.computing) == (0, 3.0, 3.0, 0.5)
    assert moody.worker == 1 and moody.note == "5 of 20 jobs took 4 times the usual"


def test_jobs_of_several_shards_are_compared_by_what_one_would_take(status: Made) -> None:
    rows = [row(i) for i in range(1, 6)]
    for one in rows:  # half of a second is computing: three shards are twice as long
        one["train"]["timings"][2].update({"shards": 3, "seconds": 2.0, "computing": 1.5})
    assert worker(status(rows), 2).slower == 1.0


def test_in_time_and_late_are_counted_and_late_ones_of_another_run_are_not(status: Made) -> None:
    late = [{"worker": 5, "node": "9", "from": f"train {i}"} for i in (1, 8)]
    told = status([row(1, straggling=[5]), row(2, straggling=[5], late=late), row(3)])
    assert (worker(told, 5).rounds, worker(told, 5).in_time, worker(told, 5).late) == (3, 1, 1)


def test_who_fails_again_and_again_is_first_with_each_reason_once(status: Made) -> None:
    reasons = ["gave up after 3.1 s", "gave up after 4.5 s", "ValueError: no file"]
    rows = [row(i, straggling=[4], rejected=[rejected(4, reason)]) for i, reason in enumerate(reasons, 1)]
    told = status(rows)
    assert told.workers[0].worker == 4 and told.workers[0].mark == "failing" and told.workers[0].failed == 3
    assert told.workers[0].reasons == (("ValueError: no file", 1), ("gave up after 4.5 s", 2))


def test_a_failure_in_training_and_in_evaluation_is_one_round(status: Made) -> None:
    wrong = [rejected(4, "ValueError: no file")]
    rows = [row(i, straggling=[4], rejected=wrong, evaluate=phase(rejected=wrong, straggling=[4])) for i in (1, 2)]
    assert worker(status(rows), 4).failed == 2 and worker(status(rows), 4).reasons == (("ValueError: no file", 2),)


def test_one_failure_long_ago_is_no_failing(status: Made) -> None:
    rows = [row(1, straggling=[4], rejected=[rejected(4, "x")]), *(row(i) for i in range(2, 9))]
    assert worker(status(rows), 4).mark == "failed"


def test_an_error_that_comes_late_is_a_failure(status: Made) -> None:
    late = [{"worker": 4, "node": "9", "from": "train 1", "reason": "error 2: boom"}]
    told = worker(status([row(1, straggling=[4]), row(2, straggling=[4], late=late)]), 4)
    assert (told.failed, told.late, told.reasons) == (1, 0, (("error 2: boom", 1),))


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
    assert worker(status(rows), 1).mark == "slow for good"


def test_a_worker_that_the_code_has_no_more_is_not_listed(status: Made) -> None:
    smaller = {**CODE, "n": 5, "k": 5}
    told = status([*(row(i) for i in (1, 2)), *(row(i, code=smaller, seconds=[1.0] * 5) for i in (3, 4, 5, 6))])
    assert sorted(one.worker or 0 for one in told.workers) == [0, 1, 2, 3, 4]
    assert told.notices == ()


# What a person must see


def test_a_run_in_order_has_no_warning(status: Made) -> None:
    assert status([row(i, straggling=[0, 1]) for i in range(1, 9)]).notices == ()


def test_shards_that_nobody_answers_for_are_named_with_their_holders(status: Made) -> None:
    # Groups of fractional_repetition(6, 2): 0, 2, 4 and 1, 3, 5.
    lost = [row(i, straggling=[0, 2, 4], outcome="skipped", ended="hopeless") for i in (3, 4)]
    told = notices(status([row(1), row(2), *lost]))["undecoded"]
    assert told.startswith(
        "Rounds 3 to 4 were not exact (skipped): nobody answered in time for shards 0, 2, 4 (held by"
    )
    assert "workers 0, 2 and 4, if order= was not given" in told


def test_holders_are_not_guessed_where_an_exact_round_contradicts_them(status: Made) -> None:
    lost = row(3, straggling=[0, 2, 4], outcome="skipped", ended="hopeless")
    told = notices(status([row(1), row(2, straggling=[0, 2, 4]), lost]))["undecoded"]
    assert "shard" not in told and "workers 0, 2 and 4 not in time, and the code covers any 2" in told


def test_of_a_code_that_is_not_known_the_coverage_tells_in_an_approximate_round(status: Made) -> None:
    code = {**CODE, "name": "universal"}
    fields = {"outcome": "approximate", "coverage": [1, 1, 0, 1, 1, 1.0], "straggling": [2, 3, 4]}
    told = notices(status([row(1, code=code), row(2, code=code, **fields)]))["undecoded"]
    assert told == "Round 2 was not exact (approximate): nobody answered in time for shard 2."


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
    twin = rejected(3, "duplicate: node 11 answered as worker 3", node=12)
    told = status([row(1, **{"replica-disagreement": 1e-9}), row(2, **{"replica-disagreement": 2e-3}, rejected=[twin])])
    assert "up to 2.0e-03 (relative), most in round 2" in notices(told)["disagreement"]
    (twins,) = [text for key, text in notices(told).items() if key.startswith("twins")]
    assert twins.startswith("Nodes 11 and 12 both answered as worker 3, last in round 2")
    assert worker(told, 3).failed == 0


def test_why_a_run_ended_comes_first(status: Made) -> None:
    text = "RoundFailed: Nodes 1 and 2 both answer as worker 0"
    told = status([row(1), row(2, outcome="raised", **{"ended-by": text})])
    assert told.notices[0].text == f"The run ended in round 2: {text}."
    assert status([row(1, **{"ended-by": "KeyboardInterrupt: "})]).notices[0].text.endswith(": KeyboardInterrupt.")


# Advice


def ledger_of(path: Path, rounds: int, *, send: str = "coded", s: int = 2, slow: float = 10.0, **options: Any) -> Path:
    latency = Latency(fixed=0.2, compute=0.8, slowdown=scaled(lognormal(1.0, 0.3), {0: slow, 1: slow}))
    with InProcessGrid(toy_app(), 9, tamper=options.pop("tamper", None)) as inner:
        code = options.pop("code", fractional_repetition(9, s))
        strategy = GradientCoding(FedAvg(), code, send=send, ledger=path, **options)  # type: ignore[arg-type]
        strategy.start(VirtualGrid(inner, latency, seed=5), initial_arrays(), rounds, timeout=1e6)
    return path


def run_of(path: Path) -> RunRows:
    (run,) = read(path).runs.values()
    return run


def test_advice_is_what_plan_says_of_the_same_ledger(tmp_path: Path) -> None:
    path = ledger_of(tmp_path / "ledger.jsonl", 20)
    advice = advise(run_of(path).recent)
    plan = make_plan(read_source(str(path)).latency, 9)
    assert advice.verdict == plan.verdict and advice.python == plan.recommended.scheme.python
    assert advice.own is False and advice.own_seconds is not None and advice.rounds == 20


def test_a_run_that_does_what_is_recommended_is_told_so(tmp_path: Path) -> None:
    first = advise(run_of(ledger_of(tmp_path / "first.jsonl", 30, send="shards", s=3)).recent)
    assert first.own is True, first
    assert first.own_seconds is not None and f"takes {first.own_seconds:.3g} s" in first.verdict


def test_too_few_rounds_say_how_many_are_needed() -> None:
    rows = [row(i) for i in range(1, LEAST)]
    advice = advise(rows)
    assert advice.verdict == "no recommendation yet: 4 of the last rounds left job times, 5 are needed."
    assert not advice.python
    assert advise([*rows, row(LEAST)]).python


def test_advice_is_made_of_the_rounds_since_the_code_had_this_many_workers() -> None:
    smaller = {**CODE, "n": 5, "k": 5}
    rows = [*(row(i) for i in range(1, 9)), *(row(i, code=smaller, seconds=[1.0] * 5) for i in range(9, 15))]
    assert advise(rows).rounds == 6


def test_rows_without_times_or_a_single_worker_get_no_advice() -> None:
    assert "0 of the last rounds" in advise([{"round": 1, "code": CODE, "train": {"outcome": "exact"}}]).verdict
    assert "at least 2 workers" in advise([row(1, code={**CODE, "n": 1})]).verdict
    assert not advise([{"round": 1, "train": None}]).python


def test_advice_for_a_thousand_workers_simulates_little() -> None:
    rng = np.random.default_rng(0)
    code = {**CODE, "n": 1000, "k": 1000}
    rows = [row(i, code=code, seconds=rng.lognormal(0, 0.3, 1000).tolist()) for i in range(1, 7)]
    advice = advise(rows)
    assert advice.rounds == 6 and advice.python


# Ledgers of real runs


def failing(worker_number: int) -> Callable[[int, Message, Message], Message]:
    def tamper(number: int, message: Message, reply: Message) -> Message:
        return (
            Message(Error(2, "Traceback\nOSError: disk [full]"), reply_to=message) if number == worker_number else reply
        )

    return tamper


@pytest.mark.parametrize("send", ["coded", "shards", "adaptive"])
def test_a_real_run_names_who_is_slow_and_who_fails(send: str, tmp_path: Path) -> None:
    path = ledger_of(tmp_path / "ledger.jsonl", 24, send=send, tamper=failing(4))
    told = status_of(run_of(path))
    assert told.outcomes == {"exact": 24} and told.virtual
    assert {0, 1} <= {one.worker for one in told.workers if one.mark == "slow for good"}
    assert "OSError: disk [full]" in worker(told, 4).reasons[0][0]
    json.dumps(as_json(told, 10), allow_nan=False)


def test_a_real_run_that_cannot_decode_any_more_says_why(tmp_path: Path) -> None:
    def tamper(number: int, message: Message, reply: Message) -> Message:
        gone = number in (0, 3, 6) and message.metadata.message_type == "train"
        return Message(Error(2, "ValueError: gone"), reply_to=message) if gone and tamper_from[0] else reply

    tamper_from = [False]
    path = tmp_path / "ledger.jsonl"
    ledger_of(path, 4, slow=1.0, run="one")
    tamper_from[0] = True
    ledger_of(tmp_path / "other.jsonl", 4, slow=1.0, tamper=tamper)
    rows = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    for number, one in enumerate(rows, 5):
        one.update({"run": "one", "round": number})
    with path.open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)
    told = status_of(run_of(path))
    assert told.outcomes == {"exact": 4, "skipped": 4}
    assert "shards 0, 3, 6 (held by workers 0, 3 and 6" in notices(told)["undecoded"]


def test_a_cyclic_code_has_its_holders_named(tmp_path: Path) -> None:
    code = cyclic_repetition(9, 1, rng=np.random.default_rng(0))
    path = ledger_of(
        tmp_path / "ledger.jsonl", 3, code=code, slow=1.0, on_undecodable="approximate",
        tamper=lambda number, message, reply: failing(number)(number, message, reply) if number in (3, 4) else reply,
    )  # fmt: skip
    assert "shard 4 (held by workers 3 and 4)" in notices(status_of(run_of(path)))["undecoded"]
