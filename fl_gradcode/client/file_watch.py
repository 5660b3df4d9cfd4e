"""Notices training that keeps something in a file: it reads one that was there before, and rewrites it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["FileWatch", "watching_files"]

_MOST = 4096  # files to remember of one call; a data set may have millions
_OTHER = ("/dev/", "/proc/", "/sys/")
_EVENTS = frozenset({"open", "os.rename", "sqlite3.connect"})


class FileWatch:
    """The files that one call has read.

    Attributes:
        rewritten: Names, without folders, of those that were there before the call, and were changed since they were
            read; known after the call.
    """

    def __init__(self) -> None:
        self.rewritten: tuple[str, ...] = ()
        self._began = time.time_ns()
        self._read: dict[str, tuple[int, ...]] = {}
        self._written: set[str] = set()

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """Note an event of Python's audit hooks."""
        if event == "sqlite3.connect":
            self._note(args[0], 0)
        elif event == "os.rename":
            self._note(args[1], os.O_WRONLY)
        elif event == "open" and isinstance(args[2], int):
            self._note(args[0], args[2])

    def _note(self, given: Any, flags: int) -> None:
        if not isinstance(given, str | bytes | os.PathLike) or len(self._read) >= _MOST:
            return
        path = os.path.abspath(os.fsdecode(given))
        if path.startswith(_OTHER) or path.endswith((".py", ".pyc")):
            return
        if flags & os.O_WRONLY or flags & os.O_TRUNC:
            self._written.add(path)  # what the call itself wrote before it read it is not kept from another call
        elif path not in self._read and path not in self._written:
            try:
                seen = _look(path)
            except OSError:
                return
            if seen[0] < self._began:
                self._read[path] = seen

    def close(self) -> None:
        """Find out which of the files were changed."""
        changed = []
        for path, seen in self._read.items():
            try:
                if _look(path) != seen:
                    changed.append(os.path.basename(path))
            except OSError:  # it is gone, so nothing is kept in it
                continue
        self.rewritten = tuple(changed)


def _look(path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size, found.st_ino


@contextmanager
def watching_files() -> Iterator[FileWatch]:
    """Notice which files this thread reads and rewrites in the block.

    Files are noticed that are opened by Python. Python never removes an audit hook: it stays, and does nothing outside
    such a block.
    """
    _install()
    watch, outer = FileWatch(), getattr(_here, "watch", None)
    _here.watch = watch
    try:
        yield watch
    finally:
        _here.watch = outer
        watch.close()


_here = threading.local()
_installed = threading.Lock()  # held for ever once the hook is there


def _install() -> None:
    if _installed.acquire(blocking=False):
        sys.addaudithook(_hear)


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if event not in _EVENTS:  # of which there are many: each header of an array is compiled
        return
    watch = getattr(_here, "watch", None)
    if watch is not None:
        try:
            watch.hear(event, args)
        except Exception:  # an exception here would end whatever the app does, and a missed file costs a warning
            return
