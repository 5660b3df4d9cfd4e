"""The constructors of `ProductCode`: codes for products A @ B that any k of n answers determine.

The papers multiply A^T B. Here the product is A @ B, so that the papers' column blocks of A are row blocks.

| code | A in | B in | k | work of a worker |
|---|---|---|---|---|
| `mds_product(n, k)` | k x 1 | whole | k | 1 / k |
| `polynomial(n, p, q)` | p x 1 | 1 x q | p q | 1 / (p q) |
| `matdot(n, m)` | 1 x m | m x 1 | 2 m - 1 | 1 / m; answers as large as the product |
| `entangled(n, p, m, q)` | p x m | m x q | p m q + m - 1 | 1 / (p m q) |
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
    """Returns the trivial code, in which each of p q workers computes one block of the product and all are needed.

    Args:
        p: Number of row blocks of A.
        q: Number of column blocks of B.
        numbers: `REALS`, or a `PrimeField`.
    """
    p, q = check_count(p, "p"), check_count(q, "q")
    dtype = np.int64 if isinstance(numbers, PrimeField) else np.float64
    one = np.eye(p * q, dtype=dtype).reshape(p * q, p, q)
    wanted = np.arange(p * q).reshape(p, q)
    made = Evaluation(one.sum(axis=2)[:, :, None], one.sum(axis=1)[:, None, :], np.eye(p * q, dtype=dtype), wanted)
    return ProductCode("uncoded", "units", made, numbers)


def mds_product(
    n: int, k: int, *, basis: str = "auto", numbers: _Numbers = REALS, rng: np.random.Generator | None = None
) -> ProductCode:
    """Returns an MDS code, in which A is split into k row blocks, and every worker gets all of B.

    Args:
        n: Number of workers.
        k: Number of answers that decode.
        basis: "random" (orthonormal columns, the default), "chebyshev", "roots" or "integers".
        numbers: `REALS`, or a `PrimeField`, over which the nodes are 1..n and nothing is rounded.
        rng: Draws the random basis; seeded with 0 by default.

    References:
        Lee, Lam, Pedarsani, Papailiopoulos, Ramchandran, "Speeding up distributed machine learning using codes", 2018.
    """
    return _polynomial("MDS", n, check_count(k, "k"), 1, basis, numbers, rng)


def polynomial(
    n: int, p: int, q: int, *, basis: str = "auto", numbers: _Numbers = REALS, rng: np.random.Generator | None = None
) -> ProductCode:
    """Returns a polynomial code, which splits A into p row blocks and B into q column blocks; any p q answers decode.

    Args:
        n: Number of workers, at least p q.
        p: Number of row blocks of A.
        q: Number of column blocks of B.
        basis: "random" (the default, with rows g_i (x) h_i of random Khatri-Rao factors), "chebyshev", "roots" or
            "integers" (the original).
        numbers: `REALS`, or a `PrimeField`.
        rng: Draws the random basis; seeded with 0 by default.

    References:
        Yu, Maddah-Ali, Avestimehr, "Polynomial codes", 2017; Subramaniam et al. 2019 for the random basis. Deviation:
        our factors have orthonormal columns and rows scaled to length 1, and the best conditioned of five draws is
        used.
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
    """Returns a MatDot code, which splits A into m column blocks and B into m row blocks; any 2 m - 1 answers decode.

    Each answer is as large as the product.

    Args:
        n: Number of workers, at least 2 m - 1.
        m: Number of blocks along the inner dimension.
        basis: "chebyshev" (orthogonal MatDot, real), "roots" (complex) or "integers" (the original). "auto" chooses
            "chebyshev" if it is well-conditioned, else "roots".
        numbers: `REALS`, or a `PrimeField`.

    References:
        Dutta et al., "On the optimal recovery threshold of coded matrix multiplication", 2018; Fahim and Cadambe,
        "Numerically stable polynomially coded computing", 2019, for the Chebyshev basis.
    """
    m = check_count(m, "m")
    n = _enough("MatDot", n, 2 * m - 1, f"2 m - 1 = {2 * m - 1}")
    j = np.arange(m)

    def chebyshev() -> Evaluation:
        # For the orthonormal polynomials o_0 = 1, o_j = sqrt(2) T_j, a product o_j o_l contains T_0 only if j = l, and
        # then with coefficient 1.
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
    """Returns an entangled polynomial code, which splits A into p x m and B into m x q blocks.

    Any p m q + m - 1 answers decode. With m = 1 it is the polynomial code, and with p = q = 1 the MatDot code.

    Args:
        n: Number of workers, at least p m q + m - 1.
        p: Number of blocks along the rows of A.
        m: Number of blocks along the inner dimension.
        q: Number of blocks along the columns of B.
        basis: "chebyshev" (monomials at Chebyshev nodes, real), "roots" (complex) or "integers" (the original). "auto"
            chooses "chebyshev" if it is well-conditioned, else "roots".
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
    """Returns the code in the given basis; "auto" chooses a well-conditioned one, or the integers over a field."""
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
    """Returns random coefficients of p blocks, shape (n, p): orthonormal columns with rows scaled to length 1.

    For p = 1, all coefficients are 1.
    """
    if p == 1:
        return np.ones((n, 1))
    q = np.linalg.qr(rng.standard_normal((n, p)))[0]
    return np.asarray(q / np.linalg.norm(q, axis=1, keepdims=True))


def _enough(name: str, n: int, k: int, rule: str) -> int:
    n = check_count(n, "n")
    if n < k:
        raise InvalidCode(f"n={n} workers cannot give the {rule} answers that a {name} code needs; take n={k} or more.")
    return n
