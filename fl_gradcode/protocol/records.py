"""The records that travel between server and client, and the protocol version that both check."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

from flwr.app import ConfigRecord, RecordDict

from .._text import printable
from .._versions import library_version
from ..errors import VersionMismatch

__all__ = [
    "ARRAYS",
    "IN_CLEAR",
    "MASKED",
    "METRICS",
    "MOST_WORKERS",
    "NUM_PARTITIONS",
    "PARTITION_ID",
    "PLAN",
    "PROTOCOL",
    "SETUP",
    "UPDATE",
    "Plan",
    "PlanWriter",
    "Reply",
    "Row",
    "is_probe",
    "is_setup",
    "plan_bytes",
    "probe_content",
    "read_json",
    "record_of",
    "report_key",
]

#: Version of the records' format. It changes with every change of a plan or a reply that the other side would misread.
PROTOCOL = 7
_MOST_OF_A_NAME = 100  # letters
_MOST_OF_A_VERSION = 40
_MOST_OF_A_DIGEST = 64
#: Letters of a record of ours: 10,000 shards with their SHA-256, or as many arrays, take less than half of it.
_MOST_OF_A_RECORD = 2_000_000
_JSON, _PROTOCOL, _VERSION = "json", "protocol", "version"


def record_of(values: Mapping[str, Any]) -> ConfigRecord:
    """Returns a record that contains these values as JSON, the protocol version and the library version."""
    return ConfigRecord({_JSON: json.dumps(dict(values)), _PROTOCOL: PROTOCOL, _VERSION: library_version()})


def read_json(record: ConfigRecord, other: str) -> str:
    """Returns the JSON text of the values that `record_of` was given.

    Args:
        record: Record from the other side.
        other: Side that made the record, "server" or "node".

    Raises:
        ValueError: A node's record is larger than any that this library makes.
        VersionMismatch: The record has another protocol version. The message says what to install.
    """
    protocol: Any = record.get(_PROTOCOL, 1)
    if protocol != PROTOCOL:
        its = printable(str(record.get(_VERSION, "of an older version")), _MOST_OF_A_VERSION)
        protocol = printable(str(protocol), _MOST_OF_A_VERSION)
        server, node = (its, library_version()) if other == "server" else (library_version(), its)
        servers, nodes = (protocol, PROTOCOL) if other == "server" else (PROTOCOL, protocol)
        raise VersionMismatch(
            f"The node has fl-gradcode {node} (protocol {nodes}), and the server {server} (protocol {servers}). "
            f"{_advice(str(server))}"
        )
    text = str(record[_JSON])
    if other == "node" and len(text) > _MOST_OF_A_RECORD:
        raise ValueError(f"a record of {len(text)} characters; at most {_MOST_OF_A_RECORD} are read")
    return text


def _advice(server: str) -> str:
    what = f"'fl-gradcode=={server}'" if server[:1].isdigit() else "the server's version"
    return f"Install the same one on the node (pip install {what}) and start its SuperNode again."


T = TypeVar("T")

#: Name of the record that holds the plan.
PLAN = "fl-gradcode.plan"
#: Attribute of a record that this process has written: its text, a plan of its phase, and the rows that it has.
_WRITTEN = "_fl_gradcode_plan"
_REPLY = "fl-gradcode.reply"
_PROBE = "fl-gradcode.probe"
#: Name of the record of a message, and of its reply, by which keys of secure aggregation are set up through the server.
SETUP = "fl-gradcode.setup"
#: Name of the ArrayRecord that holds the coded vectors. Because of the special name, a mod that expects model arrays
#: (clipping, local privacy) fails visibly instead of clipping a coded sum.
UPDATE = "fl-gradcode.update"
#: Names of the two arrays in it: the coded update, and the coded weight and metrics.
ARRAYS, METRICS = "arrays", "metrics"
#: Name of the one array in it under secure aggregation: the masked words of update, metrics, check and status.
MASKED = "masked"

#: Worker numbers are below this limit. A larger one is a mistake, and would allocate memory for that many rows.
MOST_WORKERS = 10_000

#: Possible outcomes of a reply; see `Reply`.
OUTCOMES = ("coded", "returned", "masked", "idle", "gave-up", "fixed-data")

#: All that a masked reply says in clear, beside the versions of protocol and library. None of it depends on data,
#: but for the tags, which nobody can tell from random bytes without the keys of the nodes.
IN_CLEAR = ("run", "round", "kind", "worker", "outcome", "shards", "manifest", "request", "simulated", "tags")

#: Flower's own keys of `Context.node_config`. The first one is set to the shard number when `train()` is called.
PARTITION_ID, NUM_PARTITIONS = "partition-id", "num-partitions"


@dataclass(frozen=True)
class Row:
    """One worker's row of the encoding matrix, in which `coefficients[t]` holds the m numbers for `shards[t]`."""

    shards: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Plan:
    """The work that nodes are asked for in one phase of one round.

    Attributes:
        run: Name of the run, which stays the same when the run is resumed.
        seed: Seed from which all holders of a shard derive their random seeds.
        round: The server round, from 1.
        kind: "train" or "evaluate"; under masks also "rehearse" or "compare", see `fl_gradcode.secagg`.
        n: Number of workers of the code.
        k: Number of shards of the code.
        weight_key: The metric that holds the number of examples.
        arrays_key: The ArrayRecord of the message that training starts from; empty when evaluating.
        rows: Worker -> its row; holds the rows of all workers if the server does not know which worker the node is.
        give_up_after: Seconds after which a client gives up before its next shard; 0 for never.
        allow_fixed_data: Whether an app that does not choose its data by `partition-id` is accepted.
        fraction_bits: Number of fraction bits under a code over a prime field; None if replies are floats.
        privacy: The privacy promise that training has to keep, as `privacy_to_json` writes it; empty for none.
        releases: With privacy, shard -> number of its holders, and the ranges of earlier rounds in which they were
            asked.
        digests: Shard -> SHA-256 of its data, if the server has a manifest.
        open: Whether the code is built for the shards that nodes report. Then every node reports its shards, even if it
            has no row.
        as_returned: Whether a reply holds the records of one shard as `train()` or `evaluate()` returned them, instead
            of coded vectors. Each row then has one shard.
        figures: Whether a coded reply describes the update of each shard by a few numbers, because the code mixes
            shards and the server cannot compare their holders otherwise.
        secure: Digest of the manifest under which replies are masked, as hexadecimal; empty for plain replies.
        number: Under masks, number of a rehearsal, which rises in a run; 0 in other plans.
        tags: Under masks, worker -> the tags of the integers that it computed, as hexadecimal: in a rehearsal in a plan
            of kind "compare", and otherwise in an earlier round.
        tagged: Kind, round and request digest of that round, such as "train 3 9f86..."; empty in a comparison.
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
    as_returned: bool = False
    figures: bool = False
    secure: str = ""
    number: int = 0
    tags: dict[int, str] = field(default_factory=dict)
    tagged: str = ""

    @property
    def label(self) -> str:
        """Name of the phase in the ledger and in messages, such as "train 3"."""
        return f"{self.kind} {self.round}"

    def for_worker(self, worker: int) -> Plan:
        """Returns the plan with only this worker's row."""
        return self.for_workers({worker: self.rows[worker]})

    def for_workers(self, rows: dict[int, Row]) -> Plan:
        """Returns the plan with these rows alone, and what it says of their shards."""
        return replace(self, rows=rows, releases=_about(self.releases, rows), digests=_about(self.digests, rows))

    def add_to(self, content: RecordDict) -> RecordDict:
        """Returns a new RecordDict with the same records and this plan; `content` is not changed."""
        return PlanWriter(self).add_to(content, self.rows, self.releases, self.digests)

    @classmethod
    def find_in(cls, content: RecordDict) -> Plan | None:
        """Returns the plan of a message, or None.

        Raises:
            VersionMismatch: The plan has another protocol version.
        """
        record = content.get(PLAN)
        if not isinstance(record, ConfigRecord):
            return None
        text = read_json(record, "server")
        written, plan, rows = _known(record)
        return plan.for_workers(rows) if written is text else _parse_plan(text)

    @classmethod
    def rows_in(cls, content: RecordDict) -> dict[int, Row] | None:
        """Returns the rows of the plan of a message, which are not to be changed, or None.

        Raises:
            VersionMismatch: The plan has another protocol version.
        """
        record = content.get(PLAN)
        if not isinstance(record, ConfigRecord):
            return None
        written, _, rows = _known(record)
        if written is not None and record.get(_JSON) is written and record.get(_PROTOCOL) == PROTOCOL:
            mine: dict[int, Row] = rows
            return mine
        plan = cls.find_in(content)
        return None if plan is None else plan.rows

    @staticmethod
    def remove_from(content: RecordDict) -> RecordDict:
        """Returns a new RecordDict with all records except the plan."""
        return RecordDict({key: value for key, value in content.items() if key != PLAN})


