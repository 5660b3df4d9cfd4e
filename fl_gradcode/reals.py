"""Arithmetic of ordinary codes: coefficients and replies are floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .border import as_float
from .combine import combine
from .errors import InvalidCode

__all__ = ["REALS", "Reals", "blocks_of"]


@dataclass(frozen=True)
class Reals:
    """float64 coefficients; replies as float32 or float64, whichever the updates are."""

    @property
    def name(self) -> str:
        """Of the numbers, for people."""
        return "reals"

    def matrix(self, B: ArrayLike) -> NDArray[np.float64]:
        """An encoding matrix of one's own, checked."""
        matrix = np.array(B, dtype=np.float64)
        if not np.isfinite(matrix).all():
            raise InvalidCode("The encoding matrix has entries that are not finite.")
        return matrix

    def encode(self, B: NDArray[np.float64], updates: NDArray[Any]) -> NDArray[np.floating]:
        """All workers' replies: B of shape (n, k, m) times the blocks of updates of shape (k, d)."""
        n, k, m = B.shape
        u = as_float(updates)
        rows = B.reshape(n, k * m).astype(u.dtype, copy=False)
        return np.asarray(rows @ blocks_of(u, m).reshape(k * m, -1))

    def decode(
        self, replies: Sequence[NDArray[Any]] | NDArray[Any], a: NDArray[Any], *, order: Sequence[int] | None = None
    ) -> NDArray[np.floating]:
        """`sum_t a[t] * replies[t]`, block by block of a's columns."""
        return combine(as_float(replies) if isinstance(replies, np.ndarray) else replies, a, order=order)

    def shares(self, a: NDArray[np.float64], B: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much of block l' of shard j is in block l of the decoded sum: shape (k, m, m), [j, l', l]."""
        n, k, m = B.shape
        return np.asarray((B.reshape(n, k * m).T @ a.reshape(n, m)).reshape(k, m, m))

    def kappa(self, a: NDArray[np.float64], B: NDArray[np.float64]) -> float:
        """`sqrt(sum_i |a_i|^2 |b_i|^2 / (k m))`."""
        n, k, m = B.shape
        row_norms = np.square(B.reshape(n, k * m)).sum(axis=1)
        return float(np.sqrt(np.square(a.reshape(n, m)).sum(axis=1) @ row_norms / (k * m)))


REALS = Reals()


def blocks_of(updates: NDArray[Any], m: int) -> NDArray[Any]:
    """Updates of shape (k, d) as m zero-padded blocks each: shape (k, m, ceil(d / m))."""
    k, d = updates.shape
    if d % m:
        padded = np.zeros((k, -(-d // m) * m), updates.dtype)
        padded[:, :d] = updates
        updates = padded
    return updates.reshape(k, m, -1)
