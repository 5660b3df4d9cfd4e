"""Badly scaled matrices: rows and columns keep their digits, and the scaling leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fl_gradcode.errors import Overflow
from fl_gradcode.matmul import (
    ProductCode,
    coded_matmul,
    coded_matmul_worker,
    entangled,
    matdot,
    mds_product,
    polynomial,
)
from fl_gradcode.matmul.scales import Scales
from fl_gradcode.testing import InProcessGrid

CODES: list[ProductCode] = [polynomial(20, 4, 4), mds_product(12, 9), matdot(12, 4), entangled(13, 2, 2, 2)]


def product_of(a: Any, b: Any, code: ProductCode) -> Any:
    app = ClientApp()
    app.query("matmul")(coded_matmul_worker)
    with InProcessGrid(app, code.n) as grid:
        return coded_matmul(grid, a, b, code)


def lost(a: Any, b: Any, code: ProductCode) -> float:
    """The largest error of an entry beside the sum of what was added up for it, in units of the dtype's last digit."""
    product = product_of(a, b, code)
    right = a.astype(np.longdouble) @ b.astype(np.longdouble)
    size = np.abs(a).astype(np.longdouble) @ np.abs(b).astype(np.longdouble)
    return float((np.abs(product - right) / size).max() / np.finfo(product.dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("code", CODES, ids=repr)
def test_rows_and_columns_of_any_size_keep_their_digits(code: ProductCode, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((32, 24)), rng.standard_normal((24, 20))
    plain = max(lost(a.astype(dtype), b.astype(dtype), code), 10.0)
    rows, columns, inner = np.logspace(-8, 8, 32)[:, None], np.logspace(7, -7, 20), np.logspace(-6, 6, 24)
    rng.shuffle(rows)
    for x, y in ((rows * a, b), (a, b * columns), (rows * a, b * columns), (rows * a * inner, b / inner[:, None])):
        assert lost(x.astype(dtype), y.astype(dtype), code) < 50 * plain


def test_rows_of_zeros_and_entries_near_the_ends_of_the_range_are_scaled_too() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((12, 8)), rng.standard_normal((8, 6))
    a[3], b[:, 2] = 0.0, 0.0
    a[4] *= 2.0**-1000
    a[5] *= 2.0**900
    product = product_of(a, b, polynomial(8, 2, 2))
    assert np.abs(product / np.where(a @ b, a @ b, 1) - ((a @ b) != 0)).max() < 1e-10
    for size in (1e150, 1e-150):
        assert lost(a[:3] * size, b[:, 3:] / size, polynomial(8, 2, 2)) < 1e3


def test_what_does_not_fit_is_said() -> None:
    a = np.ones((4, 4), np.float32)
    a[0] = 1e30
    with pytest.raises(Overflow, match="does not fit float32"):
        product_of(a, a.T.copy(), polynomial(6, 2, 2))


def test_scaling_changes_exponents_only() -> None:
    rng = np.random.default_rng(2)
    a = rng.standard_normal((9, 7)) * 10.0 ** rng.integers(-9, 9, (9, 1))
    b = rng.standard_normal((7, 5)) * 10.0 ** rng.integers(-9, 9, 5)
    for inner in (False, True):
        scales = Scales.of(a, inner=inner)
        left = scales.left(a)
        right, columns = scales.right(b)
        assert (np.frexp(left)[0] == np.frexp(a)[0]).all() and (np.frexp(right)[0] == np.frexp(b)[0]).all()
        assert (np.abs(left).max(axis=1).min() >= 0.5 and np.abs(left).max() < 1.0) or inner
        assert (scales.undone(np.ones((9, 5)), columns) == np.ldexp(1.0, scales.rows[:, None] + columns)).all()
    alike = rng.uniform(1, 2, (5, 5))
    assert (
        Scales.of(alike, inner=True).left(alike) is alike and Scales.of(alike, inner=True).right(alike.T)[0] is not None
    )
