"""Codes over a cyclic assignment, in which worker i holds s + 1 consecutive shards.

They are kept for comparison. docs/choosing-a-code.md says what to use instead.
"""

from __future__ import annotations

import warnings

import numpy as np

from ..errors import InvalidCode
from ._validation import check_count, check_tolerance
from .gradient_code import GradientCode

__all__ = ["cyclic_mds", "cyclic_repetition", "vandermonde"]

# Up to these n, every row of s neighbours may straggle, with a fifth of the tolerance of an exact sum to spare: what is
# left over depends on the machine's arithmetic. Beyond, powers and consecutive roots of unity lose too many digits.
_FEW_POWERS = 16
_FEW_ROOTS = 19


def cyclic_repetition(n: int, s: int, *, rng: np.random.Generator) -> GradientCode:
    """Cyclic repetition: worker i holds the s + 1 shards i, ..., i + s (mod n) and combines them at random.

    Any n - s replies decode, with probability 1 over `rng`. Real coefficients amplify rounding: see `kappa`.
    It exists for comparison; fractional repetition decodes earlier and never amplifies. For n of several
    hundred, kappa can exceed what float64 carries: the code then asks for more than n - s replies.

    References:
        Tandon, Lei, Dimakis, Karampatziakis, "Gradient coding", 2017, algorithm 2.
    """
    n, s = check_count(n, "n"), check_tolerance(s, n)
    H = rng.standard_normal((s, n))
    if s:
        H[:, -1] = -H[:, :-1].sum(axis=1)  # H 1 = 0: the vector of ones lies in the span of the rows
    B = np.zeros((n, n))
    for i in range(n):
        others = [(i + t) % n for t in range(1, s + 1)]
        B[i, i] = 1.0
        B[i, others] = -np.linalg.solve(H[:, others], H[:, i])
    return GradientCode(B, s, "cyclic repetition")


def cyclic_mds(n: int, s: int) -> GradientCode:
    """Cyclic MDS code: worker i holds shards i - s, ..., i (mod n); coefficients from consecutive roots of unity.

    A baseline: deterministic, and exponentially ill-conditioned as n grows. Warns from n = 20 on.

    Raises:
        InvalidCode: n - s is even: the code is then complex.

    References:
        Raviv, Tamo, Tandon, Dimakis, "Gradient coding from cyclic MDS codes and expander graphs", 2017.
    """
    n, s = check_count(n, "n"), check_tolerance(s, n)
    if s and (n - s) % 2 == 0:
        raise InvalidCode(
            f"n - s = {n} - {s} is even, and a cyclic MDS code is real only for odd n - s. Change n or s."
        )
    _warn(n, _FEW_ROOTS, "A cyclic MDS code")
    # s consecutive exponents, centred on n / 2: closed under conjugation, and without 0, the root 1.
    first = (n - s + 1) // 2
    column = np.real(np.poly(np.exp(2j * np.pi * np.arange(first, first + s) / n)))
    B = np.zeros((n, n))
    for j in range(n):
        B[(j + np.arange(s + 1)) % n, j] = column
    return GradientCode(B, s, "cyclic MDS")


def vandermonde(n: int, s: int) -> GradientCode:
    """The Reed-Solomon code over the reals, at Chebyshev points: a baseline. `reed_solomon` is exact at any size.

    Worker i holds shards i, ..., i + s (mod n). Warns from n = 17 on.

    References:
        Halbawi, Azizan, Salehi, Hassibi, "Improving distributed gradient descent using Reed-Solomon codes", 2017.
    """
    n, s = check_count(n, "n"), check_tolerance(s, n)
    _warn(n, _FEW_POWERS, "A Vandermonde code over the reals")
    points = np.cos(np.pi * (2 * np.arange(n) + 1) / (2 * n))
    B = np.zeros((n, n))
    for j in range(n):
        holders = (j - np.arange(s + 1)) % n
        apart = points[holders][:, None] - points[holders]
        np.fill_diagonal(apart, 1.0)
        B[holders, j] = 1 / apart.prod(axis=1)
    return GradientCode(B / np.linalg.norm(B, axis=1, keepdims=True), s, "real Vandermonde")


def _warn(n: int, few: int, what: str) -> None:
    if n > few:
        warnings.warn(
            f"{what} with n={n} workers amplifies rounding beyond use; it is a baseline for up to {few}. Take "
            "fractional_repetition, for_assignment, or reed_solomon (exact, over a prime field).",
            stacklevel=3,
        )
