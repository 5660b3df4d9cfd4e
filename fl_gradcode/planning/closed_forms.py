"""Expected round times in closed form, for rounds in which every worker starts idle.

A round ends at an order statistic of the workers' times (wait for all, drop, any n - s), or at the maximum over groups
of the m-th smallest time in each (fractional repetition). For independent workers, the distribution of the round time
is known exactly, and the mean is one integral. For exponential laws, it is a formula.
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
    """Returns the harmonic number H_n = 1 + 1/2 + ... + 1/n."""
    return float(np.sum(1.0 / np.arange(1, n + 1)))


def exponential_seconds(n: int, v: int, *, mean: float = 1.0, shift: float = 0.0) -> float:
    """Returns the expected time of the v-th of n answers in seconds, each `shift` plus an exponential time.

    The formula is shift + mean (H_n - H_{n-v}).

    References:
        Lee et al., "Speeding up distributed machine learning using codes", 2018, section III.
    """
    _check(n, v)
    return shift + mean * (harmonic(n) - harmonic(n - v))


def coded_matvec_seconds(n: int, k: int, *, mu: float = 1.0) -> float:
    """Returns the expected time of an MDS-coded product from any k of n answers: (1 + (H_n - H_{n-k}) / mu) / k.

    Each worker does 1/k of the work, which takes 1/k plus an exponential time of mean 1 / (k mu). The unit is such that
    the whole product takes 1 + 1 / mu on one worker.

    References:
        Lee et al. 2018, equation (8).
    """
    return exponential_seconds(n, k, mean=1 / (k * mu), shift=1 / k)


def best_fraction(mu: float) -> float:
    """Returns the best k / n of `coded_matvec_seconds` for many workers: 1 + 1 / W_{-1}(-exp(-mu - 1)).

    References:
        Lee et al. 2018, theorem 1; W_{-1} is the lower branch of Lambert's function.
    """
    if not mu > 0:
        raise InvalidSetting(f"mu={mu} must be greater than 0.")
    return float(1 + 1 / lambertw(-np.exp(-mu - 1), k=-1).real)


def idle_mean(scheme: Scheme, latency: Latency, *, model_megabytes: float = 0.0) -> float | None:
    """Returns the expected seconds of a round in which all workers start idle, or None if there is no closed form.

    A closed form exists unless the scheme sends shards, more than one part of the latency is random, or workers are not
    independent. The result is infinite if the mean is.
    """
    marginals = _marginals(scheme, latency, model_megabytes)
    if marginals is None:
        return None
    if all(marginal.atoms is not None for marginal in marginals):
        points = np.unique([atom for marginal in marginals for atom in marginal.atoms or ()])
        points = points[points < np.inf]
        ended = idle_distribution(scheme, marginals, points)
        if not len(points) or ended[-1] < 1 - 1e-12:  # there is a chance that too many workers never answer
            return float("inf")
        return float(points[0] + np.sum(np.diff(points) * (1 - ended[:-1])))
    return _integral(scheme, marginals)


def idle_distribution(scheme: Scheme, marginals: Sequence[Marginal], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the probability that the round has ended by each of `times`, shape (len(times),)."""
    different = {id(marginal): marginal for marginal in marginals}  # workers that are alike share one
    known = {key: marginal.cdf(times) for key, marginal in different.items()}
    done = np.array([known[id(marginal)] for marginal in marginals])
    if scheme.enough is not None:
        return _at_least(done, scheme.enough)
    result = np.ones(len(times))
    for group in scheme.groups:
        inside = done[list(group)]
        result *= 1 - np.prod(1 - inside, axis=0) if scheme.m == 1 else _at_least(inside, scheme.m)
    return result


def _at_least(done: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Returns the probability that at least `count` of independent events have happened, shape (times,).

    `done` holds the probabilities of the events, shape (events, times).
    """
    missing = len(done) - count  # at most this many events have not happened
    if missing == 0:
        return np.asarray(np.prod(done, axis=0))
    chances = np.zeros((missing + 1, done.shape[1]))  # by the number of events that have not happened
    chances[0] = 1.0
    for event in done:
        chances[1:] = chances[1:] * event + chances[:-1] * (1 - event)
        chances[0] *= event
    return np.asarray(chances.sum(axis=0))


def _marginals(scheme: Scheme, latency: Latency, model_megabytes: float) -> list[Marginal] | None:
    if scheme.shardwise:
        return None
    megabytes = model_megabytes * (1 + 1 / scheme.m)
    known = [
        latency.marginal(worker, shards=float(load), megabytes=megabytes) for worker, load in enumerate(scheme.loads)
    ]
    return [part for part in known if part is not None] if all(part is not None for part in known) else None


def _integral(scheme: Scheme, marginals: Sequence[Marginal]) -> float:
    """Returns the mean, the integral of P(T > t) over t >= 0."""

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
    for octave in range(_OCTAVES):  # the octaves of a power-law tail form a geometric series
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
    """Returns the integral by Gauss's rule on equal pieces, which handles the kinks of laws with a least value."""
    edges = np.linspace(low, high, pieces + 1)
    half = np.diff(edges) / 2
    nodes = edges[:-1, None] + half[:, None] * (1 + _NODES)
    return float((f(nodes.ravel()).reshape(nodes.shape) @ _WEIGHTS) @ half)


def _check(n: int, v: int) -> None:
    if not 1 <= v <= n:
        raise InvalidSetting(f"v={v}: of n={n} answers, the one that is waited for is number 1 to {n}.")
