"""Groups of replies that can be added up, and their sum: the decoded mean, or the records of all shards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..codes import GradientCode, PrimeField
from ..copies import Ballots
from ..errors import MaskedSumInvalid
from ..protocol import Layout, PayloadEncoding, Reply, counters_in, rebuild_arrays, rebuild_metrics

__all__ = [
    "Decoded",
    "MaskedReplies",
    "MaskedSum",
    "Noise",
    "ReplyGroup",
    "Returned",
    "ReturnedReplies",
    "StaleUpdate",
    "StaleUpdates",
]

if TYPE_CHECKING:
    from ..secagg import Manifest, MaskedReply

T = TypeVar("T")

_PIECE = 1 << 16  # entries of a masked sum that are turned into floats at once

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
class MaskedSum:
    """What a masked sum tells besides the mean.

    Attributes:
        request: Digest of the request that was answered, as hexadecimal.
        clipped: Number of clipped entries, or of clipped updates if their norm is limited; None if it is not told.
        error: Largest error of an entry of the mean from rounding to integers; for an evaluation, of a mean metric.
    """

    request: str
    clipped: int | None
    error: float


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
        masks: What a masked sum tells besides; None if replies were not masked.
    """

    arrays: ArrayRecord | None
    metrics: MetricRecord
    layout: Layout
    names: tuple[str, str]
    vector: NDArray[Any]
    used: tuple[int, ...]
    stale: tuple[StaleUpdate, ...] = ()
    masks: MaskedSum | None = None


class HeldReplies(Generic[T]):
    """Replies with the same layout, by the row of the code that they stand for.

    The first copy for a row is used. With ballots, it is the first one on which enough senders agree.

    Args:
        code: The code by which replies add up.
        key: Layout of the arrays and metrics, or names of the records and of what they hold.
        ballots: Counts equal copies of each unit; None to take the first.

    Attributes:
        key: See above.
        decoder: Tracks whether the rows that count are decodable.
        senders: Row -> the (node, worker) that sent it.
        copies: Row -> what was sent, for the rows that count.
        workers: Workers with a good reply.
        losses: Number of times that copies were dropped.
    """

    def __init__(
        self,
        code: GradientCode,
        key: object,
        ballots: Ballots[T] | None = None,
    ) -> None:
        self.key, self.ballots, self._code = key, ballots, code
        self.decoder = code.incremental()
        self.senders: dict[int, tuple[int, int]] = {}
        self.copies: dict[int, T] = {}
        self.workers: set[int] = set()
        self.losses = 0
        self._others: dict[int, list[tuple[tuple[int, int], T]]] = {}

    def add(self, row: int, sender: tuple[int, int], copy: T, *, unlike: bool = False) -> bool:
        """Add a reply; returns whether it may be used, or is only a further copy.

        Args:
            row: Row of the code.
            sender: Node and worker that sent it.
            copy: What was sent.
            unlike: Whether it differs from another copy of the same shards, so that it is kept beside the first.
        """
        self.workers.add(sender[1])
        if self.ballots is not None:
            return self._vote(self.ballots, row, sender, copy)
        if row in self.senders:
            if unlike:
                self._others.setdefault(row, []).append((sender, copy))
            return False
        self._use(row, sender, copy)
        return True

    def decodes_without(self, workers: Collection[int]) -> bool:
        """Returns whether the replies decode without what these workers sent."""
        decoder = self._code.incremental()
        return decoder.update([row for row in self.decoder.survivors if self._senders_of(row) - {*workers}])

    def _senders_of(self, row: int) -> set[int]:
        return {self.senders[row][1], *(worker for (_, worker), _ in self._others.get(row, ()))}

    def drop(self, workers: Collection[int]) -> None:
        """Use nothing that these workers sent; another copy of the same row takes its place if there is one."""
        rows = [*self.decoder.survivors]
        wrong = {row for row in rows if self.senders[row][1] in workers}
        if not wrong:
            return
        self.losses += 1
        self.decoder = self._code.incremental()
        for row in wrong:
            del self.senders[row], self.copies[row]
            others = [other for other in self._others.get(row, ()) if other[0][1] not in workers]
            if others:
                self.senders[row], self.copies[row] = others[0]
            elif self.ballots is not None:  # what a wrong sender said first of this unit, others have said too
                (unit,) = self._code.order_of([row])
                votes = [vote for vote in self.ballots.votes_for(unit) if vote[1][1] not in workers]
                if votes:
                    (its, self.senders[votes[0][0]]), (_, copy) = votes[0], self.ballots.winner(unit)
                    self.copies[its] = copy
        self.decoder.update([row for row in dict.fromkeys([*rows, *self.copies]) if row in self.copies])

    def _vote(self, ballots: Ballots[T], row: int, sender: tuple[int, int], copy: T) -> bool:
        (unit,) = self._code.order_of([row])  # its group, if the code has groups
        self.senders.setdefault(row, sender)
        decided = ballots.add(unit, row, sender, copy)
        if decided:
            (first, its), winner = ballots.winner(unit)
            self._use(first, its, winner)
        return decided

    def _use(self, row: int, sender: tuple[int, int], copy: T) -> None:
        self.senders[row], self.copies[row] = sender, copy
        self.decoder.add(row)


