"""Floats to integers and back: clipped updates in fixed point, rounded with a keyed dither, and metrics as digits.

Overflow is impossible: the clip, the number of shards and the headroom decide the number of fraction bits, so that the
sum of all shards fits. Nobody has to refuse a large update, which would tell something about one shard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting
from .labels import hash_of
from .masks import counter_mode
from .ring import Ring

__all__ = ["ENTRY_WORDS", "Quantiser", "digits_of", "restored"]

#: Words of a metric: five digits of 15 bits, and how many shards' values were not finite.
ENTRY_WORDS = 6

_DIGITS, _BITS, _FRACTION = 5, 15, 30
_SMALLEST_CLIP, _LARGEST_CLIP = 2.0**-20, 2.0**20
_MOST_BITS = 30
# A discrete Gaussian exceeds so many standard deviations with probability below 1e-20.
_NOISE_TAIL = 9.3
# Entries that are worked on together, so that they stay in a core's cache; a power of two, which the norm relies on.
_CHUNK = 1 << 15
_UNIT = 2.0**-32
# Makes up for rounding of the factor by which a long update is scaled down.
_BELOW = 1 - 2.0**-40


@dataclass(frozen=True)
class Quantiser:
    """How updates become integers; pinned by the manifest.

    Attributes:
        ring: The ring of the sums.
        k: Number of shards.
        clip: "entries" limits each entry of an update to +-bound, "norm" its Euclidean norm to the bound.
        bound: The bound A, 2^-20..2^20.
        headroom: Bits h >= 1 by which a true sum is smaller than the ring. A random entry passes the range test with
            probability 2^-h.
        largest_weight: Largest weight w_max of a shard, such as its number of examples.
        noise: Standard deviation of the discrete Gaussian noise that each shard adds, in integer units; 0: none. With
            noise all weights are 1 and no metrics are sent, since those would leave without noise.
    """

    ring: Ring
    k: int
    bound: float = 1.0
    clip: Literal["entries", "norm"] = "entries"
    headroom: int = 4
    largest_weight: float = 1.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.clip not in ("entries", "norm"):
            raise InvalidSetting(f"clip={self.clip!r} must be 'entries' or 'norm'.")
        if not _SMALLEST_CLIP <= self.bound <= _LARGEST_CLIP:  # false for NaN
            raise InvalidSetting(f"The clipping bound {self.bound!r} must be in 2^-20..2^20.")
        if type(self.headroom) is not int or not 1 <= self.headroom <= 16:
            raise InvalidSetting(f"headroom={self.headroom!r} must be a whole number of bits in 1..16.")
        if not 0 < self.largest_weight <= 2.0**40:
            raise InvalidSetting(f"largest_weight={self.largest_weight!r} must be positive, up to 2^40.")
        if not (self.noise == 0 or 2.0**-4 <= self.noise <= 2.0**30):
            raise InvalidSetting(f"noise={self.noise!r} must be 0, or in 2^-4..2^30 integer units.")
        if self.noise and self.largest_weight != 1:
            raise InvalidSetting("With integer noise every shard has weight 1: set largest_weight=1.")
        if type(self.k) is not int or self.k < 1:
            raise InvalidSetting(f"k={self.k!r} shards must be a whole number of at least 1.")
        if self.fraction_bits < 0 or self.limit(self.k) >= self.ring.half:
            raise InvalidSetting(
                f"Sums of {self.k} shards with entries up to {self.bound:g} do not fit the ring with {self.headroom} "
                "bits of headroom. Lower the clipping bound, the noise, or the headroom."
            )

    @cached_property
    def fraction_bits(self) -> int:
        """Number f of fraction bits, at most 30: the largest with 2^(f + h) k A within the ring's half."""
        room = Fraction(self.ring.half) / (2**self.headroom * self.k * Fraction(self.bound))
        bits = _MOST_BITS
        while bits >= 0 and 2**bits > room:
            bits -= 1
        return bits

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the quantiser, which enters the request digest; 32 bytes."""
        return hash_of("quantiser", *self.to_list(), self.ring.name, self.k)

    def to_list(self) -> list[str | int]:
        """Returns the settings beside ring and k as the manifest holds them; floats as hexadecimal texts."""
        return [
            self.clip,
            float(self.bound).hex(),
            self.headroom,
            float(self.largest_weight).hex(),
            float(self.noise).hex(),
        ]

    def limit(self, shards: int) -> int:
        """Returns the largest size that an entry of a sum over some shards can have, in integer units."""
        size = math.floor(shards * (self.bound * 2.0**self.fraction_bits + 1))
        return size + math.ceil(_NOISE_TAIL * self.noise * math.sqrt(shards))

    def quantise(
        self, updates: Sequence[NDArray[np.floating]], weights: Sequence[float], key: bytes
    ) -> tuple[NDArray[np.int32], int] | None:
        """Returns the rounded sum of some shards' clipped, weighted updates and how many entries were clipped.

        The result is `floor(sum_j (2^f omega_j) clip(u_j) + t)` in float64, added up in the order given, with omega
        the weight over the largest one and t uniform on [0, 1) from the key: equal for all holders, unknown to the
        server, and unbiased up to 2^-26 of a unit. Each operation is a separate element-wise one, so that the result
        has the same bits on every IEEE machine.

        Args:
            updates: The updates, each of shape (d,).
            weights: Their weights, 0..largest_weight.
            key: Key of the dither, 32 bytes.

        Returns:
            The integers, shape (d,), and the count; or None if an update is not finite or a weight out of range.
        """
        if not all(0 <= weight <= self.largest_weight for weight in weights):  # false for NaN
            return None
        size = updates[0].size
        factors, clipped = [], 0
        for update, weight in zip(updates, weights, strict=True):
            factor = 2.0**self.fraction_bits * (weight / self.largest_weight)
            if self.clip == "norm":
                norm = fixed_order_norm(update)
                if norm is None:
                    return None
                if norm > self.bound:
                    factor, clipped = factor * (self.bound / norm * _BELOW), clipped + 1
            factors.append(factor)
        result = np.empty(size, np.int32)
        cipher = counter_mode(key)
        width = min(_CHUNK, size)
        zeros, buffer = memoryview(bytes(4 * width)), bytearray(4 * width + 15)
        words: NDArray[np.uint32] = np.frombuffer(buffer, "<u4", width)
        total, scratch = np.empty(width), np.empty(width)
        for start in range(0, size, _CHUNK):
            stop = min(start + _CHUNK, size)
            sums, piece = total[: stop - start], scratch[: stop - start]
            for number, (update, factor) in enumerate(zip(updates, factors, strict=True)):
                given = update[start:stop]
                np.copyto(piece, given)
                if self.clip == "entries":
                    largest, smallest = float(given.max()), float(given.min())
                    if not (math.isfinite(largest) and math.isfinite(smallest)):  # NaN is passed on by both
                        return None
                    if largest > self.bound or smallest < -self.bound:
                        clipped += int(np.count_nonzero(np.abs(piece) > self.bound))
                        np.clip(piece, -self.bound, self.bound, out=piece)
                if number:
                    piece *= factor
                    sums += piece
                else:
                    np.multiply(piece, factor, out=sums)
            cipher.update_into(zeros[: 4 * piece.size], buffer)
            np.multiply(words[: piece.size], _UNIT, out=piece)
            sums += piece
            np.floor(sums, out=sums)
            np.copyto(result[start:stop], sums, casting="unsafe")  # finite and within the limit
        return result, clipped


def fixed_order_norm(values: NDArray[np.floating]) -> float | None:
    """Returns the Euclidean norm as float64, with the same bits on every IEEE machine; None if an entry is not finite.

    Squares are added up element-wise in a fixed order. A BLAS product would depend on the processor.
    """
    sums = np.zeros(_CHUNK)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, values.size, _CHUNK):
            piece = values[start : start + _CHUNK].astype(np.float64)
            np.square(piece, out=piece)
            sums[: piece.size] += piece
        while sums.size > 1:
            half = sums.size // 2
            sums = sums[:half] + sums[half:]
    square = float(sums[0])
    if math.isfinite(square):
        return math.sqrt(square)
    return math.inf if np.isfinite(values).all() else None


def digits_of(values: Sequence[float]) -> NDArray[np.int32] | None:
    """Returns numbers as signed digits whose sums over shards are exact, shape (6 * len(values),).

    A number is rounded to a multiple of 2^-30 and has five digits to the base 2^15. One that is not finite is sent as
    0, and its sixth word is 1: the sum is then NaN.

    Returns:
        The digits, or None if a finite number is 2^45 or larger in size.
    """
    words: list[int] = []
    for value in values:
        finite = math.isfinite(value)
        whole = round(Fraction(value) * 2**_FRACTION) if finite else 0
        size = abs(whole)
        if size >> _DIGITS * _BITS:
            return None
        sign = 1 if whole >= 0 else -1
        words += [sign * ((size >> _BITS * place) % 2**_BITS) for place in range(_DIGITS)]
        words.append(0 if finite else 1)
    return np.array(words, np.int32)


def restored(words: NDArray[np.int32]) -> NDArray[np.float64]:
    """Returns the sums of numbers from the sums of their digits, shape (len(words) / 6,)."""
    sums = []
    for *digits, lost in words.reshape(-1, ENTRY_WORDS).tolist():
        whole = sum(digit << _BITS * place for place, digit in enumerate(digits))
        sums.append(math.nan if lost else whole / 2**_FRACTION)
    return np.array(sums, np.float64)
