"""Whether two copies of a shard agree in all their entries, up to what float arithmetic may cause."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..protocol import view
from .disagreement import DISAGREEMENT

__all__ = ["records_agree", "vectors_agree"]

_CACHED = 1 << 16  # entries that fit a core's cache


def vectors_agree(one: NDArray[Any], other: NDArray[Any], slack: float = 0.0) -> bool:
    """Returns whether two vectors agree: in every bit if they are whole numbers, else but for 1e-5 of their norm.

    Args:
        one, other: The vectors, shape (d,).
        slack: Norm of what rounding the model's arrays to their dtypes may change in addition.
    """
    squares = _squares(one, other, None)
    return squares is not None and _close(*squares, slack)


def records_agree(
    one: RecordDict, other: RecordDict, weight_key: str, before: ArrayRecord | None = None, slack: float = 0.0
) -> bool:
    """Returns whether two shards' records agree: all arrays, but for 1e-5 of the norm of the update, and the weight.

    Other metrics may differ, as times do.

    Args:
        one, other: Records as a function returned them.
        weight_key: The metric that holds the number of examples.
        before: The arrays that training started from; those of the same name and shape are subtracted.
        slack: Norm of what rounding the model's arrays to their dtypes may change in addition.
    """
    if {name: type(record) for name, record in one.items()} != {name: type(record) for name, record in other.items()}:
        return False
    apart = size = 0.0
    for name, record in one.items():
        its = other[name]
        if isinstance(record, MetricRecord) and record.get(weight_key) != its.get(weight_key):
            return False
        if not isinstance(record, ArrayRecord) or not isinstance(its, ArrayRecord):
            continue
        if {*record} != {*its}:
            return False
        for key in record:
            old = None if before is None or key not in before else np.asarray(view(before[key]))
            squares = _squares(np.asarray(view(record[key])), np.asarray(view(its[key])), old)
            if squares is None:
                return False
            apart, size = apart + squares[0], size + squares[1]
    return _close(apart, size, slack)


def _close(apart: float, size: float, slack: float) -> bool:
    return math.isfinite(size) and math.sqrt(apart) <= DISAGREEMENT * math.sqrt(size) + slack


def _squares(one: NDArray[Any], other: NDArray[Any], less: NDArray[Any] | None) -> tuple[float, float] | None:
    """Returns the squared norms of the difference and of the larger of two arrays; None if they cannot agree."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return None
    if one.dtype.kind != "f":
        return (0.0, 0.0) if np.array_equal(one, other) else None
    mine, its = one.reshape(-1), other.reshape(-1)
    old = None if less is None or less.shape != one.shape or less.dtype.kind != "f" else less.reshape(-1)
    apart = size = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, mine.size, _CACHED):
            part = slice(start, start + _CACHED)
            pair = [mine[part], its[part]] if old is None else [mine[part] - old[part], its[part] - old[part]]
            apart += _square(mine[part] - its[part])
            size += max(map(_square, pair))
    return apart, size


def _square(values: NDArray[Any]) -> float:
    square = float(np.dot(values, values)) if values.dtype.itemsize >= 4 else math.inf
    if math.isfinite(square):
        return square
    wide = values.astype(np.float64)  # a float32 product may overflow where a float64 one does not
    return float(np.dot(wide, wide))
