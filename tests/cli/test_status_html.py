"""`status --html`: one page that needs nothing else, kept up to date while a run goes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fl_gradcode.cli.app import app
from tests.runlog.ledger_rows import rejected, row, write

HOLDERS = [[0, 2, 4], [1, 3, 5]] * 3


class Page(HTMLParser):
    """Texts, tags that were left open, and every address in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(folder: Path, rows: list[dict[str, Any]], *options: str) -> str:
    ledger, page = write(folder / "ledger.jsonl", rows), folder / "page.html"
    result = CliRunner().invoke(app, ["status", str(ledger), "--html", str(page), *options])
    assert result.exit_code == 0, result.output
    return page.read_text()


def rows(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [row(number, **{"ended-at": 1000.0 + number}, **fields) for number in range(1, count + 1)]


def test_the_page_says_what_the_terminal_says(tmp_path: Path) -> None:
    slow = rows(8, seconds=(1.0, 8.0, 1.0, 1.0, 1.0, 1.0), straggling=[1])
    slow[0]["holders"] = HOLDERS
    text = page_of(tmp_path, slow)
    page = Page(text)
    told = " ".join(page.texts)
    for expected in ("Run one", "8 rounds: 8 exact", "8 of 8", "always slow", "Recommended", "GradientCoding("):
        assert expected in told
    assert not page.open and not page.addresses, "the page needs nothing else"
    assert "http://" not in text and "https://" not in text and "refresh" not in text
    assert text.count("<rect") == 8


def test_what_clients_say_is_text(tmp_path: Path) -> None:
    reason = "<script>alert(1)</script>\x1b[31m" + "x" * 5000
    text = page_of(tmp_path, rows(6, rejected=[rejected(2, reason)], straggling=[2], run="<b>run</b>"), "--no-plan")
    assert "<script>alert" not in text and "<b>run" not in text and "\x1b" not in text
    assert "&lt;script&gt;alert(1)" in text and "x" * 1000 not in text
    assert not Page(text).open


def test_a_long_run_and_many_workers_stay_small(tmp_path: Path) -> None:
    many = {"seconds": (1.0,) * 150}
    code = {"name": "fractional repetition", "n": 150, "k": 150, "s": 2, "m": 1}
    text = page_of(tmp_path, rows(700, code=code, **many), "--no-plan")
    assert len(text) < 150_000
    assert text.count("<rect") <= 240 and "longest of 3 rounds" in text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--html", "page.txt"], "ends with .html"),
        (["--html", "page.html", "--run", "all"], "shows one run"),
    ],
)
def test_a_page_that_cannot_be_is_refused(tmp_path: Path, options: list[str], why: str) -> None:
    result = CliRunner().invoke(app, ["status", str(write(tmp_path / "l.jsonl", rows(1))), *options])
    assert result.exit_code == 2 and why in result.output


def test_the_page_follows_the_run_and_rests_at_its_end(tmp_path: Path) -> None:
    ledger, page = write(tmp_path / "ledger.jsonl", rows(2)), tmp_path / "page.html"
    options = ["--no-plan", "-f", "--every", "0.05", "--until-round", "3", "--html", str(page)]
    program = "from fl_gradcode.cli import main; main()"
    command = [sys.executable, "-c", program, "status", str(ledger), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not page.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        during = page.read_text()
        write(ledger, rows(3))
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert 'http-equiv="refresh"' in during and "2 rounds: 2 exact" in during
    after = page.read_text()
    assert "refresh" not in after and "3 rounds: 3 exact" in after
    assert re.search(r"<title>Round 3 of one</title>", after)
