"""The universal construction, which gives a code over the reals for any assignment."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidCode
from ._validation import as_pattern, check_count, check_holders, check_tolerance
from .gradient_code import GradientCode

__all__ = ["for_assignment"]

_PATTERNS = 6  # number of random straggler sets by which a candidate is judged
_CANDIDATES = 10  # number of sets of holders that are tried for each shard
_EVENNESS = 3.0  # roughly how far a chosen holder's load may exceed the lowest load, in shards


def for_assignment(
    assignment: ArrayLike,
    *,
    s: int,
    m: int = 1,
    holders: int | None = None,
    tries: int = 8,
    rng: np.random.Generator | None = None,
) -> GradientCode:
    """Returns a code for any assignment in which every shard has at least s + m holders.

    A matrix C with s + m random orthonormal rows is drawn. The coefficients of a shard are the shortest solution of
    `C[:, holders] beta^(l) = e_l`, l = 1..m. The first m rows of C then decode the replies of all workers. Adding
    multiples of the other rows cancels any s stragglers, which takes an s x s system. The rows of B are scaled to
    length 1, so that the shortest decoding vector amplifies noise least.

    Coefficients of both signs amplify rounding errors and differences between replicas by `kappa`. It can be in the
    hundreds for given assignments with s + m holders. With two more holders, or with holders chosen here (`holders=`),
    it is small.

    Args:
        assignment: The assignment, as a 0/1 matrix of shape (n, k), the list of each worker's shards, or an
            `fl_gradcode.placement.Assignment`. With `holders`, it says which workers may hold a shard.
        s: Straggler tolerance.
        m: Upload reduction; replies are m times shorter.
        holders: Number of holders to choose for each shard among the possible ones, at least s + m. They are chosen so
            that kappa is small and loads are in proportion to how much each worker may hold. With None, all of the
            named workers hold the shard.
        tries: Number of matrices C to try; the one with the smallest median kappa over a few random straggler sets is
            used.
        rng: Draws C. It has a fixed seed by default. Pass your own if stragglers might know the code and conspire.

    Raises:
        InvalidCode: A shard has fewer than s + m holders. The message names it.

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
    """Returns B, shape (n, k, m); shards with equally many holders are solved together."""
    B = np.zeros((*held.shape, m))
    counts = held.sum(axis=0)
    for count in np.unique(counts):
        shards = np.flatnonzero(counts == count)
        workers = np.array([np.flatnonzero(held[:, j]) for j in shards])
        B[workers, shards[:, None]] = _shortest(C, workers, m)
    return B


def _shortest(C: NDArray[np.float64], workers: NDArray[np.intp], m: int) -> NDArray[np.float64]:
    """Returns the shortest beta with `C[:, workers[t]] beta[t] = [e_1 .. e_m]`, shape (len(workers), holders, m)."""
    A = C[:, workers].transpose(1, 0, 2)
    target = np.broadcast_to(np.eye(len(C))[:, :m], (len(workers), len(C), m))
    if A.shape[1] == A.shape[2]:
        return np.asarray(np.linalg.solve(A, target))
    Q, R = np.linalg.qr(A.transpose(0, 2, 1))
    return np.asarray(Q @ np.linalg.solve(R.transpose(0, 2, 1), target))


def _choose(
    C: NDArray[np.float64], may: NDArray[np.bool_], holders: int, m: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Returns an assignment with `holders` holders of each shard, shape (n, k), chosen among the possible ones.

    For each shard, the set with the smallest coefficients among a few random sets is taken. The sets are drawn among
    workers that hold little of what they may hold, so that loads stay even.
    """
    capacity = np.maximum(may.sum(axis=1), 1)
    scale = capacity.mean() / capacity
    load = np.zeros(len(may))
    held = np.zeros_like(may)
    # Shards with the fewest possible holders come first.
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
    """Returns the median kappa over a few random sets of s stragglers."""
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
