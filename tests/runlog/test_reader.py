"""Rows are read from a ledger while it is being written."""

from __future__ import annotations

import json
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fl_gradcode.cli.status_page import draw_status
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.runlog.reader import LedgerReader, RoundLine
from fl_gradcode.runlog.status import RunStatus, as_json, status_of
from fl_gradcode.runlog.workers import FailureLine
from tests.runlog.ledger_rows import (
    CODE,
    Made,
    late,
    phase,
    read,
    rejected,
    row,
    status_of_rows,
    typed,
    worker,
    write,
)


@pytest.fixture
def status(tmp_path: Path) -> Made:
    return partial(status_of_rows, tmp_path)


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
    path = write(tmp_path / "ledger.jsonl", [row(1), row(2, ended="decoded")])
    reader, size = read(path), path.stat().st_size
    write(path, [row(1), row(2, ended="dedoced")])
    assert path.stat().st_size == size and reader.read()
    assert [one.ended for one in reader.runs["one"].rounds] == ["decoded", "dedoced"]


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
    with pytest.raises(
        InvalidSetting, match=r"Line 1 of the ledger .*: This is not a ledger row: .* Name the file given"
    ):
        read(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": 3}, "This ledger row has schema 3; this version of fl-gradcode reads schemas 1 and 2."),
        ({"round": "2"}, "round is '2' and must be a whole number"),
        ({"code": {**CODE, "k": 0}}, "code has n=6 workers and k=0 shards"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_its_line(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "ledger.jsonl", [row(1), {**row(2), **change}, row(3)])
    with pytest.raises(InvalidSetting) as refused:
        read(path)
    assert str(refused.value).startswith("Line 2 of the ledger ") and sentence in str(refused.value)


def test_a_wrong_value_in_a_long_list_is_found_when_the_row_is_read_whole(tmp_path: Path) -> None:
    wrong = row(2)
    wrong["train"]["timings"][3]["seconds"] = "fast"
    reader = read(write(tmp_path / "ledger.jsonl", [row(1), wrong]))
    with pytest.raises(InvalidSetting, match=r"^Line 2 of .* train\.timings\[3\]\.seconds is 'fast' and must be"):
        status_of(reader.runs["one"])


def test_the_summary_of_a_round_leaves_out_nothing_that_it_shows(tmp_path: Path) -> None:
    """Long lists are cut out of a line before it is parsed: the summary is that of the whole row."""
    rows = [
        row(1, holders=[[0, 1]] * 6, rejected=[rejected(1, '"asked": [1, 2]')], late=[late(2, "train 1")]),
        row(2, outcome="approximate", straggling=[1], **{"filled-in": [{"shards": [1, 4], "round": 1}]}),
        row(3, joined=[1, None], restarted=[2], evaluate=phase(outcome="skipped", rejected=[rejected(3, "no data")])),
    ]
    reader = read(write(tmp_path / "ledger.jsonl", rows))
    assert reader.runs["one"].rounds == [RoundLine.of(one) for one in typed(rows)]
    assert [one.events for one in reader.runs["one"].rounds] == [
        ("1 failed",),
        ("2 shards filled in",),
        ("1 failed to evaluate", "2 joined", "1 restarted"),
    ]


def test_a_reason_with_brackets_and_quotes_is_read_as_it_is(status: Made) -> None:
    reason = 'KeyError: "asked": [1, 2], "timings": [] \\'
    told = status([row(i, rejected=[rejected(1, reason)], straggling=[1]) for i in (1, 2, 3)])
    assert worker(told, 1).reasons == (FailureLine("error", reason, 3),)


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


def test_rounds_in_which_no_node_was_asked_are_shown(status: Made) -> None:
    idle = row(1)
    idle["train"] = None
    del idle["way"]
    told = status([idle, {**idle, "round": 2, "ended-by": "ValueError: no"}])
    assert told.outcomes == {"ended": 2} and told.workers == () and told.sending == "nothing yet"
    assert told.last.waiting is None and told.seconds["between rounds"] is None
    assert "! The run ended in round 2: ValueError: no." in shown(told)
    assert "No worker was asked in these rounds." in shown(told)
    json.dumps(as_json(told, 10), allow_nan=False)


def shown(told: RunStatus) -> str:
    """The page of a status, as it is printed."""
    console = Console(file=StringIO(), width=200)
    console.print(draw_status(told, None, rounds=10, now=0.0, others=0, ascii_only=True))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


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
    promise = {
        "unit": "record", "noise": "shared", "noise-multiplier": 1.0, "clipping-norm": 1.0, "sample-rate": 0.1,
        "steps": 2, "delta": 1e-5, "accountant": "prv", "epsilon-told": None, "epsilon-told-all-runs": None,
        "other-requests": {},
    }  # fmt: skip
    spent = [{**promise, "epsilon": 0.5 * i} for i in (1, 2)]
    told = status([row(1, privacy=spent[0]), row(2, privacy=spent[1]), row(3, privacy=None)])
    assert told.privacy is not None and told.privacy.epsilon == 1.0
    assert as_json(told, 1)["privacy"] == spent[1]
    assert "privacy of a record so far: epsilon 1, delta 1e-05" in shown(told)


def test_how_it_sends_is_told_also_where_it_is_chosen_anew(status: Made) -> None:
    rows = [row(1), row(2)]
    assert status(rows).sending == "coded vectors of 3 shards"
    rows[1]["way"] = {"send": "shards", "patience": 2.0, "load": 1}
    assert status(rows).sending == "chosen from round to round, now one shard a message, patience 2"
