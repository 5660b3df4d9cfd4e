"""Reads, checks, groups and adds up the replies of one phase.

With one shard a message there may be nothing to add up: each shard's records are kept as the function returned them,
and the wrapped strategy gets one reply for each sampled shard, as from k clients in plain Flower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..codes import GradientCode, IncrementalDecoder, P, PrimeField
from ..copies import Copies
from ..errors import VersionMismatch
from ..privacy import clipping_mod_named_in
from ..protocol import (
    ARRAYS,
    METRICS,
    UPDATE,
    Layout,
    NotFiniteRecord,
    PayloadEncoding,
    Plan,
    Rejection,
    RejectionKind,
    Reply,
    all_finite,
    counters_in,
    difference_between,
    last_line,
    names_of,
    payload_encoding,
    rebuild_arrays,
    rebuild_metrics,
    rejection_of,
    size_of,
    sum_of_squares,
    view,
)
from ..roster import WorkerRegistry

__all__ = [
    "NO_MOD",
    "Decoded",
    "Noise",
    "NotFinite",
    "Rejected",
    "ReplyCollector",
    "ReplyGroup",
    "Returned",
    "ReturnedReplies",
    "StaleUpdate",
    "StaleUpdates",
    "vectors_of",
]

# An estimate must still be close to a mean. The least-squares vector of a code with signs may subtract shards, and
# dividing by the small remaining weight would throw the model far off.
_MEAN_ENOUGH = 0.8
# For m > 1, an estimate may also put one block of the update in the place of another.
_MIX_UP = 0.1


@dataclass(frozen=True)
class StaleUpdate:
    """The contribution of some shards to an earlier round, which can fill in for them later.

    Attributes:
        shards: The shards, ascending.
        round: The round that the update is from.
        update: Coded update of the shards.
        metrics: Coded metrics of the shards.
        key: Layout of the arrays and metrics.
    """

    shards: tuple[int, ...]
    round: int
    update: NDArray[Any]
    metrics: NDArray[Any]
    key: object


@dataclass(frozen=True)
class Noise:
    """Noise that is added to a decoded sum on the server.

    Attributes:
        weight: Divisor of the sum. It replaces the decoded weight, which would reveal something about the data.
        add_to: Returns the sum with noise, shape (d,), float64, and zeros where counters lie. The privacy account is
            charged before noise is drawn.
    """

    weight: float
    add_to: Callable[[NDArray[Any], Sequence[slice]], NDArray[np.float64]]


@dataclass(frozen=True)
class Decoded:
    """The decoded result of a phase.

    Attributes:
        arrays: Mean of the clients' arrays; None when evaluating.
        metrics: Total weight and mean metrics.
        layout: Names, dtypes and shapes of the arrays that `train()` returned.
        names: The user's names of the ArrayRecord and the MetricRecord.
        vector: The decoding vector, shape (n,) or (n, m).
        used: Workers whose replies were used, ascending.
        stale: Earlier updates that filled in for missing shards.
    """

    arrays: ArrayRecord | None
    metrics: MetricRecord
    layout: Layout
    names: tuple[str, str]
    vector: NDArray[Any]
    used: tuple[int, ...]
    stale: tuple[StaleUpdate, ...] = ()


@dataclass
class ReplyGroup:
    """Replies with the same layout, which can be added up.

    Attributes:
        decoder: Tracks whether the group is decodable.
        reply: The first reply of the group.
        key: Layout of the arrays and metrics.
        encoding: Encoding of the payload.
    """

    decoder: IncrementalDecoder
    reply: Reply
    key: object
    encoding: PayloadEncoding
    #: Row of the code -> the (node, worker) that sent it; likewise for the coded updates and the coded metrics.
    senders: dict[int, tuple[int, int]] = field(default_factory=dict)
    updates: dict[int, NDArray[Any]] = field(default_factory=dict)
    metrics: dict[int, NDArray[Any]] = field(default_factory=dict)
    #: Whether the weights of all replies are whole numbers.
    whole: bool = True

    def add(self, row: int, sender: tuple[int, int], reply: Reply, update: NDArray[Any], metrics: NDArray[Any]) -> bool:
        """Add a reply unless the row has one already; returns whether it was added."""
        if row in self.senders:
            return False
        self.senders[row], self.updates[row], self.metrics[row] = sender, update, metrics
        self.whole &= reply.metrics_layout[0][2]
        self.decoder.add(row)
        return True

    def decode(
        self,
        code: GradientCode,
        vector: NDArray[Any],
        before: ArrayRecord | None,
        stale: Sequence[StaleUpdate] = (),
        noise: Noise | None = None,
    ) -> Decoded | str:
        """Returns the decoded mean, or a string that says why there is none.

        Args:
            code: The code by which the replies add up.
            vector: The decoding vector, shape (n,) or (n, m).
            before: The arrays that training started from; None when evaluating.
            stale: Earlier updates that fill in for missing groups.
            noise: Noise that is added to the sum before it is used.
        """
        rows = vector.reshape(code.n, -1)
        used = tuple(int(i) for i in np.flatnonzero(rows.any(axis=1)))
        wrong = _no_mean(code, vector, sum(len(old.shards) for old in stale))
        if wrong or not used:
            return wrong or "nothing that could be added up came in"
        # Stale updates come last, so that an exact sum has the same bits with and without them.
        coefficients = np.concatenate([rows[list(used)], np.ones((len(stale), code.m), rows.dtype)])
        order = [*code.order_of(used), *range(code.n, code.n + len(stale))]
        (weight_key, _, _), *_ = self.reply.metrics_layout
        vectors = [*(self.metrics[i] for i in used), *(old.metrics for old in stale)]
        # Metrics are never divided into m blocks: their first column of coefficients decodes them.
        metrics = self.encoding.restored(code.numbers.decode(vectors, coefficients[:, :1], order=order))
        if not 0 < metrics[0] < np.inf:
            return f"the decoded {weight_key!r} is {metrics[0]:g}, and a mean needs a positive, finite one"
        weight, record = rebuild_metrics(self.reply.metrics_layout, metrics, whole=self.whole)
        arrays = None
        if before is not None:
            vectors = [*(self.updates[i] for i in used), *(old.update for old in stale)]
            pieces: Iterable[NDArray[Any]]
            if noise is None and isinstance(code.numbers, PrimeField):
                pieces = code.numbers.decode_in_pieces(vectors, coefficients)
            else:
                total = code.numbers.decode(vectors, coefficients, order=order)
                if noise is not None:
                    total, weight = noise.add_to(total, [*counters_in(self.reply.layout)]), noise.weight
                pieces = [total]
                del total
            try:
                arrays = rebuild_arrays(self.reply.layout, before, pieces, weight)
            except OverflowError as error:
                return str(error)
        names = (self.reply.arrays_name, self.reply.metrics_name)
        workers = tuple(sorted({self.senders[row][1] for row in used}))
        return Decoded(arrays, record, self.reply.layout, names, vector, workers, tuple(stale))


@dataclass(frozen=True)
class Returned:
    """The records of all sampled shards.

    Attributes:
        contents: Shard -> the records that the function returned.
        vector: The decoding vector over the sampled shards, all ones.
        used: Workers whose replies were used, ascending.
    """

    contents: Mapping[int, RecordDict]
    vector: NDArray[Any]
    used: tuple[int, ...]


@dataclass
class ReturnedReplies:
    """Replies whose records have the same names; one for each shard, the first that came.

    Attributes:
        decoder: Tracks which shards have a reply.
        key: Names of the records and of what they hold.
    """

    decoder: IncrementalDecoder
    key: object
    #: Row, which is the shard's place among the sampled ones -> the (node, worker) that sent it; likewise the records.
    senders: dict[int, tuple[int, int]] = field(default_factory=dict)
    contents: dict[int, RecordDict] = field(default_factory=dict)

    def add(self, row: int, sender: tuple[int, int], content: RecordDict) -> bool:
        """Add a reply unless the row has one already; returns whether it was added."""
        if row in self.senders:
            return False
        self.senders[row], self.contents[row] = sender, content
        self.decoder.add(row)
        return True

    def gather(self, shards: list[int]) -> Returned | None:
        """Returns the records of all sampled shards, or None if one has no reply."""
        vector = self.decoder.vector()
        if vector is None:
            return None
        contents = {shard: self.contents[row] for row, shard in enumerate(shards)}
        return Returned(contents, vector, tuple(sorted({worker for _, worker in self.senders.values()})))


def _no_mean(code: GradientCode, vector: NDArray[Any], filled: int) -> str:
    """Returns why an estimate is no mean of the shards, or an empty string if it is one."""
    coverage = code.coverage_of(vector)
    if coverage.sum() + filled < _MEAN_ENOUGH * (np.abs(coverage).sum() + filled):
        return f"the best estimate is no mean of the shards (coverage {coverage.min():.2f} to {coverage.max():.2f})"
    if code.m > 1:
        shares = code.numbers.shares(vector, code.blocks)
        mixed = float(np.abs(shares * (1 - np.eye(code.m))).max())
        if mixed > _MIX_UP:
            return f"the best estimate mixes up the blocks of the update (by {mixed:.2f})"
    return ""


def vectors_of(
    reply: Reply, message: Message, before: ArrayRecord | None, m: int, encoding: PayloadEncoding
) -> tuple[NDArray[Any], NDArray[Any], float | None]:
    """Returns the coded update and metrics of a reply, checked against the arrays that were sent.

    Also returns the update's sum of squares, which is None over a prime field.

    Raises:
        ValueError: Something is missing, not finite, or has the wrong shape or dtype. The message says what.
    """
    record = message.content.get(UPDATE)
    if not isinstance(record, ArrayRecord) or METRICS not in record:
        raise ValueError(f"the record {UPDATE!r} is missing")
    update_dtype, metrics_dtype = encoding.dtypes(reply.layout)
    numbers = sum(max(length, 1) if length else 0 for _, length, _ in reply.metrics_layout)
    metrics = _vector(record, METRICS, encoding.entries(numbers), metrics_dtype, 1)
    if before is None:
        update = np.zeros(0, update_dtype)
    else:
        _check_layout(reply.layout, before)
        update = _vector(record, ARRAYS, size_of(reply.layout), update_dtype, m)
    square = None
    if update_dtype.kind == "f":
        square = _check_finite(update, metrics)
    elif max(update.max(initial=0), metrics.max(initial=0)) >= P:
        raise ValueError(f"an entry is outside the field 0..{P - 1}")
    return update, metrics, square


def _check_layout(layout: Layout, before: ArrayRecord) -> None:
    for name, dtype, shape in layout:
        if dtype != "bfloat16" and np.dtype(dtype).kind not in "fiub":
            raise ValueError(f"array {name!r} has dtype {dtype}; only real numbers can be averaged")
        if name not in before or tuple(before[name].shape) != shape:
            raise ValueError(f"array {name!r} with shape {shape} does not match what was sent")
    if len({name for name, _, _ in layout}) != len(layout):
        raise ValueError("an array is named twice")


def _vector(record: ArrayRecord, name: str, entries: int, dtype: np.dtype[Any], m: int) -> NDArray[Any]:
    if name not in record:
        raise ValueError(f"{name!r} is missing")
    values = view(record[name])
    length = -(-entries // m)
    if values.dtype != dtype:
        raise ValueError(f"{name!r} has dtype {values.dtype}, expected {dtype}")
    if values.shape != (length,):
        raise ValueError(f"{name!r} has shape {values.shape}, expected ({length},)")
    return np.asarray(values)


class NotFinite(ValueError):
    """An update or its weight is NaN or infinite."""


def _check_finite(update: NDArray[np.floating], metrics: NDArray[np.floating]) -> float:
    """Returns the sum of squares, which is finite if all entries are, unless it overflows."""
    # A metric may be NaN, as in plain Flower (an accuracy over no examples). The weight may not.
    square = sum_of_squares(update)
    if not math.isfinite(square) and not all_finite(update):
        raise NotFinite("its weighted update is not finite (NaN or infinity)")
    if not math.isfinite(float(metrics[0])):
        raise NotFinite("its number of examples is not finite (NaN or infinity)")
    return square


class StaleUpdates:
    """Remembers the last known update of each block of shards."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], StaleUpdate] = {}

    def keep(
        self, code: GradientCode, shards: Sequence[int], server_round: int, group: ReplyGroup, vector: NDArray[Any]
    ) -> None:
        """Remember the updates that were used in a sum."""
        for worker in np.flatnonzero(vector):
            block = tuple(shards[j] for j in code.shards_of(int(worker)))
            # Under sampling, a group sends other shards each round. Older blocks that overlap are out of date.
            self._known = {known: stale for known, stale in self._known.items() if not set(known) & set(block)}
            update, metrics = group.updates[int(worker)], group.metrics[int(worker)]
            self._known[block] = StaleUpdate(block, server_round, update, metrics, group.key)

    def for_missing(
        self, code: GradientCode, shards: Sequence[int], survivors: Sequence[int], key: object
    ) -> tuple[StaleUpdate, ...]:
        """Returns the known updates of groups without survivors, if their names, dtypes and shapes are the same."""
        there = set(survivors)
        filling = []
        for group in code.groups or ():
            if not there.intersection(group):
                stale = self._known.get(tuple(shards[j] for j in code.shards_of(group[0])))
                if stale is not None and stale.key == key:
                    filling.append(stale)
        return tuple(filling)


