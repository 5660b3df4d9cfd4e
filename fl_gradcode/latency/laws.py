"""Laws of random times: what is drawn for a worker and round, and the distribution it is drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..errors import InvalidSetting

__all__ = [
    "Law",
    "Marginal",
    "bimodal",
    "bursty",
    "constant",
    "continuous",
    "device_classes",
    "exponential",
    "from_quantiles",
    "lognormal",
    "mixture",
    "pareto",
    "poisson_stragglers",
    "scaled",
    "shifted_exponential",
    "two_speeds",
]


@dataclass(frozen=True)
class Marginal:
    """The distribution of one draw.

    Attributes:
        cdf: x -> P(X <= x), elementwise.
        atoms: All values there are, ascending, if they are finitely many; None for a continuous law.
        weights: Their probabilities.
    """

    cdf: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    atoms: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None

    def times(self, factor: float) -> Marginal:
        """The distribution of `factor` X, factor > 0."""
        if self.atoms is not None:  # anew: x / factor may miss an atom by rounding
            return Marginal.of_values([factor * value for value in self.atoms], self.weights)
        return Marginal(lambda x: self.cdf(x / factor))

    def plus(self, shift: float) -> Marginal:
        """The distribution of X + `shift`."""
        if self.atoms is not None:
            return Marginal.of_values([shift + value for value in self.atoms], self.weights)
        return Marginal(lambda x: self.cdf(x - shift))

    @staticmethod
    def of_values(values: ArrayLike, probabilities: ArrayLike | None = None) -> Marginal:
        """Finitely many values, equally likely unless said otherwise."""
        given = np.asarray(values, dtype=np.float64).ravel()
        each = np.full(len(given), 1 / len(given)) if probabilities is None else np.asarray(probabilities, float)
        points, place = np.unique(given, return_inverse=True)
        weights = np.bincount(place, weights=each, minlength=len(points))
        cumulative = np.concatenate([[0.0], np.cumsum(weights)])
        cumulative[-1] = 1.0
        return Marginal(
            lambda x: cumulative[np.searchsorted(points, x, side="right")],
            tuple(points.tolist()),
            tuple(weights.tolist()),
        )


def continuous(distribution: Any) -> Marginal:
    """A frozen distribution of scipy.stats."""
    return Marginal(lambda x: np.asarray(distribution.cdf(x)))


def two_speeds(probability: float, slowdown: float, base: float, jitter: float) -> Marginal:
    """`base`, or with this probability `slowdown` times that, with lognormal jitter."""
    return mixture([(1 - probability, base), (probability, base * slowdown)], jitter)


def mixture(modes: Sequence[tuple[float, float]], sigma: float) -> Marginal:
    """Lognormals with these weights and medians, or just the medians if sigma is 0, or they are 0 or infinite."""
    fixed = [not sigma or median in (0.0, np.inf) for _, median in modes]
    if all(fixed):
        return Marginal.of_values([median for _, median in modes], [weight for weight, _ in modes])
    parts = [
        (weight, Marginal.of_values([median]) if atom else continuous(stats.lognorm(sigma, scale=median)))
        for (weight, median), atom in zip(modes, fixed, strict=True)
    ]
    return Marginal(lambda x: np.asarray(sum(weight * part.cdf(x) for weight, part in parts)))


#: A tick that no round has: what a worker draws once and for all.
_FOR_GOOD = 2**31


@dataclass(frozen=True)
class Law:
    """One random number for each (seed, worker, tick), in seconds or as a factor.

    Attributes:
        name: For people.
        draw: (seed, worker, tick) -> value of at least 0; `inf` means never.
        marginal: worker -> the distribution of each of its draws, if draws of different workers are independent; None
            where they are not, or where it is not known.
    """

    name: str
    draw: Callable[[int, int, int], float]
    marginal: Callable[[int], Marginal] | None = None


def constant(value: float) -> Law:
    """Always `value`."""
    _at_least_zero(value=value)
    return Law(f"constant {value:g}", lambda seed, worker, tick: value, lambda worker: Marginal.of_values([value]))


def exponential(mean: float = 1.0) -> Law:
    """Exponential with this mean: memoryless."""
    return shifted_exponential(0.0, mean)


def shifted_exponential(shift: float, mean: float) -> Law:
    """`shift` plus an exponential with mean `mean`: a job that takes at least so long."""
    _at_least_zero(shift=shift, mean=mean)
    name = f"{shift:g} + exponential {mean:g}"
    if not mean:
        return Law(name, lambda seed, worker, tick: shift, lambda worker: Marginal.of_values([shift]))
    return _independent(
        name, lambda rng: shift + mean * rng.standard_exponential(), continuous(stats.expon(shift, mean))
    )


def lognormal(median: float = 1.0, sigma: float = 0.3) -> Law:
    """Lognormal: `median * exp(sigma Z)`; sigma 0.3 is the jitter of a healthy machine."""
    _at_least_zero(median=median, sigma=sigma)
    return _independent(
        f"lognormal {median:g}, {sigma:g}",
        lambda rng: median * math.exp(sigma * rng.standard_normal()),
        mixture([(1.0, median)], sigma),
    )


def pareto(alpha: float, minimum: float = 1.0) -> Law:
    """Pareto: P(X > x) = (minimum / x)^alpha; infinite variance for alpha <= 2."""
    _at_least_zero(minimum=minimum)
    if not alpha > 0:
        raise InvalidSetting(f"alpha={alpha} of a Pareto law must be greater than 0.")
    return _independent(
        f"Pareto {alpha:g}",
        lambda rng: minimum * (1.0 - rng.random()) ** (-1.0 / alpha),
        continuous(stats.pareto(alpha, scale=minimum)) if minimum else Marginal.of_values([0.0]),
    )


def bimodal(probability: float, slowdown: float, *, base: float = 1.0, jitter: float = 0.0) -> Law:
    """`base`, and `slowdown` times that with this probability, anew each time; optional lognormal jitter."""
    _probability(probability=probability)
    _at_least_zero(slowdown=slowdown, base=base, jitter=jitter)

    def draw(rng: np.random.Generator) -> float:
        slow = slowdown if rng.random() < probability else 1.0
        return base * slow * math.exp(jitter * rng.standard_normal())

    return _independent(f"bimodal {probability:g} x{slowdown:g}", draw, two_speeds(probability, slowdown, base, jitter))


def bursty(enter: float, leave: float, slowdown: float, *, base: float = 1.0, jitter: float = 0.0) -> Law:
    """A worker turns slow with probability `enter` per tick and recovers with `leave`: slow spells that last.

    The share of slow ticks is enter / (enter + leave), which is also the chance to be slow at tick 0. A round is two
    ticks, training and evaluation.
    """
    _probability(enter=enter, leave=leave)
    _at_least_zero(slowdown=slowdown, base=base, jitter=jitter)
    stationary = enter / (enter + leave) if enter + leave else 0.0

    @cache
    def spells(seed: int, worker: int, block: int) -> tuple[bool, ...]:
        """Whether slow, for the 256 ticks of one block; each block starts where the one before ended."""
        uniform = np.random.default_rng((seed, worker, block, 1)).random(256)
        slow = spells(seed, worker, block - 1)[-1] if block else None
        states = []
        for u in uniform:
            slow = bool(u < stationary) if slow is None else bool(u >= leave if slow else u < enter)
            states.append(slow)
        return tuple(states)

    def draw(seed: int, worker: int, tick: int) -> float:
        for block in range(tick // 256):  # fills the cache in order: no deep recursion
            spells(seed, worker, block)
        slow = spells(seed, worker, tick // 256)[tick % 256]
        noise = math.exp(jitter * _rng(seed, worker, tick).standard_normal()) if jitter else 1.0
        return base * (slowdown if slow else 1.0) * noise

    marginal = two_speeds(stationary, slowdown, base, jitter)
    return Law(f"bursty {enter:g}/{leave:g} x{slowdown:g}", draw, lambda worker: marginal)


def poisson_stragglers(n: int, expected: float, slowdown: float, *, base: float = 1.0) -> Law:
    """At each tick a Poisson number of the n workers, any of them, takes `slowdown` times `base`; more than n are n.

    Which workers straggle is drawn evenly. Workers are not independent here: how many straggle is common to all.
    """
    if n < 1:
        raise InvalidSetting(f"n={n} of a latency law must be at least 1.")
    _at_least_zero(expected=expected, slowdown=slowdown, base=base)

    @cache
    def slow_ones(seed: int, tick: int) -> frozenset[int]:
        rng = _rng(seed, n, tick)
        return frozenset(rng.permutation(n)[: rng.poisson(expected)].tolist())

    return Law(
        f"Poisson({expected:g}) of {n} x{slowdown:g}",
        lambda seed, worker, tick: base * (slowdown if worker in slow_ones(seed, tick) else 1.0),
    )


def from_quantiles(probabilities: Sequence[float], values: Sequence[float], *, name: str = "quantiles") -> Law:
    """A law known by some of its quantiles: between them, log X is linear in log(1 / (1 - p)).

    Power-law tails are straight lines in these coordinates. Draws beyond the last quantile take its value.

    Args:
        probabilities: Ascending, from 0; each below 1.
        values: The quantiles, ascending and positive.
        name: For people.
    """
    p, x = np.asarray(probabilities, float), np.asarray(values, float)
    if p.shape != x.shape or p.ndim != 1 or len(p) < 2:
        raise InvalidSetting(
            f"Quantiles need as many values as probabilities, at least 2; not {x.shape} and {p.shape}."
        )
    if p[0] != 0 or not (np.diff(p) > 0).all() or not p[-1] < 1:
        raise InvalidSetting(f"The probabilities of quantiles ascend from 0 and stay below 1; not {p.tolist()}.")
    if not x[0] > 0 or not (np.diff(x) > 0).all():
        raise InvalidSetting(f"Quantiles are positive and ascend; not {x.tolist()}.")
    depth, logs = -np.log1p(-p), np.log(x)

    def cdf(at: NDArray[np.float64]) -> NDArray[np.float64]:
        inside = -np.expm1(-np.interp(np.log(np.maximum(at, x[0])), logs, depth))
        return np.where(at < x[0], 0.0, np.where(at >= x[-1], 1.0, inside))

    return _independent(
        name, lambda rng: math.exp(float(np.interp(-math.log1p(-rng.random()), depth, logs))), Marginal(cdf)
    )


def device_classes(slowness: ArrayLike, *, name: str = "device classes") -> Law:
    """Each worker is one device for good, drawn evenly from a table of how slow devices are (factors, or seconds)."""
    table = np.asarray(slowness, dtype=np.float64).ravel()
    if not table.size or not (np.isfinite(table) & (table > 0)).all():
        raise InvalidSetting(f"{name} need at least one device, each with a finite slowness above 0.")
    marginal = Marginal.of_values(table)
    return Law(
        name,
        lambda seed, worker, tick: float(table[_rng(seed, worker, _FOR_GOOD).integers(len(table))]),
        lambda worker: marginal,
    )


def scaled(law: Law, factors: Mapping[int, float] | Sequence[float]) -> Law:
    """`law`, multiplied for some workers: `scaled(lognormal(), {0: 10, 1: 10})` makes two of them slow for good.

    A factor of infinity makes a worker silent.
    """
    table = dict(factors) if isinstance(factors, Mapping) else dict(enumerate(factors))
    _at_least_zero(**{f"factor of worker {worker}": factor for worker, factor in table.items()})

    def draw(seed: int, worker: int, tick: int) -> float:
        factor = table.get(worker, 1.0)
        return factor if factor == math.inf else law.draw(seed, worker, tick) * factor

    one = law.marginal
    if one is None:
        return Law(f"{law.name}, scaled", draw)

    def marginal(worker: int) -> Marginal:
        factor = table.get(worker, 1.0)
        return Marginal.of_values([factor]) if factor in (0.0, math.inf) else one(worker).times(factor)

    return Law(f"{law.name}, scaled", draw, marginal)


def _independent(name: str, draw: Callable[[np.random.Generator], float], marginal: Marginal) -> Law:
    return Law(name, lambda seed, worker, tick: float(draw(_rng(seed, worker, tick))), lambda worker: marginal)


def _rng(seed: int, worker: int, tick: int) -> np.random.Generator:
    return np.random.default_rng((seed, worker, tick))


def _at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise InvalidSetting(f"{name}={value} of a latency law must be at least 0.")


def _probability(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InvalidSetting(f"{name}={value} of a latency law is a probability: it must lie in 0..1.")
