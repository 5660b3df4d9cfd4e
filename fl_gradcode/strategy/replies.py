"""Replies of one phase: read, checked, grouped by layout, and added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

from ..codes import GradientCode, IncrementalDecoder, P, PrimeField
from ..privacy import CentralGaussian
from ..protocol import (
    ARRAYS,
    METRICS,
    UPDATE,
    Layout,
    PayloadEncoding,
    Plan,
    Reply,
    all_finite,
    error_text,
    last_line,
    payload_encoding,
    rebuild_arrays,
    rebuild_metrics,
    size_of,
    view,
)
from .workers import WorkerRegistry

__all__ = [
    "DISAGREEMENT",
    "FIXED_DATA",
    "NO_MOD",
    "Decoded",
    "Rejection",
    "ReplyCollector",
    "ReplyGroup",
    "StaleUpdate",
    "StaleUpdates",
    "can_fill_in",
    "vectors_of",
]

# An estimate that is not exact must still be close to a mean: a least-squares vector of a code with signs may
# subtract shards, and dividing by the little weight that is left would throw the model far off.
_MEAN_ENOUGH = 0.8
# For m > 1 an estimate may also put one block of the update where another belongs.
_MIX_UP = 0.1


@dataclass(frozen=True)
class StaleUpdate:
    """What some shards added to an earlier round, to fill in for them.

    Attributes:
        shards: Which, ascending.
        round: When.
        update, metrics: Their coded update and metrics.
        key: Their layout.
    """

    shards: tuple[int, ...]
    round: int
    update: NDArray[Any]
    metrics: NDArray[Any]
    key: object


@dataclass(frozen=True)
class Decoded:
    """What the replies amount to.

    Attributes:
        arrays: The mean of the clients' arrays; None when evaluating.
        metrics: The total weight and the mean metrics.
        layout: Names, dtypes and shapes as `train()` returned them.
        names: The user's names of the ArrayRecord and the MetricRecord.
        vector: The decoding vector.
        used: Workers whose replies entered, ascending.
        stale: What was filled in.
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
    """Replies that can be added up."""

    decoder: IncrementalDecoder
    reply: Reply
    key: object
    encoding: PayloadEncoding
    #: By row of the code: (node, worker) that sent it, the coded update, the coded metrics.
    senders: dict[int, tuple[int, int]] = field(default_factory=dict)
    updates: dict[int, NDArray[Any]] = field(default_factory=dict)
    metrics: dict[int, NDArray[Any]] = field(default_factory=dict)
    #: Whether the weights of all replies are whole numbers.
    whole: bool = True

    def add(self, row: int, sender: tuple[int, int], reply: Reply, update: NDArray[Any], metrics: NDArray[Any]) -> bool:
        """One more reply, unless there is one for this row; whether it was taken."""
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
        release: CentralGaussian | None = None,
    ) -> Decoded | str:
        """The decoded mean, or why there is none; with `release` a noisy one, of public weight."""
        rows = vector.reshape(code.n, -1)
        used = tuple(int(i) for i in np.flatnonzero(rows.any(axis=1)))
        wrong = _no_mean(code, vector, sum(len(one.shards) for one in stale))
        if wrong or not used:
            return wrong or "nothing that could be added up came in"
        # What is filled in comes last, so that an exact sum has the same bits with and without.
        coefficients = np.concatenate([rows[list(used)], np.ones((len(stale), code.m), rows.dtype)])
        order = [*code.order_of(used), *range(code.n, code.n + len(stale))]
        (weight_key, _, _), *_ = self.reply.metrics_layout
        vectors = [*(self.metrics[i] for i in used), *(one.metrics for one in stale)]
        metrics = self.encoding.restored(code.numbers.decode(vectors, coefficients[:, :1], order=order))  # in one block
        if not 0 < metrics[0] < np.inf:
            return f"the decoded {weight_key!r} is {metrics[0]:g}, and a mean needs a positive, finite one"
        weight, record = rebuild_metrics(self.reply.metrics_layout, metrics, whole=self.whole)
        arrays = None
        if before is not None:
            vectors = [*(self.updates[i] for i in used), *(one.update for one in stale)]
            pieces: Iterable[NDArray[Any]]
            if release is None and isinstance(code.numbers, PrimeField):
                pieces = code.numbers.decode_in_pieces(vectors, coefficients)
            else:
                total = code.numbers.decode(vectors, coefficients, order=order)
                if release is not None:
                    total, weight = release.noisy(total), release.weight
                pieces = [total]
                del total
            try:
                arrays = rebuild_arrays(self.reply.layout, before, pieces, weight)
            except OverflowError as error:
                return str(error)
        names = (self.reply.arrays_name, self.reply.metrics_name)
        workers = tuple(sorted({self.senders[row][1] for row in used}))
        return Decoded(arrays, record, self.reply.layout, names, vector, workers, tuple(stale))