NO_MOD = Rejection("no-mod", "no fl-gradcode reply: is gradient_coding_mod among the client's mods?")


def _explained(rejection: Rejection) -> Rejection:
    """Returns the rejection with kind "clipping-mod" if one of Flower's privacy mods caused it, else unchanged."""
    clipping = clipping_mod_named_in(rejection.reason) if rejection.kind == "error" else None
    return rejection if clipping is None else Rejection("clipping-mod", rejection.reason)


def _difference(one: ReplyGroup | ReturnedReplies, other: ReplyGroup | ReturnedReplies) -> str:
    """Returns in what the replies of a group differ from those of another."""
    whose = "most other replies'"
    if isinstance(one, ReplyGroup) and isinstance(other, ReplyGroup):
        mine, theirs = one.reply, other.reply
        return difference_between(mine.layout, mine.metrics_layout, theirs.layout, theirs.metrics_layout, whose)
    return f"its records, {one.key}, differ from {whose}, {other.key}"


@dataclass(frozen=True)
class Rejected:
    """A reply that does not count.

    Attributes:
        node: Node that sent it.
        worker: Worker that the node is; None if the node has never reported it.
        rejection: Why the reply does not count.
    """

    node: int
    worker: int | None
    rejection: Rejection


class ReplyCollector:
    """Checks the replies of one phase and groups them by layout.

    Args:
        plan: Plan of the phase; `plan.rows` holds every worker's row.
        code: The code by which replies add up, with one reply for each of its rows.
        before: The arrays that were sent; None when evaluating.
        registry: Which node is which worker; updated from the replies.
        copies: Compares what two holders of a shard sent.
        row_of: Returns the row of the code that a reply stands for, or a rejection.
        spare: Whether a second copy of a row is normal, and only not needed; if False, it is rejected.
    """

    def __init__(
        self,
        plan: Plan,
        code: GradientCode,
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        copies: Copies,
        row_of: Callable[[Reply], int | Rejection],
        *,
        spare: bool = False,
    ) -> None:
        self.plan, self.code, self.before, self.registry, self.copies = plan, code, before, registry, copies
        self._row_of, self._spare = row_of, spare
        self._encoding = payload_encoding(plan.fraction_bits, plan.k)
        #: Workers whose replies count, in order of arrival; with `spare`, a worker is listed once for each reply.
        self.answered: list[int] = []
        #: Workers with a good reply for a row that had one already.
        self.spare_from: set[int] = set()
        self.rejected: list[Rejected] = []
        self.stateful = False
        #: A file that some client's training read and rewrote.
        self.kept_file = ""
        self.fixed_data = False
        #: Largest epsilon that a holder reports, for this run and for all runs; None without privacy.
        self.spent: tuple[float, float] | None = None
        #: Shard -> two of its holders whose keys were bound to different requests.
        self.other_requests: dict[int, tuple[int, int]] = {}
        #: Shard -> two of its holders that share noise and compute with other devices or versions: worker, with what.
        self.other_environments: dict[int, tuple[tuple[int, str], tuple[int, str]]] = {}
        self.groups: dict[object, ReplyGroup | ReturnedReplies] = {}
        self._contexts: dict[int, tuple[int, str]] = {}
        self._environments: dict[int, tuple[int, str]] = {}

    @property
    def best(self) -> ReplyGroup | ReturnedReplies | None:
        """The group of replies that is decodable, else the largest one; None if there is no reply."""
        return max(self.groups.values(), key=lambda b: (b.decoder.decodable, len(b.decoder.survivors)), default=None)

    def read(self, node: int, reply: Message | None, failure: str) -> Rejection | None:
        """Read one reply; returns None if it counts, else the rejection."""
        rejection = Rejection("no-reply", failure or "no reply came") if reply is None else self._examine(node, reply)
        if rejection is not None:
            self.rejected.append(Rejected(node, self.registry.worker_of(node), rejection))
            if reply is None or reply.has_error():
                self.registry.forget(node)
        return rejection

    def outvoted(self) -> list[Rejected]:
        """Returns the replies that are not used because most others have different names, dtypes or shapes."""
        best = self.best
        return [
            Rejected(*sender, Rejection("outvoted", _difference(group, best)))
            for group in self.groups.values()
            if best is not None and group is not best
            for sender in group.senders.values()
        ]

    def sender_of(self, row: int) -> tuple[int, int] | None:
        """Returns the (node, worker) that sent a reply for this row, or None."""
        return next((group.senders[row] for group in self.groups.values() if row in group.senders), None)

    def _examine(self, node: int, message: Message) -> Rejection | None:
        if message.has_error():
            return _explained(rejection_of(message))
        try:
            reply = Reply.find_in(message.content)
        except VersionMismatch as error:
            return Rejection("version", str(error))
        except ValueError as error:
            return Rejection("unreadable", str(error))
        if reply is None:
            return NO_MOD
        plan = self.plan
        if (reply.run, reply.kind, reply.round) != (plan.run, plan.kind, plan.round):
            wrong = f"run {reply.run!r}, " if reply.run != plan.run else ""
            return Rejection("wrong-round", f"wrong round: it answers {wrong}{reply.kind} {reply.round}")
        if reply.worker not in plan.rows and not plan.open:
            return Rejection("wrong-worker", f"worker {reply.worker} is not in the code (workers 0..{plan.n - 1})")
        if (refused := self.registry.claim(node, reply.worker, plan.round)) is not None:
            return refused
        if plan.open:
            self.registry.holdings[node] = dict(reply.holds)
        if reply.worker not in plan.rows:
            return None  # the worker is new, and the next round's code will have a row for it
        self.stateful |= reply.stateful
        self.kept_file = self.kept_file or reply.kept_file
        self.fixed_data |= reply.fixed_data
        if reply.outcome == "idle":
            asked = plan.rows[reply.worker].shards
            return (
                Rejection("shards-gone", f"it does not hold all of the shards {list(asked)} any more")
                if asked
                else None
            )
        if reply.outcome == "gave-up":
            done, seconds = len(reply.seconds), sum(reply.seconds)
            return Rejection("gave-up", f"gave up after {seconds:.1f} s with {done} shards done")
        if reply.outcome == "fixed-data":
            return Rejection("fixed-data", f"{plan.kind}() never read partition-id")
        return self._accept(node, reply, message)

    def _accept(self, node: int, reply: Reply, message: Message) -> Rejection | None:
        if (reply.outcome == "returned") != self.plan.as_returned:
            wrong = "coded vectors instead of records" if self.plan.as_returned else "records instead of coded vectors"
            return Rejection("layout", f"it holds {wrong}")
        row = self._row_of(reply)
        if isinstance(row, Rejection):
            return row
        if self.sender_of(row) is not None and not self._spare:
            return Rejection("duplicate", "duplicate")
        if reply.outcome == "returned":
            return self._accept_records(node, row, reply, message)
        if wrong := self._misnamed(reply):
            return Rejection("layout", wrong)
        try:
            update, metrics, square = vectors_of(reply, message, self.before, self.code.m, self._encoding)
        except Exception as error:  # a reply is untrusted input, and must not end the run
            kind: RejectionKind = "not-finite" if isinstance(error, NotFinite) else "layout"
            return Rejection(kind, f"unusable vectors: {last_line(str(error))}")
        if wrong := self.copies.wrong_figures(reply, update, square):
            return Rejection("wrong-figures", wrong)
        self.copies.add(reply, update, metrics, square)
        self._note_spent(reply)
        self.answered.append(reply.worker)
        key = (reply.layout, tuple((name, length) for name, length, _ in reply.metrics_layout))
        group = self.groups.setdefault(key, ReplyGroup(self.code.incremental(), reply, key, self._encoding))
        assert isinstance(group, ReplyGroup)
        if not group.add(row, (node, reply.worker), reply, update, metrics):
            self.spare_from.add(reply.worker)
        return None

    def _accept_records(self, node: int, row: int, reply: Reply, message: Message) -> Rejection | None:
        """Take the records of a shard as they came; a second copy is only compared."""
        content = Reply.remove_from(message.content)
        try:
            key = names_of(content, self.plan.weight_key)
            self.copies.add_records(reply, content)
        except Exception as error:  # a reply is untrusted input, and must not end the run
            kind: RejectionKind = "not-finite" if isinstance(error, NotFiniteRecord) else "layout"
            return Rejection(kind, last_line(str(error)))
        self.answered.append(reply.worker)
        group = self.groups.setdefault(key, ReturnedReplies(self.code.incremental(), key))
        assert isinstance(group, ReturnedReplies)
        if not group.add(row, (node, reply.worker), content):
            self.spare_from.add(reply.worker)
        return None

    def _misnamed(self, reply: Reply) -> str:
        """Returns what is wrong with the names of a reply's records and metrics, or an empty string."""
        key = self.plan.weight_key
        if not reply.metrics_layout or reply.metrics_layout[0][0] != key:
            return f"its metrics do not begin with {key!r}"
        if reply.metrics_layout[0][1] != -1:
            return f"its {key!r} is not one number"
        if not reply.metrics_name or (self.before is not None and reply.arrays_name in ("", reply.metrics_name)):
            return f"its records are named {reply.arrays_name!r} and {reply.metrics_name!r}"
        return ""

    def _note_spent(self, reply: Reply) -> None:
        """Remember the privacy cost, and whether holders of a shard bound their noise to the same request."""
        for shard, bound, epsilon, total in reply.spent:
            most, most_total = self.spent or (0.0, 0.0)
            self.spent = (max(most, epsilon), max(most_total, total))
            holder, first = self._contexts.setdefault(shard, (reply.worker, bound))
            if first != bound:
                self.other_requests[shard] = (holder, reply.worker)
            if bound:  # shared noise
                other, known = self._environments.setdefault(shard, (reply.worker, reply.environment))
                if known.partition(";")[0] != reply.environment.partition(";")[0]:
                    self.other_environments[shard] = ((other, known), (reply.worker, reply.environment))
