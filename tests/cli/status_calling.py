"""`fl-gradcode status` called as a user does, while a run writes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from typer.testing import CliRunner

from fl_gradcode.cli.app import app
from tests.runlog.ledger_rows import row

DEADLINE = 120.0
QUICK = ("--every", "0.02")


#: Set once a command that follows has had its first look; a busy machine takes its time until then.
LOOKED = threading.Event()


class _Clock:
    """The module `time`, which tells when somebody waits for the next look."""

    def sleep(self, seconds: float) -> None:
        LOOKED.set()
        time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def status(*arguments: str | Path) -> tuple[int, str, str]:
    with mock.patch("fl_gradcode.cli.status.time", _Clock()):
        result = CliRunner().invoke(app, ["status", *map(str, arguments)], env={"COLUMNS": "300"})
    return result.exit_code, result.stdout, result.stderr


def rows(*numbers: int, **fields: Any) -> list[dict[str, Any]]:
    return [row(i, **fields) for i in numbers]


@contextmanager
def writing(path: Path, later: Sequence[dict[str, Any]], seconds: float = 0.1) -> Iterator[None]:
    """Appends rows, one after the other, once the command has had its first look; each in two pieces."""
    LOOKED.clear()

    def append() -> None:
        LOOKED.wait(DEADLINE)
        for one in later:
            time.sleep(seconds)
            text = json.dumps(one) + "\n"
            with path.open("a") as file:
                file.write(text[:99])
                file.flush()
                time.sleep(seconds)
                file.write(text[99:])

    thread = threading.Thread(target=append)
    thread.start()
    try:
        yield
    finally:
        thread.join(DEADLINE)
