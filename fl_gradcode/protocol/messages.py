"""What can be told of a message without working on it: its load, its round, its size, its error."""

from __future__ import annotations

import contextlib
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from ..errors import VersionMismatch
from .records import Plan, Reply, is_probe

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
    """How many shards `message` asks `worker` to work on; 1 for a message without a plan."""
    plan = Plan.find_in(message.content)
    if plan is None:
        return 0 if is_probe(message.content) else 1
    row = plan.rows.get(worker)
    return len(row.shards) if row else 0


def loads_of(message: Message) -> dict[int, int]:
    """Worker -> how many shards it is asked for, of all that the plan names; empty for a message without a plan."""
    plan = Plan.find_in(message.content)
    return {} if plan is None else {worker: len(row.shards) for worker, row in plan.rows.items()}


def without_arrays(content: RecordDict) -> RecordDict:
    """The same without what is large."""
    return RecordDict({name: record for name, record in content.items() if not isinstance(record, ArrayRecord)})


def reply_part(message: Message, worker: int) -> float:
    """Which part of a model's length the reply has: 1/m under a code that divides updates by m, else 1."""
    plan = Plan.find_in(message.content)
    row = None if plan is None else plan.rows.get(worker)
    return 1 / len(row.coefficients[0]) if row and row.coefficients and row.coefficients[0] else 1.0


def round_of(message: Message) -> int | None:
    """The server round that a message belongs to: from its plan, or from the `server-round` that Flower sends."""
    plan = Plan.find_in(message.content)
    if plan is not None:
        return plan.round
    for record in message.content.values():
        if isinstance(record, ConfigRecord) and isinstance(record.get("server-round"), int):
            return int(record["server-round"])  # type: ignore[arg-type]
    return None


def is_evaluation(message: Message) -> bool:
    """Whether a message asks to evaluate."""
    return message.metadata.message_type.split(".")[0] == MessageType.EVALUATE


def computing_seconds(message: Message) -> float | None:
    """Seconds that the client says it spent on its shards; None if it does not say."""
    with contextlib.suppress(ValueError, VersionMismatch):
        reply = Reply.find_in(message.content) if message.has_content() else None
        if reply is not None and reply.seconds:
            return sum(reply.seconds)
    return None


def content_bytes(content: RecordDict) -> int:
    """Bytes of the payload: arrays as serialised, 8 a number, text as it is."""
    total = 0
    for record in content.values():
        if isinstance(record, ConfigRecord | MetricRecord):
            total += sum(_value_bytes(key) + _value_bytes(value) for key, value in record.items())
        else:
            total += sum(len(array.data) for array in record.values())
    return total


def _value_bytes(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return 8 * len(value) if isinstance(value, list) else 8
