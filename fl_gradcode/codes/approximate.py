"""Approximate codes, which only estimate the sum, as baselines for comparison.

Fractional repetition that is stopped at the same time has about a tenth of their error.
"""

from __future__ import annotations

import numpy as np

from ..errors import InvalidCode
from ._validation import check_count, check_tolerance
from .gradient_code import GradientCode

__all__ = ["bernoulli", "stochastic"]


def bernoulli(n: int, s: int, *, k: int | None = None, rng: np.random.Generator) -> GradientCode:
    """Returns a Bernoulli code, in which each worker holds each shard with probability (s + 1) / n.

    Workers hold as much data as an exact code needs, in expectation. A round waits for n - s replies and estimates the
    sum by least squares. A shard that no worker has drawn is given to the worker that holds the fewest shards. The code
    is a baseline from the literature. Fractional repetition that is stopped at the same time has about a tenth of its
    error.

    References:
        Charles, Papailiopoulos, Ellenberg, "Approximate gradient coding via sparse random graphs", 2017.
    """
    n, s = check_count(n, "n"), check_tolerance(s, n)
    held = rng.random((n, n if k is None else check_count(k, "k"))) < (s + 1) / n
    for shard in np.flatnonzero(~held.any(axis=0)):
        held[np.argmin(held.sum(axis=1)), shard] = True
    return GradientCode(held.astype(np.float64), s, "Bernoulli", exact=False)


def stochastic(n: int, s: int, *, k: int | None = None, p: float = 0.0, rng: np.random.Generator) -> GradientCode:
    """Returns a stochastic gradient code, in which each shard is on s + 1 random workers with even loads.

    A round waits for n - s replies and estimates the sum by least squares. All coefficients equal
    1 / ((s + 1) (1 - p)). If each worker straggles with probability p, the plain sum of the received replies (decoding
    vector 1 on the survivors) is therefore unbiased too.

    References:
        Bitar, Wootters, El Rouayheb, "Stochastic gradient coding for straggler mitigation", 2019.
    """
    n, s = check_count(n, "n"), check_tolerance(s, n)
    shards = n if k is None else check_count(k, "k")
    if not 0 <= p < 1:
        raise InvalidCode(f"p={p} must be a probability below 1.")
    B = np.zeros((n, shards))
    load = np.zeros(n)
    for shard in range(shards):
        chosen = np.lexsort((rng.random(n), load))[: s + 1]
        B[chosen, shard] = 1 / ((s + 1) * (1 - p))
        load[chosen] += 1
    return GradientCode(B, s, "stochastic", exact=False)
