"""The ledger: one row for each round, in memory and in a file.

Several runs may write one file in turns. Each of them locks it for the moment in which it writes. `docs/ledger.md`
explains every field of a row.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from .._files import absolute_path, followed, lock, make_folder, open_file, parse_json, replace_file, sync_folder
from .._text import numbered
from ..errors import InvalidSetting
from .lines import every_line, object_of, row_of
from .rows import PHASES, Late, PhaseKind, RoundRow

__all__ = ["Ledger"]

_log = logging.getLogger(__name__)
_BEGINNING = b'{"schema": '  # of every line
_IN_MEMORY = 256  # rows
_PATIENCE = 10.0  # seconds in which another program should have written its row
_BLOCK = 1 << 16


class Ledger:
    """The rows of a run, in memory and, if a path is given, as JSON lines in a file.

    Args:
        path: File to append to; missing folders are created. The path must be absolute, since inside an app the
            working folder is the engine's. None keeps the rows in memory only.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        #: The rows as typed values, oldest first; if there is a file, which has them all, the last 256 or more.
        self.rounds: list[RoundRow] = []
        self.path = None if path is None else absolute_path(path, "ledger")
        if self.path is not None:
            if self.path.is_dir():
                raise InvalidSetting(f"The ledger's path {str(path)!r} is a folder; name a file in it.")
            with self._writing():
                self.path = followed(self.path)
                make_folder(self.path.parent)
                with self._locked() as file:
                    sync_folder(self.path.parent)
                    self._mend(file)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `rounds` as JSON values, as they stand in the file, oldest first."""
        return [row.to_json() for row in self.rounds]

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, open for reading and appending, which no other run writes to meanwhile.

        Raises:
            InvalidSetting: Another program keeps it locked.
            OSError: It cannot be opened.
        """
        assert self.path is not None
        while True:
            with os.fdopen(open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "r+b") as file:
                # A file system without locks gives another error: then rows are whole all the same, as they are short.
                if isinstance(lock(file, seconds=_PATIENCE), BlockingIOError):
                    raise InvalidSetting(
                        f"The ledger {str(self.path)!r} is locked by another program: end that one, or name another "
                        "file."
                    )
                here = os.fstat(file.fileno())
                with suppress(FileNotFoundError):
                    there = self.path.stat()
                    if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                        yield file
                        return
            # Another run has replaced the file since it was opened.

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidSetting(f"The ledger {str(self.path)!r} cannot be written: {error.strerror}.") from error

    def append(self, row: RoundRow) -> dict[str, Any]:
        """Keeps a row, writes it to the file, and logs one readable line for each of its phases.

        Returns:
            The row as JSON values.

        Raises:
            InvalidSetting: The file cannot be written. A partly written row is cut off when the file is next opened.
        """
        values = row.to_json()
        self.rounds.append(row)
        if self.path is not None and len(self.rounds) >= 2 * _IN_MEMORY:
            del self.rounds[:-_IN_MEMORY]
        if self.path is not None:
            with self._writing(), self._locked() as file:
                self._mend(file)  # another program may have been killed while it wrote
                file.write(_line(values).encode())
                file.flush()
                os.fsync(file.fileno())  # a checkpoint is written after it, and must not be there without it
        for kind in PHASES:
            if row.phase(kind) is not None:
                _log.info("%s", _readable(row, kind))
        return values

    def rows_of(self, run: str) -> list[RoundRow]:
        """Returns the rows of a run that are in the file, oldest first."""
        return [] if self.path is None else [row for row in self.read_rounds(self.path) if row.run == run]

    def resume(self, run: str, rounds: int) -> list[RoundRow]:
        """Deletes the rows of a run after its round `rounds` from the file, since those rounds will be run again.

        Returns:
            The last remaining rows of the run, which also replace `self.rounds`.
        """
        if self.path is None:
            return []
        with self._writing(), self._locked():
            every = self.read_rounds(self.path)
            kept = [row for row in every if row.run != run or row.round <= rounds]
            if len(kept) < len(every):
                replace_file(self.path, "".join(_line(row.to_json()) for row in kept))
        self.rounds = [row for row in kept if row.run == run][-_IN_MEMORY:]
        return self.rounds

    def tell_lost(self, run: str, rounds: Iterable[int]) -> None:
        """Logs a warning if rows of these rounds of a run are missing in the file, since they have been written."""
        lost = sorted({*rounds} - {row.round for row in self.rows_of(run)}) if self.path is not None else []
        if lost:
            _log.warning(
                "The ledger %s has no row of %s of run %s, which the checkpoint has: rows were lost, or the file is "
                "another one.",
                self.path,
                numbered("round", lost),
                run,
            )

    def recall(self, run: str, rounds: int) -> None:
        """Replaces `self.rounds` by the run's rows up to round `rounds`, as they stand in the file."""
        self.rounds = [row for row in self.rows_of(run) if row.round <= rounds][-_IN_MEMORY:]

    def _mend(self, file: IO[bytes]) -> None:
        """Cuts off a last line that was being written when its process was killed.

        Raises:
            InvalidSetting: It is no line of a ledger.
        """
        end = file.seek(0, os.SEEK_END)
        rest = b""
        while end and b"\n" not in rest:
            start = max(0, end - _BLOCK)
            file.seek(start)
            rest, end = file.read(end - start) + rest, start
        rest = rest[rest.rfind(b"\n") + 1 :]
        if not rest:
            return
        try:
            parse_json(rest)
        except ValueError:
            if not rest.startswith(_BEGINNING[: len(rest)]):
                raise InvalidSetting(
                    f"{str(self.path)!r} is not a ledger, and nothing was written to it: name another file."
                ) from None
            file.truncate(file.seek(0, os.SEEK_END) - len(rest))
        else:
            file.write(b"\n")
            file.flush()

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """Returns the rows of a ledger file as JSON values, oldest first.

        Raises:
            InvalidSetting: The file cannot be read, or a line is no JSON object.
        """
        return [object_of(text, where) for where, text in every_line(path)]

    @staticmethod
    def read_rounds(path: str | os.PathLike[str]) -> list[RoundRow]:
        """Returns the rows of a ledger file as typed values, oldest first.

        Raises:
            InvalidSetting: The file cannot be read, or a line is not a ledger row.
        """
        return [row_of(text, where) for where, text in every_line(path)]


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def _readable(row: RoundRow, kind: PhaseKind) -> str:
    """Returns one line for people about a phase of a row."""
    phase = row.phase(kind)
    assert phase is not None
    parts = [
        f"round {row.round} {kind}: {phase.outcome} after {phase.seconds.waiting or 0.0:.2f} s from "
        f"{len(phase.used)} of {phase.workers} workers"
    ]
    for title, workers in (("stragglers", phase.stragglers), ("held back", phase.held_back)):
        if workers:
            parts.append(f"{title} {', '.join(map(_name, workers))}")
    if phase.late:
        parts.append("late " + ", ".join(map(_late, phase.late)))
    parts += [f"worker {_name(one.worker)} rejected: {one.reason}" for one in phase.rejected]
    if phase.outcome == "stale":
        age = len(phase.ages) - 1
        old = "1 round old" if age == 1 else f"{age} rounds old"
        parts.append(f"updates of {phase.ages[0]} of {sum(phase.ages)} shards are of this round, the oldest is {old}")
    if phase.outcome == "approximate" and phase.decoding_error is not None:
        parts.append(f"decoding error {phase.decoding_error:.3g}")
    return "; ".join(parts)


def _name(worker: int | None) -> str:
    """Returns a worker's number, or "?" for a node that has not said yet which worker it is."""
    return "?" if worker is None else str(worker)


def _late(one: Late) -> str:
    return f"{_name(one.worker)} ({one.from_}{'' if one.reason is None else f': {one.reason}'})"
