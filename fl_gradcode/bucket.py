"""Replies that agree on names, dtypes and shapes, and what they add up to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from numpy.typing import NDArray

from . import pack
from .combine import combine
from .gradient_code import GradientCode
from .incremental import IncrementalDecoder
from .wire import Reply

__all__ = ["Bucket", "Decoded"]

# An estimate that is not exact must still be close to a mean: a least-squares vector of a code with signs may
# subtract shards, and dividing by the little weight that is left would throw the model far off.
_MEAN_ENOUGH = 0.8


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
    """

    arrays: ArrayRecord | None
    metrics: MetricRecord
    layout: pack.Layout
    names: tuple[str, str]
    vector: NDArray[np.float64]
    used: tuple[int, ...]


@dataclass
class Bucket:
    """Replies that can be added up."""

    decoder: IncrementalDecoder
    reply: Reply
    updates: dict[int, NDArray[np.floating]] = field(default_factory=dict)
    metrics: dict[int, NDArray[np.floating]] = field(default_factory=dict)
    #: Whether the weights of all replies are whole numbers.
    whole: bool = True

    def add(self, reply: Reply, update: NDArray[np.floating], metrics: NDArray[np.floating]) -> None:
        """One more reply."""
        self.updates[reply.worker] = update
        self.metrics[reply.worker] = metrics
        self.whole &= reply.metrics_layout[0][2]
        self.decoder.add(reply.worker)

    def decode(self, code: GradientCode, vector: NDArray[np.float64], before: ArrayRecord | None) -> Decoded | str:
        """The decoded mean, or why there is none."""
        rows = vector.reshape(code.n, -1)
        used = tuple(int(i) for i in np.flatnonzero(rows.any(axis=1)))
        coverage = code.coverage_of(vector)
        if not used or coverage.sum() < _MEAN_ENOUGH * np.abs(coverage).sum():
            return f"the best estimate is no mean of the shards (coverage {coverage.min():.2f} to {coverage.max():.2f})"
        coefficients, order = rows[list(used)], code.order_of(used)
        (weight_key, _, _), *_ = self.reply.metrics_layout
        metrics = np.asarray(combine([self.metrics[i] for i in used], coefficients, order=order), np.float64)
        if not 0 < metrics[0] < np.inf:
            return f"the decoded {weight_key!r} is {metrics[0]:g}, and a mean needs a positive, finite one"
        weight, record = pack.rebuild_metrics(self.reply.metrics_layout, metrics, whole=self.whole)
        arrays = None
        if before is not None:
            total = combine([self.updates[i] for i in used], coefficients, order=order)
            try:
                arrays = pack.rebuild_arrays(self.reply.layout, before, total, weight)
            except OverflowError as error:
                return str(error)
        names = (self.reply.arrays_name, self.reply.metrics_name)
        return Decoded(arrays, record, self.reply.layout, names, vector, used)