def _no_mean(code: GradientCode, vector: NDArray[Any], filled: int) -> str:
    """Why an estimate is no mean of the shards, or an empty text."""
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
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The coded update and the coded metrics of a reply, checked against what was sent.

    Raises:
        ValueError: With the reason; something is missing, mis-shaped, mis-typed or not finite.
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
    if update_dtype.kind == "f":
        _check_finite(update, metrics)
    elif max(update.max(initial=0), metrics.max(initial=0)) >= P:
        raise ValueError(f"an entry is outside the field 0..{P - 1}")
    return update, metrics


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


def _check_finite(update: NDArray[np.floating], metrics: NDArray[np.floating]) -> None:
    # A metric may be NaN (an accuracy over no examples), as under plain Flower; the weight may not.
    if not all_finite(update):
        raise ValueError("its weighted update is not finite (NaN or infinity)")
    if not math.isfinite(float(metrics[0])):
        raise ValueError("its number of examples is not finite (NaN or infinity)")


def can_fill_in(code: GradientCode, *, shardwise: bool) -> bool:
    """Whether the server learns what the missing ones last sent."""
    return shardwise or (code.groups is not None and code.m == 1)


class StaleUpdates:
    """The last known update of each block of shards."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], StaleUpdate] = {}

    def keep(
        self, code: GradientCode, shards: Sequence[int], server_round: int, bucket: ReplyGroup, vector: NDArray[Any]
    ) -> None:
        """Remember what went into a sum."""
        for worker in np.flatnonzero(vector):
            block = tuple(shards[j] for j in code.shards_of(int(worker)))
            # Under sampling a group sends other shards each time: what overlaps is out of date.
            self._known = {one: stale for one, stale in self._known.items() if not set(one) & set(block)}
            update, metrics = bucket.updates[int(worker)], bucket.metrics[int(worker)]
            self._known[block] = StaleUpdate(block, server_round, update, metrics, bucket.key)

    def for_missing(
        self, code: GradientCode, shards: Sequence[int], survivors: Sequence[int], key: object
    ) -> tuple[StaleUpdate, ...]:
        """What is known of the groups without survivors; only where names, dtypes and shapes are the same."""
        there = set(survivors)
        found = []
        for group in code.groups or ():
            if not there.intersection(group):
                stale = self._known.get(tuple(shards[j] for j in code.shards_of(group[0])))
                if stale is not None and stale.key == key:
                    found.append(stale)
        return tuple(found)


NO_MOD = "no fl-gradcode reply: is gradient_coding_mod among the client's mods?"
FIXED_DATA = "train() never read partition-id"

#: Relative difference between two holders of a shard above which the ledger and a warning say so: float
#: arithmetic on different machines stays below.
DISAGREEMENT = 1e-5


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count. `worker` is None while the node has never said who it is."""

    node: int
    worker: int | None
    reason: str