class _Written(tuple[str, Any, Any]):
    """What this process knows of a record; another one, to which it is pickled, gets nothing of it."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return (_nothing, ())


def _known(record: ConfigRecord) -> tuple[Any, Any, Any]:
    return vars(record).get(_WRITTEN) or (None, None, None)


def _nothing() -> None:
    """Returns None, in the place of what stayed in another process."""


class PlanWriter:
    """Writes plans that differ from one another in what they say of single workers and shards.

    A phase has as many plans as workers, so what they share is turned into JSON once.

    Args:
        plan: One of them.
        put: Returns a copy of a RecordDict or ConfigRecord with one more entry; Flower's own checks each by default.
    """

    _OWN = ("rows", "releases", "digests")

    def __init__(self, plan: Plan, put: Callable[[Any, str, Any], Any] | None = None) -> None:
        self._plan, self._put = plan, put or _put
        values = {**vars(plan), **{name: f"\0{name}" for name in self._OWN}}
        rest = json.dumps(values)
        self._parts = []
        for name in self._OWN:
            part, rest = rest.split(json.dumps(f"\0{name}"))
            self._parts.append(part)
        self._parts.append(rest)
        self._record = record_of({})

    def add_to(
        self,
        content: RecordDict,
        rows: dict[int, Row],
        releases: Mapping[int, object] | None = None,
        digests: Mapping[int, str] | None = None,
    ) -> RecordDict:
        """Returns a new RecordDict with the same records and the plan with these rows; `content` is not changed.

        Args:
            content: The records.
            rows: The rows.
            releases, digests: What the plan says of shards; None for those of the rows' shards alone.
        """
        plan = self._plan
        releases = _about(plan.releases, rows) if releases is None else releases
        digests = _about(plan.digests, rows) if digests is None else digests
        first, second, third, last = self._parts
        own = "{" + ", ".join([f'"{i}": {_row_text(row)}' for i, row in rows.items()]) + "}"
        more = json.dumps(releases) if releases else "{}", json.dumps(digests) if digests else "{}"
        text = f"{first}{own}{second}{more[0]}{third}{more[1]}{last}"
        record = self._put(self._record, _JSON, text)
        if len(rows) == 1:  # the process that has written it, and may run the node too, need not read it again
            vars(record)[_WRITTEN] = _Written((text, plan, rows))
        result: RecordDict = self._put(content, PLAN, record)
        return result


def _put(typed: Any, key: str, value: Any) -> Any:
    other = typed.copy()
    other[key] = value
    return other


@lru_cache(maxsize=MOST_WORKERS)  # rows are the same in each round
def _row_text(row: Row) -> str:
    return json.dumps([row.shards, row.coefficients])


def _about(known: Mapping[int, T], rows: Mapping[int, Row]) -> dict[int, T]:
    """Returns the entries for the shards of some rows."""
    return {j: known[j] for row in rows.values() for j in row.shards if j in known} if known else {}


@dataclass(frozen=True)
class Reply:
    """The description of a node's coded vectors, which is sent with them.

    Attributes:
        run: Name of the run, copied from the plan.
        round: The server round, copied from the plan.
        kind: "train" or "evaluate", copied from the plan, or "probe".
        worker: Worker that answers, which is the node's own `partition-id`.
        outcome: "coded"; "returned" (the message also holds the function's own records, for one shard); "masked" (one
            vector of masked words, and nothing but `IN_CLEAR` beside it); "idle" (the row is empty), "gave-up" (after
            `give_up_after`), or "fixed-data" (the app did not read `partition-id`). Only coded and masked replies
            contain vectors.
        shards: The shards that were combined, or the one whose records were returned.
        layout: Name, dtype and shape of each array that `train()` returned.
        metrics_layout: Name, length (-1 for a scalar) and whether it is a whole number, for the weight and each metric.
        arrays_name: The user's name of the ArrayRecord.
        metrics_name: The user's name of the MetricRecord.
        figures: If the plan asks for them, a few numbers for each shard, which differ if its holders disagree.
        seconds: Seconds spent on each shard.
        stateful: Whether the function kept something in `context.state`.
        kept_file: Name of a file that training found, read and rewrote; empty if there is none.
        fixed_data: Whether the function never read `partition-id`.
        spent: With privacy, for each shard: its number, the digest of the request that its key was bound to, and the
            epsilon of this run and of all runs.
        environment: With privacy, what the node computes with: kind of device, settings, versions, and threads.
        holds: Under an open plan, the shards that the node holds and the SHA-256 of each. It is empty if not known, and
            `placement.WITHHELD` if the node keeps it secret to protect its records.
        manifest: With masks, digest of the manifest that the node has pinned, as hexadecimal.
        request: With masks, digest of the request that the node has received, as hexadecimal.
        simulated: With masks, whether the keys are on the server's machine, where they protect nothing.
        tags: With masks whose holders are compared, the node's tags of its integers, as hexadecimal.
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
    figures: tuple[tuple[float, ...], ...] = ()
    seconds: tuple[float, ...] = field(default=())
    stateful: bool = False
    kept_file: str = ""
    fixed_data: bool = False
    spent: tuple[tuple[int, str, float, float], ...] = ()
    environment: str = ""
    holds: tuple[tuple[int, str], ...] = ()
    manifest: str = ""
    request: str = ""
    simulated: bool = False
    tags: str = ""

    def to_record(self) -> ConfigRecord:
        """Returns this reply as a ConfigRecord, which has the fields `IN_CLEAR` alone if it is masked."""
        values = vars(self)
        return record_of({name: values[name] for name in IN_CLEAR} if self.outcome == "masked" else values)

    def content(self, **records: Any) -> RecordDict:
        """Returns a RecordDict with this reply and further records."""
        return RecordDict({_REPLY: self.to_record(), **records})

    @staticmethod
    def remove_from(content: RecordDict) -> RecordDict:
        """Returns a new RecordDict with all records except the reply."""
        result = content.copy()
        result.pop(_REPLY, None)
        return result

    @classmethod
    def find_in(cls, content: RecordDict) -> Reply | None:
        """Returns the reply in a message, or None.

        Raises:
            ValueError: The reply cannot be read.
            VersionMismatch: The reply has another protocol version.
        """
        record = content.get(_REPLY)
        if not isinstance(record, ConfigRecord):
            return None
        try:
            return _parse_reply(read_json(record, "node"))
        except VersionMismatch:
            raise
        except Exception as error:  # a reply is untrusted input
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
    values["tags"] = {int(worker): str(tags) for worker, tags in values["tags"].items()}
    values["digests"] = {int(shard): str(digest) for shard, digest in values["digests"].items()}
    return Plan(**values)


