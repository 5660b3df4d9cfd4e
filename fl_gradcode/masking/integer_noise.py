"""Discrete Gaussian noise from a key: exact, equal on all holders of a shard, and added to integers before masking.

No probability is ever rounded, so what is known of the ideal mechanism holds for this one. The sampler works on many
numbers at once. Floats settle comparisons of numbers that differ clearly; the others are settled in growing decimal
precision. So the samples are the same on every machine.

References:
    Canonne, Kamath, Steinke, "The discrete Gaussian for differential privacy", NeurIPS 2020 (arXiv 2004.00010),
    algorithms 2 and 3. Their algorithm 1 tosses a coin of probability exp(-gamma) from rational coins; here a uniform
    number of as many bits as it takes is compared with exp(-gamma), which is as exact and several times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .streams import counter_mode

__all__ = ["discrete_gaussian"]

# Numbers that are sampled together; part of the definition, because words of the stream are used in this order.
_CHUNK = 1 << 15
# A comparison is settled by floats if the numbers differ by more than this, far above any rounding error.
_CLOSE = 2.0**-32
_WORD = 2**64

Exact = Callable[[int], Fraction]


class _Words:
    """The words of a key's stream, 64 bits each."""

    def __init__(self, key: bytes) -> None:
        self._next = counter_mode(key).update

    def take(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(self._next(bytes(8 * count)), "<u8")


def discrete_gaussian(key: bytes, sigma: float, size: int) -> NDArray[np.int64]:
    """Returns whole numbers x with probability proportional to exp(-x^2 / (2 sigma^2)), shape (size,).

    Args:
        key: 32 bytes, used for this noise alone.
        sigma: Parameter of the law, 2^-4..2^30. The variance is sigma^2 up to a difference that is below 1e-7 from
            sigma = 1 on; below that it is smaller.
        size: Number of samples.
    """
    if not 2.0**-4 <= sigma <= 2.0**30:
        raise ValueError(f"sigma={sigma!r} must be in 2^-4..2^30.")
    words = _Words(key)
    samples = np.empty(size, np.int64)
    for start in range(0, size, _CHUNK):
        samples[start : start + _CHUNK] = _gaussian(words, sigma, min(_CHUNK, size - start))
    return samples


def _gaussian(words: _Words, sigma: float, size: int) -> NDArray[np.int64]:
    """Algorithm 3: a discrete Laplace number of scale t is kept with probability exp(-(|y| - s^2 / t)^2 / (2 s^2))."""
    t = math.floor(sigma) + 1
    variance = Fraction(sigma) ** 2
    samples, pending = np.empty(size, np.int64), np.arange(size)
    while pending.size:
        y = _laplace(words, t, pending.size)
        gamma = (np.abs(y) - float(variance / t)) ** 2 / (2 * float(variance))

        def exact(i: int, y: NDArray[np.int64] = y) -> Fraction:
            return (abs(int(y[i])) - variance / t) ** 2 / (2 * variance)

        kept = _exp_coin(words, gamma, exact)
        samples[pending[kept]] = y[kept]
        pending = pending[~kept]
    return samples


def _laplace(words: _Words, t: int, size: int) -> NDArray[np.int64]:
    """Algorithm 2: numbers x with probability proportional to exp(-|x| / t)."""
    samples, pending = np.empty(size, np.int64), np.arange(size)
    while pending.size:
        u = _uniform(words, t, pending.size)

        def exact(i: int, u: NDArray[np.int64] = u) -> Fraction:
            return Fraction(int(u[i]), t)

        good = np.flatnonzero(_exp_coin(words, u / t, exact))
        times = np.zeros(good.size, np.int64)
        going = np.arange(good.size)
        while going.size:
            going = going[_exp_coin(words, np.ones(going.size), lambda i: Fraction(1))]
            times[going] += 1
        x = u[good] + t * times
        negative = words.take(good.size) >> np.uint64(63) == 1
        kept = ~(negative & (x == 0))  # or 0 would be twice as likely
        samples[pending[good[kept]]] = np.where(negative, -x, x)[kept]
        left = np.ones(pending.size, bool)
        left[good[kept]] = False
        pending = pending[left]
    return samples


def _uniform(words: _Words, t: int, size: int) -> NDArray[np.int64]:
    """Returns uniform numbers of 0..t - 1. Words above the largest multiple of t are not used."""
    most = np.uint64(_WORD // t * t - 1)
    drawn = words.take(size).copy()
    while (over := np.flatnonzero(drawn > most)).size:
        drawn[over] = words.take(over.size)
    return (drawn % np.uint64(t)).astype(np.int64)


def _exp_coin(words: _Words, gamma: NDArray[np.float64], exact: Exact) -> NDArray[np.bool_]:
    """Returns True with probability exp(-gamma), for each gamma >= 0.

    Args:
        words: The stream.
        gamma: The exponents, close to their exact values.
        exact: Gives the exact value of an exponent by its position.
    """
    drawn = words.take(gamma.size)
    uniform, probability = drawn * 2.0**-64, np.exp(-gamma)
    result = uniform < probability
    for i in np.flatnonzero(np.abs(uniform - probability) < _CLOSE).tolist():
        result[i] = _below_exp(words, int(drawn[i]), exact(i))
    return result


def _below_exp(words: _Words, drawn: int, gamma: Fraction) -> bool:
    """Returns whether a uniform number, whose first 64 bits are drawn, is below exp(-gamma)."""
    if gamma == 0:
        return True
    bits = 64
    while True:
        digits = bits // 3 + 20
        context = Context(prec=digits)
        power = context.exp(-context.divide(Decimal(gamma.numerator), Decimal(gamma.denominator)))
        # Decimal's exp is correctly rounded, and that of gamma changes it by less than this.
        error = Fraction(10) ** (8 - digits) * (1 + gamma)
        lower, upper = Fraction(drawn, 2**bits), Fraction(drawn + 1, 2**bits)
        if upper <= Fraction(power) - error:
            return True
        if lower >= Fraction(power) + error:
            return False
        drawn, bits = drawn << 64 | int(words.take(1)[0]), bits + 64
