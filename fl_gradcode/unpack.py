"""The vectors of one reply, and everything that can be wrong with them."""

from __future__ import annotations

import math

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from . import pack
from .gradient_code import GradientCode
from .wire import ARRAYS, METRICS, UPDATE, Reply

__all__ = ["vectors_of"]


def vectors_of(
    reply: Reply, message: Message, before: ArrayRecord | None, code: GradientCode
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The coded update and the coded metrics of a reply, checked against what was sent.

    Raises:
        ValueError: With the reason; something is missing, mis-shaped, mis-typed or not finite.
    """
    m = code.m
    record = message.content.get(UPDATE)
    if not isinstance(record, ArrayRecord) or METRICS not in record:
        raise ValueError(f"the record {UPDATE!r} is missing")
    entries = sum(max(length, 1) if length else 0 for _, length, _ in reply.metrics_layout)
    metrics = _vector(record, METRICS, entries, np.dtype(np.float64), m)
    if before is None:
        _check_finite(np.zeros(0, np.float32), metrics, m)
        return np.zeros(0, np.float32), metrics
    for name, dtype, shape in reply.layout:
        if dtype != "bfloat16" and np.dtype(dtype).kind not in "fiub":
            raise ValueError(f"array {name!r} has dtype {dtype}; only real numbers can be averaged")
        if name not in before or tuple(before[name].shape) != shape:
            raise ValueError(f"array {name!r} with shape {shape} does not match what was sent")
    if len({name for name, _, _ in reply.layout}) != len(reply.layout):
        raise ValueError("an array is named twice")
    expected = pack.size_of(reply.layout)
    update = _vector(record, ARRAYS, expected, pack.wire_dtype(reply.layout), m)
    _check_finite(update, metrics, m)
    return update, metrics


def _vector(record: ArrayRecord, name: str, entries: int, dtype: np.dtype[np.floating], m: int) -> NDArray[np.floating]:
    if name not in record:
        raise ValueError(f"{name!r} is missing")
    values = pack.view(record[name])
    length = -(-entries // m)
    if values.dtype != dtype:
        raise ValueError(f"{name!r} has dtype {values.dtype}, expected {dtype}")
    if values.shape != (length,):
        raise ValueError(f"{name!r} has shape {values.shape}, expected ({length},)")
    return np.asarray(values)


def _check_finite(update: NDArray[np.floating], metrics: NDArray[np.floating], m: int) -> None:
    # A metric may be NaN (an accuracy over no examples), as under plain Flower; the weight may not, and for
    # m > 1 metrics and weight share entries.
    if not pack.all_finite(update):
        raise ValueError("its weighted update is not finite (NaN or infinity)")
    if not (math.isfinite(float(metrics[0])) if m == 1 else np.isfinite(metrics).all()):
        raise ValueError("its number of examples is not finite (NaN or infinity)")
