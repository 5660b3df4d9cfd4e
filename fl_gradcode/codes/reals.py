"""Arithmetic of codes over the reals: fast sums of vectors whose result does not depend on the number of threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidCode
from ._blas import Scaled
from ._validation import as_float

__all__ = ["REALS", "Diagonals", "Reals", "blocks_of", "combine"]

# Number of entries for which a block of the running sum stays in a core's cache while all replies are added to it. With
# smaller blocks, the overhead of calls would exceed the gain.
_BLOCK = 1 << 18
# Number of additions from which a second thread pays off. NumPy releases the interpreter lock during them.
_WORTH_THREADS = 1 << 23
_MAX_THREADS = 4


class Diagonals:
    """A matrix that is constant along its diagonals, which takes the memory of n + k numbers instead of n k.

    Args:
        values: The value of each diagonal, from the last row's first entry to the first row's last; shape (n + k - 1,).
        n: Number of rows.
    """

    def __init__(self, values: NDArray[np.float64], n: int) -> None:
        self._values, self._n = np.array(values, np.float64), n
        self._values.setflags(write=False)

    def matrix(self) -> NDArray[np.float64]:
        """Returns the matrix, shape (n, k), as a view that is read-only."""
        return sliding_window_view(self._values, self._values.size - self._n + 1)[::-1]


def combine(
    replies: Sequence[NDArray[np.floating]] | NDArray[np.floating],
    coefficients: NDArray[np.float64],
    *,
    order: Sequence[int] | None = None,
) -> NDArray[np.floating]:
    """Returns `sum_t coefficients[t] * replies[t]`, shape (m * length,), in the replies' dtype.

    Replies are added in ascending `order` (worker numbers), so that the result depends neither on the order of arrival
    nor on the number of threads. Replies with coefficient 0 are not read, and coefficient 1 causes no rounding. The sum
    is computed block by block, so that it stays in cache.

    Args:
        replies: Vectors of equal length and dtype, float32 or float64.
        coefficients: The coefficients, shape (len(replies),) or (len(replies), m). Block l of the result is the
            combination with column l.
        order: Sort key of each reply; None keeps the order given.

    Raises:
        InvalidCode: There is no reply.
    """
    if not len(replies):
        raise InvalidCode("There is no reply to combine.")
    a = np.asarray(coefficients, np.float64).reshape(len(replies), -1)
    sequence = range(len(replies)) if order is None else np.argsort(order, kind="stable")
    length, dtype = replies[0].size, replies[0].dtype
    out = np.empty(a.shape[1] * length, dtype)
    for column in range(a.shape[1]):
        used = [(replies[t], dtype.type(a[t, column])) for t in sequence if a[t, column] != 0]
        target = out[column * length : (column + 1) * length]
        threads = min(_MAX_THREADS, os.cpu_count() or 1) if len(used) * length >= _WORTH_THREADS else 1
        # Threads split the vector at block bounds, so that compiled loops get the same pieces with any thread count.
        blocks = -(-length // _BLOCK)
        edges = [min(blocks * i // threads * _BLOCK, length) for i in range(threads + 1)]
        if threads == 1:
            _add_up(used, target, 0, length)
            continue
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(_add_up, used, target, *edges[i : i + 2]) for i in range(threads)]:
                done.result()
    return out


def _add_up(
    used: Sequence[tuple[NDArray[np.floating], np.floating]], target: NDArray[np.floating], first: int, last: int
) -> None:
    """Write the combination of entries first..last-1 into `target`."""
    scaled = [Scaled(reply, float(coefficient)) for reply, coefficient in used]
    address = target.ctypes.data
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks whether the sum is finite
        for start in range(first, last, _BLOCK):
            stop = min(start + _BLOCK, last)
            block = target[start:stop]
            if not used:
                block[:] = 0
            for position, ((reply, coefficient), product) in enumerate(zip(used, scaled, strict=True)):
                if position == 0:
                    np.multiply(reply[start:stop], coefficient, out=block)
                elif coefficient == 1:
                    block += reply[start:stop]
                elif product.compiled:
                    product.add_at(address, start, stop)
                else:
                    product.add_to(target, start, stop)


@dataclass(frozen=True)
class Reals:
    """The numbers of a code with float64 coefficients, whose replies are float32 or float64 like the updates."""

    @property
    def name(self) -> str:
        """Name of the numbers, for logs and tables."""
        return "reals"

    def matrix(self, B: ArrayLike | Diagonals) -> NDArray[np.float64]:
        """Returns a user's encoding matrix as float64.

        Raises:
            InvalidCode: An entry is not finite.
        """
        if isinstance(B, Diagonals):
            return B.matrix()
        matrix = np.array(B, dtype=np.float64)
        if not np.isfinite(matrix).all():
            raise InvalidCode("The encoding matrix has entries that are not finite.")
        return matrix

    def encode(self, B: NDArray[np.float64], updates: NDArray[Any]) -> NDArray[np.floating]:
        """Returns all workers' replies, shape (n, ceil(d / m)).

        Args:
            B: Encoding matrix, shape (n, k, m).
            updates: The shards' updates, shape (k, d).
        """
        n, k, m = B.shape
        u = as_float(updates)
        rows = B.reshape(n, k * m).astype(u.dtype, copy=False)
        return np.asarray(rows @ blocks_of(u, m).reshape(k * m, -1))

    def decode(
        self, replies: Sequence[NDArray[Any]] | NDArray[Any], a: NDArray[Any], *, order: Sequence[int] | None = None
    ) -> NDArray[np.floating]:
        """Returns the decoded sum `sum_t a[t] * replies[t]`, one block for each column of a."""
        return combine(as_float(replies) if isinstance(replies, np.ndarray) else replies, a, order=order)

    def shares(self, a: NDArray[np.float64], B: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the share of block l' of shard j in block l of the decoded sum, shape (k, m, m), as [j, l', l]."""
        n, k, m = B.shape
        return np.asarray((B.reshape(n, k * m).T @ a.reshape(n, m)).reshape(k, m, m))

    def kappa(self, a: NDArray[np.float64], norms: NDArray[np.float64], k: int) -> float:
        """Returns the noise amplification `sqrt(sum_i |a_i|^2 |b_i|^2 / (k m))` of a decoding vector.

        Args:
            a: The vector, shape (n,) or (n, m).
            norms: Squared lengths of the rows of B, shape (n,).
            k: Number of shards.
        """
        squares = np.square(a.reshape(len(norms), -1))
        return float(np.sqrt(squares.sum(axis=1) @ norms / (k * squares.shape[1])))


REALS = Reals()


def blocks_of(updates: NDArray[Any], m: int) -> NDArray[Any]:
    """Returns updates of shape (k, d) divided into m zero-padded blocks each, shape (k, m, ceil(d / m))."""
    k, d = updates.shape
    if d % m:
        padded = np.zeros((k, -(-d // m) * m), updates.dtype)
        padded[:, :d] = updates
        updates = padded
    return updates.reshape(k, m, -1)