class ReplyCollector:
    """Collects replies.

    Args:
        plan: What was asked; `plan.rows` holds every worker's row.
        code: How replies add up: one reply for each of its rows.
        before: The arrays that were sent; None when evaluating.
        registry: Who is who; learns from the replies.
        row_of: Which of the code's rows a reply stands for; a text says why none.
        spare: Whether a second copy of a row is welcome, and merely not needed.
    """

    def __init__(
        self,
        plan: Plan,
        code: GradientCode,
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        row_of: Callable[[Reply], int | str],
        *,
        spare: bool = False,
    ) -> None:
        self.plan, self.code, self.before, self.registry = plan, code, before, registry
        self._row_of, self._spare = row_of, spare
        self._carrier = payload_encoding(plan.fraction_bits, plan.k)
        #: Workers whose replies count, in order of arrival; under `spare`, each as often as it answered.
        self.answered: list[int] = []
        #: Workers with a good reply for which there was one before.
        self.spare_from: set[int] = set()
        self.rejections: list[Rejection] = []
        self.stateful = False
        self.fixed_data = False
        self.disagreement = 0.0
        #: Shard -> two of its holders that disagree.
        self.disagreeing: dict[int, tuple[int, int]] = {}
        #: Largest epsilon that a holder tells, of this run and of all runs; None without privacy.
        self.spent: tuple[float, float] | None = None
        #: Shard -> two of its holders whose keys were bound to different requests.
        self.other_requests: dict[int, tuple[int, int]] = {}
        self.buckets: dict[object, ReplyGroup] = {}
        self._contexts: dict[int, tuple[int, str]] = {}
        self._sketches: dict[int, tuple[int, tuple[float, ...]]] = {}

    @property
    def best(self) -> ReplyGroup | None:
        """The bucket that decodes, else the largest."""
        buckets = self.buckets.values()
        return max(buckets, key=lambda b: (b.decoder.decodable, len(b.decoder.survivors)), default=None)

    def read(self, node: int, reply: Message | None, failure: str) -> str | None:
        """Read one reply: it counts (None), or is rejected with a reason."""
        reason = (failure or "no reply came") if reply is None else self._examine(node, reply)
        if reason is not None:
            self.rejections.append(Rejection(node, self.registry.worker_of(node), reason))
            if reply is None or reply.has_error():
                self.registry.forget(node)
        return reason

    def outvoted(self) -> list[Rejection]:
        """Replies that were left out because others agree on other names, dtypes or shapes."""
        best = self.best
        reason = "its arrays or metrics differ in name, dtype or shape from the other replies'"
        return [
            Rejection(*sender, reason)
            for bucket in self.buckets.values()
            if bucket is not best
            for sender in bucket.senders.values()
        ]

    def sender_of(self, row: int) -> tuple[int, int] | None:
        """(node, worker) of a reply for this row that counts, or None."""
        return next((b.senders[row] for b in self.buckets.values() if row in b.senders), None)

    def _examine(self, node: int, message: Message) -> str | None:
        if message.has_error():
            return error_text(message)
        try:
            reply = Reply.find_in(message.content)
        except ValueError as error:
            return str(error)
        if reply is None:
            return NO_MOD
        if (reply.run, reply.kind, reply.round) != (self.plan.run, self.plan.kind, self.plan.round):
            wrong = f"run {reply.run!r}, " if reply.run != self.plan.run else ""
            return f"wrong round: it answers {wrong}{reply.kind} {reply.round}"
        if self.plan.open:
            self.registry.holdings[reply.worker] = dict(reply.holds)
        if reply.worker not in self.plan.rows and self.plan.open:
            self.registry.answered(node, reply.worker, self.plan.round)
            return None  # it is new: the next round's code has a row for it
        if reply.worker not in self.plan.rows:
            return f"worker {reply.worker} is not in the code (workers 0..{self.plan.n - 1})"
        self.registry.answered(node, reply.worker, self.plan.round)
        self.stateful |= reply.stateful
        self.fixed_data |= reply.fixed_data
        if reply.outcome == "idle":
            asked = self.plan.rows[reply.worker].shards
            return f"it does not hold all of the shards {list(asked)} any more" if asked else None
        if reply.outcome == "gave-up":
            return f"gave up after {sum(reply.seconds):.1f} s with {len(reply.seconds)} shards done"
        if reply.outcome == "fixed-data":
            return FIXED_DATA
        return self._accept(node, reply, message)

    def _accept(self, node: int, reply: Reply, message: Message) -> str | None:
        row = self._row_of(reply)
        if isinstance(row, str):
            return row
        sender = self.sender_of(row)
        if sender is not None and not self._spare:
            other = sender[0]
            return "duplicate" if other == node else f"duplicate: node {other} answered as worker {reply.worker}"
        if not reply.metrics_layout or reply.metrics_layout[0][0] != self.plan.weight_key:
            return f"its metrics do not begin with {self.plan.weight_key!r}"
        if reply.metrics_layout[0][1] != -1:
            return f"its {self.plan.weight_key!r} is not one number"
        if not reply.metrics_name or (self.before is not None and reply.arrays_name in ("", reply.metrics_name)):
            return f"its records are named {reply.arrays_name!r} and {reply.metrics_name!r}"
        try:
            update, metrics = vectors_of(reply, message, self.before, self.code.m, self._carrier)
        except Exception as error:  # a reply holds whatever somebody put there: it must not end the run
            return f"unusable vectors: {last_line(str(error))}"
        self._compare(reply)
        self._note_spent(reply)
        self.answered.append(reply.worker)
        key = (reply.layout, tuple((name, length) for name, length, _ in reply.metrics_layout))
        if key not in self.buckets:
            self.buckets[key] = ReplyGroup(self.code.incremental(), reply, key, self._carrier)
        if not self.buckets[key].add(row, (node, reply.worker), reply, update, metrics):
            self.spare_from.add(reply.worker)
        return None

    def _note_spent(self, reply: Reply) -> None:
        """Remember what privacy cost, and whether holders of a shard were asked the same."""
        for shard, bound, epsilon, total in reply.spent:
            most, most_total = self.spent or (0.0, 0.0)
            self.spent = (max(most, epsilon), max(most_total, total))
            holder, first = self._contexts.setdefault(shard, (reply.worker, bound))
            if first != bound:
                self.other_requests[shard] = (holder, reply.worker)

    def _compare(self, reply: Reply) -> None:
        """Remember how far holders of one shard are apart."""
        for shard, sketch in zip(reply.shards, reply.sketches, strict=False):
            holder, first = self._sketches.setdefault(shard, (reply.worker, sketch))
            scale = max(abs(first[0]), abs(sketch[0]), 1e-30)
            apart = max((abs(x - y) / scale for x, y in zip(first, sketch, strict=False)), default=0.0)
            if apart > DISAGREEMENT:
                self.disagreeing[shard] = (holder, reply.worker)
            self.disagreement = min(max(self.disagreement, apart), 1e300)  # a ledger row holds finite numbers