def _short(most: int) -> Callable[[Any], str]:
    return lambda text: printable(str(text), most)


#: What most replies leave empty, and how it is read where they do not.
_READ: dict[str, Callable[[Any], Any]] = {
    "layout": lambda arrays: tuple((str(a), str(d), tuple(int(x) for x in s)) for a, d, s in arrays),
    "metrics_layout": lambda metrics: tuple((str(a), int(x), bool(w)) for a, x, w in metrics),
    "figures": lambda shards: tuple(tuple(float(x) for x in figures) for figures in shards),
    "shards": lambda shards: tuple(int(x) for x in shards),
    "seconds": lambda seconds: tuple(float(x) for x in seconds),
    "spent": lambda spent: tuple((int(j), str(c), float(e), float(t)) for j, c, e, t in spent),
    "holds": lambda held: tuple((int(j), printable(str(digest), _MOST_OF_A_DIGEST)) for j, digest in held),
    "arrays_name": str,
    "metrics_name": str,
    "tags": str,
    "kept_file": _short(_MOST_OF_A_NAME),
    "environment": _short(_MOST_OF_A_NAME),
    "manifest": _short(_MOST_OF_A_DIGEST),
    "request": _short(_MOST_OF_A_DIGEST),
    "stateful": bool,
    "fixed_data": bool,
    "simulated": bool,
}
_FIELDS = vars(Reply("", 0, "", 0, "")).keys()
_EMPTY = {name: vars(Reply("", 0, "", 0, ""))[name] for name in _READ}


