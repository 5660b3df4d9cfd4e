"""Expected round times in closed form, for rounds that find every worker idle.

A round ends at an order statistic of the workers' times (wait for all, drop, any n - s), or at the largest over groups
of the m-th smallest within (fractional repetition). With independent workers its distribution function is known
exactly, and the mean is one integral; for exponential and Pareto laws it is a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import lambertw

from ..errors import InvalidSetting
from ..latency import Latency, Marginal
from .schemes import Scheme

__all__ = [
    "best_fraction",
    "coded_matvec_seconds",
    "exponential_seconds",
    "harmonic",
    "idle_distribution",
    "idle_mean",
]

_OCTAVES = 400
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)


def harmonic(n: int) -> float:
    """H_n = 1 + 1/2 + ... + 1/n."""
    return float(np.sum(1.0 / np.arange(1, n + 1)))


def exponential_seconds(n: int, v: int, *, mean: float = 1.0, shift: float = 0.0) -> float:
    """Expected time of the v-th of n answers, each `shift` plus an exponential: shift + mean (H_n - H_{n-v}).

    References:
        Lee et al., "Speeding up distributed machine learning using codes", 2018, section III.
    """
    _check(n, v)
    return shift + mean * (harmonic(n) - harmonic(n - v))


def coded_matvec_seconds(n: int, k: int, *, mu: float = 1.0) -> float:
    """Expected time of an MDS-coded product from any k of n answers: (1 + (H_n - H_{n-k}) / mu) / k.

    Each worker does a k-th of the work, which takes 1/k plus an exponential of mean 1 / (k mu); all at once takes
    1 + 1 / mu on one worker.

    References:
        Lee et al. 2018, equation (8).
    """
    return exponential_seconds(n, k, mean=1 / (k * mu), shift=1 / k)


def best_fraction(mu: float) -> float:
    """The best k / n of `coded_matvec_seconds` for many workers: 1 + 1 / W_{-1}(-exp(-mu - 1)).

    References:
        Lee et al. 2018, theorem 1; W_{-1} is the lower branch of Lambert's function.
    """
    if not mu > 0:
        raise InvalidSetting(f"mu={mu} must be greater than 0.")
    return float(1 + 1 / lambertw(-np.exp(-mu - 1), k=-1).real)


def idle_mean(scheme: Scheme, latency: Latency, *, model_megabytes: float = 0.0) -> float | None:
    """Expected seconds of a round in which all workers start idle, or None if there is no closed form.

    There is one unless the scheme sends shards, more than one part of the latency is random, or workers are not
    independent. Infinite where the mean is.
    """
    marginals = _marginals(scheme, latency, model_megabytes)
    if marginals is None:
        return None
    if all(one.atoms is not None for one in marginals):
        points = np.unique([atom for one in marginals for atom in one.atoms or ()])
        points = points[points < np.inf]
        ended = idle_distribution(scheme, marginals, points)
        if not len(points) or ended[-1] < 1 - 1e-12:  # with some probability too many never answer
            return float("inf")
        return float(points[0] + np.sum(np.diff(points) * (1 - ended[:-1])))
    return _integral(scheme, marginals)


def idle_distribution(scheme: Scheme, marginals: Sequence[Marginal], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(the round has ended by t), for each of `times`; shape (len(times),)."""
    done = np.array([one.cdf(times) for one in marginals])
    if scheme.enough is not None:
        return _at_least(done, scheme.enough)
    result = np.ones(len(times))
    for group in scheme.groups:
        inside = done[list(group)]
        result *= 1 - np.prod(1 - inside, axis=0) if scheme.m == 1 else _at_least(inside, scheme.m)
    return result


def _at_least(done: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """P(at least `count` of independent events), `done` has shape (events, times)."""
    missing = len(done) - count  # P(at most `missing` have not happened)
    if missing == 0:
        return np.asarray(np.prod(done, axis=0))
    ways = np.zeros((missing + 1, done.shape[1]))  # by how many have not
    ways[0] = 1.0
    for one in done:
        ways[1:] = ways[1:] * one + ways[:-1] * (1 - one)
        ways[0] *= one
    return np.asarray(ways.sum(axis=0))


def _marginals(scheme: Scheme, latency: Latency, model_megabytes: float) -> list[Marginal] | None:
    if scheme.shardwise:
        return None
    megabytes = model_megabytes * (1 + 1 / scheme.m)
    known = [
        latency.marginal(worker, shards=float(load), megabytes=megabytes) for worker, load in enumerate(scheme.loads)
    ]
    return [one for one in known if one is not None] if all(one is not None for one in known) else None


def _integral(scheme: Scheme, marginals: Sequence[Marginal]) -> float:
    """The integral of P(T > t) over t >= 0."""

    def survival(t: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.0 - idle_distribution(scheme, marginals, t)

    middle = 1.0
    while survival(np.array([middle]))[0] > 0.5 and middle < 1e300:
        middle *= 2
    while survival(np.array([middle / 2]))[0] < 0.5 and middle > 1e-300:
        middle /= 2
    if not middle < 1e300:
        return float("inf")
    total = _area(survival, 0.0, middle, pieces=256)
    before = float("inf")
    for octave in range(_OCTAVES):  # a power-law tail is a geometric series of these
        low = middle * 2.0**octave
        piece = _area(survival, low, 2 * low, pieces=max(16, 256 >> octave))
        total += piece
        if piece <= 1e-9 * total:
            return total
        ratio = piece / before
        if octave > 20 and ratio > 0.5:
            return float("inf") if ratio >= 1 - 1e-6 else total + piece * ratio / (1 - ratio)
        before = piece
    return total


def _area(f: Callable[[NDArray[np.float64]], NDArray[np.float64]], low: float, high: float, *, pieces: int) -> float:
    """Integral by Gauss's rule on equal pieces: fine enough for the kinks of laws with a least value."""
    edges = np.linspace(low, high, pieces + 1)
    half = np.diff(edges) / 2
    nodes = edges[:-1, None] + half[:, None] * (1 + _NODES)
    return float((f(nodes.ravel()).reshape(nodes.shape) @ _WEIGHTS) @ half)


def _check(n: int, v: int) -> None:
    if not 1 <= v <= n:
        raise InvalidSetting(f"v={v}: of n={n} answers, the one that is waited for is number 1 to {n}.")
