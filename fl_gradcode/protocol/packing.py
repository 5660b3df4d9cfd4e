"""Converts arrays and metrics to one flat vector each, and back.

An update is `arrays_after - arrays_before`, flattened in the order of `arrays_before`, and metrics are in alphabetical
order: a node may name the same things in another order than the next. An update's dtype is float64 if any array
is float64, else float32. Whole numbers (counters) and booleans are sent as floats, and rounded again after the wrapped
strategy has aggregated them. bfloat16 arrays, which NumPy lacks, are read from their 16-bit payload.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord
from numpy.typing import NDArray

from .._npy import array_of

__all__ = [
    "Layout",
    "MetricsLayout",
    "all_finite",
    "as_array",
    "check_whole_numbers",
    "counters_in",
    "difference_between",
    "encode_row",
    "first_difference",
    "flatten_metrics",
    "flatten_update",
    "rebuild_arrays",
    "rebuild_metrics",
    "restore_types",
    "size_of",
    "sum_of_squares",
    "view",
    "wire_dtype",
]

#: Name, dtype and shape of each array.
Layout = tuple[tuple[str, str, tuple[int, ...]], ...]
#: Name, length (-1 for a scalar) and whether it is a whole number, for each metric; the weight comes first.
MetricsLayout = tuple[tuple[str, int, bool], ...]

_BFLOAT16 = "bfloat16"
_LEAST_WEIGHT = 1e-30
_LARGEST_WHOLE = 2**63
# Number of entries that fit a core's cache.
_CACHED = 1 << 17
_FEW = 256  # entries that are looked at sooner than NumPy's warnings are switched off and on


def view(array: Array) -> NDArray[np.generic]:
    """Returns the values of a Flower array, read-only and without a copy; bfloat16 is copied to float32.

    Raises:
        ValueError: The array is not serialised by NumPy, or its bytes cannot be read or do not fit its shape.
    """
    if array.stype != "numpy.ndarray":
        raise ValueError(f"arrays are serialised as {array.stype!r}, expected 'numpy.ndarray'")
    values = array_of(array.data)
    if array.dtype == _BFLOAT16 and values.dtype.itemsize == 2:
        bits = np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(values.shape)
    return values


def all_finite(values: NDArray[np.floating]) -> bool:
    """Returns whether no entry is NaN or infinite."""
    # A finite sum of squares proves it, and takes half the time of checking each entry. A sum that overflows proves
    # nothing, so then the entries are checked.
    if values.dtype.itemsize < 4 or values.size <= _FEW:  # NumPy multiplies float16 slowly
        return bool(np.isfinite(values).all())
    return math.isfinite(sum_of_squares(values)) or bool(np.isfinite(values).all())


def sum_of_squares(values: NDArray[np.floating]) -> float:
    """Returns the sum of squares in the dtype of the vector; infinity or NaN if it overflows or an entry is none."""
    with np.errstate(all="ignore"):
        return float(np.dot(values, values))


def difference_between(
    one: Layout, one_metrics: MetricsLayout, other: Layout, other_metrics: MetricsLayout, whose: str
) -> str:
    """Returns a sentence part about the first array or metric in which two replies differ, or an empty string.

    Args:
        one, one_metrics: Layouts of the reply that the sentence is about.
        other, other_metrics: Layouts of the reply that it is compared with.
        whose: The other reply, such as "shard 3's".
    """
    kinds = [("array", _arrays(one), _arrays(other)), ("metric", _metrics(one_metrics), _metrics(other_metrics))]
    found = (first_difference(what + " {!r}", mine, theirs, whose) for what, mine, theirs in kinds)
    return next(filter(None, found), "")


def first_difference(called: str, mine: Mapping[str, str], theirs: Mapping[str, str], whose: str) -> str:
    """Returns a sentence part about the first name in which two replies differ, or an empty string.

    Args:
        called: What a name stands for, such as "array {!r}".
        mine: What the reply that the sentence is about has by each name, in words.
        theirs: The same of the reply that it is compared with.
        whose: The other reply, such as "shard 3's".
    """
    for name in sorted({*mine, *theirs}):
        what = called.format(name)
        if name not in theirs:
            return f"its {what} is not among {whose}"
        if name not in mine:
            return f"it lacks the {what}, which is among {whose}"
        if mine[name] != theirs[name]:
            return f"its {what} is {mine[name]}, and {whose} is {theirs[name]}"
    return ""


def _arrays(layout: Layout) -> dict[str, str]:
    return {name: f"{dtype} of shape {[*shape]}" for name, dtype, shape in layout}


def _metrics(layout: MetricsLayout) -> dict[str, str]:
    return {name: "one number" if size < 0 else f"a list of {size}" for name, size, _ in layout}


def wire_dtype(layout: Layout) -> np.dtype[np.floating]:
    """Returns the dtype of the flat vector: float64 if an array has a wider float dtype than float32, else float32."""
    wide = any(d != _BFLOAT16 and np.dtype(d).kind == "f" and np.dtype(d).itemsize > 4 for _, d, _ in layout)
    return np.dtype(np.float64 if wide else np.float32)


def size_of(layout: Layout) -> int:
    """Returns the number of entries of the flat vector."""
    return sum(math.prod(shape) for _, _, shape in layout)


def counters_in(layout: Layout) -> Iterator[slice]:
    """Yields where the arrays that are no floats lie in the flat vector."""
    start = 0
    for _, dtype, shape in layout:
        stop = start + math.prod(shape)
        if dtype != _BFLOAT16 and np.dtype(dtype).kind != "f":
            yield slice(start, stop)
        start = stop


def _kind_of(dtype: str) -> str:
    """Returns NumPy's letter for the kind of a dtype; "V", as of raw bytes, for one that NumPy cannot name."""
    if dtype == _BFLOAT16:
        return "f"
    try:
        return np.dtype(dtype).kind
    except TypeError:  # a record's fields, or a type of a library of its own
        return "V"


