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
from .ring import Ring
from .streams import counter_mode

__all__ = ["ENTRY_WORDS", "Quantiser", "RoundedSum", "digits_of", "fixed_order_norm", "restored"]

#: Words of a metric: five digits of 15 bits, and how many shards' values were not finite.
ENTRY_WORDS = 6

_DIGITS, _BITS, _FRACTION = 5, 15, 30
_SMALLEST_CLIP, _LARGEST_CLIP = 2.0**-20, 2.0**20
_MOST_BITS = 30
# A discrete Gaussian exceeds so many standard deviations with probability below 1e-20.
_NOISE_TAIL = 9.3
# Entries that are worked on together, so that they stay in a core's cache: an even number, for two share a dither word.
_CHUNK = 1 << 15
# Squares that the norm adds up in one order; a part of its definition.
_LANES = 1 << 16
# Bits of a unit that are kept until a class's sum is rounded, and of its dither. Sums below 2^31 units then are whole
# numbers of float64.
_GUARD = 16
# Bytes of updates that are kept until they are added up together.
_MOST_KEPT = 1 << 26
# No entry exceeds the bound if the sum of squares is below this part of the bound's square, however it was rounded.
_SURE = 0.98
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
            noise the norm is clipped, all weights are 1 and no metrics are sent, since those would leave without noise.
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


class RoundedSum:
    """The sum of some shards' clipped, weighted updates, which is rounded once at its end.

    The result is `floor((sum_j rint(2^(f + 16) omega_j clip(u_j)) + t) / 2^16)`, with omega the weight over the largest
    one and t uniform on 0..2^16 - 1 from a key, two a word: equal for all holders and unknown to the server. It is
    unbiased but for the inner rounding of each shard, which is at most 2^-17 of a unit. All sums are of whole numbers
    below 2^48, which float64 adds exactly, so neither the order of the shards nor the processor changes a bit. Products
    and norms are single element-wise operations.

    Updates are kept and added up piece by piece at the end, where a piece stays in a core's cache from the first shard
    to the rounded sum. Large ones are added up earlier, so that at most 64 MB of them are kept beside the sum.

    Args:
        quantiser: The quantiser.
        size: Length d of the updates.
    """

    def __init__(self, quantiser: Quantiser, size: int) -> None:
        self._quantiser, self._size = quantiser, size
        self._kept: list[tuple[NDArray[np.floating], float]] = []  # with the factor that makes whole numbers of them
        self._total: NDArray[np.float64] | None = None
        self._clipped = self._failed = 0

    def add(self, update: NDArray[np.floating], weight: float) -> bool:
        """Add a shard's update, which must not be changed any more, and returns whether its weight and norm are usable.

        Args:
            update: The update, shape (d,).
            weight: Its weight, 0..largest_weight.
        """
        quantiser = self._quantiser
        if not 0 <= weight <= quantiser.largest_weight:  # false for NaN
            return False
        factor = 2.0 ** (quantiser.fraction_bits + _GUARD) * (weight / quantiser.largest_weight)
        if quantiser.clip == "norm":
            norm = fixed_order_norm(update)
            if norm is None:
                return False
            if norm > quantiser.bound:
                factor *= quantiser.bound / norm * _BELOW
                self._clipped += 1
        self._kept.append((update, factor))
        if sum(kept.nbytes for kept, _ in self._kept) > _MOST_KEPT:
            self._add_up()
        return True

    def finish(self, key: bytes) -> tuple[NDArray[np.int32], int, int]:
        """Returns the rounded sum, the number of clipped entries or updates, and that of updates that were not finite.

        The sum has shape (d,) and is of no use if an update was not finite. This can be called once.

        Args:
            key: Key of the dither, 32 bytes.
        """
        result, cipher = np.empty(self._size, np.int32), counter_mode(key)
        most = 2 * (_CHUNK + _CHUNK % 2)  # bytes: whole words
        zeros, buffer = memoryview(bytes(most)), bytearray(most + 15)
        halves: NDArray[np.uint16] = np.frombuffer(buffer, "<u2", _CHUNK)
        sums, scratch = np.empty(_CHUNK), np.empty(_CHUNK)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, self._size, _CHUNK):
                stop = min(start + _CHUNK, self._size)
                piece = sums[: stop - start]
                cipher.update_into(zeros[: 2 * piece.size], buffer)
                np.copyto(piece, halves[: piece.size])
                if self._total is not None:
                    piece += self._total[start:stop]
                self._add_pieces(piece, start, scratch)
                piece *= 2.0**-_GUARD
                np.floor(piece, out=piece)
                np.copyto(result[start:stop], piece, casting="unsafe")  # finite and within the limit
        self._kept, self._total = [], None
        return result, self._clipped, self._failed

    def _add_up(self) -> None:
        """Add the kept updates to the exact sum, and keep them no more."""
        if self._total is None:
            self._total = np.zeros(self._size)
        scratch = np.empty(_CHUNK)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, self._size, _CHUNK):
                self._add_pieces(self._total[start : start + _CHUNK], start, scratch)
        self._kept = []

    def _add_pieces(self, total: NDArray[np.float64], start: int, scratch: NDArray[np.float64]) -> None:
        """Add a piece of each kept update to a piece of the sum, and drop an update that is not finite there."""
        bound, by_entry = self._quantiser.bound, self._quantiser.clip == "entries"
        piece, bad = scratch[: total.size], list[int]()
        for place, (update, factor) in enumerate(self._kept):
            given = update[start : start + total.size]
            np.copyto(piece, given)
            if by_entry and not _surely_below(given, bound):
                largest, smallest = float(given.max()), float(given.min())
                if not (math.isfinite(largest) and math.isfinite(smallest)):  # NaN is passed on by both
                    bad.append(place)
                    continue
                if largest > bound or smallest < -bound:
                    self._clipped += int(np.count_nonzero(np.abs(piece) > bound))
                    np.clip(piece, -bound, bound, out=piece)
            piece *= factor
            np.rint(piece, out=piece)
            total += piece
        for place in reversed(bad):
            del self._kept[place]
            self._failed += 1


def _surely_below(values: NDArray[np.floating], bound: float) -> bool:
    """Returns True only if all values are finite and at most the bound in size; one pass, which most updates pass.

    It may return False for such values too, and the processor may decide that, so no result may depend on it.
    """
    if values.dtype not in (np.float32, np.float64):
        return False
    return bool(np.dot(values, values) < _SURE * bound * bound)


def fixed_order_norm(values: NDArray[np.floating]) -> float | None:
    """Returns the Euclidean norm as float64, with the same bits on every IEEE machine; None if an entry is not finite.

    Squares are added up element-wise in a fixed order. A BLAS product would depend on the processor. The norm is
    infinite where the sum of squares exceeds float64, which scales such an update to zero.
    """
    sums = np.zeros(_LANES)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, values.size, _LANES):
            piece = values[start : start + _LANES].astype(np.float64)
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
