"""What makes two replies alike whose records are as the function returned them, and how far two copies are apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from .packing import all_finite, view

__all__ = ["NotFiniteRecord", "difference_of", "names_of"]


def names_of(content: RecordDict, weight_key: str) -> object:
    """Returns the names of the records and of their entries, in alphabetical order: replies are compared by it.

    The entries of a ConfigRecord are left out, because they may differ between clients.

    Raises:
        ValueError: An array cannot be read, or an entry is NaN or infinite. The message says which.
    """
    names = []
    for name, record in sorted(content.items()):
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                _check_array(f"{name}[{key!r}]", array)
        elif not isinstance(record, ConfigRecord):
            weight = record.get(weight_key)
            if isinstance(weight, float) and not math.isfinite(weight):
                raise NotFiniteRecord(f"its {weight_key!r} is not finite (NaN or infinity)")
        keys = () if isinstance(record, ConfigRecord) else tuple(sorted(record))
        names.append((name, type(record).__name__, keys))
    return tuple(names)


class NotFiniteRecord(ValueError):
    """An array or the weight of a reply is NaN or infinite."""


def _check_array(name: str, array: Array) -> None:
    try:
        values = view(array)
    except Exception as error:  # a reply is untrusted input
        raise ValueError(f"its array {name} cannot be read ({error})") from error
    if values.dtype.kind == "f" and not all_finite(np.asarray(values).ravel()):
        raise NotFiniteRecord(f"its array {name} is not finite (NaN or infinity)")


def difference_of(one: RecordDict, other: RecordDict, weight_key: str) -> float:
    """Returns how much two holders' records of a shard differ: the relative Euclidean distance of their arrays.

    Records or arrays that are missing, have another shape, or hold something else than floats and differ, and weights
    that differ, count as infinitely different. Other metrics may differ, as seconds do.
    """
    if one.keys() != other.keys():
        return math.inf
    apart = total = 0.0
    mine: Any
    for name, mine in one.items():
        theirs: Any = other[name]
        if isinstance(mine, ConfigRecord):
            continue  # times and remarks may differ
        if type(mine) is not type(theirs) or {*mine} != {*theirs}:
            return math.inf
        if isinstance(mine, MetricRecord) and mine.get(weight_key) != theirs.get(weight_key):
            return math.inf
        if not isinstance(mine, ArrayRecord):
            continue
        for key, array in mine.items():
            x: NDArray[Any] = np.asarray(view(array))
            y: NDArray[Any] = np.asarray(view(theirs[key]))
            if x.shape != y.shape or x.dtype != y.dtype:
                return math.inf
            if x.dtype.kind != "f":
                if not np.array_equal(x, y):
                    return math.inf
                continue
            apart += float(np.square(x.astype(np.float64) - y).sum())
            total += float(np.square(x, dtype=np.float64).sum())
    return math.sqrt(apart / total) if total else math.sqrt(apart)
