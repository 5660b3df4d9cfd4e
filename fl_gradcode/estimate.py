"""Estimating the sum from too few replies: optimal decoding by least squares, regularised where replies are noisy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidCode
from .prime_field import PrimeField

if TYPE_CHECKING:
    from .gradient_code import GradientCode

__all__ = ["by_group", "estimate", "whole_groups"]


def estimate(code: GradientCode, workers: Sequence[int], ridge: float = 0.0) -> NDArray[np.float64]:
    """The vector of `GradientCode.least_squares_vector`; shape (n,) or (n, m)."""
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


def by_group(code: GradientCode, replies: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """The vector, shape (n, m), that is exact on groups with m replies and closest on the others.

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
            a[inside] = np.linalg.pinv(code.blocks[inside, shard]).T
    return a


def whole_groups(code: GradientCode, workers: Sequence[int]) -> list[int]:
    """Those of `workers` whose group has m replies, if the code has groups: with m > 1, fewer mix up the blocks."""
    if code.groups is None:
        return list(workers)
    return [i for inside in _grouped(code, workers) if len(inside) >= code.m for i in inside]


def _grouped(code: GradientCode, workers: Sequence[int]) -> list[list[int]]:
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
        return np.asarray(np.linalg.lstsq(rows.T, target, rcond=None)[0])
    # Further equations `sqrt(ridge) ||b_i|| a_i = 0` instead of normal equations, which would square the condition.
    damped = np.concatenate([rows.T, np.sqrt(ridge) * np.diag(np.linalg.norm(rows, axis=1))])
    return np.asarray(np.linalg.lstsq(damped, np.concatenate([target, np.zeros((survivors, m))]), rcond=None)[0])
