"""`fl-gradcode status --follow`: one look after the other, on a terminal, in a pipe, as JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.cli.status_calling import DEADLINE, LOOKED, QUICK, rows, status, writing
from tests.runlog.ledger_rows import write


def test_following_in_a_pipe_appends_a_line_for_each_new_round(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", rows(1, 2))
    with writing(path, [*rows(3, 4, straggling=[0, 2, 4], outcome="skipped"), *rows(5)]):
        code, out, _ = status(path, "--follow", "--until-round", "5", *QUICK)
    assert code == 0
    lines = re.findall(r"^ +(\d) .(\w+)", out, re.MULTILINE)
    assert lines == [("1", "exact"), ("2", "exact"), ("3", "skipped"), ("4", "skipped"), ("5", "exact")]
    assert out.count("Run one") == 1 and out.count("! Round") == 1


def test_following_waits_for_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with writing(path, rows(1, 2)):
        code, out, err = status(path, "--follow", "--until-round", "2", *QUICK)
    assert code == 0 and "Waiting for the first round" in err
    assert re.findall(r"^ +(\d)  exact", out, re.MULTILINE) == ["1", "2"]


def test_following_tells_a_round_again_that_a_resumed_run_has_run_again(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", rows(1, 2, 3))

    def resume() -> None:
        LOOKED.wait(DEADLINE)
        time.sleep(0.2)
        write(tmp_path / "new", [*rows(1, 2), *rows(3, resumed=True, outcome="approximate")]).replace(path)

    LOOKED.clear()
    thread = threading.Thread(target=resume)
    thread.start()
    with writing(path, rows(4), seconds=0.5):
        code, out, _ = status(path, "--follow", "--until-round", "4", *QUICK)
    thread.join(DEADLINE)
    assert code == 0
    assert re.findall(r"^ +(\d)  (\w+)", out, re.MULTILINE)[-3:] == [
        ("3", "exact"),
        ("3", "approximate"),
        ("4", "exact"),
    ]
    assert "resumed" in out


def test_following_goes_on_when_the_ledger_is_begun_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", rows(1, 2, 3))

    def begin_anew() -> None:
        LOOKED.wait(DEADLINE)
        time.sleep(0.3)
        path.write_text("")

    LOOKED.clear()
    thread = threading.Thread(target=begin_anew)
    thread.start()
    with writing(path, rows(1, 4, run="two"), seconds=0.8):
        code, out, err = status(path, "--follow", "--until-round", "4", *QUICK)
    thread.join(DEADLINE)
    assert code == 0 and "Traceback" not in err
    assert out.count("Run one") == 1 and out.count("Run two") == 1


def test_following_as_json_is_a_line_for_each_look_that_found_something(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", rows(1, 2))
    with writing(path, rows(3)):
        _, out, _ = status(path, "--follow", "--until-round", "3", "--json", "--no-plan", *QUICK)
    assert [json.loads(line)["rounds-done"] for line in out.splitlines()] == [2, 3]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from fl_gradcode.cli import main; main()", "status", *map(str, arguments)]


def test_control_c_ends_following_cleanly(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", rows(1, 2))
    with subprocess.Popen(
        command(path, "--follow"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored by jobs in the background
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if re.match(r" +2  exact", line):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
        assert "Traceback" not in process.stderr.read()


def test_on_a_terminal_the_page_is_drawn_anew_and_stays_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", rows(1, 2))
    reading, terminal = pty.openpty()
    shown, later = b"", rows(3)
    with subprocess.Popen(
        command(path, "-f", "--until-round", "3", "--no-plan", *QUICK), stdout=terminal, stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "60"},
    ) as process:  # fmt: skip
        os.close(terminal)
        with suppress(OSError):  # Linux: the other end is closed
            while piece := os.read(reading, 65536):
                shown += piece
                if later and b"2 rounds: 2 exact" in shown:
                    with path.open("a") as file:
                        file.write(json.dumps(later.pop()) + "\n")
        assert process.wait(DEADLINE) == 0
    os.close(reading)
    text = shown.decode()
    assert "\x1b[" in text and "2 rounds: 2 exact" in text
    last = text[text.rindex("Run one") :]
    assert "3 rounds: 3 exact" in last and "as expected" not in last and "Workers, in the last 3 rounds" in last
