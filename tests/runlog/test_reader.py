"""Rows are read from a ledger whatever version wrote it, and while it is being written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from fl_gradcode.errors import InvalidSetting
from fl_gradcode.runlog.reader import LedgerReader
from fl_gradcode.runlog.status import as_json, status_of
from tests.runlog.ledger_rows import Made, read, rejected, row, status_of_rows, worker, write


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