class ReplyGroup(HeldReplies[tuple[NDArray[Any], NDArray[Any]]]):
    """Coded updates and coded metrics with the same layout, which can be added up.

    Args:
        code: The code by which replies add up.
        key: Layout of the arrays and metrics.
        reply: The first reply of the group.
        encoding: Encoding of the payload.
        ballots: Counts equal copies; None to take the first.

    Attributes:
        reply, encoding: See above.
        whole: Whether the weights of all replies are whole numbers.
    """

    def __init__(
        self,
        code: GradientCode,
        key: object,
        reply: Reply,
        encoding: PayloadEncoding,
        ballots: Ballots[tuple[NDArray[Any], NDArray[Any]]] | None = None,
    ) -> None:
        super().__init__(code, key, ballots)
        self.reply, self.encoding = reply, encoding
        self.whole = True

    def vectors_of(self, rows: Sequence[int]) -> list[tuple[NDArray[Any], ...]]:
        """Returns all vectors that were sent for some rows."""
        return [self.copies[row] for row in rows]

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
        vectors = [*(self.copies[i][1] for i in used), *(old.metrics for old in stale)]
        # Metrics are never divided into m blocks: their first column of coefficients decodes them.
        metrics = self.encoding.restored(code.numbers.decode(vectors, coefficients[:, :1], order=order))
        if wrong := _no_weight(weight_key, metrics[0]):
            return wrong
        weight, record = rebuild_metrics(self.reply.metrics_layout, metrics, whole=self.whole)
        arrays = None
        if before is not None:
            vectors = [*(self.copies[i][0] for i in used), *(old.update for old in stale)]
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


def same_words(one: MaskedReply, other: MaskedReply) -> bool:
    """Returns whether two masked replies of one class are equal, which they are exactly if the integers are."""
    return all(np.array_equal(words, other.parts[part]) for part, words in one.parts.items())


