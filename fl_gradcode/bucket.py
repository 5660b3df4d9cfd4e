"""Replies that agree on names, dtypes and shapes, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from numpy.typing import NDArray

from . import pack
from .carry import Carrier
from .gradient_code import GradientCode
from .incremental import IncrementalDecoder
from .prime_field import PrimeField
from .release import CentralRelease
from .wire import Reply

__all__ = ["Bucket", "Decoded", "Stale"]

# An estimate that is not exact must still be close to a mean: a least-squares vector of a code with signs may
# subtract shards, and dividing by the little weight that is left would throw the model far off.
_MEAN_ENOUGH = 0.8
# For m > 1 an estimate may also put one block of the update where another belongs.
_MIX_UP = 0.1


@dataclass(frozen=True)
class Stale:
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
    layout: pack.Layout
    names: tuple[str, str]
    vector: NDArray[Any]
    used: tuple[int, ...]
    stale: tuple[Stale, ...] = ()


@dataclass
class Bucket:
    """Replies that can be added up."""

    decoder: IncrementalDecoder
    reply: Reply
    key: object
    carrier: Carrier
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
        stale: Sequence[Stale] = (),
        release: CentralRelease | None = None,
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
        metrics = self.carrier.restored(code.numbers.decode(vectors, coefficients[:, :1], order=order))  # in one block
        if not 0 < metrics[0] < np.inf:
            return f"the decoded {weight_key!r} is {metrics[0]:g}, and a mean needs a positive, finite one"
        weight, record = pack.rebuild_metrics(self.reply.metrics_layout, metrics, whole=self.whole)
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
                arrays = pack.rebuild_arrays(self.reply.layout, before, pieces, weight)
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
