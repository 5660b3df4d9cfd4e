"""The encoding matrix `B` of a gradient code: its assignment, encoding, and the quality of a decoding vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

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
    """The encoding matrix of a gradient code, with all methods that do not need a decoder.

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
        workers, shards = np.nonzero(B if B.ndim == 2 else B.any(axis=2))
        ends = np.cumsum(np.bincount(shards, minlength=B.shape[1]))[:-1]
        holders = tuple(tuple(mine.tolist()) for mine in np.split(workers[np.argsort(shards, kind="stable")], ends))
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
        """The workers that hold at least one shard, ascending."""
        return self.once(_active)

    @property
    def blocks(self) -> NDArray[Any]:
        """B with an axis for the m blocks, shape (n, k, m)."""
        return self.B if self.B.ndim == 3 else self.B[:, :, None]

    def shards_of(self, worker: int) -> tuple[int, ...]:
        """Returns the shards that `worker` holds, ascending."""
        check_workers([worker], self.n)
        row = self.B[worker]
        return tuple(int(j) for j in np.flatnonzero(row.any(axis=1) if row.ndim == 2 else row))

    def holders_of(self, shard: int) -> tuple[int, ...]:
        """Returns the workers that hold `shard`, ascending."""
        if not 0 <= shard < self.k:
            raise InvalidCode(f"Shard {shard} does not exist: this code has shards 0..{self.k - 1}.")
        return self._holders[shard]

    def once(self, compute: Callable[[Self], T]) -> T:
        """Returns `compute(self)`, which is computed at the first call and then stored in the code."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        value: T = self._computed[compute]
        return value

    def encode(self, updates: ArrayLike) -> NDArray[Any]:
        """Returns the replies of all workers.

        Args:
            updates: The shards' updates, one row each, shape (k, d).

        Returns:
            The replies, one row a worker, shape (n, ceil(d / m)). Over the reals, they are float32 if the updates are,
            else float64. Over a prime field, they are uint32 (fixed point), or int64 for updates of an integer dtype.

        Raises:
            Overflow: The sum might not fit the field.
        """
        u = np.asarray(updates)
        if u.ndim != 2 or u.shape[0] != self.k:
            raise InvalidCode(f"Updates have shape {u.shape}; encoding needs ({self.k}, d), one row a shard.")
        return self.numbers.encode(self.blocks, u)

    def coverage_of(self, a: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the coverage `a @ B` of a decoding vector of shape (n,) or (n, m); shape (k,)."""
        shares = self.shares_of(a)
        return np.asarray(np.trace(shares, axis1=1, axis2=2) / self.m)

    def error_of(self, a: NDArray[Any]) -> float:
        """Returns the decoding error `max |a @ B - 1|` of a decoding vector, computed from `B` alone."""
        return float(np.abs(self.shares_of(a) - np.eye(self.m)).max())

    def shares_of(self, a: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the share of block l' of shard j in block l of the sum that `a` decodes, shape (k, m, m), [j, l', l].

        In a code with groups and m = 1, a shard's share is the sum of `a` over its group. That takes O(n + k) steps
        instead of the n k of a product with `B`.
        """
        layout = self.once(_group_layout)
        if layout is None:
            return self.numbers.shares(a, self.blocks)
        group_of_worker, group_of_shard = layout
        sums = np.bincount(group_of_worker, weights=np.asarray(a, np.float64).reshape(-1))
        return np.asarray(sums[group_of_shard], np.float64).reshape(-1, 1, 1)

    def kappa_of(self, a: NDArray[Any]) -> float:
        """Returns the noise amplification `sqrt(sum_i |a_i|^2 |b_i|^2 / (k m))` of a decoding vector.

        It is the factor by which independent rounding noise in the shards grows.
        """
        if isinstance(self.numbers, PrimeField):
            return self.numbers.kappa(a, self.blocks)
        return self.numbers.kappa(a, self.once(_row_norms), self.k)

    def least_squares_vector(self, survivors: Iterable[int], *, ridge: float = 0.0) -> NDArray[np.float64]:
        """Returns the decoding vector that minimises `||a @ B - 1||^2 + ridge sum_i a_i^2 ||b_i||^2`.

        With ridge 0, the vector is exact if the survivors decode, and has minimum norm. A small ridge prevents codes
        with coefficients of both signs from gaining coverage by large, noisy coefficients. A code with groups ignores
        the ridge; with m = 1, its vector is 1 on the first survivor of each group. Over a prime field there are no
        estimates, and the vector is zero.

        Args:
            survivors: Worker numbers, in order of arrival.
            ridge: Weight of the noise term, at least 0.

        Returns:
            The vector, shape (n,), or (n, m) for m > 1.

        References:
            Raviv et al. 2017, and Glasgow and Wootters 2020, for optimal decoding.
        """
        return estimate(self, check_workers(survivors, self.n), ridge)

    def order_of(self, workers: Sequence[int]) -> list[int]:
        """Returns sort keys for replies, with which the sum has the same bits in any order of arrival.

        The keys are group numbers if replies within a group are equal, else worker numbers.
        """
        if self.groups is None or self.m > 1:
            return list(workers)
        number = {i: q for q, group in enumerate(self.groups) for i in group}
        return [number.get(i, len(self.groups)) for i in workers]


def _active(code: EncodingMatrix) -> tuple[int, ...]:
    return tuple(np.flatnonzero(code.blocks.any(axis=(1, 2))).tolist())


def _row_norms(code: EncodingMatrix) -> NDArray[np.float64]:
    """Returns the squared lengths of the rows of B, shape (n,)."""
    rows = code.blocks.reshape(code.n, -1)
    return np.array([float(np.square(row).sum()) for row in rows])


def _group_layout(code: EncodingMatrix) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Returns the group of each worker and of each shard, shapes (n,) and (k,); None if not all of B is in groups.

    A worker in no group has the number of groups as its group.
    """
    if code.groups is None or code.m > 1 or isinstance(code.numbers, PrimeField):
        return None
    of_worker = np.full(code.n, len(code.groups))
    of_shard = np.zeros(code.k, np.int64)
    for number, group in enumerate(code.groups):
        of_worker[list(group)] = number
        of_shard[code.B[group[0]] != 0] = number
    return None if code.B[of_worker == len(code.groups)].any() else (of_worker, of_shard)