def flatten_update(before: Mapping[str, Array], after: dict[str, Array]) -> tuple[Layout, NDArray[np.floating]]:
    """Returns the layout of `after` and the flat update `after - before`, shape (d,).

    `after` is emptied array by array to save memory.

    Raises:
        ValueError: `after` contains a name that was not sent, another shape, or a dtype that cannot be averaged.
    """
    layout = []
    new_names = [name for name in after if name not in before]
    if new_names:
        raise ValueError(f"train() returned an array named {new_names[0]!r} that the server did not send")
    for name in before:
        if name not in after:
            continue
        array = after[name]
        if tuple(array.shape) != tuple(before[name].shape):
            raise ValueError(
                f"train() returned {name!r} with shape {tuple(array.shape)}; the server sent "
                f"{tuple(before[name].shape)}"
            )
        if _kind_of(array.dtype) not in "fiub":
            raise ValueError(f"{name!r} has dtype {array.dtype}; only real numbers can be averaged")
        layout.append((name, array.dtype, tuple(int(x) for x in array.shape)))
    dtype = wire_dtype(tuple(layout))
    flat = np.empty(size_of(tuple(layout)), dtype)
    start = 0
    for name, _, shape in layout:
        stop = start + math.prod(shape)
        new, old = view(after.pop(name)), view(before[name])
        piece = flat[start:stop].reshape(shape)
        if new.dtype == old.dtype == np.float32 == dtype:
            np.subtract(new, old, out=piece)
        else:
            piece[...] = new.astype(np.float64) - old.astype(np.float64)
        start = stop
    return tuple(layout), flat


def rebuild_arrays(
    layout: Layout, before: ArrayRecord, total: Iterable[NDArray[np.floating]], weight: float
) -> ArrayRecord:
    """Returns `before + total / weight`, the weighted mean of the clients' arrays, in the order of `before`.

    Floats get the dtype that `train()` returned. Counters become float64 and bfloat16 becomes float32, so that the
    wrapped strategy can compute with them (see `restore_types`).

    Args:
        layout: Names, dtypes and shapes of the arrays.
        before: The arrays that training started from.
        total: Weighted sum of the updates, in pieces of any length, which may be overwritten.
        weight: Sum of the weights, above 0.

    Raises:
        OverflowError: An array of the mean is not finite in its dtype.
    """
    pieces = iter(total)
    mean: NDArray[np.floating] = np.zeros(0)
    arrays = {}
    for name, dtype_name, shape in layout:
        size = math.prod(shape)
        dtype = np.dtype(np.float32 if dtype_name == _BFLOAT16 else dtype_name)
        if dtype.kind != "f":
            dtype = np.dtype(np.float64)
        old = view(before[name]).reshape(-1)
        values: NDArray[Any] | None = None
        start = 0
        while start < size:
            if not mean.size:
                mean = _divided(next(pieces), weight)
            if values is None and mean.size >= size and mean.dtype == old.dtype == dtype:
                stop = size
                with np.errstate(all="ignore"):
                    values = np.add(mean[:size], old, out=mean[:size])
            else:
                values = np.empty(size, dtype) if values is None else values
                stop = min(start + min(mean.size, _CACHED), size)
                with np.errstate(all="ignore"):
                    values[start:stop] = old[start:stop].astype(np.float64) + mean[: stop - start]
            mean, start = mean[stop - start :], stop
        values = np.empty(0, dtype) if values is None else values
        if not all_finite(values):
            raise OverflowError(f"the decoded {name!r} is not finite in {dtype_name}")
        arrays[name] = as_array(values.reshape(shape))
        del values
    return ArrayRecord({name: arrays.pop(name) for name in before if name in arrays})


def _divided(total: NDArray[np.floating], weight: float) -> NDArray[np.floating]:
    with np.errstate(all="ignore"):
        divisor = total.dtype.type(weight)
    if not 0 < divisor < np.inf:  # float32 cannot hold this weight
        total, divisor = total.astype(np.float64), np.float64(weight)
    with np.errstate(all="ignore"):
        total /= divisor
    return total


