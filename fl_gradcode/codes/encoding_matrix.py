"""The encoding matrix `B` of a gradient code: who holds what, encoding, and what a decoding vector is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidCode
from ._linalg import lstsq, pinv
from ._validation import check_groups, check_holders, check_tolerance, check_workers
from .prime_field import PrimeField
from .reals import REALS, Reals

__all__ = ["EXACT", "EncodingMatrix", "by_group", "estimate", "whole_groups"]

#: Largest decoding error `max |a @ B - 1|` that counts as exact.
EXACT = 1e-8

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class EncodingMatrix:
    """The encoding matrix of a gradient code, and what can be said of it without decoding.

    Attributes:
        B, s, name, groups, numbers, exact: See `GradientCode`.
    """

    B: NDArray[Any]
    s: int
    name: str = "custom"
    groups: tuple[tuple[int, ...], ...] | None = None
    numbers: Reals | PrimeField = REALS
    exact: bool = True
    _holders: tuple[tuple[int, ...], ...] = field(init=False)
    _computed: dict[Callable[..., Any], Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        B = self.numbers.matrix(self.B)
        if B.ndim == 3 and B.shape[2] == 1:
            B = B[:, :, 0]
        if B.ndim not in (2, 3) or 0 in B.shape:
            raise InvalidCode(f"An encoding matrix has shape (n, k) or (n, k, m), not {B.shape}.")
        check_tolerance(self.s, B.shape[0])
        B.setflags(write=False)
        object.__setattr__(self, "B", B)
        pattern: NDArray[np.bool_] = np.asarray(self.blocks.any(axis=2))
        holders = tuple(tuple(np.flatnonzero(pattern[:, j]).tolist()) for j in range(B.shape[1]))
        object.__setattr__(self, "_holders", holders)
        # The converse (Tandon et al. 2017, theorem 1; with m, Jahani-Nezhad and Maddah-Ali 2021).
        check_holders(holders, self.s if self.exact else 0, self.m)
        if self.groups is not None:
            check_groups(self.blocks, self.groups)

    def __repr__(self) -> str:
        m = f", m={self.m}" if self.m > 1 else ""
        over = "" if self.numbers == REALS else f", over a {self.numbers.name}"
        return f"<{self.name} code: n={self.n} workers, k={self.k} shards, s={self.s} stragglers{m}{over}>"

    @property
    def n(self) -> int:
        """Number of workers."""
        return int(self.B.shape[0])

    @property
    def k(self) -> int:
        """Number of shards."""
        return int(self.B.shape[1])

    @property
    def m(self) -> int:
        """Upload reduction: a reply has ceil(d / m) entries."""
        return int(self.B.shape[2]) if self.B.ndim == 3 else 1

    @property
    def active(self) -> tuple[int, ...]:
        """The workers that hold anything, ascending."""
        return tuple(np.flatnonzero(self.blocks.any(axis=(1, 2))).tolist())

    @property
    def blocks(self) -> NDArray[Any]:
        """B with its axis of m blocks: shape (n, k, m)."""
        return self.B if self.B.ndim == 3 else self.B[:, :, None]

    def shards_of(self, worker: int) -> tuple[int, ...]:
        """The shards that `worker` holds, ascending."""
        check_workers([worker], self.n)
        row = self.B[worker]
        return tuple(int(j) for j in np.flatnonzero(row.any(axis=1) if row.ndim == 2 else row))

    def holders_of(self, shard: int) -> tuple[int, ...]:
        """The workers that hold `shard`, ascending."""
        if not 0 <= shard < self.k:
            raise InvalidCode(f"Shard {shard} does not exist: this code has shards 0..{self.k - 1}.")
        return self._holders[shard]

    def once(self, compute: Callable[[EncodingMatrix], T]) -> T:
        """Returns `compute(self)`, computed at the first call and kept with the code, so that it dies with it."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        value: T = self._computed[compute]
        return value

    def encode(self, updates: ArrayLike) -> NDArray[Any]:
        """All workers' replies.

        Args:
            updates: One row a shard, shape (k, d).

        Returns:
            One row a worker, shape (n, ceil(d / m)). Reals: float32 if the updates are, else float64. Prime field:
            uint32, fixed point; int64 for updates of an integer type.

        Raises:
            Overflow: The sum might not fit the field.
        """
        u = np.asarray(updates)
        if u.ndim != 2 or u.shape[0] != self.k:
            raise InvalidCode(f"Updates have shape {u.shape}; encoding needs ({self.k}, d), one row a shard.")
        return self.numbers.encode(self.blocks, u)

    def coverage_of(self, a: NDArray[Any]) -> NDArray[np.float64]:
        """`a @ B` for a given decoding vector of shape (n,) or (n, m). Shape (k,)."""
        shares = self.numbers.shares(a, self.blocks)
        return np.asarray(np.trace(shares, axis1=1, axis2=2) / self.m)

    def error_of(self, a: NDArray[Any]) -> float:
        """`max |a @ B - 1|` for a given decoding vector, recomputed from `B` alone."""
        return float(np.abs(self.numbers.shares(a, self.blocks) - np.eye(self.m)).max())

    def kappa_of(self, a: NDArray[Any]) -> float:
        """`sqrt(sum_i |a_i|^2 |b_i|^2 / (k m))`: how much independent rounding noise in the shards grows."""
        return self.numbers.kappa(a, self.blocks)

    def least_squares_vector(self, survivors: Iterable[int], *, ridge: float = 0.0) -> NDArray[np.float64]:
        """The decoding vector that minimises `||a @ B - 1||^2 + ridge sum_i a_i^2 ||b_i||^2`.

        With ridge 0 it is exact where that is possible, and of minimum norm except for a code with groups and m = 1 (1
        on the first survivor of each); a little ridge keeps codes with
        coefficients of both signs from buying coverage with large, noisy coefficients. A code with groups does without,
        and a code over a field knows no estimates: its vector is zero.

        Args:
            survivors: Worker numbers, in order of arrival.
            ridge: At least 0.

        References:
            Raviv et al. 2017, and Glasgow and Wootters 2020, for optimal decoding.
        """
        return estimate(self, check_workers(survivors, self.n), ridge)

    def order_of(self, workers: Sequence[int]) -> list[int]:
        """In which order to add replies, so that the sum has the same bits whoever came first.

        By group where replies within a group are alike, else by worker.
        """
        if self.groups is None or self.m > 1:
            return list(workers)
        number = {i: q for q, group in enumerate(self.groups) for i in group}
        return [number.get(i, len(self.groups)) for i in workers]


