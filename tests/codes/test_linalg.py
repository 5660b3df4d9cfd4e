"""Decompositions hold where LAPACK's divide-and-conquer does not converge."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode import cyclic_repetition
from fl_gradcode.codes import GradientCode, cyclic_mds, fractional_repetition, reed_solomon
from fl_gradcode.codes._linalg import condition, lstsq, pinv, svd

RNG = np.random.default_rng(0)
MATRICES = {
    "tall": RNG.standard_normal((9, 4)),
    "wide": RNG.standard_normal((4, 9)),
    "rank 3": RNG.standard_normal((6, 3)) @ RNG.standard_normal((3, 6)),
    "complex": RNG.standard_normal((5, 5)) + 1j * RNG.standard_normal((5, 5)),
}


def never(*_: Any, **__: Any) -> None:
    raise np.linalg.LinAlgError("SVD did not converge")


@pytest.fixture
def no_divide_and_conquer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("svd", "lstsq", "pinv", "cond"):
        monkeypatch.setattr(np.linalg, name, never)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.usefixtures("no_divide_and_conquer")
def test_the_fallback_decomposes(name: str) -> None:
    matrix = MATRICES[name]
    U, sigma, Vh = svd(matrix, full_matrices=False)
    assert np.abs((U * sigma) @ Vh - matrix).max() < 1e-12
    assert (np.diff(sigma) <= 0).all()
    full, _, whole = svd(matrix, full_matrices=True)
    assert full.shape == (len(matrix),) * 2 and whole.shape == (matrix.shape[1],) * 2
    assert np.abs(full.conj().T @ full - np.eye(len(full))).max() < 1e-12


@pytest.mark.parametrize("name", ["tall", "wide", "rank 3"])
def test_the_fallback_solves_as_numpy_does(name: str, request: pytest.FixtureRequest) -> None:
    matrix, right = MATRICES[name], RNG.standard_normal((len(MATRICES[name]), 2))
    nearest, inverse = np.linalg.lstsq(matrix, right, rcond=None)[0], np.linalg.pinv(matrix)
    request.getfixturevalue("no_divide_and_conquer")
    assert np.abs(lstsq(matrix, right) - nearest).max() < 1e-11
    assert np.abs(pinv(matrix) - inverse).max() < 1e-11


def test_the_fallback_measures_condition_numbers_as_numpy_does(request: pytest.FixtureRequest) -> None:
    stack = RNG.standard_normal((3, 2, 5, 5))
    expected, one = np.linalg.cond(stack), float(np.linalg.cond(stack[0, 0]))
    request.getfixturevalue("no_divide_and_conquer")
    assert np.abs(condition(stack) / expected - 1).max() < 1e-10
    assert float(condition(stack[0, 0])) == pytest.approx(one)
    assert condition(np.zeros((2, 2))) == np.inf


def test_a_sound_code_on_which_gesdd_fails_decodes_from_any_n_minus_s() -> None:
    code = cyclic_repetition(200, 50, rng=np.random.default_rng(3))
    for survivors in (range(150), range(50, 200), np.random.default_rng(1).permutation(200)[:150]):
        assert code.error_of(code.decoding_vector(survivors)) < 1e-8


@pytest.mark.parametrize(
    "make",
    [
        lambda: cyclic_repetition(7, 2, rng=np.random.default_rng(0)),
        lambda: cyclic_mds(8, 3),
        lambda: fractional_repetition(6, 1, m=2),
    ],
    ids=["cyclic", "cyclic mds", "fractional with m = 2"],
)
@pytest.mark.usefixtures("no_divide_and_conquer")
def test_a_code_is_made_and_decodes_on_the_fallback_alone(make: Callable[[], GradientCode]) -> None:
    code = make()
    updates = np.random.default_rng(0).standard_normal((code.k, 6))
    survivors = [*range(code.s, code.n)]
    replies: NDArray[Any] = code.encode(updates)
    assert np.abs(code.decode(replies[survivors], survivors, length=6) - updates.sum(axis=0)).max() < 1e-8


@pytest.mark.parametrize("make", [reed_solomon, cyclic_repetition], ids=["field", "reals"])
def test_what_was_computed_of_a_code_dies_with_it(make: Callable[..., GradientCode]) -> None:
    whole = make(8, 2) if make is reed_solomon else make(8, 2, rng=np.random.default_rng(0))
    part = whole.restrict([0, 2, 5])  # as each round with sampling makes one
    assert part.decodable(range(8))
    watched = weakref.ref(part)
    del part
    gc.collect()
    assert watched() is None
