"""Laws of random times, which draw a value for each worker and round, and their distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
        cdf: Function x -> P(X <= x), elementwise.
        atoms: All possible values, ascending; None for a continuous law.
        weights: Probabilities of the atoms; None for a continuous law.
    """

    cdf: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    atoms: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None
    _derived: dict[tuple[str, float], Marginal] = field(default_factory=dict, init=False, repr=False, compare=False)

    def times(self, factor: float) -> Marginal:
        """Returns the distribution of `factor` X, for a factor above 0."""
        if self.atoms is not None:  # the atoms are scaled, because x / factor may miss an atom by rounding
            return Marginal.of_values([factor * value for value in self.atoms], self.weights)
        return self._once("times", factor, lambda x: self.cdf(x / factor))

    def plus(self, shift: float) -> Marginal:
        """Returns the distribution of X + `shift`."""
        if self.atoms is not None:
            return Marginal.of_values([shift + value for value in self.atoms], self.weights)
        return self._once("plus", shift, lambda x: self.cdf(x - shift))

    def _once(self, how: str, amount: float, cdf: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Marginal:
        """Returns one object for equal amounts, so that workers that are alike share the distribution."""
        return self._derived.setdefault((how, amount), Marginal(cdf))

    @staticmethod
    def of_values(values: ArrayLike, probabilities: ArrayLike | None = None) -> Marginal:
        """Returns the distribution over finitely many values, which are equally likely by default."""
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
    """Returns the distribution of a frozen continuous distribution from scipy.stats."""
    return Marginal(lambda x: np.asarray(distribution.cdf(x)))


def two_speeds(probability: float, slowdown: float, base: float, jitter: float) -> Marginal:
    """Returns the distribution of `base`, or with this probability of `slowdown * base`, with lognormal jitter."""
    return mixture([(1 - probability, base), (probability, base * slowdown)], jitter)


def mixture(modes: Sequence[tuple[float, float]], sigma: float) -> Marginal:
    """Returns a mixture of lognormal distributions with the given weights and medians.

    A mode is a single point if sigma is 0 or its median is 0 or infinite.
    """
    fixed = [not sigma or median in (0.0, np.inf) for _, median in modes]
    if all(fixed):
        return Marginal.of_values([median for _, median in modes], [weight for weight, _ in modes])
    parts = [
        (weight, Marginal.of_values([median]) if atom else continuous(stats.lognorm(sigma, scale=median)))
        for (weight, median), atom in zip(modes, fixed, strict=True)
    ]
    return Marginal(lambda x: np.asarray(sum(weight * part.cdf(x) for weight, part in parts)))


#: A tick that no round has, used to draw permanent properties of a worker.
_PERMANENT = 2**31


@dataclass(frozen=True)
class Law:
    """A law that draws one random number for each (seed, worker, tick), in seconds or as a factor.

    Attributes:
        name: Name for people.
        draw: Function (seed, worker, tick) -> value of at least 0; `inf` means that no reply comes.
        marginal: Function worker -> the distribution of each of its draws. None if draws of different workers are not
            independent, or if the distribution is not known.
        table: Measured values that the law replays round after round, shape (rounds, workers); None for other laws.
    """

    name: str
    draw: Callable[[int, int, int], float]
    marginal: Callable[[int], Marginal] | None = None
    table: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)


def constant(value: float) -> Law:
    """Returns the law that always draws `value`."""
    _at_least_zero(value=value)
    return Law(f"constant {value:g}", lambda seed, worker, tick: value, lambda worker: Marginal.of_values([value]))


def exponential(mean: float = 1.0) -> Law:
    """Returns the exponential law with this mean, which is memoryless."""
    return shifted_exponential(0.0, mean)


def shifted_exponential(shift: float, mean: float) -> Law:
    """Returns the law of `shift` plus an exponential with mean `mean`, for jobs that take at least `shift`."""
    _at_least_zero(shift=shift, mean=mean)
    name = f"{shift:g} + exponential {mean:g}"
    if not mean:
        return Law(name, lambda seed, worker, tick: shift, lambda worker: Marginal.of_values([shift]))
    return _independent(
        name, lambda rng: shift + mean * rng.standard_exponential(), continuous(stats.expon(shift, mean))
    )


def lognormal(median: float = 1.0, sigma: float = 0.3) -> Law:
    """Returns the lognormal law `median * exp(sigma Z)`; sigma 0.3 is the jitter of a healthy machine."""
    _at_least_zero(median=median, sigma=sigma)
    return _independent(
        f"lognormal {median:g}, {sigma:g}",
        lambda rng: median * math.exp(sigma * rng.standard_normal()),
        mixture([(1.0, median)], sigma),
    )


def pareto(alpha: float, minimum: float = 1.0) -> Law:
    """Returns the Pareto law P(X > x) = (minimum / x)^alpha, which has infinite variance for alpha <= 2."""
    _at_least_zero(minimum=minimum)
    if not alpha > 0:
        raise InvalidSetting(f"alpha={alpha} of a Pareto law must be greater than 0.")
    return _independent(
        f"Pareto {alpha:g}",
        lambda rng: minimum * (1.0 - rng.random()) ** (-1.0 / alpha),
        continuous(stats.pareto(alpha, scale=minimum)) if minimum else Marginal.of_values([0.0]),
    )


def bimodal(probability: float, slowdown: float, *, base: float = 1.0, jitter: float = 0.0) -> Law:
    """Returns the law of `base`, or with this probability `slowdown * base`, independently in each draw.

    With `jitter`, draws are multiplied by a lognormal factor with this sigma.
    """
    _probability(probability=probability)
    _at_least_zero(slowdown=slowdown, base=base, jitter=jitter)

    def draw(rng: np.random.Generator) -> float:
        slow = slowdown if rng.random() < probability else 1.0
        return base * slow * math.exp(jitter * rng.standard_normal())

    return _independent(f"bimodal {probability:g} x{slowdown:g}", draw, two_speeds(probability, slowdown, base, jitter))


