"""What travels: the records that we add to Flower's messages, their names and their form.

Server to node: the user's records, plus `fl-gradcode.plan`. Node to server: `fl-gradcode.update`, the coded
vectors, plus `fl-gradcode.reply`, what they mean. Record names are spelled here and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict

__all__ = [
    "ARRAYS",
    "METRICS",
    "NUM_PARTITIONS",
    "PARTITION_ID",
    "UPDATE",
    "Plan",
    "Reply",
    "Row",
    "computing_seconds",
    "content_bytes",
    "error_text",
    "is_evaluation",
    "is_probe",
    "last_line",
    "load_of",
    "loads_of",
    "plan_bytes",
    "probe_content",
    "reply_part",
    "report_key",
    "round_of",
]

_PLAN = "fl-gradcode.plan"
_REPLY = "fl-gradcode.reply"
_PROBE = "fl-gradcode.probe"
_JSON = "json"

#: Name of the ArrayRecord that holds the coded vectors. A name of its own makes a mod that expects model
#: arrays (clipping, local privacy) fail loudly instead of clipping a coded sum.
UPDATE = "fl-gradcode.update"
#: The two arrays in it: the coded update, and the coded weight and metrics.
ARRAYS, METRICS = "arrays", "metrics"

#: What a reply can be; see `Reply`.
OUTCOMES = ("coded", "idle", "gave-up", "fixed-data")

#: Flower's own keys of `Context.node_config`, in which a shard number is written for `train()`.
PARTITION_ID, NUM_PARTITIONS = "partition-id", "num-partitions"


@dataclass(frozen=True)
class Row:
    """One worker's row of the encoding matrix: `coefficients[t]` holds the m numbers for `shards[t]`."""

    shards: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Plan:
    """What a node is asked to do in one phase of one round.

    Attributes:
        run: Our own name of the run, kept over a resume.
        seed: What all holders of a shard derive their random seeds from.
        round: The server round, from 1.
        kind: "train" or "evaluate".
        n, k: Workers and shards of the code.
        weight_key: The metric that holds the number of examples.
        arrays_key: The ArrayRecord of the message that training starts from; empty when evaluating.
        rows: Worker number -> its row: all workers', as long as the server does not know which node this is.
        give_up_after: Seconds after which a client stops between two shards; 0: never.
        allow_fixed_data: Whether an app that does not choose its data by `partition-id` is accepted.
        fraction_bits: Of the fixed point, under a code over a prime field; None: replies are floats.
    """

    run: str
    seed: int
    round: int
    kind: str
    n: int
    k: int
    weight_key: str
    arrays_key: str
    rows: dict[int, Row]
    give_up_after: float = 0.0
    allow_fixed_data: bool = False
    fraction_bits: int | None = None

    @property
    def label(self) -> str:
        """For people and the ledger: "train 3"."""
        return f"{self.kind} {self.round}"

    def for_worker(self, worker: int) -> Plan:
        """The plan with this worker's row alone."""
        return replace(self, rows={worker: self.rows[worker]})

    def add_to(self, content: RecordDict) -> RecordDict:
        """A new RecordDict with the same records and this plan; strategies may share one object."""
        values = dict(vars(self))
        values["rows"] = {i: [row.shards, row.coefficients] for i, row in self.rows.items()}
        return RecordDict({**content, _PLAN: ConfigRecord({_JSON: json.dumps(values)})})

    @classmethod
    def find_in(cls, content: RecordDict) -> Plan | None:
        """The plan of a message, or None."""
        record = content.get(_PLAN)
        return _parse_plan(str(record[_JSON])) if isinstance(record, ConfigRecord) else None

    @staticmethod
    def remove_from(content: RecordDict) -> RecordDict:
        """A new RecordDict with all other records."""
        return RecordDict({key: value for key, value in content.items() if key != _PLAN})


