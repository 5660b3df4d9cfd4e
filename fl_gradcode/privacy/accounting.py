"""The accountant: epsilon of noisy steps, and the noise that a wanted epsilon takes.

The accountants are Opacus' own. Its `gdp` is not offered: it approximates from below (3.67 where the truth is 5.00).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import InvalidSetting

__all__ = ["ACCOUNTANTS", "Spend", "composed", "epsilon_of", "noise_multiplier_for"]

ACCOUNTANTS = ("prv", "rdp")

# Beyond, the numerical accountant needs minutes and gigabytes to tell one useless epsilon from another.
_USELESS = 100.0
_MOST_STEPS = 1_000_000
# Outside, the accountants divide by zero, overflow or never end. Less noise is none; more counts as this much.
_LEAST_COUNTED, _MOST_COUNTED = 1e-9, 1e4
# No run gets there, and floats do not hold all whole numbers beyond.
_ENDLESS = 10**15


@dataclass(frozen=True, order=True)
class Spend:
    """Steps of the Poisson-subsampled Gaussian mechanism on one shard.

    Attributes:
        noise_multiplier: Standard deviation of the noise over what one record can change.
        sample_rate: Probability of each record to be in a batch; 1: no subsampling.
        steps: Number of steps.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def composed(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """Returns the same steps sorted, with equal mechanisms added up: equal histories become equal values."""
    steps: dict[tuple[float, float], int] = {}
    for one in spends:
        mechanism = (float(one.noise_multiplier), float(one.sample_rate))
        steps[mechanism] = steps.get(mechanism, 0) + one.steps
    return tuple(sorted(Spend(*mechanism, count) for mechanism, count in steps.items() if count))


def epsilon_of(spends: Iterable[Spend], delta: float, *, accountant: str = "prv") -> float:
    """Returns an upper bound of epsilon for all steps together, for adding or removing one record.

    Args:
        spends: Steps in any order.
        delta: Probability that the bound does not cover.
        accountant: "prv": tight to 0.01 (Gopi, Lee, Wutschitz, "Numerical composition of differential privacy", 2021),
            0.1 to 2 s; "rdp": 5 to 40 % more (Mironov, "Renyi differential privacy", 2017). Where "prv" fails, above
            100 and beyond a million steps, "rdp" is used.

    Returns:
        0 for no steps, infinity for steps without noise.

    Raises:
        InvalidSetting: The accountant is unknown, or delta is outside 0..1.
    """
    if accountant not in ACCOUNTANTS:
        raise InvalidSetting(f"accountant={accountant!r} must be one of {', '.join(ACCOUNTANTS)}.")
    if not 0 < delta < 1:
        raise InvalidSetting(f"delta={delta} must lie between 0 and 1, and below 1 over the number of records.")
    return _epsilon(composed(one for one in spends if one.sample_rate > 0), float(delta), accountant)


def noise_multiplier_for(
    epsilon: float, delta: float, *, sample_rate: float, steps: int, accountant: str = "prv"
) -> float:
    """Returns the smallest noise multiplier with which `steps` steps cost at most `epsilon`, to 0.1 %.

    It takes 1 to 20 seconds.

    Raises:
        InvalidSetting: No multiplier up to 10000 does, or a value makes no sense.
    """
    if not (0 < epsilon < _USELESS):
        raise InvalidSetting(f"epsilon={epsilon} must lie between 0 and {_USELESS:g}.")
    if not 0 < sample_rate <= 1:
        raise InvalidSetting(f"sample_rate={sample_rate} must be above 0 and at most 1.")
    if steps < 1:
        raise InvalidSetting(f"steps={steps} must be at least 1.")

    def cost(noise: float) -> float:
        return epsilon_of([Spend(noise, sample_rate, steps)], delta, accountant=accountant)

    if cost(_MOST_COUNTED) > epsilon:
        raise InvalidSetting(
            f"No noise multiplier up to {_MOST_COUNTED:g} brings {steps} steps at sample_rate={sample_rate} down to "
            f"epsilon={epsilon} by accountant={accountant!r}: prv is off by up to 0.01, rdp by 0.1. Choose "
            "a larger epsilon."
        )
    high = 1.0
    while cost(high) > epsilon:
        high *= 2
    low = high / 2 if high > 1 else 0.0
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _epsilon(spends: tuple[Spend, ...], delta: float, accountant: str) -> float:
    if not spends:
        return 0.0
    steps = sum(one.steps for one in spends)
    if steps > _ENDLESS or any(one.noise_multiplier < _LEAST_COUNTED for one in spends):
        return math.inf
    bound = _by("rdp", spends, delta)
    if accountant == "rdp" or not bound <= _USELESS or steps > _MOST_STEPS:
        return bound
    try:
        tight = _by("prv", spends, delta)
    except (ArithmeticError, ValueError, RuntimeError, MemoryError):
        return bound
    return min(tight, bound) if math.isfinite(tight) else bound


def _by(mechanism: str, spends: tuple[Spend, ...], delta: float) -> float:
    from ._opacus import create_accountant  # imports Opacus, which takes seconds

    accountant = create_accountant(mechanism=mechanism)
    accountant.history = [(min(one.noise_multiplier, _MOST_COUNTED), one.sample_rate, one.steps) for one in spends]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of orders at the end of its list: the bound holds all the same
        return float(accountant.get_epsilon(delta=delta))
