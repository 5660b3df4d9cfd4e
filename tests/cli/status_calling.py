"""`fl-gradcode status` called as a user does, while a run writes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fl_gradcode.cli.app import app
from tests.runlog.ledger_rows import row

DEADLINE = 120.0
QUICK = ("--every", "0.02")


def status(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["status", *map(str, arguments)], env={"COLUMNS": "300"})
    return result.exit_code, result.stdout, result.stderr


def rows(*numbers: int, **fields: Any) -> list[dict[str, Any]]:
    return [row(i, **fields) for i in numbers]


@contextmanager
def writing(path: Path, later: Sequence[dict[str, Any]], seconds: float = 0.1) -> Iterator[None]:
    """Appends rows, one after the other, while the command runs; each in two pieces."""

    def append() -> None:
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