@dataclass(frozen=True)
class Reply:
    """What a node says about its coded vectors.

    Attributes:
        run, round, kind: Copied from the plan.
        worker: Who answers: the node's own `partition-id`.
        outcome: "coded"; "idle" (the row is empty), "gave-up" (after `give_up_after`), or "fixed-data" (the
            app did not read `partition-id`): the last three carry no vectors.
        shards: The shards that were combined.
        layout: Name, dtype and shape of each array as `train()` returned it.
        metrics_layout: Name, length (-1: a scalar) and whether whole numbers, of the weight and each metric.
        arrays_name, metrics_name: The user's names of the two records.
        sketches: A few numbers per shard in which holders that disagree differ.
        seconds: Compute seconds of each shard.
        stateful: Whether the function kept something in `context.state`.
        fixed_data: Whether it never read `partition-id`.
    """

    run: str
    round: int
    kind: str
    worker: int
    outcome: str
    shards: tuple[int, ...] = ()
    layout: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    metrics_layout: tuple[tuple[str, int, bool], ...] = ()
    arrays_name: str = ""
    metrics_name: str = ""
    sketches: tuple[tuple[float, ...], ...] = ()
    seconds: tuple[float, ...] = field(default=())
    stateful: bool = False
    fixed_data: bool = False

    def to_record(self) -> ConfigRecord:
        """This reply as a record."""
        return ConfigRecord({_JSON: json.dumps(vars(self))})

    def content(self, **records: Any) -> RecordDict:
        """A RecordDict with this reply and further records."""
        return RecordDict({_REPLY: self.to_record(), **records})

    @classmethod
    def find_in(cls, content: RecordDict) -> Reply | None:
        """The reply record of a message, or None.

        Raises:
            ValueError: The record is there and cannot be read.
        """
        record = content.get(_REPLY)
        if not isinstance(record, ConfigRecord):
            return None
        try:
            v = json.loads(str(record[_JSON]))
            v["layout"] = tuple((str(a), str(d), tuple(int(x) for x in s)) for a, d, s in v["layout"])
            v["metrics_layout"] = tuple((str(a), int(x), bool(w)) for a, x, w in v["metrics_layout"])
            v["sketches"] = tuple(tuple(float(x) for x in one) for one in v["sketches"])
            v["shards"] = tuple(int(x) for x in v["shards"])
            v["seconds"] = tuple(float(x) for x in v["seconds"])
            v["worker"], v["round"] = int(v["worker"]), int(v["round"])
            v["stateful"], v["fixed_data"] = bool(v["stateful"]), bool(v["fixed_data"])
            v["arrays_name"], v["metrics_name"] = str(v["arrays_name"]), str(v["metrics_name"])
            if v["outcome"] not in OUTCOMES:
                raise ValueError(f"outcome {v['outcome']!r}")
            if not all(len(one) == 4 and all(map(math.isfinite, one)) for one in v["sketches"]):
                raise ValueError("sketches that are not four finite numbers each")
            return cls(**v)
        except Exception as error:  # whatever somebody may have put there
            raise ValueError(f"unreadable reply record ({error})") from error


@lru_cache(maxsize=256)
def _parse_plan(text: str) -> Plan:
    values = json.loads(text)
    values["rows"] = {
        int(i): Row(tuple(shards), tuple(tuple(c) for c in coefficients))
        for i, (shards, coefficients) in values["rows"].items()
    }
    return Plan(**values)


def report_key(name: str) -> str:
    """The key under which a figure of ours stands among Flower's result metrics."""
    return f"fl-gradcode.{name}"


def probe_content() -> RecordDict:
    """Content of a message that asks only "which worker are you?"; the mod answers it without training."""
    return RecordDict({_PROBE: ConfigRecord({"who": True})})


def is_probe(content: RecordDict) -> bool:
    """Whether a message asks only for the worker number."""
    return _PROBE in content


def load_of(message: Message, worker: int) -> int:
    """How many shards `message` asks `worker` to work on; 1 for a message without a plan."""
    plan = Plan.find_in(message.content)
    if plan is None:
        return 1
    row = plan.rows.get(worker)
    return len(row.shards) if row else 0


def loads_of(message: Message) -> dict[int, int]:
    """Worker -> how many shards it is asked for, of all that the plan names; empty for a message without a plan."""
    plan = Plan.find_in(message.content)
    return {} if plan is None else {worker: len(row.shards) for worker, row in plan.rows.items()}


def reply_part(message: Message, worker: int) -> float:
    """Which part of a model's length the reply has: 1/m under a code that divides updates by m, else 1."""
    plan = Plan.find_in(message.content)
    row = None if plan is None else plan.rows.get(worker)
    return 1 / len(row.coefficients[0]) if row and row.coefficients and row.coefficients[0] else 1.0


def computing_seconds(message: Message) -> float | None:
    """Seconds that the client says it spent on its shards; None if it does not say."""
    with contextlib.suppress(ValueError):
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


def plan_bytes(content: RecordDict) -> int:
    """Bytes of the plan in it."""
    record = content.get(_PLAN)
    return len(_JSON) + len(str(record[_JSON])) if isinstance(record, ConfigRecord) else 0


def _value_bytes(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return 8 * len(value) if isinstance(value, list) else 8


def error_text(message: Message) -> str:
    """An error reply in one line: Flower's code, and the last line of the reason, where Python names the exception."""
    return f"error {message.error.code}: {last_line(message.error.reason or '')}"


def last_line(text: str) -> str:
    """The last line that is not empty, cut to 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def is_evaluation(message: Message) -> bool:
    """Whether a message asks to evaluate."""
    return message.metadata.message_type.split(".")[0] == MessageType.EVALUATE


def round_of(message: Message) -> int | None:
    """The server round that a message belongs to: from its plan, or from the `server-round` that Flower sends."""
    plan = Plan.find_in(message.content)
    if plan is not None:
        return plan.round
    for record in message.content.values():
        if isinstance(record, ConfigRecord) and isinstance(record.get("server-round"), int):
            return int(record["server-round"])  # type: ignore[arg-type]
    return None
