"""Decoding over the prime field: closed form where the code is built on powers of 1..n, elimination otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .prime_field import P, matmul, solve

if TYPE_CHECKING:
    from .gradient_code import GradientCode

__all__ = ["FieldRule", "check_matrix"]

# Elimination over all workers takes about a second at this size; it is done once a code.
_RANK_UP_TO = 512


class FieldRule:
    """Decodable for sure with n - s replies; sooner where the columns leave room."""

    improves = False

    def __init__(self, code: GradientCode) -> None:
        self._code = code
        self._live = np.zeros(code.n, dtype=bool)
        self._order: list[int] = []
        self._span: _Span | None = None
        self._in_span = 0  # how many of `_order`
        self.added = 0

    def add(self, workers: Sequence[int]) -> None:
        """More replies are in."""
        self.added += len(workers)
        self._order.extend(workers)
        self._live[list(workers)] = True

    def solve(self) -> NDArray[np.int64] | None:
        """A decoding vector, shape (n,) or (n, m), or None."""
        code = self._code
        missing = np.flatnonzero(~self._live)
        if len(missing) <= code.s and _has_closed_form(code):
            spare = self._order[::-1][: code.s - len(missing)]
            a = _closed_form(code, np.concatenate([missing, np.array(spare, np.int64)]))
        else:
            found = None
            if (code.blocks[self._live].any(axis=2).sum(axis=0) >= code.m).all() and (
                len(missing) <= code.s or not _has_closed_form(code) or _may_decode_sooner(code)
            ):
                found = self._eliminate() if self._suffices() else None
            if found is None:
                return None
            a = found
        return a if code.m > 1 else a[:, 0]

    def _suffices(self) -> bool:
        """Whether the target lies in the span of the rows that are in; each arrival adds one row."""
        columns = _distinct(self._code)
        if self._span is None:
            self._span = _Span(_target(columns.shape[1], self._code.m).T)
        for worker in self._order[self._in_span :]:
            self._span.add(columns[worker].reshape(-1))
        self._in_span = len(self._order)
        return not self._span.rest.any()

    def _eliminate(self) -> NDArray[np.int64] | None:
        code = self._code
        columns = _distinct(code)
        x = solve(columns[self._live].reshape(int(self._live.sum()), -1).T, _target(columns.shape[1], code.m))
        if x is None:
            return None
        a = np.zeros((code.n, code.m), np.int64)
        a[self._live] = x
        return a


def check_matrix(n: int, rows: int) -> NDArray[np.int64]:
    """C, shape (rows, n): powers rows - 1 down to 0 of the points 1..n; every `rows` columns are independent."""
    points = np.arange(1, n + 1, dtype=np.int64)
    C = np.ones((rows, n), np.int64)
    for row in range(rows - 2, -1, -1):
        C[row] = C[row + 1] * points % P
    return C


class _Span:
    """Rows in reduced echelon form, and what is left of the targets beside them."""

    def __init__(self, targets: NDArray[np.int64]) -> None:
        self.rest = targets.copy()
        self._rows = np.zeros((min(64, targets.shape[1]), targets.shape[1]), np.int64)
        self._pivots: list[int] = []

    def add(self, row: NDArray[np.int64]) -> None:
        done = len(self._pivots)
        if done == self._rows.shape[1]:
            return
        rows = self._rows[:done]
        row = (row - matmul(row[None, self._pivots], rows)[0]) % P
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


@lru_cache(maxsize=64)
def _has_closed_form(code: GradientCode) -> bool:
    """Whether C B = [blocks of ones, then zeros] with C the powers of 1..n."""
    C = check_matrix(code.n, code.s + code.m)
    found = matmul(C, code.blocks.reshape(code.n, -1))
    expected = np.zeros_like(found)
    expected[: code.m] = _target(code.k, code.m).T
    return bool((found == expected).all())


def _closed_form(code: GradientCode, missing: NDArray[np.int64]) -> NDArray[np.int64]:
    """Column l is `x^e - (x^e mod M)` at the points, e = s + m - l, M the polynomial that vanishes on `missing`.

    Then it vanishes there, and lies in the row space of C with coefficient 1 at power e: it picks block l.
    """
    s, m = code.s, code.m
    points = np.arange(1, code.n + 1, dtype=np.int64)
    if m == 1:
        a = np.ones(code.n, np.int64)
        for t in missing + 1:
            a = a * (points - t) % P
        return a[:, None]
    M = np.zeros(s + 1, np.int64)  # lowest power first
    M[0] = 1
    for t in missing + 1:
        M[1:], M[0] = (M[:-1] - t * M[1:]) % P, -t * M[0] % P
    columns = np.zeros((code.n, m), np.int64)
    rest = -M[:s] % P  # x^s mod M
    power = np.ones(code.n, np.int64)
    for _ in range(s):
        power = power * points % P
    for column in range(m - 1, -1, -1):
        value = np.zeros(code.n, np.int64)
        for coefficient in rest[::-1]:
            value = (value * points + coefficient) % P
        columns[:, column] = (power - value) % P
        if s:
            top = rest[-1]
            rest = (np.concatenate([[0], rest[:-1]]) - top * M[:s]) % P
        power = power * points % P
    return columns


def _target(k: int, m: int) -> NDArray[np.int64]:
    return np.tile(np.eye(m, dtype=np.int64), (k, 1))


@lru_cache(maxsize=64)
def _distinct(code: GradientCode) -> NDArray[np.int64]:
    """The columns of B, equal ones once: shape (n, columns, m)."""
    unique = np.unique(code.blocks.transpose(1, 0, 2).reshape(code.k, -1), axis=0)
    return np.asarray(unique.reshape(len(unique), code.n, code.m).transpose(1, 0, 2))


@lru_cache(maxsize=64)
def _may_decode_sooner(code: GradientCode) -> bool:
    """Whether fewer than n - s replies can ever suffice: only if the rows of B span fewer than n - s dimensions.

    Above 512 workers the number of distinct columns decides, without elimination: a code is then at worst taken to need
    n - s replies.
    """
    columns = _distinct(code).reshape(code.n, -1)
    least = code.n - code.s
    if columns.shape[1] < least:
        return True
    return code.n <= _RANK_UP_TO and _rank(columns) < least


def _rank(A: NDArray[np.int64]) -> int:
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
