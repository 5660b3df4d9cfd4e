"""Arithmetic modulo the prime 2^31 - 1: no rounding, so no code is too large to decode exactly.

Floats enter as fixed point: `q = round(2^f u)`. Replies wrap freely; only the decoded sum has to fit, which is checked
before anything is encoded: an overflow is an error, never a wrap.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidCode, Overflow
from .reals import blocks_of

__all__ = ["P", "PrimeField", "combine_mod", "fold", "inverse", "lift_mod", "matmul_mod", "solve_mod"]

#: The field's size, a Mersenne prime; an element takes 31 bits, as much as float32 on the wire.
P = 2**31 - 1
_HALF = (P - 1) // 2
# Products of a 16-bit and a 31-bit number, 64 of them added up, are exact in float64.
_EXACT = 64
# Vectors that are multiplied at once, and entries of each.
_ROWS, _STEP = 16, 1 << 14
# Multiplications from which a second thread pays for its start; NumPy lets go of the interpreter meanwhile.
_WORTH_THREADS = 1 << 22
_MAX_THREADS = 4
# Entries that are decoded at once where not all have to be there together.
_PIECE = 1 << 19
# Numbers that stay in a core's cache.
_CACHED = 1 << 17


@dataclass(frozen=True)
class PrimeField:
    """Coefficients modulo 2^31 - 1.

    Updates of floats are rounded to multiples of 2^-fraction_bits: each shard adds an error of at most
    2^-(fraction_bits + 1) to an entry of the sum, and decoding none. Whole numbers (an integer dtype) are taken as they
    are, and decoded as such.

    Attributes:
        fraction_bits: Binary digits behind the point. The largest entries of all shards, added up, must stay below
            2^(30 - fraction_bits).
    """

    fraction_bits: int = 16

    def __post_init__(self) -> None:
        if type(self.fraction_bits) is not int or not 0 <= self.fraction_bits <= 30:
            raise InvalidCode(f"fraction_bits={self.fraction_bits!r} must be a whole number in 0..30.")

    @property
    def name(self) -> str:
        """Of the numbers, for people."""
        return f"field of {P} elements"

    def rounding(self, k: int) -> float:
        """The largest error of an entry of the sum over k shards of floats."""
        return float(k * 2.0 ** -(self.fraction_bits + 1))

    def matrix(self, B: ArrayLike) -> NDArray[np.int64]:
        """An encoding matrix of one's own, reduced to 0..p-1."""
        given = np.asarray(B)
        if given.dtype.kind not in "iub":
            raise InvalidCode(f"An encoding matrix over the {self.name} holds whole numbers, not {given.dtype}.")
        return np.asarray(given % P, np.int64)

    def quantise(
        self, values: ArrayLike, *, limit: int = _HALF, out: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Floats as whole numbers, in units of 2^-fraction_bits; float64 holds them exactly. Written to `out` if given.

        Raises:
            Overflow: One is beyond `limit` after scaling, or is not finite.
        """
        given = np.asarray(values)
        with np.errstate(over="ignore", invalid="ignore"):
            whole = np.multiply(given, 2.0**self.fraction_bits, out=out, dtype=np.float64)
            # The norm bounds every entry; where it does not, look.
            bounded = float(np.vdot(whole, whole)) <= float(limit) ** 2
        if not bounded:
            largest = max(float(whole.max()), -float(whole.min()))
            if not largest <= limit:
                room, size = limit / 2.0**self.fraction_bits, largest / 2.0**self.fraction_bits
                fit = math.floor(math.log2(limit / size)) if 0 < size < math.inf else -1
                raise Overflow(
                    f"An entry of size {size:.4g} does not fit: at fraction_bits={self.fraction_bits} there is room up "
                    f"to {room:.4g}. "
                    + (
                        f"Scale the updates down, or take fraction_bits={fit} or fewer."
                        if fit >= 0
                        else "Scale the updates down."
                        if math.isfinite(size)
                        else "It must be a finite number."
                    )
                )
        return np.asarray(np.rint(whole, out=whole))

    def encode(self, B: NDArray[np.int64], updates: NDArray[Any]) -> NDArray[Any]:
        """All workers' replies, 0..p-1: int64 for updates of whole numbers, uint32 for floats.

        Raises:
            Overflow: `2 sum_j max|q_j|` is not below p: the sum might wrap.
        """
        n, k, m = B.shape
        if updates.dtype.kind not in "iubf":
            raise InvalidCode(f"Updates have dtype {updates.dtype}; only real numbers can be encoded.")
        whole = updates.dtype.kind != "f"
        q = updates if whole else self.quantise(updates)
        largest = sum(max(int(row.max(initial=0)), -int(row.min(initial=0))) for row in q)
        if largest > _HALF:
            raise Overflow(
                f"The shards' largest entries add up to {largest}{'' if whole else ' units'}; the sum must stay within "
                f"(p - 1) / 2 = {_HALF}. Scale the updates down{'' if whole else ', or take fewer fraction_bits'}."
            )
        flat = blocks_of(q, m).reshape(k * m, -1)
        replies = combine_mod(flat, B.reshape(n, k * m).T).reshape(n, -1)
        return replies if whole else replies.astype(np.uint32)

    def decode(
        self, replies: Sequence[NDArray[Any]] | NDArray[Any], a: NDArray[Any], *, order: Sequence[int] | None = None
    ) -> NDArray[Any]:
        """The sum: int64 if the replies are, else float64 after fixed point. The order does not matter."""
        dtype = replies[0].dtype if len(replies) else np.dtype(np.int64)
        if dtype not in (np.int64, np.uint32):
            raise InvalidCode(f"Replies over the {self.name} are int64 or uint32, not {dtype}.")
        if dtype == np.int64 and any(len(x) and not 0 <= x.min() <= x.max() < P for x in replies):
            raise InvalidCode(f"Replies over the {self.name} lie in 0..{P - 1}.")
        total = combine_mod(replies, a.reshape(len(replies), -1))
        total -= (total >> 30) * P  # as `lift_mod` does: what is above half has bit 30
        return total if dtype == np.int64 else total * 2.0**-self.fraction_bits

    def decode_in_pieces(self, replies: Sequence[NDArray[Any]], a: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """What `decode` gives, from its beginning on: fixed point takes twice the room when decoded."""
        length = replies[0].size
        step = min(max(_WORTH_THREADS // len(replies), _PIECE), 2 * _PIECE)
        for column in a.reshape(len(replies), -1).T:
            for start in range(0, length, step):
                yield self.decode([reply[start : start + step] for reply in replies], column)

    def shares(self, a: NDArray[np.int64], B: NDArray[np.int64]) -> NDArray[np.float64]:
        """1 where a shard is in the sum as it should be, else 0: there is no "almost" in a field. Shape (k, m, m)."""
        n, k, m = B.shape
        found = matmul_mod(B.reshape(n, k * m).T, np.asarray(a, np.int64).reshape(n, m)).reshape(k, m, m)
        right = (found == np.eye(m, dtype=np.int64)).all(axis=(1, 2))
        return np.asarray(right[:, None, None] * np.eye(m))

    def kappa(self, a: NDArray[np.int64], B: NDArray[np.int64]) -> float:
        """1: holders send equal numbers, and decoding rounds nothing."""
        return 1.0


def lift_mod(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """0..p-1 as the signed numbers that they stand for."""
    return np.where(values > _HALF, values - P, values)


def inverse(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Multiplicative inverses modulo p, by Fermat: `v^(p-2)`."""
    result = np.ones_like(values)
    power = values % P
    exponent = P - 2
    while exponent:
        if exponent & 1:
            result = result * power % P
        power = power * power % P
        exponent >>= 1
    return result


def matmul_mod(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """`left @ right` modulo p, through float64 products of 16-bit halves; inner dimension below 2^20."""
    halves = [(part >> 16, part & 0xFFFF) for part in (left % P, right % P)]
    (lh, ll), (rh, rl) = [(high.astype(np.float64), low.astype(np.float64)) for high, low in halves]
    high = (lh @ rh).astype(np.int64) % P
    middle = (lh @ rl + ll @ rh).astype(np.int64) % P
    low = (ll @ rl).astype(np.int64) % P
    return ((high * 2 % P + middle * 65536) + low) % P  # 2^32 = 2 modulo p


def combine_mod(vectors: Sequence[NDArray[Any]] | NDArray[Any], coefficients: NDArray[np.int64]) -> NDArray[np.int64]:
    """`sum_t coefficients[t, l] * vectors[t]` modulo p, for each column l; shape (columns * length,).

    16-bit halves of the coefficients times the vectors (below 2^31 in size), added up by the float64 matrix product:
    exact, at memory speed. What is left is folded by 2^31 = 1.
    """
    c = np.asarray(coefficients, np.int64) % P
    halves = np.ascontiguousarray(np.concatenate([c >> 16, c & 0xFFFF], axis=1).T, np.float64)
    columns, length = c.shape[1], vectors.shape[1] if isinstance(vectors, np.ndarray) else vectors[0].size
    out = np.zeros((columns, length), np.int64)
    step = max(min(_CACHED // columns, _STEP), _ROWS)

    def work(starts: range) -> None:
        rows = np.empty((_ROWS, step))
        for start in starts:
            _add_block(vectors, halves, out[:, start : start + step], start, rows)

    starts = range(0, length, step)
    threads = min(_MAX_THREADS, os.cpu_count() or 1) if length * len(vectors) * columns >= _WORTH_THREADS else 1
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, starts[number::threads]) for number in range(threads)]:
            done.result()
    return out.reshape(-1)


def _add_block(
    vectors: Sequence[NDArray[Any]] | NDArray[Any],
    halves: NDArray[np.float64],
    block: NDArray[np.int64],
    start: int,
    rows: NDArray[np.float64],
) -> None:
    """Add up what belongs into `block`, which begins at entry `start`; `rows` is scratch."""
    columns, width = block.shape
    for first in range(0, len(vectors), _EXACT):
        sums = np.zeros((2 * columns, width))
        last = min(first + _EXACT, len(vectors))
        for at in range(first, last, len(rows)):
            few = vectors[at : min(at + len(rows), last)]
            for row, vector in zip(rows, few, strict=False):
                row[:width] = vector[start : start + width]
            sums += halves[:, at : at + len(few)] @ rows[: len(few), :width]
        whole = sums.astype(np.int64)
        fold(whole)
        whole[:columns] <<= 16
        block += whole[:columns]
        block += whole[columns:]
        fold(block)
    block %= P


def fold(values: NDArray[np.int64]) -> None:
    """In place: the same modulo p, and from 2^62 down to a little above 2^31 in size; also for negative numbers."""
    high = values >> 31
    values &= P
    values += high


def solve_mod(A: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """One solution x of `A x = right` modulo p, columns of `right` together; None if there is none."""
    rows, unknowns = A.shape
    work = np.concatenate([A, right], axis=1) % P
    pivots: list[int] = []
    for column in range(unknowns):
        done = len(pivots)
        if done == rows:
            break
        candidates = np.flatnonzero(work[done:, column])
        if not candidates.size:
            continue
        pivot = done + int(candidates[0])
        if pivot != done:
            work[[done, pivot]] = work[[pivot, done]]
        work[done] = work[done] * pow(int(work[done, column]), P - 2, P) % P
        factors = work[:, column].copy()
        factors[done] = 0
        touched = np.flatnonzero(factors)
        work[touched] = (work[touched] - factors[touched, None] * work[done]) % P
        pivots.append(column)
    if work[len(pivots) :, unknowns:].any():
        return None
    x = np.zeros((unknowns, right.shape[1]), np.int64)
    x[pivots] = work[: len(pivots), unknowns:]
    return x
