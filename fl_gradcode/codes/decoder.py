"""Decides after each arrival whether the replies so far decode, and computes the decoding vector.

Over the reals, the decision is made in the null space of `B`. Over a prime field, it is made by elimination.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ._linalg import lstsq, svd
from ._points import points, powers
from .encoding_matrix import EXACT, EncodingMatrix, by_group
from .prime_field import P, PrimeField, matmul_mod, rank_mod, solve_mod

__all__ = ["FieldRule", "IncrementalDecoder"]

# Relative squared residual of the normal equations below which the exact test is worth its cost.
_WORTH_TESTING = 1e-6
# The same limit for a residual that is computed without loss of digits.
_NOTHING_LEFT = 1e-14
# Number of spare rows from which a system of that size is too slow to be solved at each arrival.
_MANY = 64


class IncrementalDecoder:
    """Collects the survivors of one round in order of arrival, and tells when they decode.

    Attributes:
        code: The code.
        survivors: Workers whose replies have arrived, in order of arrival.
    """

    def __init__(self, code: EncodingMatrix) -> None:
        self.code = code
        self.survivors: list[int] = []
        self._vector: NDArray[Any] | None = None
        self._rule: _Rule
        if code.groups is not None and (code.m == 1 or not isinstance(code.numbers, PrimeField)):
            self._rule = _GroupRule(code)
        elif isinstance(code.numbers, PrimeField):
            self._rule = FieldRule(code)
        else:
            spare = code.once(_decompose)[1].shape[1]
            self._rule = _RowSpaceRule(code) if 4 * spare > code.n - spare and spare > _MANY else _NullSpaceRule(code)

    def add(self, worker: int) -> bool:
        """Add a worker whose reply has arrived; returns whether the sum can be decoded now."""
        self.survivors.append(worker)
        if self._vector is None:
            self._rule.add([worker])
            self._vector = self._rule.solve()
        return self.decodable

    def update(self, workers: Iterable[int]) -> bool:
        """Add several workers at once, which is faster than `add` for each; returns whether the sum can be decoded."""
        more = list(workers)
        self.survivors.extend(more)
        if more and self._vector is None:
            self._rule.add(more)
            self._vector = self._rule.solve()
        return self.decodable

    @property
    def decodable(self) -> bool:
        """Whether the replies so far determine the sum."""
        return self._vector is not None

    def vector(self) -> NDArray[Any] | None:
        """Returns the decoding vector of the survivors so far, shape (n,) or (n, m), or None while undecodable.

        For a code with groups and m = 1, the vector is 1 on the first reply of each group. Over a prime field, it uses
        the first survivors that decode. Otherwise it is the shortest vector among those that decode.
        """
        if self._vector is not None and self._rule.improves and self._rule.added < len(self.survivors):
            self._rule.add(self.survivors[self._rule.added :])
            self._vector = self._rule.solve()
        return self._vector

    def hopeless(self, outstanding: Iterable[int]) -> bool:
        """Returns whether the sum stays undecodable even if all `outstanding` workers answer."""
        if self.decodable:
            return False
        if isinstance(self._rule, _GroupRule):
            return not self._rule.can_complete(set(outstanding))
        return not IncrementalDecoder(self.code).update({*self.survivors, *outstanding})


class _Rule(Protocol):
    """Decides when replies suffice, and computes the decoding vector."""

    #: Whether further replies improve the vector after the sum has become decodable.
    improves: bool
    #: Number of replies that were added.
    added: int

    def add(self, workers: Sequence[int]) -> None:
        """Add workers whose replies have arrived."""

    def solve(self) -> NDArray[Any] | None:
        """Returns the decoding vector, or None if the replies do not suffice."""


class _GroupRule:
    """Decides for codes with groups: the sum is decodable when each group has m replies."""

    def __init__(self, code: EncodingMatrix) -> None:
        assert code.groups is not None
        self._code, self._groups = code, code.groups
        self._group_of = {worker: q for q, group in enumerate(code.groups) for worker in group}
        self._replies: list[list[int]] = [[] for _ in code.groups]
        self._lacking = len(code.groups)  # groups with fewer than m replies
        self.improves = code.m > 1
        self.added = 0

    def add(self, workers: Sequence[int]) -> None:
        self.added += len(workers)
        for worker in workers:
            group = self._group_of.get(worker)
            if group is not None and worker not in self._replies[group]:
                self._replies[group].append(worker)
                self._lacking -= len(self._replies[group]) == self._code.m

    def solve(self) -> NDArray[np.float64] | None:
        if self._lacking:
            return None
        a = by_group(self._code, self._replies)
        if self._code.m == 1:
            return a[:, 0]
        return a if self._code.error_of(a) <= EXACT else None

    def can_complete(self, outstanding: set[int]) -> bool:
        return all(
            len(replies) + len(outstanding.intersection(group).difference(replies)) >= self._code.m
            for group, replies in zip(self._groups, self._replies, strict=True)
        )


class _NullSpaceRule:
    """Decides over the reals: the sum is decodable when the small system on the stragglers can be solved."""

    def __init__(self, code: EncodingMatrix) -> None:
        self._code = code
        self._a0, self._N, _, self._norms, self._consistent = code.once(_decompose)
        self._missing = np.ones(code.n, dtype=bool)
        self.improves = True
        self._restart()
        self._scale = self._square
        self.added = 0

    def add(self, workers: Sequence[int]) -> None:
        self.added += len(workers)
        self._missing[list(workers)] = False
        if len(workers) > 1:
            self._restart()
            return
        for worker in workers:
            row, target = self._N[worker], self._a0[worker]
            self._gram -= np.outer(row, row)
            self._right -= np.outer(row, target)
            self._square -= float(target @ target)

    def solve(self) -> NDArray[np.float64] | None:
        if not self._consistent or not self._worth_testing():
            return None
        a = self._shortest()
        if self._code.error_of(a) > EXACT:
            # The small system may have lost digits, so the large one decides.
            a = self._code.least_squares_vector(np.flatnonzero(~self._missing)).reshape(a.shape)
            if self._code.error_of(a) > EXACT:
                return None
        return a if self._code.m > 1 else a[:, 0]

    def _restart(self) -> None:
        """Compute the normal equations of the stragglers' rows from scratch."""
        N, a0 = self._N[self._missing], self._a0[self._missing]
        self._gram, self._right, self._square = N.T @ N, N.T @ a0, float(np.square(a0).sum())

    def _shortest(self) -> NDArray[np.float64]:
        """Returns the shortest decoding vector that is zero on the stragglers, if one exists at all."""
        missing, N, a = self._missing, self._N, self._a0.copy()
        if N.shape[1]:
            w, free = _solve(N[missing], -self._a0[missing])
            a += N @ w
            if free.shape[1]:  # with fewer stragglers than tolerated, the solution is not unique
                directions = N @ free / self._norms
                a -= N @ (free @ lstsq(directions, a / self._norms))
        a /= self._norms
        a[missing] = 0.0
        return a

    def _worth_testing(self) -> bool:
        unknowns = self._N.shape[1]
        if np.count_nonzero(self._missing) <= unknowns:
            return True
        residual = self._square
        if unknowns:
            # N is orthonormal, so anything below 1e-12 is the rounding error of rows that were subtracted.
            w = np.linalg.solve(self._gram + 1e-12 * np.eye(unknowns), self._right)
            residual -= float((self._right * w).sum())
        return residual <= _WORTH_TESTING * self._scale


