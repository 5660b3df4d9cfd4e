"""Evaluation bases of coded products: where a polynomial is evaluated, in which basis, and how much that loses.

Over the reals a basis decides how many digits decoding costs: about log10 of the condition number of the rows of D that
came in. Integer nodes lose all of them from 11 workers on; random factors stay usable at 110 (Subramaniam, Heidarzadeh
and Narayanan 2019, "Random Khatri-Rao-product codes").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidCode
from .prime_field import P

__all__ = ["ConditionWarning", "Evaluation", "best_draw", "choose", "nodes", "powers", "worst_condition"]

#: A real basis up to this worst condition number is preferred to complex numbers, which are four times the work.
_SOUND = 1e6
#: Decoding beyond it leaves less than half of the digits of a float64.
_WARN = 1e8
_SETS = 64  # of answers, drawn to judge a basis by
_TRIES = 5
_BUDGET = 200 * 100**3  # of all singular value decompositions, in cubes of k


class ConditionWarning(UserWarning):
    """A code whose decoding loses many digits; the message names a better choice."""


@dataclass(frozen=True)
class Evaluation:
    """What makes a product code: coefficients of A's blocks and of B's, and the matrix that answers are decoded by.

    Attributes:
        left: Coefficients of A's p x m blocks, shape (n, p, m).
        right: Coefficients of B's m x q blocks, shape (n, m, q).
        D: Answer i is `sum_t D[i, t] Z_t`, shape (n, k).
        wanted: Which Z_t is which block of the product, shape (p, q).
    """

    left: NDArray[Any]
    right: NDArray[Any]
    D: NDArray[Any]
    wanted: NDArray[np.int64]


def nodes(basis: str, n: int) -> NDArray[Any]:
    """Where worker i evaluates: Chebyshev nodes, the n-th roots of unity, or 1..n ("integers": as floats; "field")."""
    i = np.arange(n)
    if basis == "chebyshev":
        return np.asarray(np.cos((2 * i + 1) * np.pi / (2 * n)))
    if basis == "roots":
        return np.asarray(np.exp(2j * np.pi * i / n))
    return i + 1 if basis == "field" else i + 1.0


def powers(x: NDArray[Any], exponents: NDArray[np.int64]) -> NDArray[Any]:
    """`x_i ** e`, shape (n, *exponents.shape); whole numbers modulo the field's prime."""
    if x.dtype.kind == "i":
        table = [[pow(int(one), int(e), P) for e in exponents.ravel()] for one in x]
        return np.array(table, np.int64).reshape(len(x), *exponents.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # integer nodes: the condition number tells
        return np.asarray(x.reshape(-1, *[1] * exponents.ndim) ** exponents)


def worst_condition(
    D: NDArray[Any], *, sets: int = _SETS, rng: np.random.Generator | None = None
) -> tuple[float, NDArray[np.int64]]:
    """The largest condition number of k rows of D among `sets` drawn at random and up to as many consecutive ones.

    Also returns the rows. It is a sample: a worse set may exist.
    """
    n, k = D.shape
    rng = np.random.default_rng(0) if rng is None else rng
    count = 1 if n == k else min(sets, max(_BUDGET // k**3, 8))
    drawn = np.argsort(rng.random((count, n)), axis=1)[:, :k]
    starts = np.linspace(0, n, min(count, n), endpoint=False).astype(int)
    tried = np.concatenate([drawn, (starts[:, None] + np.arange(k)) % n])
    # A few at a time: a hundred 100 x 100 matrices are 8 MB.
    if not np.isfinite(D).all():
        return float("inf"), tried[0]
    found = np.concatenate([np.linalg.cond(D[rows]) for rows in np.array_split(tried, -(-len(tried) // 100))])
    found = np.nan_to_num(found, nan=np.inf, posinf=np.inf)
    worst = int(np.argmax(found))
    return float(found[worst]), tried[worst]


def best_draw(
    draw: Callable[[np.random.Generator], Evaluation], rng: np.random.Generator | None, tries: int = _TRIES
) -> Evaluation:
    """The best conditioned of a few draws; without spare rows one draw is as good as another."""
    rng = np.random.default_rng(0) if rng is None else rng
    drawn = [draw(rng) for _ in range(tries)]
    return min(drawn, key=lambda one: worst_condition(one.D)[0])


def choose(
    name: str, basis: str, candidates: Mapping[str, Callable[[], Evaluation]], order: Sequence[str]
) -> tuple[str, Evaluation]:
    """The evaluation in that basis, with a warning if it is badly conditioned; "auto" tries `order`.

    Of `order` the first whose worst sampled condition number is at most 1e6 is taken, else the best.

    Raises:
        InvalidCode: There is no such basis for this code.
    """
    known = ["auto", *candidates]
    if basis not in known:
        raise InvalidCode(f"basis={basis!r}: {name} codes have {', '.join(map(repr, known))}.")
    judged: list[tuple[float, str, Evaluation]] = []
    for one in order:
        made = candidates[one]()
        judged.append((worst_condition(made.D)[0], one, made))
        if judged[-1][0] <= _SOUND:
            break
    best, auto, evaluation = min(judged, key=lambda one: one[0])
    if basis in ("auto", auto):
        if best > _WARN:
            n, k = evaluation.D.shape
            warnings.warn(
                f"This {name} code (n={n}, k={k}) has a condition number of at least {best:.1g}; float64 bears "
                "about 1e8. Take numbers=PrimeField(...), which is exact, fewer spare workers (n - k up to 6), or "
                "polynomial(), whose random basis stays sound at any size.",
                ConditionWarning,
                stacklevel=4,
            )
        return auto, evaluation
    made = candidates[basis]()
    condition = worst_condition(made.D)[0]
    if condition > _WARN:
        warnings.warn(
            f"basis={basis!r} has a condition number of at least {condition:.1g} at n={len(made.D)}, of which float64 "
            f"bears about 1e8; basis={auto!r} has {best:.1g} here, and numbers=PrimeField(...) is exact.",
            ConditionWarning,
            stacklevel=4,
        )
    return basis, made