def estimate(code: EncodingMatrix, workers: Sequence[int], ridge: float = 0.0) -> NDArray[np.float64]:
    """Returns the vector of `EncodingMatrix.least_squares_vector`; shape (n,) or (n, m)."""
    if not 0 <= ridge < np.inf:
        raise InvalidCode(f"ridge={ridge} must be at least 0.")
    a = np.zeros((code.n, code.m))
    if isinstance(code.numbers, PrimeField):
        pass  # a vector that is wrong in one shard is wrong by anything
    elif code.groups is not None:
        a = by_group(code, _grouped(code, workers))
    elif workers:
        a[list(workers)] = _least_squares(code.blocks[list(workers)], ridge)
    return a if code.m > 1 else a[:, 0]


def by_group(code: EncodingMatrix, replies: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Returns the vector, shape (n, m), that is exact on groups with m replies and closest on the others.

    `replies` has the survivors of each group, in order of arrival.
    """
    a = np.zeros((code.n, code.m))
    if code.m == 1:
        a[[inside[0] for inside in replies if inside]] = 1.0
        return a
    for arrived in replies:
        if arrived:
            inside = sorted(arrived)  # the same bits, whoever came first
            shard = int(np.argmax(code.blocks[inside[0]].any(axis=1)))
            a[inside] = pinv(code.blocks[inside, shard]).T
    return a


def whole_groups(code: EncodingMatrix, workers: Sequence[int]) -> list[int]:
    """Returns the workers whose group has m replies, if there are groups: with m > 1, fewer mix up the blocks."""
    if code.groups is None:
        return list(workers)
    return [i for inside in _grouped(code, workers) if len(inside) >= code.m for i in inside]


def _grouped(code: EncodingMatrix, workers: Sequence[int]) -> list[list[int]]:
    group_of = {worker: q for q, group in enumerate(code.groups or ()) for worker in group}
    replies: list[list[int]] = [[] for _ in code.groups or ()]
    for worker in workers:
        if worker in group_of:
            replies[group_of[worker]].append(worker)
    return replies


def _least_squares(blocks: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    survivors, k, m = blocks.shape
    rows = blocks.reshape(survivors, k * m)
    target = np.tile(np.eye(m), (k, 1))
    if ridge == 0:
        return lstsq(rows.T, target)
    # Further equations `sqrt(ridge) ||b_i|| a_i = 0` instead of normal equations, which would square the condition.
    damped = np.concatenate([rows.T, np.sqrt(ridge) * np.diag(np.linalg.norm(rows, axis=1))])
    return lstsq(damped, np.concatenate([target, np.zeros((survivors, m))]))
