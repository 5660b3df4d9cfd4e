"""The ledger: one row a round, so that nothing is silent.

A row is a dict that JSON can hold: what was asked, held back, answered, used, late, rejected and why; when the
round became decodable; how exact it is; bytes and seconds. `docs/ledger.md` explains every field.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._files import followed, replace_file
from ..errors import InvalidSetting

__all__ = ["Ledger"]

_log = logging.getLogger(__name__)


class Ledger:
    """Rows of a run, in memory and, if a path is named, as JSON lines in a file.

    Args:
        path: File to append to; its folder is made. It must be absolute, since inside an app the working
            folder is the engine's. None keeps the rows in memory only.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.path = None if path is None else Path(path)
        if self.path is not None:
            if not self.path.is_absolute():
                raise InvalidSetting(
                    f"The ledger's path {str(path)!r} is relative; inside an app the working folder is the "
                    "engine's, not yours. Give an absolute path."
                )
            if self.path.is_dir():
                raise InvalidSetting(f"The ledger's path {str(path)!r} is a folder; name a file in it.")
            with self._writing():
                self.path = followed(self.path)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.open("a").close()
                self._mend()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidSetting(f"The ledger {str(self.path)!r} cannot be written: {error.strerror}.") from error

    def append(self, row: dict[str, Any]) -> None:
        """Keep a row, write it, and log it as one readable line for each phase.

        Raises:
            InvalidSetting: It cannot be written. What was written of it is cut off by whoever opens the file next.
        """
        self.rows.append(row)
        if self.path is not None:
            with self._writing(), self.path.open("a") as file:
                file.write(json.dumps(_storable(row), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint is written after it, and must not be there without it
        for kind in ("train", "evaluate"):
            if row.get(kind):
                _log.info("%s", _readable(row, kind))

    def rows_of(self, run: str) -> list[dict[str, Any]]:
        """All rows of a run that the file has."""
        return [] if self.path is None else [row for row in self.read(self.path) if row.get("run") == run]

    def resume(self, run: str, rounds: int) -> list[dict[str, Any]]:
        """Leave out the rows of a run behind its round `rounds`: those rounds will be run again.

        Returns:
            The run's rows that stay, which are also put into `rows`.
        """
        if self.path is None:
            return []
        every = self.read(self.path)
        kept = [row for row in every if row.get("run") != run or row.get("round", 0) <= rounds]
        if len(kept) < len(every):
            with self._writing():
                replace_file(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
        self.rows = [row for row in kept if row.get("run") == run]
        return self.rows

    def _mend(self) -> None:
        """Cut off a last line that was being written when its process was killed."""
        assert self.path is not None
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            try:
                json.loads(content[end:])
            except ValueError:
                if not content[end:].startswith(b'{"run"'[: len(content) - end]):
                    raise InvalidSetting(
                        f"{str(self.path)!r} is no ledger, and nothing was written to it: name another file."
                    ) from None
                os.truncate(self.path, end)
            else:
                with self.path.open("ab") as file:
                    file.write(b"\n")

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """The rows of a ledger file.

        Raises:
            InvalidSetting: There is no such file, or a line is not JSON.
        """
        try:
            lines = Path(path).read_text().splitlines()
        except OSError as error:
            raise InvalidSetting(f"The ledger {str(path)!r} cannot be read: {error.strerror}.") from error
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InvalidSetting(f"Line {number} of the ledger {str(path)!r} is not JSON: {error}.") from error
        return rows


def _storable(value: Any) -> Any:
    """What JSON can hold: a number that is not finite becomes null, since no row may be lost over it."""
    if isinstance(value, dict):
        return {key: _storable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _readable(row: dict[str, Any], kind: str) -> str:
    phase = row[kind]
    parts = [
        f"round {row['round']} {kind}: {phase['outcome']} after {phase['seconds']['waiting']:.2f} s from "
        f"{len(phase['used'])} of {phase['workers']} workers"
    ]
    for name, title in (("stragglers", "stragglers"), ("held-back", "held back")):
        if phase[name]:
            parts.append(f"{title} {', '.join(map(_name, phase[name]))}")
    if phase["late"]:
        parts.append("late " + ", ".join(_late(one) for one in phase["late"]))
    for one in phase["rejected"]:
        parts.append(f"worker {_name(one['worker'])} rejected: {one['reason']}")
    if phase["outcome"] == "approximate":
        parts.append(f"decoding error {phase['decoding-error']:.3g}")
    return "; ".join(parts)


def _name(worker: int | None) -> str:
    """A worker's number; "?" for a node that has not said yet who it is."""
    return "?" if worker is None else str(worker)


def _late(one: dict[str, Any]) -> str:
    return f"{_name(one['worker'])} ({one['from']}{': ' + one['reason'] if 'reason' in one else ''})"