class _RowSpaceRule:
    """Decides over the reals if B has many spare rows: the sum is decodable when the survivors' rows span the target.

    With many spare rows, the survivors' rows are the smaller system. In terms of `y = D a`, it reads `y U = t`, where U
    holds orthonormal columns that span those of B. The survivors' rows of U are orthonormalised one by one. The rest of
    t that they do not span tells whether they suffice.
    """

    def __init__(self, code: EncodingMatrix) -> None:
        self._code = code
        a0, _, self._U, _, self._consistent = code.once(_decompose)
        self._live = np.zeros(code.n, dtype=bool)
        self._basis = np.empty((self._U.shape[1], self._U.shape[1]))
        self._found = 0
        self._rest = self._U.T @ a0
        self._scale = float(np.square(self._rest).sum())
        self.improves = True
        self.added = 0

    def add(self, workers: Sequence[int]) -> None:
        self.added += len(workers)
        for worker in workers:
            known, self._live[worker] = bool(self._live[worker]), True
            if known or self._found == len(self._basis):
                continue
            v, basis = self._U[worker].copy(), self._basis[: self._found]
            before = float(np.linalg.norm(v))
            for _ in range(2):  # a second pass removes the rounding error of the first
                v -= basis.T @ (basis @ v)
            length = float(np.linalg.norm(v))
            if length > 1e-11 * before:
                v /= length
                self._basis[self._found] = v
                self._found += 1
                self._rest -= np.outer(v, v @ self._rest)

    def solve(self) -> NDArray[np.float64] | None:
        # Orthonormal rows lose no digits, so a strict limit on the rest avoids most tests, each of which costs a large
        # system.
        if not self._consistent or float(np.square(self._rest).sum()) > _NOTHING_LEFT * self._scale:
            return None
        a = self._code.least_squares_vector(np.flatnonzero(self._live))
        return a if self._code.error_of(a) <= EXACT else None


