"""Tasks and rows: a task is a frozen value with a stable hash, its result is one line of JSON; runs resume."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["Store", "Task", "provenance"]

ROOT = Path(__file__).resolve().parents[2]
_VERSION = 1  # of what a task means: raised when the same task would give another row


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        problem: Name in `PROBLEMS`.
        law: Name in `LAWS`; empty where time plays no part.
        scheme: Name in `SCHEMES`.
        seed: Of data split, initial model, batches and latencies.
        rounds: Server rounds.
        options: What is set besides, as sorted (name, value).
    """

    problem: str
    law: str
    scheme: str
    seed: int
    rounds: int
    options: tuple[tuple[str, float], ...] = ()

    @property
    def hash(self) -> str:
        """The same for equal tasks, in any process."""
        text = json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """Rows in a file of JSON lines, appended one by one: a killed run loses the task that it was at, and no more.

    A packed file (.gz), as the docs keep them, can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[str, dict[str, Any]]:
        """Hash -> row; a last line that was cut off is left out."""
        found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            packed = self.path.read_bytes()
            text = gzip.decompress(packed) if self.path.suffix == ".gz" else packed
            for line in text.decode().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    row = json.loads(line)
                    found[row["hash"]] = row
        return found

    def add(self, task: Task, result: dict[str, Any]) -> None:
        """Append a row, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"hash": task.hash, "task": asdict(task), **result, **provenance()}
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            data = b"\n" + data  # after a line that was cut off
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Those without a row, each once."""
        there = self.rows()
        return [task for task in dict.fromkeys(tasks) if task.hash not in there]


@cache
def provenance() -> dict[str, Any]:
    """Versions and commit of this code."""
    packages = {name: version(name) for name in ("flwr", "torch", "numpy", "scipy")}
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return {"versions": packages, "commit": commit}
