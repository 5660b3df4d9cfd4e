"""Scales rows and columns of badly scaled matrices by powers of two before they are coded, and undoes it exactly.

A coded block mixes rows of A that lie in different blocks, and a float keeps digits relative to the largest of them.
The product of scaled matrices is `(R A C) (C^-1 B S) = R (A B) S` with diagonal powers of two, so R and S are taken off
again without rounding. Equal row sizes are nearly the best choice (van der Sluis 1969).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import Overflow

__all__ = ["Scales"]

_ALIKE = 4  # binary orders of magnitude between the smallest and the largest row that are left as they are
_EXTREME = 32  # and of the largest one from 1, beyond which sums of squares of float32 might overflow

_NOTHING = -(1 << 20)  # the exponent of 0

_Exponents = NDArray[np.int64]


@dataclass(frozen=True)
class Scales:
    """The binary exponents of a left matrix's rows and columns.

    Attributes:
        rows: Exponent of each row's largest entry, shape (rows,); all 0 if the rows are of similar size.
        inner: The same for each column of A once its rows are scaled, shape (inner,).
    """

    rows: _Exponents
    inner: _Exponents

    @classmethod
    def of(cls, a: NDArray[Any], *, inner: bool) -> Scales:
        """Returns the scales of A.

        Args:
            a: The matrix, shape (rows, inner).
            inner: Whether columns are scaled as well, for codes that divide the inner dimension.
        """
        rows = _unless_alike(_exponents(np.abs(a).max(axis=1)))
        columns = np.zeros(a.shape[1], np.int64)
        if inner:
            columns = _unless_alike(_exponents(np.abs(_scaled(a, -rows[:, None])).max(axis=0)))
        return cls(rows, columns)

    def left(self, a: NDArray[Any]) -> NDArray[Any]:
        """Returns A with rows and columns scaled; A itself if there is nothing to scale."""
        return _scaled(a, -(self.rows[:, None] + self.inner)) if self.rows.any() or self.inner.any() else a

    def right(self, b: NDArray[Any]) -> tuple[NDArray[Any], _Exponents]:
        """Returns B with rows scaled inversely to A's columns, and its columns scaled; and the columns' exponents."""
        size, exponent = np.frexp(np.abs(b))
        columns = _unless_alike(np.where(size > 0, exponent + self.inner[:, None], _NOTHING).max(axis=0))
        shift = self.inner[:, None] - columns
        return (_scaled(b, shift) if shift.any() else b), columns

    def undone(self, product: NDArray[Any], columns: _Exponents) -> NDArray[Any]:
        """Returns the product of the matrices as they were, from that of the scaled ones, shape (rows, columns).

        Raises:
            Overflow: An entry does not fit the product's dtype.
        """
        shift = self.rows[:, None] + columns
        if not shift.any():
            return product
        with np.errstate(over="ignore"):
            whole = _scaled(product, shift)
        if not np.isfinite(whole).all():
            raise Overflow(f"An entry of the product does not fit {product.dtype}: give A and B in smaller units.")
        return whole

    def largest(self, columns: _Exponents, p: int, q: int) -> NDArray[np.float64]:
        """Returns the largest factor that is taken off an entry of each block of the product, shape (p, q)."""
        exponents = [
            np.array([part.max(initial=_NOTHING) for part in _parts(one, count)])
            for one, count in ((self.rows, p), (columns, q))
        ]
        with np.errstate(over="ignore"):
            return np.asarray(np.ldexp(1.0, exponents[0][:, None] + exponents[1]))


def _parts(values: _Exponents, count: int) -> list[_Exponents]:
    height = -(-len(values) // count)
    return [values[c * height : (c + 1) * height] for c in range(count)]


def _exponents(largest: NDArray[Any]) -> _Exponents:
    """Returns e with 2^(e-1) <= x < 2^e for each number, shape as given."""
    size, exponent = np.frexp(largest)
    return np.where(size > 0, exponent, _NOTHING).astype(np.int64)


def _unless_alike(exponents: _Exponents) -> _Exponents:
    """Returns the exponents, or zeros if they differ little; a row of zeros keeps its own, so its products are 0."""
    some = exponents > _NOTHING // 2
    known = exponents[some]
    if known.size and known.max() - known.min() <= _ALIKE and np.abs(known).max() <= _EXTREME:
        return np.where(some, 0, exponents)
    return exponents


def _scaled(values: NDArray[Any], exponents: _Exponents) -> NDArray[Any]:
    """Returns the values times these powers of two, each rounded at most once, and only where it underflows."""
    with np.errstate(under="ignore"):  # what underflows is below the last digit of its row
        return np.asarray(np.ldexp(values, exponents.astype(np.int32)))
