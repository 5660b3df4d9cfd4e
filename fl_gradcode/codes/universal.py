"""A code for any assignment: the universal construction over the reals, with random orthonormal rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidCode
from ._validation import as_pattern, check_count, check_holders, check_tolerance
from .gradient_code import GradientCode

__all__ = ["for_assignment"]

_PATTERNS = 6  # random straggler sets that a candidate is judged by
_CANDIDATES = 10  # sets of holders tried for each shard
_EVENNESS = 3.0  # how far a worker's load may be from the least, roughly, when holders are chosen


def for_assignment(
    assignment: ArrayLike,
    *,
    s: int,
    m: int = 1,
    holders: int | None = None,
    tries: int = 8,
    rng: np.random.Generator | None = None,
) -> GradientCode:
    """A code for whoever holds whatever: any assignment with at least s + m holders of every shard.

    Draw C with s + m random orthonormal rows; the coefficients of a shard are the shortest solution of
    `C[:, holders] beta^(l) = e_l`, l = 1..m. The first m rows of C then decode everyone's replies, and adding
    multiples of the others cancels any s stragglers: an s x s system. Rows of B are scaled to length 1, which makes
    the shortest decoding vector the one that amplifies noise least.

    Coefficients of both signs amplify rounding and replica differences by `kappa`: in the hundreds with s + m holders
    that are given, a few with two holders more, or with holders chosen here (`holders=`).

    Args:
        assignment: Who holds what: a 0/1 matrix of shape (n, k), the list of each worker's shards, or an
            `fl_gradcode.assignment.Assignment`. With `holders`: who may hold what.
        s: Straggler tolerance.
        m: Upload reduction: replies are m times shorter.
        holders: Choose so many of the possible holders of each shard, at least s + m, such that loads stay in
            proportion to how much each worker may hold, and kappa small. None: everybody who is named holds the shard.
        tries: Matrices C that are tried; the one with the smallest median kappa over a few random straggler sets is
            taken.
        rng: Draws C. A fixed seed by default: give one of your own if stragglers might know the code and conspire.

    Raises:
        InvalidCode: A shard with fewer than s + m holders, by name.

    References:
        Jahani-Nezhad and Maddah-Ali, "Optimal communication-computation trade-off in heterogeneous gradient
        coding", 2021 (arXiv 2103.01589), for arbitrary assignments; orthonormal rows, the search and the scaling are
        ours.
    """
    may = as_pattern(assignment)
    n = len(may)
    s, m, tries = check_tolerance(s, n), check_count(m, "m"), check_count(tries, "tries")
    listed = [np.flatnonzero(column) for column in may.T]
    check_holders([workers.tolist() for workers in listed], s, m)
    if holders is not None and not s + m <= holders <= min(map(len, listed)):
        raise InvalidCode(
            f"holders={holders} must be at least s + m = {s + m}, and at most what every shard has to choose from: "
            f"{min(map(len, listed))}."
        )
    rng = rng or np.random.default_rng(0)
    best: tuple[float, NDArray[np.float64]] | None = None
    for _ in range(tries):
        C = np.linalg.qr(rng.standard_normal((n, s + m)))[0].T * np.sqrt(n)
        held = may if holders is None else _choose(C, may, holders, m, rng)
        B = _coefficients(C, held, m)
        score = _median_kappa(C, B, rng) if tries > 1 and s else 0.0
        if best is None or score < best[0]:
            best = score, B
    assert best is not None
    B = best[1]
    lengths = np.linalg.norm(B.reshape(n, -1), axis=1)
    lengths[lengths == 0] = 1.0
    return GradientCode(B / lengths[:, None, None], s, "universal")


def _coefficients(C: NDArray[np.float64], held: NDArray[np.bool_], m: int) -> NDArray[np.float64]:
    """B of shape (n, k, m): the shortest solutions, shards with equally many holders together."""
    B = np.zeros((*held.shape, m))
    counts = held.sum(axis=0)
    for count in np.unique(counts):
        shards = np.flatnonzero(counts == count)
        workers = np.array([np.flatnonzero(held[:, j]) for j in shards])
        B[workers, shards[:, None]] = _shortest(C, workers, m)
    return B


def _shortest(C: NDArray[np.float64], workers: NDArray[np.intp], m: int) -> NDArray[np.float64]:
    """beta of shape (len(workers), holders, m) with `C[:, workers[t]] beta[t] = [e_1 .. e_m]`."""
    A = C[:, workers].transpose(1, 0, 2)
    target = np.broadcast_to(np.eye(len(C))[:, :m], (len(workers), len(C), m))
    if A.shape[1] == A.shape[2]:
        return np.asarray(np.linalg.solve(A, target))
    Q, R = np.linalg.qr(A.transpose(0, 2, 1))
    return np.asarray(Q @ np.linalg.solve(R.transpose(0, 2, 1), target))


def _choose(
    C: NDArray[np.float64], may: NDArray[np.bool_], holders: int, m: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Of each shard's possible holders so many, with the smallest coefficients among a few random sets.

    Sets are drawn among those who hold least of what they may hold, so that loads stay even.
    """
    capacity = np.maximum(may.sum(axis=1), 1)
    scale = capacity.mean() / capacity
    load = np.zeros(len(may))
    held = np.zeros_like(may)
    # Those with the least choice first.
    for shard in np.lexsort((rng.random(may.shape[1]), may.sum(axis=0))):
        possible = np.flatnonzero(may[:, shard])
        noise = rng.random((_CANDIDATES if len(possible) > holders else 1, len(possible)))
        keys = (load * scale)[possible] + _EVENNESS * noise
        sets = possible[np.argsort(keys, axis=1)[:, :holders]]
        chosen = sets[np.argmin(np.square(_shortest(C, sets, m)).sum(axis=(1, 2)))]
        held[chosen, shard] = True
        load[chosen] += 1
    return held


def _median_kappa(C: NDArray[np.float64], B: NDArray[np.float64], rng: np.random.Generator) -> float:
    """Over a few random sets of s stragglers."""
    n, k, m = B.shape
    squares = np.square(B).sum(axis=(1, 2))
    s = len(C) - m
    kappas: list[Any] = []
    for _ in range(_PATTERNS):
        T = rng.choice(n, s, replace=False)
        z = np.linalg.solve(C[m:, T].T, -C[:m, T].T)
        a = C[:m] + z.T @ C[m:]
        a[:, T] = 0
        kappas.append(np.sqrt(np.square(a).sum(axis=0) @ squares / (k * m)))
    return float(np.median(kappas))
