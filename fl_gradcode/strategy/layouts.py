"""Which names, dtypes and shapes the arrays of replies may have: those that the server sent, or what most agree on.

Plain Flower lets an app return fewer arrays than it got, or other dtypes, and the model has those from then on. Here
one early reply may decode alone, so a layout that is not the server's counts only if the majority of the nodes that
were asked has it, or an earlier round was decoded with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from ..protocol import Layout, difference_between, shape_named, view

__all__ = ["AgreedLayouts", "check_layout", "check_records", "unlike_plain", "unlike_sent"]

_BFLOAT16 = "bfloat16"
_LARGEST_BFLOAT16 = float(np.finfo(np.float32).max)
_MOST = 8  # layouts that are remembered


class AgreedLayouts:
    """The layouts with which rounds of a run were decoded, the last few."""

    def __init__(self) -> None:
        self._known: list[object] = []

    def __contains__(self, key: object) -> bool:
        """Whether a round was decoded with this layout."""
        return key in self._known

    def add(self, key: object) -> None:
        """Note that a round was decoded with this layout."""
        if key not in self._known:
            self._known = [*self._known, key][-_MOST:]


def check_layout(layout: Layout, before: ArrayRecord) -> None:
    """Refuse arrays that cannot be an update of the arrays that were sent.

    Raises:
        ValueError: A name, shape or dtype does not fit. The message says which.
    """
    for name, dtype, shape in layout:
        if name not in before or tuple(before[name].shape) != shape:
            raise ValueError(f"array {name!r} with shape {shape} does not match what was sent")
        _check_dtype(name, dtype, before[name])
    if len({name for name, _, _ in layout}) != len(layout):
        raise ValueError("an array is named twice")


def check_records(content: RecordDict, before: ArrayRecord) -> None:
    """Refuse records whose arrays have a dtype that cannot hold the values of the array of that name that was sent.

    Raises:
        ValueError: A dtype does not fit. The message says which.
    """
    sent = dict(before.items())
    for record in content.values():
        if isinstance(record, ArrayRecord):
            for name, array in record.items():
                if name in sent:
                    _check_dtype(name, array.dtype, sent[name])


def unlike_sent(layout: Layout, before: ArrayRecord) -> str:
    """Returns in what a layout differs from the arrays that were sent, or an empty string; their order may differ."""
    sent = tuple((name, array.dtype, tuple(array.shape)) for name, array in before.items())
    return difference_between(layout, (), sent, (), "the server's")


def unlike_plain(key: object, before: ArrayRecord | None, weight_key: str) -> str:
    """Returns in what records differ from what most strategies of Flower take, or an empty string.

    They take one ArrayRecord with the names that were sent, none when evaluating, and one MetricRecord with the weight.

    Args:
        key: What `names_of` returns for the records.
        before: The arrays that were sent; None when evaluating.
        weight_key: The metric that holds the number of examples.
    """
    assert isinstance(key, tuple)
    arrays = [dict(zip(names, forms, strict=True)) for _, kind, names, forms in key if kind == "ArrayRecord"]
    metrics = [names for _, kind, names, _ in key if kind == "MetricRecord"]
    if [{*names} for names in arrays] != ([] if before is None else [{*before}]):
        return "the arrays differ from the server's"
    for name, array in () if before is None else before.items():
        form, sent = arrays[0][name], shape_named(array.shape)
        if form and form != sent:
            return f"its array {name!r} is {form}, and the server's is {sent}"
    return (
        "" if len(metrics) == 1 and weight_key in metrics[0] else "there is not one record of metrics with the weight"
    )


def _check_dtype(name: str, dtype: str, sent: Array) -> None:
    if dtype == sent.dtype:
        return
    known = dtype == _BFLOAT16 or np.dtype(dtype).kind in "fiub"
    if not known:
        raise ValueError(f"array {name!r} has dtype {dtype}; only real numbers can be averaged")
    values: NDArray[Any] = np.asarray(view(sent))
    if not _holds(dtype, sent.dtype, float(values.min(initial=0)), float(values.max(initial=0))):
        raise ValueError(f"array {name!r} has dtype {dtype}, which cannot hold the server's {sent.dtype}")


def _holds(dtype: str, sent: str, lowest: float, highest: float) -> bool:
    kind = "f" if dtype == _BFLOAT16 else np.dtype(dtype).kind
    its = "f" if sent == _BFLOAT16 else np.dtype(sent).kind
    if its == "f" and kind != "f":
        return False
    if kind == "b":
        return its == "b"
    if kind == "f":
        most = _LARGEST_BFLOAT16 if dtype == _BFLOAT16 else float(np.finfo(dtype).max)
        return not (lowest < -most or highest > most)
    limits = np.iinfo(dtype)
    return limits.min <= lowest and highest <= limits.max
