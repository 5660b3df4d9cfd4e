"""The incremental decoder: told of one arrival after another, it answers "decodable now?".

Repetition in groups: every group needs a reply. Any other code: let the columns of `N` (orthonormal) span
the vectors a with `a @ B = 0`, and let `a0` be the shortest a with `a0 @ B = 1`. Then all decoding vectors are
`a0 + N w`, and the stragglers T are tolerated if and only if `N_T w = -a0_T` can be solved: a small system,
whatever k. Each arrival takes one row out of its normal equations. As `a0` is orthogonal to `N`, the shortest
w gives the shortest a.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .gradient_code import GradientCode

__all__ = ["IncrementalDecoder"]

_EXACT = 1e-8
# Relative squared residual of the normal equations below which the exact test is worth its cost.
_WORTH_TESTING = 1e-6


class IncrementalDecoder:
    """Collects survivors of one round, in order of arrival."""

    def __init__(self, code: GradientCode) -> None:
        self.code = code
        self.survivors: list[int] = []
        self._vector: NDArray[np.float64] | None = None
        self._rule: _GroupRule | _NullSpaceRule
        if code.groups is not None and code.m == 1:
            self._rule = _GroupRule(code)
        else:
            self._rule = _NullSpaceRule(code)

    def add(self, worker: int) -> bool:
        """Worker's reply is in. Returns whether the sum can be decoded now."""
        self.survivors.append(worker)
        if self._vector is None:
            self._rule.add(worker)
            self._vector = self._rule.solve()
        return self.decodable

    def update(self, workers: Iterable[int]) -> bool:
        """Several replies are in: like `add` for each, but asks once."""
        for worker in workers:
            self.survivors.append(worker)
            if self._vector is None:
                self._rule.add(worker)
        if self._vector is None:
            self._vector = self._rule.solve()
        return self.decodable

    @property
    def decodable(self) -> bool:
        """Whether the replies that are in determine the sum."""
        return self._vector is not None

    def vector(self) -> NDArray[np.float64] | None:
        """The decoding vector, shape (n,) or (n, m), of all survivors so far; None while undecodable.

        Groups: 1 on the first reply of each. Otherwise the shortest vector that the survivors admit.
        """
        if self._vector is None:
            return None
        if isinstance(self._rule, _NullSpaceRule) and self._rule.added < len(self.survivors):
            for worker in self.survivors[self._rule.added :]:
                self._rule.add(worker)
            self._vector = self._rule.solve()
        return self._vector

    def hopeless(self, outstanding: Iterable[int]) -> bool:
        """Whether the sum stays undecodable even if all `outstanding` workers answer."""
        if self.decodable:
            return False
        if isinstance(self._rule, _GroupRule):
            return not self._rule.can_complete(set(outstanding))
        return not self.code.decodable({*self.survivors, *outstanding})


class _GroupRule:
    """Decodable when each group has a reply."""

    def __init__(self, code: GradientCode) -> None:
        assert code.groups is not None
        self._group_of = {worker: q for q, group in enumerate(code.groups) for worker in group}
        self._groups = code.groups
        self._first: dict[int, int] = {}
        self._n = code.n

    def add(self, worker: int) -> None:
        group = self._group_of.get(worker)
        if group is not None:
            self._first.setdefault(group, worker)

    def solve(self) -> NDArray[np.float64] | None:
        if len(self._first) < len(self._groups):
            return None
        a = np.zeros(self._n)
        a[list(self._first.values())] = 1.0
        return a

    def can_complete(self, outstanding: set[int]) -> bool:
        return all(q in self._first or outstanding.intersection(group) for q, group in enumerate(self._groups))


class _NullSpaceRule:
    """Decodable when the small system on the stragglers can be solved."""

    def __init__(self, code: GradientCode) -> None:
        self._code = code
        self._a0, self._N, self._consistent = _decompose(code)
        self._missing = np.ones(code.n, dtype=bool)
        self._gram = self._N.T @ self._N
        self._right = self._N.T @ self._a0
        self._square = float(np.square(self._a0).sum())
        self.added = 0

    def add(self, worker: int) -> None:
        self.added += 1
        self._missing[worker] = False
        row, target = self._N[worker], self._a0[worker]
        self._gram -= np.outer(row, row)
        self._right -= np.outer(row, target)
        self._square -= float(target @ target)

    def solve(self) -> NDArray[np.float64] | None:
        if not self._consistent or not self._worth_testing():
            return None
        missing = self._missing
        a = self._a0.copy()
        if missing.any() and self._N.shape[1]:
            w = np.linalg.lstsq(self._N[missing], -self._a0[missing], rcond=None)[0]
            a += self._N @ w
        a[missing] = 0.0
        if self._code.error_of(a) > _EXACT:
            # Badly scaled rows cost the small system its digits: ask the large one before saying no.
            best = self._code.least_squares_vector(np.flatnonzero(~missing)).reshape(a.shape)
            if self._code.error_of(best) > _EXACT:
                return None
            a = best
        return a if self._code.m > 1 else a[:, 0]

    def _worth_testing(self) -> bool:
        unknowns = self._N.shape[1]
        if np.count_nonzero(self._missing) <= unknowns:
            return True
        if not unknowns:
            return False
        ridge = 1e-13 * max(float(np.trace(self._gram)), 1e-30)
        w = np.linalg.solve(self._gram + ridge * np.eye(unknowns), self._right)
        residual = self._square - float((self._right * w).sum())
        return residual <= _WORTH_TESTING * max(self._square, 1e-30)


@lru_cache(maxsize=64)
def _decompose(code: GradientCode) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    """`a0` (n, m), an orthonormal basis `N` (n, n - rank) of {a: a @ B = 0}, and whether a0 solves exactly."""
    B = code.B.reshape(code.n, -1)
    U, sigma, Vt = np.linalg.svd(B, full_matrices=True)
    rank = int(np.count_nonzero(sigma > sigma[0] * max(B.shape) * np.finfo(float).eps))
    a0 = U[:, :rank] @ ((Vt[:rank] @ np.tile(np.eye(code.m), (code.k, 1))) / sigma[:rank, None])
    N = U[:, rank:]
    for array in (a0, N):
        array.setflags(write=False)
    return a0, N, code.error_of(a0) <= _EXACT
