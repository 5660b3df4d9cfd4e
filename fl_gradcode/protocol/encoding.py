"""Encodings of updates and metrics: as floats, or as fixed-point numbers under a code over a prime field.

Client and server use the same kind of `PayloadEncoding`, because both make it from the plan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..codes import P, PrimeField
from ..errors import Overflow
from .packing import Layout, encode_row, wire_dtype
from .sketch import SUMS, add_up, figures_of, folded_sums

__all__ = ["FixedPointEncoding", "FloatEncoding", "PayloadEncoding", "payload_encoding"]

# A metric is stored in 5 digits of 15 bits each, with 30 fraction bits. Sums of 2^15 shards' digits fit the field.
_DIGITS, _BITS, _FRACTION = 5, 15, 30
# Number of numbers that a hash becomes.
_HASHED = 4
# Number of entries that fit a core's cache together with the scratch arrays; a multiple of the signs' period.
_CACHED = 1 << 16
_P = np.uint32(P)
_ROUNDING = 1e-9  # relative: how far a sum of weights may be from the weights


class PayloadEncoding(Protocol):
    """Combines the shards' vectors on the client, and converts the decoded metrics on the server.

    Totals are None before the first shard. `coefficients` contains one number for each of the m blocks. Updates and
    totals that are passed in may be overwritten.
    """

    def add_update(
        self,
        total: NDArray[Any] | None,
        update: NDArray[np.floating],
        coefficients: Sequence[float],
        *,
        describe: bool = False,
        rounding: float = 0.0,
    ) -> tuple[NDArray[Any], tuple[float, ...] | None]:
        """Returns the total with one more weighted update; with `describe`, also figures of the update, else None.

        The figures are a few numbers, which differ if the holders of a shard disagree by more than rounding may cause.
        """

    def add_metrics(
        self, total: NDArray[Any] | None, metrics: NDArray[np.float64], coefficients: Sequence[float]
    ) -> NDArray[Any]:
        """Returns the total with one more shard's weight and weighted metrics."""

    def with_metrics(self, figures: tuple[float, ...] | None, metrics: NDArray[np.float64]) -> tuple[float, ...]:
        """Returns the figures of an update (None when evaluating) with its weight, and a hash of the metrics if needed.

        The metrics must agree if one that differs affects other numbers. The weight always does, and is the last figure
        of an update.
        """

    def weighs(
        self, metrics: NDArray[Any], coefficients: Sequence[Sequence[float]], figures: Sequence[Sequence[float]]
    ) -> bool:
        """Returns whether the weights in the figures of a reply's shards add up to the one in its coded metrics."""

    def add_up(
        self, vector: NDArray[Any], coefficients: Sequence[Sequence[float]], figures: Sequence[Sequence[float]]
    ) -> bool:
        """Returns whether the figures of a reply's shards are those of updates that add up to its coded vector."""

    def sent(self, total: NDArray[Any]) -> NDArray[Any]:
        """Returns a total in the form in which it is sent."""

    def dtypes(self, layout: Layout) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Returns the dtypes of the update and of the metrics that are sent."""

    def entries(self, metrics: int) -> int:
        """Returns the length of the combined metrics vector for a number of metrics."""

    def restored(self, metrics: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the decoded metrics as float64."""


