"""Distributions of single latencies, as expected round times need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["Marginal", "continuous", "mixture", "two_speeds"]


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
