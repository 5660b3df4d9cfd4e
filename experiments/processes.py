"""Processes that are started here and stopped here, with everything that they started themselves.

Flower's SuperLink and SuperNodes start a SuperExec each, in a session of its own, which outlives them by up to a minute
when they end in an unusual way; and that starts the ServerApp or ClientApps. Neither a signal to the group that we
started nor the tree of processes reaches all of them: they are known by a mark in their environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["Member", "Processes"]

_PROC = Path("/proc")
_MARK = "FL_GRADCODE_STARTED_AS"


@dataclass(frozen=True)
class Member:
    """A process: its number, what it runs, and when it began, since numbers are used again."""

    pid: int
    command: str
    began: str

    def runs(self) -> bool:
        """Whether it is still there, and not a zombie."""
        return _began(self.pid) == self.began

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self.runs():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


class Processes:
    """What was started, each with a log file of its own in `folder`.

    Args:
        folder: Where they run and log.
        environment: Their environment.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._mark = uuid.uuid4().hex
        self._marks: dict[int, str] = {}
        self._running: list[subprocess.Popen[bytes]] = []
        self._logs: list[IO[bytes]] = []

    def start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        """Start a command, logging to `name`.log."""
        with self._lock:
            if self.stopping.is_set():
                raise RuntimeError(f"{name} is not started any more: everything is being stopped.")
            log = (self.folder / f"{name}.log").open("ab")
            self._logs.append(log)
            mark = f"{self._mark}-{len(self._logs)}"
            # A session of its own: Ctrl-C in our terminal does not reach it, we stop it ourselves.
            process = subprocess.Popen(
                command,
                env={**self.environment, _MARK: mark},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._marks[process.pid] = mark
            self._running.append(process)
            return process

    def members(self, process: subprocess.Popen[bytes]) -> list[Member]:
        """The process and all that it has started, as far as they run; only itself where there is no /proc."""
        return _marked(f"{_MARK}={self._marks[process.pid]}")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End a process and all that it started by SIGKILL, as when its machine dies."""
        self._end([process], f"{_MARK}={self._marks[process.pid]}", patience=0.0)

    def stop(self, process: subprocess.Popen[bytes], *, patience: float = 10.0) -> None:
        """End a process by SIGTERM, as an operator does; whatever is there after `patience` seconds, by SIGKILL."""
        _terminate(process)
        self._end([process], f"{_MARK}={self._marks[process.pid]}", patience=patience)

    def stop_all(self, *, patience: float = 8.0) -> None:
        """End everything, the last started first; nothing can be started afterwards."""
        with self._lock:
            self.stopping.set()
            running = self._running[::-1]
        # SuperNodes first: a SuperLink that goes first leaves them retrying.
        for process in running:
            _terminate(process)
        self._end(running, f"{_MARK}={self._mark}-", patience=patience)
        for log in self._logs:
            log.close()
        self._logs.clear()

    def log(self, name: str) -> str:
        """What a process has logged."""
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def _end(self, processes: list[subprocess.Popen[bytes]], mark: str, *, patience: float) -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and (_alive(processes) or _marked(mark)):
            time.sleep(0.05)
        deadline = time.monotonic() + 8
        while _alive(processes) or _marked(mark):  # whoever is killed may have started another one just before
            for process in processes:
                if process.poll() is None:
                    process.kill()
            for member in _marked(mark):
                member.signal(signal.SIGKILL)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        with self._lock:
            self._running = [process for process in self._running if process not in processes]


def _terminate(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)


def _alive(processes: list[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() is None for process in processes)


def _marked(mark: str) -> list[Member]:
    """Running processes whose environment has this variable; or, if it ends in "-", one that begins like it."""
    wanted, found = mark.encode() if mark.endswith("-") else mark.encode() + b"\0", []
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if not entry.name.isdigit():
            continue
        try:
            environment = b"\0" + (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # another user's, or gone
            continue
        began = _began(int(entry.name))
        if began and b"\0" + wanted in environment:
            found.append(Member(int(entry.name), command, began))
    return found


def _began(pid: int) -> str:
    """When a process began, in ticks; nothing of a zombie, or of none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks
    return "" if fields[0] == "Z" else fields[19]