@lru_cache(maxsize=64)  # a reply is parsed on arrival, for its times, and again a moment later when it is read
def _parse_reply(text: str) -> Reply:
    v = json.loads(text)
    if v["outcome"] == "masked":
        if set(v) != {*IN_CLEAR}:
            raise ValueError("a masked reply with other fields than it has")
        v = {**vars(Reply("", 0, "", 0, "")), **v}
    for name, read in _READ.items():
        v[name] = read(v[name]) if v[name] else _EMPTY[name]
    v["worker"], v["round"] = int(v["worker"]), int(v["round"])
    v["run"], v["kind"] = str(v["run"]), str(v["kind"])
    if v["outcome"] not in OUTCOMES:
        raise ValueError(f"outcome {v['outcome']!r}")
    if v["figures"] and not all(figures and all(map(math.isfinite, figures)) for figures in v["figures"]):
        raise ValueError("figures that are not finite numbers")
    if v["spent"] and not all(0 <= number < math.inf for spent in v["spent"] for number in spent[2:]):
        raise ValueError("an epsilon that is not a number of at least 0")
    if not 0 <= v["worker"] < MOST_WORKERS:
        raise ValueError(f"worker {v['worker']}")
    if v.keys() != _FIELDS:
        raise ValueError("a reply with other fields than it has")
    reply = Reply.__new__(Reply)
    vars(reply).update(v)  # the constructor of a frozen dataclass takes longer than all of the above
    return reply


def report_key(name: str) -> str:
    """Returns the key of one of this library's figures in Flower's result metrics."""
    return f"fl-gradcode.{name}"


def probe_content() -> RecordDict:
    """Returns the content of a probe, which asks a node for its worker number and is answered without training."""
    return RecordDict({_PROBE: record_of({"who": True})})


def is_setup(content: RecordDict) -> bool:
    """Returns whether a message belongs to a set-up of keys, which is answered without training."""
    return isinstance(content.get(SETUP), ConfigRecord)


def is_probe(content: RecordDict) -> bool:
    """Returns whether a message is a probe.

    Raises:
        VersionMismatch: The probe has another protocol version.
    """
    record = content.get(_PROBE)
    if isinstance(record, ConfigRecord):
        read_json(record, "server")
    return record is not None


def plan_bytes(content: RecordDict) -> int:
    """Returns the size of the plan in bytes, or 0 without a plan."""
    record = content.get(PLAN)
    return sum(len(key) + len(str(value)) for key, value in record.items()) if isinstance(record, ConfigRecord) else 0
