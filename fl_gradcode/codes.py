"""The code families: functions that make a `GradientCode`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .border import check_tolerance
from .errors import InvalidCode
from .gradient_code import GradientCode

__all__ = ["GradientCode", "cyclic_repetition", "fractional_repetition", "uncoded"]


def uncoded(n: int) -> GradientCode:
    """Every worker holds its own shard, and everybody is waited for: B is the identity, s = 0."""
    n = _positive(n, "n")
    return GradientCode(np.eye(n), 0, "uncoded", tuple((i,) for i in range(n)))


def fractional_repetition(n: int, s: int, *, k: int | None = None, order: Sequence[int] | None = None) -> GradientCode:
    """Fractional repetition: groups of at least s + 1 workers that all hold the same block of shards.

    There are g = floor(n / (s + 1)) groups, whose sizes differ by at most one, as do the blocks'. All workers
    of a group send the same sum, so decoding takes the first reply of each group and amplifies nothing; it is
    possible as soon as every group has one reply, often long before n - s replies are in. With k = n, worker i
    holds shard i, its own data, beside those of its group.

    Args:
        n: Number of workers.
        s: Straggler tolerance, 0 <= s < n.
        k: Number of shards, at least g; n by default.
        order: The workers, sorted by what they have in common (slowest first, or rack by rack): they are dealt
            one by one to the groups, so that slow workers and failure domains are spread. 0..n-1 by default.

    References:
        Tandon, Lei, Dimakis, Karampatziakis, "Gradient coding", 2017, section 3.1, for (s + 1) | n; uneven
        groups are our deviation.
    """
    n, s = _positive(n, "n"), check_tolerance(s, n)
    g = n // (s + 1)
    shards = n if k is None else _positive(k, "k")
    if shards < g:
        raise InvalidCode(f"k={shards} shards cannot fill {g} groups; k must be at least floor(n / (s + 1)) = {g}.")
    dealt = list(range(n)) if order is None else [int(i) for i in order]
    if sorted(dealt) != list(range(n)):
        raise InvalidCode(f"order must name each worker 0..{n - 1} once, not {dealt}.")
    group_of = {worker: turn % g for turn, worker in enumerate(dealt)}
    B = np.zeros((n, shards))
    for worker in range(n):
        for shard in range(shards):
            block = group_of[shard] if shards == n else shard % g
            B[worker, shard] = group_of[worker] == block
    groups = tuple(tuple(i for i in range(n) if group_of[i] == q) for q in range(g))
    return GradientCode(B, s, "fractional repetition", groups)


def cyclic_repetition(n: int, s: int, *, rng: np.random.Generator) -> GradientCode:
    """Cyclic repetition: worker i holds the s + 1 shards i, ..., i + s (mod n) and combines them at random.

    Any n - s replies decode, with probability 1 over `rng`. Real coefficients amplify rounding: see `kappa`.
    It exists for comparison; fractional repetition decodes earlier and never amplifies. For n of several
    hundred, kappa can exceed what float64 carries: the code then asks for more than n - s replies.

    References:
        Tandon, Lei, Dimakis, Karampatziakis, "Gradient coding", 2017, algorithm 2.
    """
    n, s = _positive(n, "n"), check_tolerance(s, n)
    H = rng.standard_normal((s, n))
    if s:
        H[:, -1] = -H[:, :-1].sum(axis=1)  # H 1 = 0: the vector of ones lies in the span of the rows
    B = np.zeros((n, n))
    for i in range(n):
        others = [(i + t) % n for t in range(1, s + 1)]
        B[i, i] = 1.0
        B[i, others] = -np.linalg.solve(H[:, others], H[:, i])
    return GradientCode(B, s, "cyclic repetition")


def _positive(value: Any, name: str) -> int:
    if not isinstance(value, int | float | np.number) or value != int(value) or value < 1:
        raise InvalidCode(f"{name}={value!r} must be a whole number of at least 1.")
    return int(value)