class FloatEncoding:
    """Sends updates and metrics as floating-point numbers."""

    def add_update(
        self,
        total: NDArray[Any] | None,
        update: NDArray[np.floating],
        coefficients: Sequence[float],
        *,
        describe: bool = False,
        rounding: float = 0.0,
    ) -> tuple[NDArray[Any], tuple[float, ...] | None]:
        """Returns the total in the update's dtype, and figures, which are compared with a tolerance."""
        figures = figures_of(update, rounding, len(coefficients)) if describe else None
        if total is None and len(coefficients) == 1 and coefficients[0] != 0:  # in place, to save a second vector
            if coefficients[0] != 1:
                update *= update.dtype.type(coefficients[0])
            update += 0  # -0 becomes 0
            return update, figures
        return encode_row(total, update, tuple(coefficients)), figures

    def add_metrics(
        self, total: NDArray[Any] | None, metrics: NDArray[np.float64], coefficients: Sequence[float]
    ) -> NDArray[Any]:
        """Returns the total of the metrics as float64."""
        return encode_row(total, metrics, tuple(coefficients))

    def with_metrics(self, figures: tuple[float, ...] | None, metrics: NDArray[np.float64]) -> tuple[float, ...]:
        """Returns the figures with the weight; any other metric that differs affects no other number."""
        return (*figures, float(metrics[0])) if figures else ()

    def weighs(
        self, metrics: NDArray[Any], coefficients: Sequence[Sequence[float]], figures: Sequence[Sequence[float]]
    ) -> bool:
        """Returns whether the weights in the figures of a reply's shards add up to the one in its coded metrics."""
        parts = [mine[0] * described[-1] for mine, described in zip(coefficients, figures, strict=True)]
        return abs(math.fsum(parts) - float(metrics[0])) <= _ROUNDING * math.fsum(map(abs, parts))

    def add_up(
        self, vector: NDArray[Any], coefficients: Sequence[Sequence[float]], figures: Sequence[Sequence[float]]
    ) -> bool:
        """Returns whether the figures of a reply's shards are those of updates that add up to its coded vector."""
        wanted = {3 + SUMS * len(mine) for mine in coefficients}
        return {*map(len, figures)} == wanted and add_up(vector, coefficients, [one[:-1] for one in figures])

    def sent(self, total: NDArray[Any]) -> NDArray[Any]:
        """Returns the total unchanged."""
        return total

    def dtypes(self, layout: Layout) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Returns the layout's float dtype for the update, and float64 for the metrics."""
        return wire_dtype(layout), np.dtype(np.float64)

    def entries(self, metrics: int) -> int:
        """Returns `metrics`, because each metric takes one entry."""
        return metrics

    def restored(self, metrics: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the decoded metrics as float64."""
        return np.asarray(metrics, np.float64)


class FixedPointEncoding:
    """Sends updates and metrics as whole numbers modulo 2^31 - 1, in which the sum over all k shards has to fit.

    Args:
        field: The code's field.
        k: Number of shards; each may use 1/k of the range.

    Raises:
        Overflow: There are more than 2^15 shards.
    """

    def __init__(self, field: PrimeField, k: int) -> None:
        if k > 2**_BITS:
            raise Overflow(f"k={k} shards: the metrics of more than {2**_BITS} might not fit a prime field.")
        self.field, self.k = field, k

    def add_update(
        self,
        total: NDArray[Any] | None,
        update: NDArray[np.floating],
        coefficients: Sequence[float],
        *,
        describe: bool = False,
        rounding: float = 0.0,
    ) -> tuple[NDArray[Any], tuple[float, ...] | None]:
        """Returns the total with the update rounded to multiples of 2^-fraction_bits, and figures.

        The figures are a hash, because decoding is meaningless unless the holders agree in every bit, and sums modulo
        p with public signs, which add up to those of the coded vector.

        Raises:
            Overflow: An entry is too large or not finite.
        """
        if not describe:
            return self.add(total, update, coefficients), None
        digest, sums = hashlib.sha256(), np.zeros((len(coefficients), SUMS), np.int64)
        total = self.add(total, update, coefficients, digest, sums)
        return total, (*_numbers(digest), *(sums % P).reshape(-1).tolist())

    def with_metrics(self, figures: tuple[float, ...] | None, metrics: NDArray[np.float64]) -> tuple[float, ...]:
        """Returns the figures with a hash of both, since metrics that differ in one bit decode to a random number."""
        both = hashlib.sha256(repr((figures, (np.rint(metrics * 2.0**_FRACTION) + 0.0).tolist())).encode())
        return (*_numbers(both), *figures[_HASHED:], float(metrics[0])) if figures else _numbers(both)

    def weighs(
        self, metrics: NDArray[Any], coefficients: Sequence[Sequence[float]], figures: Sequence[Sequence[float]]
    ) -> bool:
        """Returns whether the weights in the figures of a reply's shards add up to the one in its coded metrics."""
        expected = [0] * _DIGITS
        try:
            for mine, described in zip(coefficients, figures, strict=True):
                digits = _digits_of(described[-1])
                expected = [x + int(mine[0]) * digit for x, digit in zip(expected, digits, strict=True)]
        except Overflow:
            return False
        return [x % P for x in expected] == [int(x) % P for x in metrics[:_DIGITS]]

    def add_up(
        self, vector: NDArray[Any], coefficients: Sequence[Sequence[float]], figures: Sequence[Sequence[float]]
    ) -> bool:
        """Returns whether the figures of a reply's shards are those of updates that add up to its coded vector."""
        expected = [0] * SUMS
        for mine, of_shard in zip(coefficients, figures, strict=True):
            if len(of_shard) != _HASHED + SUMS * len(mine) + 1:
                return False
            for block, coefficient in enumerate(mine):
                sums = of_shard[_HASHED + SUMS * block : _HASHED + SUMS * (block + 1)]
                expected = [x + int(coefficient) * int(y) for x, y in zip(expected, sums, strict=True)]
        return bool((folded_sums(vector, np.int64) % P == np.array([x % P for x in expected])).all())

    def add(
        self,
        total: NDArray[Any] | None,
        update: NDArray[np.floating],
        coefficients: Sequence[float],
        digest: Any = None,
        sums: NDArray[np.int64] | None = None,
    ) -> NDArray[Any]:
        """Returns the total plus the rounded update times the coefficients, uint32.

        Each shard may use 1/k of the range, so that the decoded sum fits. The hash and the sums with public signs, one
        row for each block, are extended by the rounded update.
        """
        limit = (P - 1) // 2 // self.k
        length = -(-update.size // len(coefficients))
        if total is None:
            total = np.zeros(length, np.uint32)
        scratch = np.empty(min(_CACHED, length))
        halves = np.empty((2, scratch.size), np.int32)
        for block, coefficient in enumerate(coefficients):
            piece = update[block * length : (block + 1) * length]
            for start in range(0, piece.size, _CACHED):
                part = piece[start : start + _CACHED]
                rounded = self.field.quantise(part, limit=limit, out=scratch[: part.size])
                whole, times = halves[:, : part.size]
                np.copyto(whole, rounded, casting="unsafe")
                if digest is not None:
                    digest.update(whole.data)
                if sums is not None:
                    sums[block] += folded_sums(whole, np.int64)
                _add_times(total[start : start + part.size], int(coefficient), rounded, whole, times)
        return total

    def add_metrics(
        self, total: NDArray[Any] | None, metrics: NDArray[np.float64], coefficients: Sequence[float]
    ) -> NDArray[Any]:
        """Returns the total plus the digits of each metric times the coefficients, uint32.

        Raises:
            Overflow: A metric is too large or not finite.
        """
        digits = np.empty((len(metrics), _DIGITS))
        for row, value in zip(digits, metrics.tolist(), strict=True):
            row[:] = _digits_of(value)
        whole = digits.reshape(-1)
        length = -(-whole.size // len(coefficients))
        if total is None:
            total = np.zeros(length, np.uint32)
        for block, coefficient in enumerate(coefficients):
            piece = whole[block * length : (block + 1) * length]
            halves = np.array([piece, piece], np.int32)
            _add_times(total[: piece.size], int(coefficient), piece.copy(), *halves)
        return total

    def sent(self, total: NDArray[Any]) -> NDArray[np.uint32]:
        """Returns the total unchanged, with 31 bits an entry."""
        return total

    def dtypes(self, layout: Layout) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Returns uint32 for both the update and the metrics."""
        return np.dtype(np.uint32), np.dtype(np.uint32)

    def entries(self, metrics: int) -> int:
        """Returns the number of digits of all metrics, five each."""
        return metrics * _DIGITS

    def restored(self, metrics: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the metrics as float64, from summed digits that the field's decoding has scaled like an update."""
        whole = np.rint(np.asarray(metrics) * 2.0**self.field.fraction_bits).astype(np.int64)
        rows = whole[: len(whole) // _DIGITS * _DIGITS].reshape(-1, _DIGITS)
        sums = [sum(int(digit) << _BITS * place for place, digit in enumerate(row)) for row in rows]
        return np.array([total / 2**_FRACTION for total in sums])


def _digits_of(value: float) -> list[int]:
    """Returns the digits of a metric, the lowest first, all with its sign.

    Raises:
        Overflow: It is too large or not finite.
    """
    scaled = value * 2.0**_FRACTION
    if not abs(scaled) < 2.0 ** (_DIGITS * _BITS):
        raise Overflow(
            f"A weighted metric is {value:g}; a code over a prime field carries finite ones below "
            f"{2.0 ** (_DIGITS * _BITS - _FRACTION):.2g}."
        )
    size, sign = abs(round(scaled)), 1 if value >= 0 else -1
    return [sign * ((size >> _BITS * place) % 2**_BITS) for place in range(_DIGITS)]


def _add_times(
    total: NDArray[np.uint32],
    coefficient: int,
    rounded: NDArray[np.float64],
    product: NDArray[np.int32],
    times: NDArray[np.int32],
) -> None:
    """Compute `total += coefficient * rounded` modulo p in place.

    On entry, `product` holds the same numbers as `rounded`, and `times` is scratch. All three are overwritten.

    Let t be the whole number nearest to coefficient * rounded / p. It is below 2^30 in size, so float64 determines it.
    The remainder coefficient * rounded - t p is at most slightly larger than p / 2 in size, so the low 32 bits of each
    product suffice to compute it.
    """
    rounded *= coefficient / P
    np.rint(rounded, out=rounded)
    np.copyto(times, rounded, casting="unsafe")
    times *= np.int32(P)
    product *= np.int32(coefficient)
    product -= times
    rest, spare = product.view(np.uint32), times.view(np.uint32)
    np.minimum(rest, np.add(rest, _P, out=spare), out=rest)  # a negative remainder wraps to a large number
    total += rest
    np.minimum(total, np.subtract(total, _P, out=spare), out=total)


def _numbers(digest: Any) -> tuple[float, ...]:
    bits = digest.digest()
    return tuple(1.0 + int.from_bytes(bits[i : i + 6], "little") / 2**48 for i in (0, 6, 12, 18))


def payload_encoding(fraction_bits: int | None, k: int) -> PayloadEncoding:
    """Returns a `FixedPointEncoding` for a number of fraction bits, or a `FloatEncoding` for None."""
    return FloatEncoding() if fraction_bits is None else FixedPointEncoding(PrimeField(fraction_bits), k)
