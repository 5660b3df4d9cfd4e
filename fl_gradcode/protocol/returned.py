"""What makes two replies alike whose records are as the function returned them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from .packing import all_finite, check_whole_numbers, first_difference, view

__all__ = ["NotFiniteRecord", "difference_of_names", "names_of", "shape_named"]

#: Name, type and entries of each record, and what each entry looks like if that has to be alike, else an empty string.
_Names = tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...]


def names_of(content: RecordDict, weight_key: str, adds_up: Collection[str] = ()) -> _Names:
    """Returns the names of the records and of their entries, in alphabetical order: replies are compared by it.

    The entries of a ConfigRecord are left out, because they may differ between clients.

    Args:
        content: The records.
        weight_key: Metric that holds the number of examples.
        adds_up: "arrays" if the strategy adds up arrays of one name, so that their shapes have to be alike; "metrics"
            if it adds up metrics, so that lists have to have one length.

    Raises:
        ValueError: An array cannot be read, or an entry is NaN or infinite. The message says which.
    """
    names = []
    for name, record in sorted(content.items()):
        keys: tuple[str, ...] = () if isinstance(record, ConfigRecord) else tuple(sorted(record.keys()))
        forms = ("",) * len(keys)
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                _check_array(f"{name}[{key!r}]", array)
            if "arrays" in adds_up:
                forms = tuple(shape_named(record[key].shape) for key in keys)
        elif isinstance(record, MetricRecord):
            check_whole_numbers(record)
            weight = record.get(weight_key)
            if isinstance(weight, (int, float)) and not math.isfinite(weight):
                raise NotFiniteRecord(f"its {weight_key!r} is not finite (NaN or infinity)")
            if isinstance(weight, (int, float)) and weight < 0:
                raise ValueError(f"its {weight_key!r} is {weight:g}, below zero")
            if "metrics" in adds_up:
                forms = tuple(_length_named(record[key]) for key in keys)
        names.append((name, type(record).__name__, keys, forms))
    return tuple(names)


def shape_named(shape: Iterable[int]) -> str:
    """Returns what `names_of` says of an array of this shape."""
    return f"of shape {[*shape]}"


def _length_named(value: object) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else "one number"


def difference_of_names(one: _Names, other: _Names, whose: str) -> str:
    """Returns a sentence part about the first record or entry in which two replies differ, or an empty string.

    Args:
        one: What `names_of` returned for the reply that the sentence is about.
        other: What it returned for the reply that it is compared with.
        whose: The other reply, such as "shard 3's".
    """
    kinds, theirs = ({name: f"of type {kind}" for name, kind, _, _ in names} for names in (one, other))
    if wrong := first_difference("record {!r}", kinds, theirs, whose):
        return wrong
    for (name, _, keys, forms), (_, _, its_keys, its_forms) in zip(one, other, strict=True):  # both in their order
        entries, its = dict(zip(keys, forms, strict=True)), dict(zip(its_keys, its_forms, strict=True))
        called = "entry {!r} of " + repr(name).replace("{", "{{").replace("}", "}}")
        if wrong := first_difference(called, entries, its, whose):
            return wrong
    return ""


class NotFiniteRecord(ValueError):
    """An array or the weight of a reply is NaN or infinite."""


def _check_array(name: str, array: Array) -> None:
    try:
        values: NDArray[Any] = view(array)
    except Exception as error:  # a reply is untrusted input
        raise ValueError(f"its array {name} cannot be read ({error})") from error
    if values.dtype.kind == "f" and not all_finite(values.ravel()):
        raise NotFiniteRecord(f"its array {name} is not finite (NaN or infinity)")