def bursty(enter: float, leave: float, slowdown: float, *, base: float = 1.0, jitter: float = 0.0) -> Law:
    """Returns a law with lasting slow periods: a worker becomes slow with probability `enter` a tick.

    It recovers with probability `leave` a tick. The share of slow ticks is enter / (enter + leave), which is also the
    probability of being slow at tick 0. A round has two ticks, training and evaluation.
    """
    _probability(enter=enter, leave=leave)
    _at_least_zero(slowdown=slowdown, base=base, jitter=jitter)
    stationary = enter / (enter + leave) if enter + leave else 0.0

    @cache
    def spells(seed: int, worker: int, block: int) -> tuple[bool, ...]:
        """Returns whether the worker is slow, for the 256 ticks of one block, which continues the block before."""
        uniform = np.random.default_rng((seed, worker, block, 1)).random(256)
        slow = spells(seed, worker, block - 1)[-1] if block else None
        states = []
        for u in uniform:
            slow = bool(u < stationary) if slow is None else bool(u >= leave if slow else u < enter)
            states.append(slow)
        return tuple(states)

    def draw(seed: int, worker: int, tick: int) -> float:
        for block in range(tick // 256):  # filling the cache in order avoids deep recursion
            spells(seed, worker, block)
        slow = spells(seed, worker, tick // 256)[tick % 256]
        noise = math.exp(jitter * _rng(seed, worker, tick).standard_normal()) if jitter else 1.0
        return base * (slowdown if slow else 1.0) * noise

    marginal = two_speeds(stationary, slowdown, base, jitter)
    return Law(f"bursty {enter:g}/{leave:g} x{slowdown:g}", draw, lambda worker: marginal)


def poisson_stragglers(n: int, expected: float, slowdown: float, *, base: float = 1.0) -> Law:
    """Returns a law in which, at each tick, a Poisson number of the n workers takes `slowdown * base`.

    The number is capped at n, and the slow workers are chosen uniformly. Workers are not independent, because the
    number of slow workers is common to all.
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
    """Returns a law with the given quantiles, between which log X is linear in log(1 / (1 - p)).

    Power-law tails are straight lines in these coordinates. Draws beyond the last quantile take its value.

    Args:
        probabilities: Probabilities of the quantiles, ascending from 0, each below 1.
        values: The quantiles, ascending and positive.
        name: Name for people.
    """
    p, x = np.asarray(probabilities, float), np.asarray(values, float)
    if p.shape != x.shape or p.ndim != 1 or len(p) < 2:
        raise InvalidSetting(
            f"Quantiles need as many values as probabilities, at least 2; not {x.shape} and {p.shape}."
        )
    if p[0] != 0 or not (np.diff(p) > 0).all() or not p[-1] < 1:
        raise InvalidSetting(f"The probabilities of quantiles must ascend from 0 and stay below 1, not {p.tolist()}.")
    if not x[0] > 0 or not (np.diff(x) > 0).all():
        raise InvalidSetting(f"Quantiles must be positive and ascending, not {x.tolist()}.")
    depth, logs = -np.log1p(-p), np.log(x)

    def cdf(at: NDArray[np.float64]) -> NDArray[np.float64]:
        inside = -np.expm1(-np.interp(np.log(np.maximum(at, x[0])), logs, depth))
        return np.where(at < x[0], 0.0, np.where(at >= x[-1], 1.0, inside))

    return _independent(
        name, lambda rng: math.exp(float(np.interp(-math.log1p(-rng.random()), depth, logs))), Marginal(cdf)
    )


def device_classes(slowness: ArrayLike, *, name: str = "device classes") -> Law:
    """Returns a law in which each worker permanently is one device, drawn uniformly from a table.

    Args:
        slowness: Slowness of each device, as factors or seconds.
        name: Name for people.
    """
    table = np.asarray(slowness, dtype=np.float64).ravel()
    if not table.size or not (np.isfinite(table) & (table > 0)).all():
        raise InvalidSetting(f"{name} need at least one device, each with a finite slowness above 0.")
    marginal = Marginal.of_values(table)

    @cache
    def device(seed: int, worker: int) -> float:
        return float(table[_rng(seed, worker, _PERMANENT).integers(len(table))])

    return Law(name, lambda seed, worker, tick: device(seed, worker), lambda worker: marginal)


def scaled(law: Law, factors: Mapping[int, float] | Sequence[float]) -> Law:
    """Returns the law multiplied by a factor for some workers.

    For example, `scaled(lognormal(), {0: 10, 1: 10})` makes two workers permanently slow. A worker with factor infinity
    never answers.
    """
    table = dict(factors) if isinstance(factors, Mapping) else dict(enumerate(factors))
    _at_least_zero(**{f"factor of worker {worker}": factor for worker, factor in table.items()})

    def draw(seed: int, worker: int, tick: int) -> float:
        factor = table.get(worker, 1.0)
        return factor if factor == math.inf else law.draw(seed, worker, tick) * factor

    unscaled = law.marginal
    if unscaled is None:
        measured = law.table
        if measured is not None:
            each = np.array([table.get(worker, 1.0) for worker in range(measured.shape[1])])
            measured = np.where(np.isinf(each), each, measured * np.where(np.isinf(each), 1.0, each))
        return Law(f"{law.name}, scaled", draw, table=measured)

    def marginal(worker: int) -> Marginal:
        factor = table.get(worker, 1.0)
        return Marginal.of_values([factor]) if factor in (0.0, math.inf) else unscaled(worker).times(factor)

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
