"""The records that travel between server and client, and the protocol version that both check."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from ..errors import VersionMismatch

__all__ = [
    "ARRAYS",
    "METRICS",
    "MOST_WORKERS",
    "NUM_PARTITIONS",
    "PARTITION_ID",
    "PROTOCOL",
    "UPDATE",
    "Plan",
    "Reply",
    "Row",
    "is_probe",
    "library_version",
    "plan_bytes",
    "probe_content",
    "read_json",
    "record_of",
    "report_key",
]

#: What the records mean. It changes when a plan or a reply does: the other half would misread it.
PROTOCOL = 2
_JSON, _PROTOCOL, _VERSION = "json", "protocol", "version"


def record_of(values: Mapping[str, Any]) -> ConfigRecord:
    """A record that holds them, and our version."""
    return ConfigRecord({_JSON: json.dumps(dict(values)), _PROTOCOL: PROTOCOL, _VERSION: library_version()})


def read_json(record: ConfigRecord, other: str) -> str:
    """What `record_of` was given, as JSON.

    Args:
        record: From the other half.
        other: "server" or "node": who made it.

    Raises:
        VersionMismatch: It is of another protocol; with what to install where.
    """
    protocol: Any = record.get(_PROTOCOL, 1)
    its = str(record.get(_VERSION, "of an older version"))
    if protocol != PROTOCOL:
        server, node = (its, library_version()) if other == "server" else (library_version(), its)
        ours, theirs = (protocol, PROTOCOL) if other == "server" else (PROTOCOL, protocol)
        raise VersionMismatch(
            f"The node has fl-gradcode {node} (protocol {theirs}), and the server {server} (protocol {ours}). "
            f"{_advice(str(server))}"
        )
    return str(record[_JSON])


@lru_cache(maxsize=1)
def library_version() -> str:
    """Of what is installed here."""
    try:
        return version("fl-gradcode")
    except PackageNotFoundError:  # a checkout on the path
        return "of a checkout"


def _advice(server: str) -> str:
    what = f"'fl-gradcode=={server}'" if server[:1].isdigit() else "the server's version"
    return f"Install the same one on the node (pip install {what}) and start its SuperNode again."


_PLAN = "fl-gradcode.plan"
_REPLY = "fl-gradcode.reply"
_PROBE = "fl-gradcode.probe"
#: Name of the ArrayRecord that holds the coded vectors. A name of its own makes a mod that expects model
#: arrays (clipping, local privacy) fail loudly instead of clipping a coded sum.
UPDATE = "fl-gradcode.update"
#: The two arrays in it: the coded update, and the coded weight and metrics.
ARRAYS, METRICS = "arrays", "metrics"

#: Numbers of workers are below this: a greater one is a mistake, for which memory for so many rows would be taken.
MOST_WORKERS = 10_000

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
        privacy: What training has to promise, as `privacy_to_json` writes it; empty: nothing.
        releases: With privacy: shard -> how many hold it, and the ranges of rounds in which they were asked before.
        digests: Shard -> SHA-256 of its data, where the server has a manifest.
        open: Whether the code is made for what nodes hold: each says what that is, also one that has no row.
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
    privacy: str = ""
    releases: dict[int, tuple[int, tuple[tuple[int, int], ...]]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    open: bool = False

    @property
    def label(self) -> str:
        """For people and the ledger: "train 3"."""
        return f"{self.kind} {self.round}"

    def for_worker(self, worker: int) -> Plan:
        """The plan with this worker's row alone."""
        row = self.rows[worker]
        releases = {shard: self.releases[shard] for shard in row.shards if shard in self.releases}
        digests = {shard: self.digests[shard] for shard in row.shards if shard in self.digests}
        return replace(self, rows={worker: row}, releases=releases, digests=digests)

    def add_to(self, content: RecordDict) -> RecordDict:
        """A new RecordDict with the same records and this plan; strategies may share one object."""
        values = dict(vars(self))
        values["rows"] = {i: [row.shards, row.coefficients] for i, row in self.rows.items()}
        return RecordDict({**content, _PLAN: record_of(values)})

    @classmethod
    def find_in(cls, content: RecordDict) -> Plan | None:
        """The plan of a message, or None.

        Raises:
            VersionMismatch: It is of a version that is not understood here.
        """
        record = content.get(_PLAN)
        return _parse_plan(read_json(record, "server")) if isinstance(record, ConfigRecord) else None

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
        spent: With privacy: for each shard its number, the digest of what its key was bound to, and epsilon of this run
            and of all runs.
        holds: Under an open plan: the shards that the node holds, and the SHA-256 of each; empty: not known; `WITHHELD`
            (see `manifest`): the node does not tell, for its records' sake.
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
    spent: tuple[tuple[int, str, float, float], ...] = ()
    holds: tuple[tuple[int, str], ...] = ()

    def to_record(self) -> ConfigRecord:
        """This reply as a record."""
        return record_of(vars(self))

    def content(self, **records: Any) -> RecordDict:
        """A RecordDict with this reply and further records."""
        return RecordDict({_REPLY: self.to_record(), **records})

    @classmethod
    def find_in(cls, content: RecordDict) -> Reply | None:
        """The reply record of a message, or None.

        Raises:
            ValueError: The record is there and cannot be read.
            VersionMismatch: It is of a version that is not understood here.
        """
        record = content.get(_REPLY)
        if not isinstance(record, ConfigRecord):
            return None
        try:
            return _parse_reply(read_json(record, "node"))
        except VersionMismatch:
            raise
        except Exception as error:  # whatever somebody may have put there
            raise ValueError(f"unreadable reply record ({error})") from error


