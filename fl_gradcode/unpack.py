"""The vectors of one reply, and everything that can be wrong with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from . import pack
from .carry import Carrier
from .prime_field import P
from .wire import ARRAYS, METRICS, UPDATE, Reply

__all__ = ["vectors_of"]


def vectors_of(
    reply: Reply, message: Message, before: ArrayRecord | None, m: int, carrier: Carrier
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The coded update and the coded metrics of a reply, checked against what was sent.

    Raises:
        ValueError: With the reason; something is missing, mis-shaped, mis-typed or not finite.
    """
    record = message.content.get(UPDATE)
    if not isinstance(record, ArrayRecord) or METRICS not in record:
        raise ValueError(f"the record {UPDATE!r} is missing")
    update_dtype, metrics_dtype = carrier.dtypes(reply.layout)
    numbers = sum(max(length, 1) if length else 0 for _, length, _ in reply.metrics_layout)
    metrics = _vector(record, METRICS, carrier.entries(numbers), metrics_dtype, 1)
    if before is None:
        update = np.zeros(0, update_dtype)
    else:
        _check_layout(reply.layout, before)
        update = _vector(record, ARRAYS, pack.size_of(reply.layout), update_dtype, m)
    if update_dtype.kind == "f":
        _check_finite(update, metrics)
    elif max(update.max(initial=0), metrics.max(initial=0)) >= P:
        raise ValueError(f"an entry is outside the field 0..{P - 1}")
    return update, metrics


def _check_layout(layout: pack.Layout, before: ArrayRecord) -> None:
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
    values = pack.view(record[name])
    length = -(-entries // m)
    if values.dtype != dtype:
        raise ValueError(f"{name!r} has dtype {values.dtype}, expected {dtype}")
    if values.shape != (length,):
        raise ValueError(f"{name!r} has shape {values.shape}, expected ({length},)")
    return np.asarray(values)


def _check_finite(update: NDArray[np.floating], metrics: NDArray[np.floating]) -> None:
    # A metric may be NaN (an accuracy over no examples), as under plain Flower; the weight may not.
    if not pack.all_finite(update):
        raise ValueError("its weighted update is not finite (NaN or infinity)")
    if not math.isfinite(float(metrics[0])):
        raise ValueError("its number of examples is not finite (NaN or infinity)")