def _decompose(
    code: EncodingMatrix,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], bool]:
    """Returns a decoding vector of all replies and bases of the null space and column space of B, scaled by row.

    The rows of B are first scaled to length 1, because rows of very different lengths would cost digits. With D the
    diagonal matrix of the original lengths, the results are in terms of `D a`.

    Returns:
        (a0, N, U, D, exact): the decoding vector of all replies, shape (n, m); the bases, shapes (n, n - rank) and
        (n, rank); the row lengths, shape (n, 1); and whether a0 decodes exactly.
    """
    B = code.B.reshape(code.n, -1)
    norms = np.linalg.norm(B, axis=1, keepdims=True)
    norms[norms == 0] = 1.0
    U, sigma, Vt = svd(B / norms, full_matrices=True)
    # The coefficients of B are solutions of equations, and accurate to about 1e-12. A singular value that is wrongly
    # taken for zero does no harm, because every decoding vector is confirmed on B itself.
    rank = int(np.count_nonzero(sigma > 1e-11 * sigma[0]))
    a0 = U[:, :rank] @ ((Vt[:rank] @ np.tile(np.eye(code.m), (code.k, 1))) / sigma[:rank, None])
    N, spanned = U[:, rank:], U[:, :rank]
    for array in (a0, N, spanned, norms):
        array.setflags(write=False)
    return a0, N, spanned, norms, code.error_of(a0 / norms) <= EXACT


