"""How an update and its metrics travel: as floats, or as fixed point under a code over a prime field.

Client and server take the same `Carrier`: one for the plan, one for the code.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import pack
from .errors import Overflow
from .prime_field import P, PrimeField

__all__ = ["Carrier", "FixedPoint", "Floats", "carrier_of"]

# A metric is 5 digits of 15 bits, 30 of the bits behind the point; sums of 2^15 shards' digits fit the field.
_DIGITS, _BITS, _FRACTION = 5, 15, 30


class Carrier(Protocol):
    """What is done to a shard's vectors before they are combined, and after they were decoded."""

    def update(self, update: NDArray[np.floating]) -> NDArray[Any]:
        """The weighted update as it is combined."""

    def metrics(self, metrics: NDArray[np.float64]) -> NDArray[Any]:
        """The weight and the weighted metrics as they are combined."""

    def add(self, total: NDArray[Any] | None, vector: NDArray[Any], coefficients: Sequence[float]) -> NDArray[Any]:
        """`total + sum_l coefficients[l] * block_l(vector)`."""

    def sent(self, total: NDArray[Any]) -> NDArray[Any]:
        """A combined vector as it is sent."""

    def sketch(self, vector: NDArray[Any]) -> tuple[float, ...]:
        """Four numbers in which holders that disagree differ."""

    def dtypes(self, layout: pack.Layout) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Of the update and the metrics that are sent."""

    def entries(self, metrics: int) -> int:
        """Length of the combined metrics vector for so many numbers."""

    def restored(self, metrics: NDArray[Any]) -> NDArray[np.float64]:
        """The decoded metrics as floats."""


class Floats:
    """As they are."""

    def update(self, update: NDArray[np.floating]) -> NDArray[np.floating]:
        """As it is."""
        return update

    def metrics(self, metrics: NDArray[np.float64]) -> NDArray[np.float64]:
        """As they are."""
        return metrics

    def add(
        self, total: NDArray[Any] | None, vector: NDArray[Any], coefficients: Sequence[float]
    ) -> NDArray[np.floating]:
        """In the vector's dtype."""
        return pack.encode_row(total, vector, tuple(coefficients))

    def sent(self, total: NDArray[Any]) -> NDArray[Any]:
        """As it is."""
        return total

    def sketch(self, vector: NDArray[Any]) -> tuple[float, ...]:
        """Compared with a tolerance: float arithmetic differs between machines."""
        return pack.sketch(vector)

    def dtypes(self, layout: pack.Layout) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """The layout's, and float64."""
        return pack.wire_dtype(layout), np.dtype(np.float64)

    def entries(self, metrics: int) -> int:
        """One each."""
        return metrics

    def restored(self, metrics: NDArray[Any]) -> NDArray[np.float64]:
        """As they are."""
        return np.asarray(metrics, np.float64)


@dataclass(frozen=True)
class FixedPoint:
    """Whole numbers modulo 2^31 - 1; updates of all k shards together have to fit.

    Attributes:
        field: The code's field.
        k: Number of shards; each may use a k-th of the room.
    """

    field: PrimeField
    k: int

    def update(self, update: NDArray[np.floating]) -> NDArray[np.int64]:
        """Rounded to multiples of 2^-fraction_bits.

        Raises:
            Overflow: An entry is too large, or not finite.
        """
        return self.field.quantise(update, limit=(P - 1) // 2 // self.k)

    def metrics(self, metrics: NDArray[np.float64]) -> NDArray[np.int64]:
        """The digits of each.

        Raises:
            Overflow: One is too large, or not finite.
        """
        digits = np.empty((len(metrics), _DIGITS), np.int64)
        for row, value in zip(digits, metrics.tolist(), strict=True):
            scaled = math.ldexp(value, _FRACTION)
            if not abs(scaled) < 2.0 ** (_DIGITS * _BITS):
                raise Overflow(
                    f"A weighted metric is {value:g}; a code over a prime field carries finite ones below "
                    f"{2.0 ** (_DIGITS * _BITS - _FRACTION):.2g}."
                )
            size = abs(round(scaled))
            row[:] = [math.copysign((size >> _BITS * place) % 2**_BITS, value) for place in range(_DIGITS)]
        return digits.reshape(-1)

    def add(self, total: NDArray[Any] | None, vector: NDArray[Any], coefficients: Sequence[float]) -> NDArray[np.int64]:
        """Modulo p."""
        length = -(-vector.size // len(coefficients))
        if total is None:
            total = np.zeros(length, np.int64)
        for block, coefficient in enumerate(coefficients):
            piece = vector[block * length : (block + 1) * length]
            # Two steps of at most 62 bits, without a product of full length kept.
            total[: piece.size] += piece * int(coefficient) % P
            total[: piece.size] %= P
        return total

    def sent(self, total: NDArray[Any]) -> NDArray[np.uint32]:
        """31 bits an entry."""
        return np.asarray(total, np.uint32)

    def sketch(self, vector: NDArray[Any]) -> tuple[float, ...]:
        """Of a hash: here holders agree in every bit, or decoding makes garbage."""
        digest = hashlib.sha256(np.ascontiguousarray(vector).data).digest()
        return tuple(1.0 + int.from_bytes(digest[i : i + 6], "little") / 2**48 for i in (0, 6, 12, 18))

    def dtypes(self, layout: pack.Layout) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """uint32 both."""
        return np.dtype(np.uint32), np.dtype(np.uint32)

    def entries(self, metrics: int) -> int:
        """Their digits."""
        return metrics * _DIGITS

    def restored(self, metrics: NDArray[Any]) -> NDArray[np.float64]:
        """From the summed digits, which the field's decoding has scaled as if they were an update."""
        whole = np.rint(np.asarray(metrics) * 2.0**self.field.fraction_bits).astype(np.int64)
        rows = whole[: len(whole) // _DIGITS * _DIGITS].reshape(-1, _DIGITS)
        sums = [sum(int(digit) << _BITS * place for place, digit in enumerate(row)) for row in rows]
        return np.array([total / 2**_FRACTION for total in sums])


def carrier_of(fraction_bits: int | None, k: int) -> Carrier:
    """`FixedPoint` for a number of fraction bits, `Floats` for None."""
    return Floats() if fraction_bits is None else FixedPoint(PrimeField(fraction_bits), k)