@lru_cache(maxsize=256)
def _parse_plan(text: str) -> Plan:
    values = json.loads(text)
    values["rows"] = {
        int(i): Row(tuple(shards), tuple(tuple(c) for c in coefficients))
        for i, (shards, coefficients) in values["rows"].items()
    }
    values["releases"] = {
        int(shard): (int(holders), tuple((int(first), int(last)) for first, last in ranges))
        for shard, (holders, ranges) in values["releases"].items()
    }
    values["digests"] = {int(shard): str(digest) for shard, digest in values["digests"].items()}
    return Plan(**values)


@lru_cache(maxsize=64)  # a reply is looked at on arrival, for its times, and read a moment later
def _parse_reply(text: str) -> Reply:
    v = json.loads(text)
    v["layout"] = tuple((str(a), str(d), tuple(int(x) for x in s)) for a, d, s in v["layout"])
    v["metrics_layout"] = tuple((str(a), int(x), bool(w)) for a, x, w in v["metrics_layout"])
    v["sketches"] = tuple(tuple(float(x) for x in one) for one in v["sketches"])
    v["shards"] = tuple(int(x) for x in v["shards"])
    v["seconds"] = tuple(float(x) for x in v["seconds"])
    v["worker"], v["round"] = int(v["worker"]), int(v["round"])
    v["stateful"], v["fixed_data"] = bool(v["stateful"]), bool(v["fixed_data"])
    v["spent"] = tuple((int(j), str(c), float(e), float(t)) for j, c, e, t in v["spent"])
    v["holds"] = tuple((int(j), str(digest)) for j, digest in v["holds"])
    v["arrays_name"], v["metrics_name"] = str(v["arrays_name"]), str(v["metrics_name"])
    if v["outcome"] not in OUTCOMES:
        raise ValueError(f"outcome {v['outcome']!r}")
    if not all(len(one) == 4 and all(map(math.isfinite, one)) for one in v["sketches"]):
        raise ValueError("sketches that are not four finite numbers each")
    if not all(0 <= number < math.inf for one in v["spent"] for number in one[2:]):
        raise ValueError("an epsilon that is no number of at least 0")
    if not 0 <= v["worker"] < MOST_WORKERS:
        raise ValueError(f"worker {v['worker']}")
    return Reply(**v)


def report_key(name: str) -> str:
    """The key under which a figure of ours stands among Flower's result metrics."""
    return f"fl-gradcode.{name}"


def probe_content() -> RecordDict:
    """Content of a message that asks only "which worker are you?"; the mod answers it without training."""
    return RecordDict({_PROBE: record_of({"who": True})})


def is_probe(content: RecordDict) -> bool:
    """Whether a message asks only for the worker number.

    Raises:
        VersionMismatch: It is of a version that is not understood here.
    """
    record = content.get(_PROBE)
    if isinstance(record, ConfigRecord):
        read_json(record, "server")
    return record is not None


def plan_bytes(content: RecordDict) -> int:
    """Bytes of the plan in it."""
    record = content.get(_PLAN)
    return sum(len(key) + len(str(value)) for key, value in record.items()) if isinstance(record, ConfigRecord) else 0