def _solve(rows: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns a solution w of `rows @ w = right`, and a basis of the null space of `rows`.

    The rows are parts of orthonormal columns, so a singular value that is small in absolute terms is a rounding error.
    """
    if not len(rows):
        return np.zeros((rows.shape[1], right.shape[1])), np.eye(rows.shape[1])
    U, sigma, Vt = svd(rows, full_matrices=len(rows) < rows.shape[1])
    rank = int(np.count_nonzero(sigma > 1e-11))
    return Vt[:rank].T @ ((U[:, :rank].T @ right) / sigma[:rank, None]), Vt[rank:].T


# Elimination over all workers takes about a second at this number of workers. It is done once for each code.
_RANK_UP_TO = 512


class FieldRule:
    """Decides over a prime field: n - s replies always decode, and fewer may if the columns of B allow it."""

    improves = False

    def __init__(self, code: EncodingMatrix) -> None:
        self._code = code
        self._live = np.zeros(code.n, dtype=bool)
        self._order: list[int] = []
        self._span: _Span | None = None
        self._in_span = 0  # number of workers of `_order` that were added to the span
        self.added = 0

    def add(self, workers: Sequence[int]) -> None:
        """Add workers whose replies have arrived."""
        self.added += len(workers)
        self._order.extend(workers)
        self._live[list(workers)] = True

    def solve(self) -> NDArray[np.int64] | None:
        """Returns a decoding vector, shape (n,) or (n, m), or None if the replies do not suffice."""
        code = self._code
        missing = np.flatnonzero(~self._live)
        if len(missing) <= code.s and code.once(_has_closed_form):
            spare = self._order[::-1][: code.s - len(missing)]
            a = _closed_form(code, np.concatenate([missing, np.array(spare, np.int64)]))
        else:
            solution = None
            if (code.blocks[self._live].any(axis=2).sum(axis=0) >= code.m).all() and (
                len(missing) <= code.s or not code.once(_has_closed_form) or code.once(_may_decode_sooner)
            ):
                solution = self._eliminate() if self._suffices() else None
            if solution is None:
                return None
            a = solution
        return a if code.m > 1 else a[:, 0]

    def _suffices(self) -> bool:
        """Returns whether the target lies in the span of the received rows; each arrival adds one row."""
        columns = self._code.once(_distinct)
        if self._span is None:
            self._span = _Span(_target(columns.shape[1], self._code.m).T)
        for worker in self._order[self._in_span :]:
            self._span.add(columns[worker].reshape(-1))
        self._in_span = len(self._order)
        return not self._span.rest.any()

    def _eliminate(self) -> NDArray[np.int64] | None:
        code = self._code
        columns = code.once(_distinct)
        x = solve_mod(columns[self._live].reshape(int(self._live.sum()), -1).T, _target(columns.shape[1], code.m))
        if x is None:
            return None
        a = np.zeros((code.n, code.m), np.int64)
        a[self._live] = x
        return a


class _Span:
    """Keeps rows in reduced echelon form, and the rest of the targets that they do not span."""

    def __init__(self, targets: NDArray[np.int64]) -> None:
        self.rest = targets.copy()
        self._rows = np.zeros((min(64, targets.shape[1]), targets.shape[1]), np.int64)
        self._pivots: list[int] = []

    def add(self, row: NDArray[np.int64]) -> None:
        done = len(self._pivots)
        if done == self._rows.shape[1]:
            return
        rows = self._rows[:done]
        row = (row - matmul_mod(row[None, self._pivots], rows)[0]) % P
        nonzero = np.flatnonzero(row)
        if not nonzero.size:
            return
        pivot = int(nonzero[0])
        row = row * pow(int(row[pivot]), P - 2, P) % P
        rows -= rows[:, pivot, None] * row % P
        rows %= P
        self.rest = (self.rest - self.rest[:, pivot, None] * row) % P
        if done == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[done] = row
        self._pivots.append(pivot)


def _has_closed_form(code: EncodingMatrix) -> bool:
    """Returns whether C B = [blocks of ones, then zeros], where C contains the powers s + m - 1..0 of the points."""
    C = powers(points(code.n), code.s + code.m)[::-1]
    product = matmul_mod(C, code.blocks.reshape(code.n, -1))
    expected = np.zeros_like(product)
    expected[: code.m] = _target(code.k, code.m).T
    return bool((product == expected).all())


def _closed_form(code: EncodingMatrix, missing: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the decoding vector that is zero on the `missing` workers, shape (n, m), from a closed form.

    Let M be the polynomial that vanishes on the missing workers' points. Column l is `x^e - (x^e mod M)` at all points,
    with e = s + m - l. It vanishes on the missing workers, and it lies in the row space of C with coefficient 1 at
    power e, so that it picks block l.
    """
    s, m, x = code.s, code.m, points(code.n)
    if m == 1:
        a = np.ones(code.n, np.int64)
        for t in x[missing]:
            a = a * (x - t) % P
        return a[:, None]
    M = np.zeros(s + 1, np.int64)  # lowest power first
    M[0] = 1
    for t in x[missing]:
        M[1:], M[0] = (M[:-1] - t * M[1:]) % P, -t * M[0] % P
    columns = np.zeros((code.n, m), np.int64)
    rest = -M[:s] % P  # x^s mod M
    power = np.ones(code.n, np.int64)
    for _ in range(s):
        power = power * x % P
    for column in range(m - 1, -1, -1):
        value = np.zeros(code.n, np.int64)
        for coefficient in rest[::-1]:
            value = (value * x + coefficient) % P
        columns[:, column] = (power - value) % P
        if s:
            top = rest[-1]
            rest = (np.concatenate([[0], rest[:-1]]) - top * M[:s]) % P
        power = power * x % P
    return columns


def _target(k: int, m: int) -> NDArray[np.int64]:
    return np.tile(np.eye(m, dtype=np.int64), (k, 1))


def _distinct(code: EncodingMatrix) -> NDArray[np.int64]:
    """Returns the distinct columns of B, shape (n, columns, m)."""
    unique = np.unique(code.blocks.transpose(1, 0, 2).reshape(code.k, -1), axis=0)
    return np.asarray(unique.reshape(len(unique), code.n, code.m).transpose(1, 0, 2))


def _may_decode_sooner(code: EncodingMatrix) -> bool:
    """Returns whether fewer than n - s replies may ever suffice, which needs a rank of B below n - s.

    Above 512 workers, elimination would be slow, and only the number of distinct columns is compared. At worst, a code
    is then taken to need n - s replies.
    """
    columns = code.once(_distinct).reshape(code.n, -1)
    least = code.n - code.s
    if columns.shape[1] < least:
        return True
    return code.n <= _RANK_UP_TO and rank_mod(columns) < least
