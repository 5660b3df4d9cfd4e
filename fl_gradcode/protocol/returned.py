"""What makes two replies alike whose records are as the function returned them."""

from __future__ import annotations

import math
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from .packing import all_finite, view

__all__ = ["NotFiniteRecord", "names_of"]


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
            if isinstance(weight, (int, float)) and not math.isfinite(weight):
                raise NotFiniteRecord(f"its {weight_key!r} is not finite (NaN or infinity)")
            if isinstance(weight, (int, float)) and weight < 0:
                raise ValueError(f"its {weight_key!r} is {weight:g}, below zero")
        keys = () if isinstance(record, ConfigRecord) else tuple(sorted(record.keys()))
        names.append((name, type(record).__name__, keys))
    return tuple(names)


class NotFiniteRecord(ValueError):
    """An array or the weight of a reply is NaN or infinite."""


def _check_array(name: str, array: Array) -> None:
    try:
        values: NDArray[Any] = view(array)
    except Exception as error:  # a reply is untrusted input
        raise ValueError(f"its array {name} cannot be read ({error})") from error
    if values.dtype.kind == "f" and not all_finite(values.ravel()):
        raise NotFiniteRecord(f"its array {name} is not finite (NaN or infinity)")
