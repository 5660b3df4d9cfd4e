"""Rows as a ledger has them, made for tests, and what is read from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fl_gradcode.runlog.reader import LedgerReader
from fl_gradcode.runlog.rows import SCHEMA, RoundRow
from fl_gradcode.runlog.status import RunStatus, status_of
from fl_gradcode.runlog.workers import WorkerLine

CODE = {"name": "fractional repetition", "n": 6, "k": 6, "s": 2, "m": 1}


def phase(*, seconds: Any = (1.0,) * 6, straggling: Any = (), asked: Any = 1, **fields: Any) -> dict[str, Any]:
    """An entry in which worker i took seconds[i]; None: it left no time."""
    good = [i for i in range(len(seconds)) if i not in straggling]
    timings = [
        {"worker": i, "kind": "train", "round": asked, "shards": 1, "seconds": one, "computing": one / 2}
        for i, one in enumerate(seconds)
        if one is not None
    ]
    told = {"waiting": 2.0, "decoding": 0.25, "aggregating": 0.75}
    return {
        "outcome": "exact", "ended": "decoded", "workers": len(seconds), "shards": [*range(len(seconds))],
        "asked": [*range(len(seconds))], "held-back": [], "answered": good, "unread": [], "used": good[:2],
        "stragglers": [*straggling], "rejected": [], "late": [], "decodable-after-replies": 2,
        "decodable-after-seconds": 1.5, "decoding-error": 0.0, "kappa": 1.0, "coverage": [1.0] * len(seconds),
        "replica-disagreement": 0.0, "timings": timings, "owing": [], "bytes-down": 100, "bytes-up": 10,
        "seconds": told, **fields,
    }  # fmt: skip


def row(server_round: int, *, run: Any = "one", code: Any = CODE, **fields: Any) -> dict[str, Any]:
    way = {"send": "coded", "patience": None, "load": 3}
    extra: dict[str, Any] = {
        name: fields.pop(name) for name in ("ended-at", "resumed", "ended-by", "evaluate", "holders") if name in fields
    }
    train = phase(asked=server_round, **fields)
    return {
        "schema": SCHEMA, "run": run, "flower-run-id": "1", "round": server_round, "ended-at": None, "code": code,
        "train": train, "evaluate": None, "way": way, **extra,
    }  # fmt: skip


def typed(rows: Sequence[dict[str, Any]]) -> list[RoundRow]:
    return [RoundRow.from_json(one) for one in rows]


def rejected(worker: int | None, reason: str, node: int = 7, kind: str = "error") -> dict[str, Any]:
    return {"worker": worker, "node": str(node), "kind": kind, "reason": reason}


def late(worker: int | None, asked: str, reason: str | None = None) -> dict[str, Any]:
    wrong = {} if reason is None else {"kind": "error", "reason": reason}
    return {"worker": worker, "node": "9", "from": asked, **wrong}


def write(path: Path, rows: Sequence[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows) + tail)
    return path


def read(path: Path) -> LedgerReader:
    reader = LedgerReader(path)
    reader.read()
    return reader


def status_of_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> RunStatus:
    """What status says of the last run of a ledger of these rows."""
    reader = read(write(folder / "ledger.jsonl", rows))
    assert reader.last is not None
    return status_of(reader.runs[reader.last])


Made = Callable[[Sequence[dict[str, Any]]], RunStatus]


def worker(status: RunStatus, number: int) -> WorkerLine:
    (found,) = [one for one in status.workers if one.worker == number]
    return found


def notices(status: RunStatus) -> dict[str, str]:
    return {one.key: one.text for one in status.notices}
