"""Codes over a cyclic assignment, in which worker i holds s + 1 consecutive shards.

They are baselines for comparison. docs/choosing-a-code.md says what to use instead.
"""

from __future__ import annotations

import warnings

import numpy as np

from ..errors import InvalidCode
from ._validation import check_count, check_tolerance
from .gradient_code import GradientCode

__all__ = ["cyclic_mds", "cyclic_repetition", "vandermonde"]

# Up to these n, any s consecutive workers may straggle, and the decoding error stays at a safe distance from the limit
# of an exact sum, since it depends on the machine's arithmetic. For larger n, powers and consecutive roots of unity
# lose too many digits.
_FEW_POWERS = 16
_FEW_ROOTS = 19


def cyclic_repetition(n: int, s: int, *, rng: np.random.Generator) -> GradientCode:
    """Returns a cyclic repetition code, in which worker i holds shards i, ..., i + s (mod n).

    The coefficients are random, and any n - s replies decode with probability 1. Coefficients of both signs amplify
    rounding errors by `kappa`. The code is a baseline: fractional repetition decodes earlier and does not amplify
    errors. For n of several hundred, kappa can exceed the precision of float64, and decoding then needs more than n - s
    replies.

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
    """Returns a cyclic MDS code, in which worker i holds shards i - s, ..., i (mod n).

    The coefficients come from consecutive roots of unity, so the code is deterministic. Its condition number grows
    exponentially in n, which makes it a baseline. From n = 20 on, a warning is issued.

    Raises:
        InvalidCode: n - s is even, so that the code would be complex.

    References:
        Raviv, Tamo, Tandon, Dimakis, "Gradient coding from cyclic MDS codes and expander graphs", 2017.
    """
    n, s = check_count(n, "n"), check_tolerance(s, n)
    if s and (n - s) % 2 == 0:
        raise InvalidCode(
            f"n - s = {n} - {s} is even, and a cyclic MDS code is real only for odd n - s. Change n or s."
        )
    _warn(n, _FEW_ROOTS, "A cyclic MDS code")
    # s consecutive exponents, centred on n / 2, are closed under conjugation and leave out the root 1.
    first = (n - s + 1) // 2
    column = np.real(np.poly(np.exp(2j * np.pi * np.arange(first, first + s) / n)))
    B = np.zeros((n, n))
    for j in range(n):
        B[(j + np.arange(s + 1)) % n, j] = column
    return GradientCode(B, s, "cyclic MDS")


def vandermonde(n: int, s: int) -> GradientCode:
    """Returns a Reed-Solomon code over the reals at Chebyshev points, in which worker i holds shards i, ..., i + s.

    The code is a baseline, because it is ill-conditioned for large n. From n = 17 on, a warning is issued.
    `reed_solomon`, over a prime field, is exact at any size.

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
            f"{what} with n={n} workers amplifies rounding errors beyond use; it is a baseline for up to {few}. Use "
            "fractional_repetition, for_assignment, or reed_solomon (exact, over a prime field).",
            stacklevel=3,
        )