def restore_types(layout: Layout, arrays: ArrayRecord) -> ArrayRecord:
    """Returns the wrapped strategy's arrays with counters rounded and bfloat16 restored; floats stay unchanged."""
    restored = dict(arrays.items())
    for name, dtype_name, _ in layout:
        if name not in restored:
            continue
        if dtype_name == _BFLOAT16:
            restored[name] = _to_bfloat16(restored[name].numpy())
        elif np.dtype(dtype_name).kind in "iub":
            restored[name] = Array(np.asarray(_rounded(restored[name].numpy(), np.dtype(dtype_name))))
    return ArrayRecord(restored)


def _rounded(values: NDArray[np.generic], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    whole = np.rint(values.astype(np.float64))
    if dtype.kind == "b":
        return whole >= 1
    limits = np.iinfo(dtype.name)  # a mean of values of this dtype lies within its limits, up to rounding
    inside = np.clip(whole, limits.min, limits.max)
    with np.errstate(invalid="ignore"):  # no float is the largest int64, so the next one is replaced
        return np.where(whole >= float(limits.max), limits.max, inside.astype(dtype)).astype(dtype)


def _to_bfloat16(values: NDArray[np.generic]) -> Array:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    payload = Array(rounded.astype(np.uint16).view("V2").reshape(values.shape))
    return Array(_BFLOAT16, payload.shape, payload.stype, payload.data)


def check_whole_numbers(metrics: MetricRecord) -> None:
    """Refuse whole numbers of more than 64 bits, which Flower cannot send and no float may be able to hold.

    Raises:
        ValueError: There is one. The message says under which name.
    """
    for name, value in metrics.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not -_LARGEST_WHOLE <= number < _LARGEST_WHOLE:
                raise ValueError(
                    f"its metric {name!r} is a whole number of {number.bit_length()} bits; Flower sends at most 63 and "
                    "a sign"
                )


def flatten_metrics(metrics: MetricRecord, weight_key: str) -> tuple[MetricsLayout, NDArray[np.float64]]:
    """Returns the layout, and one float64 vector of the weight w and then w times each metric.

    Raises:
        ValueError: The weight is missing, a list, not finite, negative, or too small for float32; or a whole number is
            larger than Flower can send.
    """
    check_whole_numbers(metrics)
    if weight_key not in metrics:
        raise ValueError(f"the reply's metrics lack {weight_key!r}, the number of examples, which weighs them")
    weight = metrics[weight_key]
    if isinstance(weight, list) or not math.isfinite(weight) or weight < 0 or 0 < weight < _LEAST_WEIGHT:
        raise ValueError(
            f"{weight_key!r} is {weight!r}; it must be one finite number, 0 or at least {_LEAST_WEIGHT:g} (float32 "
            "loses what is smaller)"
        )
    layout = [(weight_key, -1, isinstance(weight, int))]
    values = [float(weight)]
    for name, value in sorted(metrics.items()):
        if name == weight_key:
            continue
        several = value if isinstance(value, list) else [value]
        layout.append((name, len(several) if isinstance(value, list) else -1, False))
        values.extend(float(weight) * float(number) for number in several)
    return tuple(layout), np.array(values)


def rebuild_metrics(layout: MetricsLayout, total: NDArray[np.float64], *, whole: bool) -> tuple[float, MetricRecord]:
    """Returns the decoded weight W > 0, and the metrics: W under the weight's name, and all others divided by W."""
    weight_key = layout[0][0]
    weight = float(total[0])
    record = MetricRecord({weight_key: max(1, round(weight)) if whole else weight})
    start = 1
    for name, length, _ in layout[1:]:
        stop = start + max(length, 1) if length != 0 else start
        means = [float(value) / weight for value in total[start:stop]]
        record[name] = means if length >= 0 else means[0]
        start = stop
    return weight, record


def encode_row(
    total: NDArray[np.floating] | None, vector: NDArray[np.floating], coefficients: tuple[float, ...]
) -> NDArray[np.floating]:
    """Returns `total + sum_l coefficients[l] * block_l(vector)`, shape (ceil(d / m),).

    The vector is divided into m blocks, which are padded with zeros to equal length. `total` is overwritten.
    """
    m = len(coefficients)
    length = -(-vector.size // m)
    if total is None:
        total = np.zeros(length, vector.dtype)
    for block, coefficient in enumerate(coefficients):
        piece = vector[block * length : (block + 1) * length]
        if coefficient == 1:
            total[: piece.size] += piece
        elif coefficient != 0:
            for start in range(0, piece.size, _CACHED):
                part = piece[start : start + _CACHED]
                total[start : start + part.size] += part * vector.dtype.type(coefficient)
    return total


def as_array(values: NDArray[np.generic]) -> Array:
    """Returns the same Flower array as `Array(values)`, with one copy of the values instead of three."""
    flat = np.ascontiguousarray(values).reshape(-1)
    data = b"".join((_npy_header(values.dtype, values.shape), flat.view(np.uint8).data))
    return Array(str(values.dtype), tuple(int(x) for x in values.shape), "numpy.ndarray", data)


@lru_cache(maxsize=1024)
def _npy_header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(stream, {"descr": description, "fortran_order": False, "shape": shape})
    return stream.getvalue()
