"""Bounds what float rounding in coding and decoding may change in the sum of the updates.

Every number on the way is a combination `v = sum_c c_t x_t` of blocks x_t of weighted updates, whose coefficients are
known: those of a worker's partial sums, of its reply times the decoding vector, and of the server's partial sums. An
operation that rounds changes an entry of v by at most u, relatively, where u is the unit roundoff. By Cauchy and
Schwarz `||v|| <= ||c||_2 ||x||`, where `||x||` is the root of the summed squares of all weighted updates. So each
operation adds at most `u ||c||_2`, relative to `||x||`. A worker's errors are multiplied by its decoding coefficients.

The sum over all operations is the worst case. Rounding errors of many operations behave like independent random numbers
of mean 0 and at most u in size (a third of u^2 in the mean square), so that the root of the sum of squares, times 2,
bounds them as well. That is 3.5 standard deviations of the norm, in which the errors of many entries average out
(Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019). The smaller of both counts. To it
comes what the decoding vector itself, a solution of equations in float64, is off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encoding_matrix import EXACT, EncodingMatrix

__all__ = ["rounding_bound"]

_CONFIDENCE = 2.0


def rounding_bound(code: EncodingMatrix, a: NDArray[Any], dtype: np.dtype[np.floating], *, further: int = 0) -> float:
    """Returns a bound of the rounding error of a decoded mean, relative to the size of the updates.

    Args:
        code: A code over the reals.
        a: Decoding vector, shape (n,) or (n, m).
        dtype: Dtype of the replies.
        further: Number of vectors that are added with coefficient 1 in the end.

    Returns:
        The bound of `||decoded - exact|| / ||x||`, where x holds the weighted updates of all shards, and `exact` is the
        combination that `a` stands for. If the updates' directions are independent, `||x||` is the norm of their sum.
        If they agree, the sum is longer, and its relative error is smaller. If they cancel each other, the sum is
        shorter, and its relative error is larger by as much.
    """
    _, k, m = code.blocks.shape
    vector = a.reshape(code.n, m)
    used = [int(i) for i in np.flatnonzero(vector.any(axis=1))]
    # The weight times the update, and the division by the sum of the weights, which is rounded to the wire's dtype.
    steps = [np.full(3 + further, np.sqrt(k))]
    for i in used:
        row = code.blocks[i][code.blocks[i] != 0]
        size = np.linalg.norm(vector[i])
        inexact = np.abs(row[row != 1])  # both the coefficient and its product with the update are rounded
        steps += [size * inexact, size * inexact, size * np.sqrt(np.cumsum(np.square(row))[1:])]
    sums, squares = np.zeros((m, k * m)), np.zeros(m)
    order = np.argsort(code.order_of(used), kind="stable")
    for place, i in enumerate(np.array(used, int)[order]):
        row = code.blocks[i].reshape(-1)
        inexact = np.linalg.norm(row) * np.abs(vector[i][(vector[i] != 0) & (vector[i] != 1)])
        steps += [inexact, inexact]
        held = np.flatnonzero(row)
        before = sums[:, held]
        sums[:, held] += vector[i][:, None] * row[held]
        squares += (np.square(sums[:, held]) - np.square(before)).sum(axis=1)
        if place:
            steps.append(np.sqrt(np.maximum(squares[vector[i] != 0], 0.0)))
    every = np.concatenate(steps)
    rounded = float(np.finfo(dtype).eps) / 2 * float(min(every.sum(), _CONFIDENCE * np.linalg.norm(every)))
    off = code.shares_of(vector) - np.eye(m)
    # A vector that is further off is an estimate, which the decoding error tells.
    return rounded + (float(np.linalg.norm(off)) if np.abs(off).max() <= EXACT else 0.0)
