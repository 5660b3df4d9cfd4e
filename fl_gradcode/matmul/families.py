"""Codes for products A @ B: any k of n answers determine it. Constructors of `ProductCode`.

The papers multiply A^T B; here it is A @ B, so that A's column blocks there are row blocks here.

| code | A in | B in | k | a worker computes |
|---|---|---|---|---|
| `mds_product(n, k)` | k x 1 | whole | k | a k-th |
| `polynomial(n, p, q)` | p x 1 | 1 x q | p q | a (p q)-th |
| `matdot(n, m)` | 1 x m | m x 1 | 2 m - 1 | an m-th; answers as large as the product |
| `entangled(n, p, m, q)` | p x m | m x q | p m q + m - 1 | a (p m q)-th |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..codes import REALS, PrimeField, Reals, check_count
from ..errors import InvalidCode
from .product_code import Evaluation, ProductCode, best_draw, choose, nodes, powers

__all__ = ["entangled", "matdot", "mds_product", "polynomial", "uncoded_product"]

_Numbers = Reals | PrimeField


def uncoded_product(p: int, q: int = 1, *, numbers: _Numbers = REALS) -> ProductCode:
    """No code: each of p q workers has one block of the product, and all are waited for."""
    p, q = check_count(p, "p"), check_count(q, "q")
    dtype = np.int64 if isinstance(numbers, PrimeField) else np.float64
    one = np.eye(p * q, dtype=dtype).reshape(p * q, p, q)
    wanted = np.arange(p * q).reshape(p, q)
    made = Evaluation(one.sum(axis=2)[:, :, None], one.sum(axis=1)[:, None, :], np.eye(p * q, dtype=dtype), wanted)
    return ProductCode("uncoded", "units", made, numbers)


def mds_product(
    n: int, k: int, *, basis: str = "auto", numbers: _Numbers = REALS, rng: np.random.Generator | None = None
) -> ProductCode:
    """A in k row blocks, coded into n; B, a matrix or a vector, goes to every worker as it is.

    Args:
        n, k: Workers, and answers that decode.
        basis: "random" (orthonormal columns, the default), "chebyshev", "roots" or "integers".
        numbers: `REALS`, or a `PrimeField`, over which the nodes are 1..n and nothing is rounded.
        rng: Of the random basis; by default seeded with 0.

    References:
        Lee, Lam, Pedarsani, Papailiopoulos, Ramchandran, "Speeding up distributed machine learning using codes", 2018.
    """
    return _polynomial("MDS", n, check_count(k, "k"), 1, basis, numbers, rng)


def polynomial(
    n: int, p: int, q: int, *, basis: str = "auto", numbers: _Numbers = REALS, rng: np.random.Generator | None = None
) -> ProductCode:
    """A in p row blocks and B in q column blocks, each coded; any p q answers decode.

    Args:
        n: Workers, at least p q.
        p, q: Row blocks of A, column blocks of B.
        basis: "random" (the default: rows g_i (x) h_i of random Khatri-Rao factors), "chebyshev", "roots" or
            "integers" (the original).
        numbers: `REALS`, or a `PrimeField`.
        rng: Of the random basis; by default seeded with 0.

    References:
        Yu, Maddah-Ali, Avestimehr, "Polynomial codes", 2017; Subramaniam et al. 2019 for the random basis (our factors
        have orthonormal columns, and rows scaled to length 1; the best conditioned of five draws is taken).
    """
    return _polynomial("polynomial", n, check_count(p, "p"), check_count(q, "q"), basis, numbers, rng)


def _polynomial(
    name: str, n: int, p: int, q: int, basis: str, numbers: _Numbers, rng: np.random.Generator | None
) -> ProductCode:
    n = _enough(name, n, p * q, f"p q = {p * q}" if q > 1 else f"k = {p}")
    wanted = np.arange(p * q).reshape(p, q)

    def made(left: NDArray[np.float64], right: NDArray[np.float64]) -> Evaluation:
        D = (left[:, :, None] * right[:, None, :]).reshape(n, -1)
        return Evaluation(left[:, :, None], right[:, None, :], D, wanted)

    def random() -> Evaluation:
        return best_draw(lambda draw: made(_factor(draw, n, p), _factor(draw, n, q)), rng)

    def chebyshev() -> Evaluation:
        degrees = np.arccos(nodes("chebyshev", n))[:, None]
        return made(np.cos(degrees * np.arange(p)), np.cos(degrees * p * np.arange(q)))

    def monomials(basis: str) -> Evaluation:
        x = nodes(basis, n)
        a, b = np.arange(p), p * np.arange(q)
        order = (a[:, None] + b).ravel()
        return Evaluation(powers(x, a)[:, :, None], powers(x, b)[:, None, :], powers(x, order), wanted)

    return _make(name, basis, {"random": random, "chebyshev": chebyshev}, monomials, ("random",), numbers)


def matdot(n: int, m: int, *, basis: str = "auto", numbers: _Numbers = REALS) -> ProductCode:
    """A in m column blocks and B in m row blocks; any 2 m - 1 answers decode, each as large as the product.

    Args:
        n: Workers, at least 2 m - 1.
        m: Blocks along the inner dimension.
        basis: "chebyshev" (orthogonal MatDot, real) where it is sound, else "roots" (complex): "auto" looks. "integers"
            is the original.
        numbers: `REALS`, or a `PrimeField`.

    References:
        Dutta et al., "On the optimal recovery threshold of coded matrix multiplication", 2018; Fahim and Cadambe,
        "Numerically stable polynomially coded computing", 2019, for the Chebyshev basis.
    """
    m = check_count(m, "m")
    n = _enough("MatDot", n, 2 * m - 1, f"2 m - 1 = {2 * m - 1}")
    j = np.arange(m)

    def chebyshev() -> Evaluation:
        # Orthonormal polynomials o_0 = 1, o_j = sqrt(2) T_j: of all o_j o_l only those with j = l hold T_0, once.
        angle = np.arccos(nodes("chebyshev", n))[:, None]
        values = np.cos(angle * j) * np.where(j, np.sqrt(2), 1.0)
        return Evaluation(
            values[:, None, :], values[:, :, None], np.cos(angle * np.arange(2 * m - 1)), np.zeros((1, 1), np.int64)
        )

    def monomials(basis: str) -> Evaluation:
        x = nodes(basis, n)
        D = powers(x, np.arange(2 * m - 1))
        return Evaluation(powers(x, j)[:, None, :], powers(x, m - 1 - j)[:, :, None], D, np.full((1, 1), m - 1))

    return _make("MatDot", basis, {"chebyshev": chebyshev}, monomials, ("chebyshev", "roots"), numbers)


def entangled(n: int, p: int, m: int, q: int, *, basis: str = "auto", numbers: _Numbers = REALS) -> ProductCode:
    """A in p x m blocks and B in m x q; any p m q + m - 1 answers decode.

    With m = 1 it is the polynomial code, with p = q = 1 MatDot.

    Args:
        n: Workers, at least p m q + m - 1.
        p, m, q: Blocks along the rows of A, the inner dimension, and the columns of B.
        basis: "chebyshev" (monomials at Chebyshev nodes, real) where it is sound, else "roots" (complex): "auto" looks.
            "integers" is the original.
        numbers: `REALS`, or a `PrimeField`.

    References:
        Yu, Maddah-Ali, Avestimehr, "Straggler mitigation in distributed matrix multiplication", 2018, theorem 1.
    """
    p, m, q = check_count(p, "p"), check_count(m, "m"), check_count(q, "q")
    k = p * m * q + m - 1
    n = _enough("entangled polynomial", n, k, f"p m q + m - 1 = {k}")
    c, j, b = np.arange(p), np.arange(m), np.arange(q)

    def monomials(basis: str) -> Evaluation:
        x = nodes(basis, n)
        left = powers(x, j + m * c[:, None])
        right = powers(x, m - 1 - j[:, None] + m * p * b)
        return Evaluation(left, right, powers(x, np.arange(k)), m - 1 + m * c[:, None] + m * p * b)

    real = {"chebyshev": partial(monomials, "chebyshev")}
    return _make("entangled polynomial", basis, real, monomials, ("chebyshev", "roots"), numbers)


def _make(
    name: str,
    basis: str,
    candidates: Mapping[str, Callable[[], Evaluation]],
    monomials: Callable[[str], Evaluation],
    order: tuple[str, ...],
    numbers: _Numbers,
) -> ProductCode:
    """The code in the basis asked for, or in the sound one; over a field the integers 1..n lose nothing."""
    if isinstance(numbers, PrimeField):
        if basis not in ("auto", "integers"):
            raise InvalidCode(f"basis={basis!r}: over a prime field the nodes are the integers; leave basis out.")
        return ProductCode(name, "integers", monomials("field"), numbers)
    every: dict[str, Callable[[], Evaluation]] = {
        **candidates,
        "roots": partial(monomials, "roots"),
        "integers": partial(monomials, "integers"),
    }
    return ProductCode(name, *choose(name, basis, every, order), numbers)


def _factor(rng: np.random.Generator, n: int, p: int) -> NDArray[np.float64]:
    """Random coefficients of p blocks, shape (n, p): Haar columns, then rows of length 1; all ones if p = 1."""
    if p == 1:
        return np.ones((n, 1))
    q = np.linalg.qr(rng.standard_normal((n, p)))[0]
    return np.asarray(q / np.linalg.norm(q, axis=1, keepdims=True))


def _enough(name: str, n: int, k: int, rule: str) -> int:
    n = check_count(n, "n")
    if n < k:
        raise InvalidCode(f"n={n} workers cannot give the {rule} answers that a {name} code needs; take n={k} or more.")
    return n