class MaskedReplies(HeldReplies["MaskedReply"]):
    """Masked replies to one request.

    Args:
        code: The code by which replies add up.
        key: Digest of the request.
        manifest: The manifest by which they are masked.
        names: The names of the ArrayRecord and the MetricRecord for the wrapped strategy.
        ballots: Counts equal copies of each class; None to take the first.

    Attributes:
        differing: Two workers whose copies of one class differ; None if there are none.
        tags: Worker -> place of a class among those that it sends -> its tag of this class, as hexadecimal.
    """

    def __init__(
        self,
        code: GradientCode,
        key: object,
        manifest: Manifest,
        names: tuple[str, str],
        ballots: Ballots[MaskedReply] | None = None,
    ) -> None:
        super().__init__(code, key, ballots)
        self._manifest, self._names = manifest, names
        self.differing: tuple[int, int] | None = None
        self.tags: dict[int, dict[int, str]] = {}
        self._first_of: dict[int, int] = {}  # group -> the row whose copy came first

    def vectors_of(self, rows: Sequence[int]) -> list[tuple[NDArray[Any], ...]]:
        """Returns all vectors that were sent for some rows; each part is coded alike, so each has the code's checks."""
        return [tuple(self.copies[row].parts.values()) for row in rows]

    def note_tags(self, copy: MaskedReply, tags: str) -> None:
        """Keep the tags that came with a reply, for the other holders; whatever is none is left out."""
        from ..secagg import tags_in

        sent = self._manifest.body.classes.sent_by(copy.worker)
        places = range(len(sent)) if copy.number is None else [sent.index(copy.number)]
        self.tags.setdefault(copy.worker, {}).update(zip(places, tags_in(tags, len(places)), strict=False))

    def add(self, row: int, sender: tuple[int, int], copy: MaskedReply, *, unlike: bool = False) -> bool:
        """Add a reply; returns whether it may be used, or is only a further copy."""
        if (
            self._code.groups is not None and self.ballots is None
        ):  # with one shard a message, each shard is a group, with a row for all copies
            first = self._first_of.setdefault(self._code.order_of([row])[0], row)
            if first in self.copies and not same_words(self.copies[first], copy):
                self.differing = self.differing or (self.senders[first][1], sender[1])
        return super().add(row, sender, copy, unlike=unlike)

    def decode(
        self,
        code: GradientCode,
        vector: NDArray[Any],
        before: ArrayRecord | None,
        stale: Sequence[StaleUpdate] = (),
        noise: Noise | None = None,
    ) -> Decoded | str:
        """Returns the decoded mean, or a string that says why there is none; see `ReplyGroup.decode`.

        The check words are decoded before anything else is looked at.
        """
        from ..secagg import decode  # a plain server loads no cryptography

        assert not stale
        if self.differing is not None:
            return "workers {} and {} hold the same shards and sent different integers".format(*self.differing)
        used = [int(i) for i in np.flatnonzero(vector.reshape(code.n, -1).any(axis=1))]
        body = self._manifest.body
        try:
            (total,) = decode(self._manifest, [self.copies[row] for row in used])
        except MaskedSumInvalid as error:
            return str(error)[:-1]
        if not total.weight > 0:
            return f"the decoded {body.weight_key!r} is {total.weight:g}, and a mean needs a positive one"
        result = body.result("evaluate" if before is None else "train")
        layout = ((body.weight_key, -1, False), *((name, length, False) for name, length in result.metrics))
        whole = float(total.weight).is_integer()
        _, record = rebuild_metrics(layout, np.array([total.weight, *total.metrics]), whole=whole)
        arrays, error_of_mean = None, body.classes.k * 2.0**-31 / total.weight  # of metrics
        if before is not None:
            scale, weight = total.unit * total.largest_weight, total.weight
            starts = range(0, total.integers.size, _PIECE)
            pieces: Iterable[NDArray[Any]] = (total.integers[i : i + _PIECE].astype(np.float64) * scale for i in starts)
            if noise is not None:
                pieces, weight = [noise.add_to(total.integers * np.float64(scale), [])], noise.weight
            try:
                arrays = rebuild_arrays(result.arrays, before, pieces, weight)
            except OverflowError as error:
                return str(error)
            rounded = body.classes.k if body.quantiser.noise else len(body.classes) + body.classes.k * 2.0**-17
            error_of_mean = rounded * scale / weight
        clipped = total.clipped if noise is None else None
        masks = MaskedSum(self.copies[used[0]].request.hex(), clipped, error_of_mean)
        workers = tuple(sorted({self.senders[row][1] for row in used}))
        return Decoded(arrays, record, result.arrays, self._names, vector, workers, (), masks)


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

    def no_mean(self, weight_key: str) -> str:
        """Returns why the records have no weighted mean, or an empty string; what lacks a weight is not looked at."""
        weights = [
            record.get(weight_key)
            for content in self.contents.values()
            for record in content.values()
            if isinstance(record, MetricRecord)
        ]
        numbers = [float(weight) for weight in weights if isinstance(weight, (int, float))]
        return _no_weight(weight_key, sum(numbers)) if len(numbers) == len(self.contents) else ""


class ReturnedReplies(HeldReplies[RecordDict]):
    """Replies whose records have the same names, by the shard's place among the sampled ones."""

    def gather(self, shards: list[int]) -> Returned | None:
        """Returns the records of all sampled shards, or None if one has no reply."""
        vector = self.decoder.vector()
        if vector is None:
            return None
        contents = {shard: self.copies[row] for row, shard in enumerate(shards)}
        used = {self.senders[row][1] for row in range(len(shards))}
        return Returned(contents, vector, tuple(sorted(used)))


def _no_weight(weight_key: str, weight: float) -> str:
    """Returns why a sum of weights makes no mean, or an empty string if it does."""
    if 0 < weight < np.inf:
        return ""
    return f"the decoded {weight_key!r} is {weight:g}, and a mean needs a positive, finite one"


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
            update, metrics = group.copies[int(worker)]
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
