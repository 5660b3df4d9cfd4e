"""Fractional repetition, in which groups of workers hold the same shards; the default if the assignment is free."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidCode
from ._linalg import condition
from ._validation import check_count, check_tolerance
from .gradient_code import GradientCode
from .reals import Diagonals

__all__ = ["fractional_repetition", "uncoded"]

_TRIES = 64
_SUBSETS = 500


def uncoded(n: int) -> GradientCode:
    """Returns the trivial code in which worker i holds shard i and a round waits for all (B is the identity, s = 0)."""
    n = check_count(n, "n")
    return GradientCode(_diagonals(n, n, n), 0, "uncoded", tuple((i,) for i in range(n)))


def fractional_repetition(
    n: int,
    s: int,
    *,
    k: int | None = None,
    m: int = 1,
    order: Sequence[int] | None = None,
    rng: np.random.Generator | None = None,
) -> GradientCode:
    """Returns a fractional repetition code, in which groups of at least s + m workers hold the same block of shards.

    There are g = floor(n / (s + m)) groups. The sizes of groups differ by at most one, and so do those of blocks. With
    m = 1, all workers of a group send the same sum. Decoding takes the first reply of each group and amplifies no
    noise. It is possible as soon as every group has one reply, often long before n - s replies have arrived. With
    m > 1, replies are m times shorter, and each group decodes from any m of its replies. With k = n, worker i holds
    shard i, its own data, and the shards of the other workers in its group.

    Args:
        n: Number of workers.
        s: Straggler tolerance, 0 <= s <= n - m.
        k: Number of shards, at least g; n by default.
        m: Upload reduction.
        order: The workers, sorted by what they have in common, such as slowest first or rack by rack. They are dealt
            one by one to the groups, which spreads slow workers and failure domains. 0..n-1 by default.
        rng: Draws candidates for the code inside the groups, of which the best conditioned is used; for m > 1 only. It
            has a fixed seed by default.

    Raises:
        InvalidCode: An argument is out of range.

    References:
        Tandon, Lei, Dimakis, Karampatziakis, "Gradient coding", 2017, section 3.1, for (s + 1) | n; uneven
        groups are our deviation. For m > 1, an MDS code in each group: Ye and Abbe 2018 have the same corner.
    """
    n, m, s = check_count(n, "n"), check_count(m, "m"), check_tolerance(s, n)
    if s + m > n:
        raise InvalidCode(f"s={s} stragglers at m={m} need groups of {s + m} workers; there are n={n}. Lower s or m.")
    g = n // (s + m)
    shards = n if k is None else check_count(k, "k")
    if shards < g:
        floor = "floor(n / (s + 1))" if m == 1 else "floor(n / (s + m))"
        raise InvalidCode(f"k={shards} shards cannot fill {g} groups; k must be at least {floor} = {g}.")
    dealt = list(range(n)) if order is None else [int(i) for i in order]
    if sorted(dealt) != list(range(n)):
        raise InvalidCode(f"order must name each worker 0..{n - 1} once, not {dealt}.")
    group_of = np.empty(n, int)
    group_of[dealt] = np.arange(n) % g
    block_of = group_of if shards == n else np.arange(shards) % g
    groups = tuple(tuple(np.flatnonzero(group_of == q).tolist()) for q in range(g))
    if m == 1 and dealt == list(range(n)):
        return GradientCode(_diagonals(n, shards, g), s, "fractional repetition", groups)
    B = (group_of[:, None] == block_of).astype(np.float64)[:, :, None]
    if m > 1:
        sizes = {len(group) for group in groups}
        inside = {size: _well_conditioned(size, m, rng or np.random.default_rng(0)) for size in sorted(sizes)}
        B = np.repeat(B, m, axis=2)
        for group in groups:
            B[list(group)] *= inside[len(group)][:, None, :]
    return GradientCode(B, s, "fractional repetition", groups)


def _diagonals(n: int, k: int, g: int) -> Any:
    """Returns the matrix that has 1 where worker and shard have the same remainder by g, and 0 elsewhere."""
    return Diagonals((np.arange(1 - n, k) % g == 0).astype(np.float64), n)


def _well_conditioned(size: int, m: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns a matrix with rows of length 1, all of whose m x m submatrices are well-conditioned; shape (size, m).

    It is the best of several random matrices, judged by the worst condition number over the submatrices, or over a
    random selection if there are many. With rows of equal length, the shortest decoding vector amplifies noise least.
    """
    if comb(size, m) <= _SUBSETS:
        subsets = np.array(list(combinations(range(size), m)))
    else:
        subsets = np.array([rng.permutation(size)[:m] for _ in range(_SUBSETS)])
    candidates = []
    for _ in range(_TRIES):
        G = np.linalg.qr(rng.standard_normal((size, m)))[0]
        G /= np.linalg.norm(G, axis=1, keepdims=True)
        candidates.append((float(condition(G[subsets]).max()), G))
    return min(candidates, key=lambda candidate: candidate[0])[1]
