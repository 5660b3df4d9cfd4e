"""Arithmetic modulo the prime 2^31 - 1, which has no rounding, so that codes of any size decode exactly.

Floats are converted to fixed point, `q = round(2^f u)`. Replies may wrap around modulo p; only the decoded sum has to
fit. This is checked before anything is encoded, so an overflow is an error and never a wrong result.
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

__all__ = ["P", "PrimeField", "combine_mod", "fold", "inverse", "lift_mod", "matmul_mod", "rank_mod", "solve_mod"]

#: Size of the field, a Mersenne prime. An element has 31 bits, and takes as much space on the wire as float32.
P = 2**31 - 1
_HALF = (P - 1) // 2
# A sum of 64 products of a 16-bit and a 31-bit number is exact in float64.
_EXACT = 64
# Number of vectors that are multiplied at once, and number of their entries.
_ROWS, _STEP = 16, 1 << 14
# Number of multiplications from which a second thread pays off. NumPy releases the interpreter lock during them.
_WORTH_THREADS = 1 << 22
_MAX_THREADS = 4
# Number of entries that are decoded at once if the result is produced in pieces.
_PIECE = 1 << 19
# Number of entries that fit a core's cache.
_CACHED = 1 << 17


@dataclass(frozen=True)
class PrimeField:
    """The numbers of a code whose coefficients are taken modulo 2^31 - 1.

    Float updates are rounded to multiples of 2^-fraction_bits. Each shard adds an error of at most
    2^-(fraction_bits + 1) to an entry of the sum, and decoding adds none. Updates of an integer dtype are used without
    rounding, and decoded as integers.

    Attributes:
        fraction_bits: Number of fraction bits, 0..30. The sum of the shards' largest entries must stay below
            2^(30 - fraction_bits).
    """

    fraction_bits: int = 16

    def __post_init__(self) -> None:
        if type(self.fraction_bits) is not int or not 0 <= self.fraction_bits <= 30:
            raise InvalidCode(f"fraction_bits={self.fraction_bits!r} must be a whole number in 0..30.")

    @property
    def name(self) -> str:
        """Name of the numbers, for logs and tables."""
        return f"field of {P} elements"

    def rounding(self, k: int) -> float:
        """Returns the largest rounding error in an entry of the sum over k shards of floats."""
        return float(k * 2.0 ** -(self.fraction_bits + 1))

    def matrix(self, B: ArrayLike) -> NDArray[np.int64]:
        """Returns a user's encoding matrix reduced to 0..p-1, int64.

        Raises:
            InvalidCode: The matrix does not have an integer dtype.
        """
        given = np.asarray(B)
        if given.dtype.kind not in "iub":
            raise InvalidCode(f"An encoding matrix over the {self.name} holds whole numbers, not {given.dtype}.")
        return np.asarray(given % P, np.int64)

    def quantise(
        self, values: ArrayLike, *, limit: int = _HALF, out: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Returns floats rounded to whole numbers in units of 2^-fraction_bits, as float64; written to `out` if given.

        Raises:
            Overflow: A number exceeds `limit` after scaling, or is not finite.
        """
        given = np.asarray(values)
        with np.errstate(over="ignore", invalid="ignore"):
            whole = np.multiply(given, 2.0**self.fraction_bits, out=out, dtype=np.float64)
            # The norm bounds every entry. The entries are only inspected if that bound is too weak.
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
        """Returns all workers' replies in 0..p-1, int64 for updates of an integer dtype and uint32 for floats.

        Args:
            B: Encoding matrix, shape (n, k, m).
            updates: The shards' updates, shape (k, d).

        Raises:
            Overflow: The sum might wrap around, because `2 sum_j max|q_j|` is not below p.
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
        """Returns the decoded sum, int64 if the replies are, else float64; `order` has no effect."""
        dtype = replies[0].dtype if len(replies) else np.dtype(np.int64)
        if dtype not in (np.int64, np.uint32):
            raise InvalidCode(f"Replies over the {self.name} are int64 or uint32, not {dtype}.")
        if dtype == np.int64 and any(len(x) and not 0 <= x.min() <= x.max() < P for x in replies):
            raise InvalidCode(f"Replies over the {self.name} lie in 0..{P - 1}.")
        total = combine_mod(replies, a.reshape(len(replies), -1))
        total -= (total >> 30) * P  # the same as `lift_mod`, since numbers above p / 2 have bit 30 set
        return total if dtype == np.int64 else total * 2.0**-self.fraction_bits

    def decode_in_pieces(self, replies: Sequence[NDArray[Any]], a: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Yields the result of `decode` in pieces, from its beginning on.

        Decoded numbers take twice the memory of the replies, which pieces avoid.
        """
        length = replies[0].size
        step = min(max(_WORTH_THREADS // len(replies), _PIECE), 2 * _PIECE)
        for column in a.reshape(len(replies), -1).T:
            for start in range(0, length, step):
                yield self.decode([reply[start : start + step] for reply in replies], column)

    def shares(self, a: NDArray[np.int64], B: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns 1 on the diagonal for each shard that the sum contains exactly, else 0; shape (k, m, m).

        Over a field, a shard cannot be contained approximately.
        """
        n, k, m = B.shape
        product = matmul_mod(B.reshape(n, k * m).T, np.asarray(a, np.int64).reshape(n, m)).reshape(k, m, m)
        right = (product == np.eye(m, dtype=np.int64)).all(axis=(1, 2))
        return np.asarray(right[:, None, None] * np.eye(m))

    def kappa(self, a: NDArray[np.int64], B: NDArray[np.int64]) -> float:
        """Returns 1, because holders send equal numbers and decoding rounds nothing."""
        return 1.0


def lift_mod(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the signed numbers that the elements 0..p-1 stand for."""
    return np.where(values > _HALF, values - P, values)


def inverse(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the multiplicative inverses modulo p, computed as `v^(p-2)` (Fermat)."""
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
    """Returns `left @ right` modulo p, computed by float64 products of 16-bit halves.

    The inner dimension must be below 2^20.
    """
    halves = [(part >> 16, part & 0xFFFF) for part in (left % P, right % P)]
    (lh, ll), (rh, rl) = [(high.astype(np.float64), low.astype(np.float64)) for high, low in halves]
    high = (lh @ rh).astype(np.int64) % P
    middle = (lh @ rl + ll @ rh).astype(np.int64) % P
    low = (ll @ rl).astype(np.int64) % P
    return ((high * 2 % P + middle * 65536) + low) % P  # 2^32 = 2 modulo p


def combine_mod(vectors: Sequence[NDArray[Any]] | NDArray[Any], coefficients: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns `sum_t coefficients[t, l] * vectors[t]` modulo p for each column l, shape (columns * length,).

    The 16-bit halves of the coefficients are multiplied by the vectors (entries below 2^31 in size) in a float64 matrix
    product, which is exact and fast. The sums are then reduced by 2^31 = 1 modulo p.
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
    if threads == 1:
        work(starts)  # starting a thread takes longer than a small product
    else:
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
    """Compute the entries of `block`, which begins at entry `start` of the result; `rows` is scratch."""
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
    """Reduce numbers of up to 2^62 in size to slightly above 2^31, in place and without changing them modulo p."""
    high = values >> 31
    values &= P
    values += high


def solve_mod(A: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Returns one solution x of `A x = right` modulo p, shape (columns of A, columns of right), or None."""
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


def rank_mod(A: NDArray[np.int64]) -> int:
    """Returns the rank of a matrix modulo p."""
    work, rank = A % P, 0
    for column in range(work.shape[1]):
        candidates = np.flatnonzero(work[rank:, column])
        if not candidates.size:
            continue
        pivot = rank + int(candidates[0])
        work[[rank, pivot]] = work[[pivot, rank]]
        work[rank] = work[rank] * pow(int(work[rank, column]), P - 2, P) % P
        below = rank + 1 + np.flatnonzero(work[rank + 1 :, column])
        work[below] = (work[below] - work[below, column, None] * work[rank]) % P
        rank += 1
        if rank == len(work):
            break
    return rank
