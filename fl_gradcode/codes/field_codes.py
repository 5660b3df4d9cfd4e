"""Reed-Solomon codes over a prime field, which are deterministic, have a closed form, and are exact for any n and s."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidCode
from ._points import points
from ._validation import as_pattern, check_count, check_holders, check_tolerance
from .gradient_code import GradientCode
from .prime_field import P, PrimeField, inverse

__all__ = ["reed_solomon"]


def reed_solomon(
    n: int,
    s: int,
    *,
    k: int | None = None,
    m: int = 1,
    assignment: ArrayLike | None = None,
    fraction_bits: int = 16,
) -> GradientCode:
    """Returns a Reed-Solomon code over the field of 2^31 - 1 elements, for which any n - s replies decode exactly.

    Updates are rounded once to fixed point (see `PrimeField`), each shard by at most 2^-(fraction_bits + 1). Coding
    adds no further error. All holders of a shard must compute equal numbers: a difference of one bit makes the decoded
    entry meaningless.

    Args:
        n: Number of workers.
        s: Straggler tolerance.
        k: Number of shards; n by default. Without an `assignment`, each shard is held by s + m consecutive workers.
            With k = n, worker i holds shards i, ..., i + s + m - 1 (mod n).
        m: Upload reduction.
        assignment: The assignment, in the same form as for `for_assignment`; every shard needs at least s + m holders.
        fraction_bits: Number of fraction bits. The sum of the shards' largest entries must stay below
            2^(30 - fraction_bits), which is 16,384 by default.

    Raises:
        InvalidCode: A shard has fewer than s + m holders, or an argument is invalid.

    References:
        Halbawi et al. 2017 for m = 1 (here in divided differences, over a prime field, and at fixed points without a
        pattern: see `_points`); the universal construction of Jahani-Nezhad and Maddah-Ali 2021 (arXiv 2103.01589),
        with a Vandermonde matrix, for any assignment.
    """
    n, s, m = check_count(n, "n"), check_tolerance(s, n), check_count(m, "m")
    if s + m > n:
        raise InvalidCode(f"s={s} stragglers at m={m} need {s + m} holders of each shard; there are n={n} workers.")
    if assignment is None:
        shards = n if k is None else check_count(k, "k")
        held = np.zeros((n, shards), bool)
        for j in range(shards):
            last = j if shards == n else (j + 1) * (s + m) - 1
            held[(last - np.arange(s + m)) % n, j] = True
    else:
        held = as_pattern(assignment)
        if held.shape[0] != n or (k is not None and held.shape[1] != k):
            wanted = f"({n}, {'k' if k is None else k})"
            raise InvalidCode(f"The assignment is of shape {held.shape}; n and k ask for {wanted}.")
    check_holders([np.flatnonzero(column).tolist() for column in held.T], s, m)
    B, x = np.zeros((n, held.shape[1], m), np.int64), points(n)
    for j, column in enumerate(held.T):
        B[column, j] = _coefficients(x[column], s + m, m)
    return GradientCode(B, s, "Reed-Solomon", numbers=PrimeField(fraction_bits))


def _coefficients(x: NDArray[np.int64], rho: int, m: int) -> NDArray[np.int64]:
    """Returns beta with `C beta^(l) = e_l`, where C contains the powers rho - 1..0 of the points; shape (holders, m).

    For rho holders, beta contains the leading coefficients of their Lagrange polynomials. For more holders, it is a
    weighted mean over all windows of rho consecutive holders, so that every holder gets a coefficient. The weights have
    no pattern either: equal ones would give holders shares such as 1/2.
    """
    base = int(points(1)[0])  # its powers repeat after 357,913,941, and their sums are not 0 before that
    weights = [pow(base, t, P) for t in range(len(x) - rho + 1)]
    beta = np.zeros((len(x), m), np.int64)
    for first, weight in enumerate(weights):
        beta[first : first + rho] += _leading(x[first : first + rho], m) * weight % P
    return beta % P * pow(sum(weights), P - 2, P) % P


def _leading(x: NDArray[np.int64], m: int) -> NDArray[np.int64]:
    """Returns the m leading coefficients of each point's Lagrange polynomial, shape (rho, m)."""
    rho = len(x)
    scale = np.ones(rho, np.int64)
    whole = np.zeros(m, np.int64)  # leading coefficients of prod (x - point), highest first
    whole[0] = 1
    for t in x:
        apart = x - t
        apart[apart == 0] = 1
        scale = scale * (apart % P) % P
        whole[1:] = (whole[1:] - t * whole[:-1]) % P
    columns = np.ones((rho, m), np.int64)
    for column in range(1, m):  # divide by (x - point)
        columns[:, column] = (whole[column] + x * columns[:, column - 1]) % P
    return columns * inverse(scale)[:, None] % P
