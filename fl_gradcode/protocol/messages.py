"""Reads facts about a message without processing it, such as its load, its round and its size."""

from __future__ import annotations

import contextlib
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from ..errors import VersionMismatch
from .records import PLAN, Plan, Reply, is_probe

__all__ = [
    "computing_seconds",
    "content_bytes",
    "is_evaluation",
    "load_of",
    "loads_of",
    "reply_part",
    "round_of",
    "without_arrays",
]


def load_of(message: Message, worker: int) -> int:
    """Returns how many shards `message` asks `worker` to work on; 1 for a message without a plan, 0 for a probe."""
    rows = Plan.rows_in(message.content)
    if rows is None:
        return 0 if is_probe(message.content) else 1
    row = rows.get(worker)
    return len(row.shards) if row else 0


def loads_of(message: Message) -> dict[int, int]:
    """Returns worker -> number of shards for all workers in the message's plan; empty without a plan."""
    rows = Plan.rows_in(message.content)
    return {} if rows is None else {worker: len(row.shards) for worker, row in rows.items()}


def without_arrays(content: RecordDict) -> RecordDict:
    """Returns the content without its ArrayRecords."""
    return RecordDict({name: record for name, record in content.items() if not isinstance(record, ArrayRecord)})


def reply_part(message: Message, worker: int) -> float:
    """Returns the length of the reply's vector relative to the model: 1/m under a code that divides updates, else 1."""
    row = (Plan.rows_in(message.content) or {}).get(worker)
    return 1 / len(row.coefficients[0]) if row and row.coefficients and row.coefficients[0] else 1.0


def round_of(message: Message) -> int | None:
    """Returns the server round of a message, from its plan or from Flower's `server-round`, or None."""
    plan = Plan.find_in(message.content)
    if plan is not None:
        return plan.round
    for record in message.content.values():
        if isinstance(record, ConfigRecord) and isinstance(record.get("server-round"), int):
            return int(record["server-round"])  # type: ignore[arg-type]
    return None


def is_evaluation(message: Message) -> bool:
    """Returns whether a message asks to evaluate."""
    return message.metadata.message_type.split(".")[0] == MessageType.EVALUATE


def computing_seconds(message: Message) -> float | None:
    """Returns the seconds that the client reports to have spent on its shards, or None if it reports none."""
    with contextlib.suppress(ValueError, VersionMismatch):
        reply = Reply.find_in(message.content) if message.has_content() else None
        if reply is not None and reply.seconds:
            return sum(reply.seconds)
    return None


def content_bytes(content: RecordDict, shared: dict[int, tuple[object, int]] | None = None) -> int:
    """Returns the size of the payload in bytes: arrays as serialised, 8 a number, 1 a character or byte.

    Args:
        content: The payload.
        shared: Sizes of records that several contents have in common, by their identity. It is extended, and keeps
            these records alive.
    """
    if shared is None:
        return sum(map(_record_bytes, content.values()))
    total = 0
    for name, record in content.items():
        known = shared.get(id(record))
        if known is None:
            known = record, _record_bytes(record)
            if name != PLAN:  # of which each message has its own
                shared[id(record)] = known
        total += known[1]
    return total


def _record_bytes(record: Any) -> int:
    if isinstance(record, ArrayRecord):
        return sum([len(array.data) for array in record.values()])
    total = 0
    for key, value in record.items():
        if isinstance(value, (str, bytes)):
            total += len(key) + len(value)
        else:
            total += len(key) + 8 * (len(value) if isinstance(value, list) else 1)
    return total