def estimate(code: EncodingMatrix, workers: Sequence[int], ridge: float = 0.0) -> NDArray[np.float64]:
    """Returns the vector of `EncodingMatrix.least_squares_vector`; shape (n,) or (n, m)."""
    if not 0 <= ridge < np.inf:
        raise InvalidCode(f"ridge={ridge} must be at least 0.")
    a = np.zeros((code.n, code.m))
    if isinstance(code.numbers, PrimeField):
        pass  # over a field, an inexact vector gives arbitrary numbers
    elif code.groups is not None:
        a = by_group(code, _grouped(code, workers))
    elif workers:
        a[list(workers)] = _least_squares(code.blocks[list(workers)], ridge)
    return a if code.m > 1 else a[:, 0]


def by_group(code: EncodingMatrix, replies: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Returns the decoding vector that is exact on groups with m replies and closest on the others, shape (n, m).

    Args:
        code: A code with groups.
        replies: The survivors of each group, in order of arrival.
    """
    a = np.zeros((code.n, code.m))
    if code.m == 1:
        a[[inside[0] for inside in replies if inside]] = 1.0
        return a
    for arrived in replies:
        if arrived:
            inside = sorted(arrived)  # for the same bits in any order of arrival
            shard = int(np.argmax(code.blocks[inside[0]].any(axis=1)))
            a[inside] = pinv(code.blocks[inside, shard]).T
    return a


def whole_groups(code: EncodingMatrix, workers: Sequence[int]) -> list[int]:
    """Returns the workers whose group has m replies, or all workers for a code without groups.

    With m > 1, fewer replies of a group would mix up the blocks of the update.
    """
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
    # The ridge is added as equations `sqrt(ridge) ||b_i|| a_i = 0`. Normal equations would square the condition number.
    damped = np.concatenate([rows.T, np.sqrt(ridge) * np.diag(np.linalg.norm(rows, axis=1))])
    return lstsq(damped, np.concatenate([target, np.zeros((survivors, m))]))
