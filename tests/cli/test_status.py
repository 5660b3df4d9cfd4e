"""`fl-gradcode status`: one look, or one after the other; on a terminal, in a pipe, as JSON."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.status_calling import rows, status
from tests.runlog.ledger_rows import CODE, rejected, row, write

# One look


def test_in_a_pipe_it_fits_a_hundred_columns_without_colours(tmp_path: Path) -> None:
    wrong = [rejected(4, "ValueError: " + "no such file or directory " * 9)]
    late = rows(*range(1, 30), straggling=[1, 2, 3, 4], rejected=wrong, kappa=2.5, outcome="approximate")
    code, out, err = status(write(tmp_path / "ledger.jsonl", late))
    assert code == 0 and not err
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines() if "strategy =" not in line) <= 100


def test_the_page_tells_rounds_workers_and_what_to_do(tmp_path: Path) -> None:
    ledger = rows(*range(1, 15), seconds=[8.0, 1.0, 1.0, 1.0, 1.0, 1.0], **{"ended-at": time.time() - 30})
    _, out, _ = status(write(tmp_path / "ledger.jsonl", ledger), "--rounds", "3")
    assert "fractional repetition, n=6 workers, k=6 shards, s=2; sends coded vectors of 3 shards" in out
    assert re.search(r"14 rounds: 14 exact; the last, round 14, 3\d\.?\d* s ago", out)
    assert "waiting 66.7%, decoding 8.3%, aggregating 25.0%" in out
    assert re.findall(r"^ +(\d+)  exact", out, re.MULTILINE) == ["12", "13", "14"]
    assert re.search(r"0 +14/14 +0 +0 +8 s +50% +8.00x +14 +always slow", out)
    assert "Recommended by the times of the last 14 rounds:\nCode: " in out
    assert "\n    strategy = GradientCoding(strategy, " in out


def test_rounds_with_updates_of_earlier_rounds_say_how_old_they_are(tmp_path: Path) -> None:
    way = {"send": "shards", "patience": 2.0, "load": 1}
    filled = {"filled-in": [{"shards": [4], "round": 1}, {"shards": [5], "round": 0}]}
    ledger = [
        {**row(1, ages=[6]), "way": way},
        {**row(2, outcome="stale", ages=[4, 1, 1], **filled), "way": way},
    ]
    _, out, _ = status(write(tmp_path / "ledger.jsonl", ledger))
    assert "\nUpdates that were used are up to 2 rounds old, 0.25 on average\n" in out
    assert re.search(r"^ +2  stale .* mean age 0.5, oldest 2$", out, re.MULTILINE) and "filled in" not in out


def test_the_line_to_paste_is_never_broken(tmp_path: Path) -> None:
    slow = {0, 15}  # in one group of two
    code = {**CODE, "n": 30, "k": 30}
    path = write(
        tmp_path / "ledger.jsonl",
        rows(*range(1, 8), code=code, seconds=[(9.0 if i in slow else 1.0) * (1 + i / 100) for i in range(30)]),
    )
    python = json.loads(status(path, "--json")[1])["advice"]["python"]
    assert len(python) > 100 and f"\n    {python}\n" in status(path)[1]


@pytest.mark.parametrize(
    ("seconds", "told"), [(1e-5, "< 1 ms"), (0.01234, "12.3 ms"), (1800.0, "1800 s"), (9e4, "25 h")]
)
def test_short_and_long_waits_fit_their_column(seconds: float, told: str, tmp_path: Path) -> None:
    ledger = rows(1, 2, **{"decodable-after-seconds": seconds, "decodable-after-replies": 1000})
    for one in ledger:
        one["train"]["seconds"]["waiting"] = seconds
    _, out, _ = status(write(tmp_path / "ledger.jsonl", ledger), "--no-plan")
    assert re.search(rf"2  exact +{told} +1000 in {told} ", out)


def test_the_plan_can_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", rows(*range(1, 10)))
    assert "Recommended" not in status(path, "--no-plan")[1]
    assert json.loads(status(path, "--no-plan", "--json")[1])["advice"] is None


def test_too_few_rounds_for_a_plan_are_told(tmp_path: Path) -> None:
    _, out, _ = status(write(tmp_path / "ledger.jsonl", rows(1, 2)))
    assert "No recommendation yet: 2 of the last rounds left job times, 5 are needed." in out


def test_warnings_stand_above_the_rounds(tmp_path: Path) -> None:
    lost = rows(3, straggling=[0, 2, 4], outcome="skipped", ended="hopeless")
    _, out, _ = status(write(tmp_path / "ledger.jsonl", [*rows(1, 2), *lost]))
    assert 0 < out.index("! Round 3 was not exact (skipped)") < out.index("decodable after")


def test_a_run_that_stands_still_is_told(tmp_path: Path) -> None:
    long_ago = [row(i, **{"ended-at": time.time() - 4000 + 4 * i}) for i in (1, 2)]
    assert "the run is over, or it hangs" in status(write(tmp_path / "ledger.jsonl", long_ago))[1]
    just_now = [row(i, **{"ended-at": time.time() + 4000 + 4 * i}) for i in (1, 2)]  # somebody else's clock
    _, out, _ = status(write(tmp_path / "ledger.jsonl", just_now))
    assert "hangs" not in out and "round 2, 0 s ago" in out


def test_of_many_workers_those_worth_a_look_are_listed(tmp_path: Path) -> None:
    code = {**CODE, "n": 1000, "k": 1000}
    ledger = rows(1, 2, 3, code=code, seconds=[9.0, 9.0, *[1.0] * 998], straggling=range(900))
    _, out, _ = status(write(tmp_path / "ledger.jsonl", ledger), "--no-plan")
    assert out.count("always slow") == 2 and "and 996 more as expected" in out
    assert len(out.splitlines()) < 30 and "0 1 2 3 +896" in out


def test_many_that_fail_are_counted(tmp_path: Path) -> None:
    code = {**CODE, "n": 100, "k": 100}
    wrong = [rejected(i, f"OSError: {i}", node=i) for i in range(40)]
    ledger = rows(1, 2, 3, code=code, seconds=[1.0] * 100, rejected=wrong, straggling=range(40))
    _, out, _ = status(write(tmp_path / "ledger.jsonl", ledger), "--no-plan")
    assert "and 24 more failing, 60 more as expected" in out and "and 35 more failed: --json has their reasons" in out


def test_what_clients_write_cannot_steer_the_terminal(tmp_path: Path) -> None:
    reason = "\x1b[2J\x1b]0;owned\x07 [bold]E[/bold][/x]\r\nmore"
    _, out, _ = status(write(tmp_path / "ledger.jsonl", rows(1, 2, 3, rejected=[rejected(1, reason)])))
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out) and "[bold]E[/bold][/x]" in out


def test_the_last_run_is_shown_unless_another_is_named(tmp_path: Path) -> None:
    both = [*rows(1, 2, run="first"), *rows(1, run="second")]
    path = write(tmp_path / "ledger.jsonl", both)
    assert "Run second  (1 other run in this file: --run all)" in status(path)[1]
    assert "Run first" in status(path, "--run", "first")[1] and "Run first" in status(path, "--run", "fi")[1]
    _, out, _ = status(path, "--run", "all")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["first", "second"]
    code, out, err = status(path, "--run", "third")
    assert code == 2 and not out and "The run 'third' is not in the ledger; the ledger has 2" in err


def test_everything_is_there_as_json(tmp_path: Path) -> None:
    ledger = rows(*range(1, 21), rejected=[rejected(1, "x")], straggling=[1])
    told = json.loads(status(write(tmp_path / "ledger.jsonl", ledger), "--json", "--rounds", "4")[1])
    assert told["run"] == "one" and told["rounds-done"] == 20 and told["outcomes"] == {"exact": 20}
    assert [one["round"] for one in told["rounds"]] == [17, 18, 19, 20]
    assert told["workers"][0]["worker"] == 1 and told["workers"][0]["reasons"] == [
        {"kind": "error", "reason": "x", "rounds": 20}
    ]
    assert told["advice"]["python"] and told["seconds"]["waiting"] == 40.0 and told["other-runs"] == []
    everyone = json.loads(status(tmp_path / "ledger.jsonl", "--json", "--run", "all")[1])
    assert [one["run"] for one in everyone] == ["one"]


# Nothing to show


def with_timings(timings: list[Any]) -> bytes:
    """A row that is wrong only in a list that is not read for its summary."""
    return json.dumps(row(1, timings=timings)).encode() + b"\n"


@pytest.mark.parametrize("text", [None, "", '{"schema": 1, "run": "on'])
def test_without_a_round_it_says_so_in_one_sentence(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    if text is not None:
        path.write_text(text)
    code, out, err = status(path)
    assert code == 1 and not out and err.count("\n") == 1
    assert ("There is no file" if text is None else "has no rounds yet") in err and "--follow waits" in err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"nonsense\n", "Line 1 of the ledger"),
        (b'{"event": "x"}\n', "This is not a ledger row: it has no field 'schema'."),
        (b"\x80\x81\xff\n\x00\n", "Line 1 of the ledger"),
        (b'{"schema": 1, "train": {"seconds": 5}, "round": 1}\n', "This is not a ledger row: run is missing."),
        (with_timings([1, 2]), "train.timings[0] is 1 and must be an object"),
    ],
)
def test_a_file_that_is_no_ledger_gets_one_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for options in ((), ("--follow",)):
        code, out, err = status(path, *options)
        assert code == 2 and not out and err.count("\n") == 1
        assert err.startswith("fl-gradcode: ") and sentence in err


def test_a_folder_and_options_that_make_no_sense_get_one_sentence(tmp_path: Path) -> None:
    for arguments, sentence in (
        ((tmp_path,), "cannot be read: Is a directory"),
        ((tmp_path / "x", "--rounds", "0"), "--rounds 0 must be at least 1"),
        ((tmp_path / "x", "--until-round", "3"), "give --follow too"),
        ((tmp_path / "x", "--follow", "--every", "0"), "--every 0.0 must be"),
        ((tmp_path / "x", "--follow", "--until-round", "3", "--run", "all"), "--until-round 3 is about one run"),
    ):
        code, out, err = status(*arguments)
        assert code == 2 and not out and sentence in err and err.count("\n") == 1


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    code = {**CODE, "name": "[/b] mine"}
    path = write(tmp_path / "ledger.jsonl", rows(1, 2, run="[/x] a", code=code, ended="[/red]", outcome="skipped"))
    for more in ((), ("--run", "all")):
        exit_code, out, _ = status(path, "--no-plan", *more)
        assert exit_code == 0 and "[/x] a" in out and "[/b] mine" in out
