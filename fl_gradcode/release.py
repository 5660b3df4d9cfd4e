"""Noise on what is decoded: drawn once by `CentralNoise`, or by each holder for itself and amplified."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .gradient_code import GradientCode
from .prime_field import PrimeField
from .privacy_settings import CentralNoise

__all__ = ["CentralRelease", "amplification"]

_SETS = 100  # of survivors that are tried


class CentralRelease:
    """One noisy sum.

    Args:
        privacy: Noise and bound.
        code: For what quantisation adds to the bound.
        shards: How many are summed: the public weight of the mean.
        charge: Called before noise is drawn.
    """

    def __init__(self, privacy: CentralNoise, code: GradientCode, shards: int, charge: Callable[[], None]) -> None:
        self.weight = float(shards)
        self._privacy, self._charge = privacy, charge
        self._rounding = code.numbers.rounding(1) if isinstance(code.numbers, PrimeField) else 0.0

    def noisy(self, total: NDArray[np.floating]) -> NDArray[np.float64]:
        """The decoded sum of clipped updates with one Gaussian draw, from a key of the operating system's generator."""
        from .keyed import KeyedStream  # torch and cryptography: an extra, which most servers do without

        self._charge()
        sensitivity = self._privacy.clipping_norm + self._rounding * np.sqrt(total.size)
        noise = KeyedStream(os.urandom(32)).normal(total.size)
        return np.asarray(total + self._privacy.noise_multiplier * sensitivity * noise, np.float64)


def amplification(code: GradientCode) -> tuple[float, float]:
    """By how much decoding multiplies the variance of noise that each holder draws for itself: least and most, over
    survivor sets of size n - s (at most 100 of them, drawn with a fixed seed).

    With shared noise it is 1, whoever answers.
    """
    rng = np.random.default_rng(0)
    sets = [rng.choice(code.n, code.n - code.s, replace=False).tolist() for _ in range(_SETS)]
    squares = [code.kappa(one) ** 2 for one in sets if code.decodable(one)] or [float("nan")]
    return min(squares), max(squares)
