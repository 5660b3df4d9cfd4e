"""Codes of every family, small enough to look at all sets of survivors."""

from __future__ import annotations

import math

import numpy as np

from fl_gradcode.codes import (
    GradientCode,
    P,
    PrimeField,
    cyclic_mds,
    cyclic_repetition,
    for_assignment,
    fractional_repetition,
    uncoded,
    vandermonde,
)

PAIRS = [(n, s) for n in range(1, 9) for s in range(n)]


def cyclic(n: int, s: int, seed: int = 1) -> GradientCode:
    return cyclic_repetition(n, s, rng=np.random.default_rng(seed))


def at_small_points(n: int, s: int) -> GradientCode:
    """The Reed-Solomon code at the points 1..n, as versions up to 0.2 made it; s + 1 holders in a row."""
    B = np.zeros((n, n), np.int64)
    for j in range(n):
        held = [(j - t) % n + 1 for t in range(s + 1)]
        for x in held:
            B[x - 1, j] = pow(math.prod(x - y for y in held if y != x), -1, P)
    return GradientCode(B, s, "Reed-Solomon", numbers=PrimeField())


def group_mds(n: int, s: int, m: int, k: int | None = None) -> GradientCode:
    """Groups of at least s + m workers; inside a group an MDS code over the m blocks of the group's sum."""
    rng = np.random.default_rng((n, s, m))
    g = n // (s + m)
    B = np.zeros((n, k or g, m))
    for q in range(g):
        members = range(q, n, g)
        B[np.ix_(members, range(q, k or g, g))] = np.linalg.qr(rng.standard_normal((len(members), m)))[0][:, None, :]
    return GradientCode(B, s, "group MDS")


UNIVERSAL = [
    *((n, n, s, m, extra) for n, s, m, extra in ((4, 1, 1, 0), (6, 2, 1, 0), (7, 2, 1, 2), (6, 2, 2, 0), (8, 3, 3, 1))),
    (5, 9, 1, 2, 1),
    (8, 3, 2, 1, 0),
    (6, 4, 0, 2, 1),
]


def universal(n: int, k: int, s: int, m: int, extra: int) -> GradientCode:
    """Random holders, some shards with up to `extra` more than needed."""
    rng = np.random.default_rng((n, k, s, m))
    held = np.zeros((n, k), bool)
    for j in range(k):
        held[rng.permutation(n)[: s + m + int(rng.integers(extra + 1))], j] = True
    return for_assignment(held, s=s, m=m)


def shuffled(n: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).permutation(n)]


FRACTIONAL = [
    *(fractional_repetition(n, s) for n, s in PAIRS),
    *(fractional_repetition(n, s, order=shuffled(n, 7 * n + s)) for n, s in PAIRS if s + 1 < n),
    *(fractional_repetition(n, s, k=n // (s + 1)) for n, s in PAIRS if s),
    *(fractional_repetition(n, s, k=2 * n + 1, order=shuffled(n, n + s)) for n, s in PAIRS if s < 3),
]
GENERAL = [
    *(cyclic(n, s) for n, s in PAIRS),
    # The matrix alone: the library does not know that there are groups.
    *(GradientCode(fractional_repetition(n, s).B, s, "nameless") for n, s in ((4, 1), (5, 1), (7, 2), (8, 3))),
    *(cyclic(n, s).restrict(range(0, n, 2)) for n, s in ((5, 2), (6, 3), (7, 1))),
    *(group_mds(n, s, m) for n, s, m in ((4, 0, 2), (5, 1, 2), (6, 0, 3), (7, 1, 2), (8, 1, 3), (8, 2, 2))),
    group_mds(6, 1, 2, k=5),
    *(cyclic_mds(n, s) for n, s in PAIRS if (n - s) % 2),
    *(vandermonde(n, s) for n, s in PAIRS if n < 8),
    *(universal(n, k, s, m, extra) for n, k, s, m, extra in UNIVERSAL),
]
# Groups that decode on their own, m replies each.
GROUPED = [fractional_repetition(n, s, m=m) for n, s, m in ((2, 0, 2), (5, 1, 2), (7, 1, 2), (8, 2, 2), (8, 1, 3))]
CODES = [*(uncoded(n) for n in range(1, 9)), *FRACTIONAL, *GENERAL, *GROUPED]


def supports(code: GradientCode) -> list[tuple[int, ...]]:
    """For each shard its holders, read off the matrix."""
    B = code.B.reshape(code.n, code.k, -1)
    return [tuple(i for i in range(code.n) if B[i, j].any()) for j in range(code.k)]
