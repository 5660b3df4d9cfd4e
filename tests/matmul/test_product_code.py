"""Laws of product codes: any k answers decode, k - 1 never do, and how many digits that costs."""

from __future__ import annotations

import doctest
import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fl_gradcode.matmul.product_code
from fl_gradcode.codes.prime_field import P, PrimeField, matmul_mod
from fl_gradcode.errors import InvalidCode, NotDecodable, Overflow
from fl_gradcode.matmul import (
    ConditionWarning,
    ProductCode,
    entangled,
    matdot,
    mds_product,
    polynomial,
    uncoded_product,
)
from fl_gradcode.matmul.blocks import join, multiply
from fl_gradcode.matmul.product_code import nodes, powers, worst_condition

FIELD = PrimeField(0)
Make = Callable[..., ProductCode]
# Every family at n <= 10, and the names of its bases.
FAMILIES: dict[str, tuple[Make, tuple[int, ...], tuple[str, ...]]] = {
    "MDS": (mds_product, (9, 5), ("random", "chebyshev", "roots", "integers")),
    "polynomial": (polynomial, (8, 2, 3), ("random", "chebyshev", "roots", "integers")),
    "MatDot": (matdot, (9, 3), ("chebyshev", "roots", "integers")),
    "entangled": (entangled, (10, 2, 2, 2), ("chebyshev", "roots", "integers")),
    "uncoded": (uncoded_product, (3, 2), ()),
}


def quiet(make: Make, *arguments: int, **options: object) -> ProductCode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConditionWarning)  # the baselines warn, rightly
        return make(*arguments, **options)


def answers_of(code: ProductCode, A: np.ndarray, B: np.ndarray) -> list[np.ndarray]:
    return [code.multiply(left, right) for left, right in zip(*code.encode(A, B), strict=True)]


def operands(seed: int = 0, *, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Sizes that nothing divides."""
    rng = np.random.default_rng(seed)
    if whole:
        return rng.integers(-999, 999, (13, 11)), rng.integers(-999, 999, (11, 7))
    return rng.standard_normal((13, 11)), rng.standard_normal((11, 7))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# Every k answers decode


@pytest.mark.parametrize("family", FAMILIES)
def test_every_set_of_k_answers_decodes(family: str) -> None:
    make, sizes, _ = FAMILIES[family]
    code = make(*sizes)
    A, B = operands()
    answers = answers_of(code, A, B)
    for workers in itertools.combinations(range(code.n), code.k):
        assert code.decodable(workers)
        decoded = code.decode([answers[i] for i in workers], workers, shape=(13, 7))
        assert relative(decoded, A @ B) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_every_set_of_k_answers_decodes_exactly_over_the_field(family: str) -> None:
    make, sizes, _ = FAMILIES[family]
    code = make(*sizes, numbers=FIELD)
    A, B = operands(whole=True)
    expected = A.astype(object) @ B.astype(object)  # Python's integers
    answers = answers_of(code, A, B)
    for workers in itertools.combinations(range(code.n), code.k):
        decoded = code.decode([answers[i] for i in workers], workers, shape=(13, 7))
        assert decoded.dtype == np.int64
        assert (decoded == expected).all()


@pytest.mark.parametrize(("family", "basis"), [(f, b) for f, (_, _, bases) in FAMILIES.items() for b in bases])
def test_every_basis_of_a_family_is_the_same_code_in_other_numbers(family: str, basis: str) -> None:
    make, sizes, _ = FAMILIES[family]
    code = quiet(make, *sizes, basis=basis)
    A, B = operands()
    answers = answers_of(code, A, B)
    for workers in itertools.islice(itertools.combinations(range(code.n), code.k), 0, None, 7):
        coefficients = code.coefficients(workers)
        # From the coefficients of the blocks alone: no D, no answers.
        assert code.error_of(workers, coefficients) < 1e-4
        assert relative(code.decode([answers[i] for i in workers], workers, shape=(13, 7)), A @ B) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("numbers", [None, FIELD], ids=["reals", "field"])
def test_k_minus_1_answers_never_decode(family: str, numbers: PrimeField | None) -> None:
    make, sizes, _ = FAMILIES[family]
    code = make(*sizes) if numbers is None else make(*sizes, numbers=numbers)
    A, B = operands(whole=True)
    answers = answers_of(code, A, B)
    made = code.evaluation
    p, m, q = code.partition
    # What the answers hold of each A_cj B_j'l, and what each block of the product holds.
    terms = (made.left[:, :, :, None, None] * made.right[:, None, None]).reshape(code.n, -1)
    blocks = np.einsum("ac,jk,bl->abcjkl", np.eye(p), np.eye(m), np.eye(q)).reshape(p * q, -1).astype(terms.dtype)
    determined = 0
    for workers in itertools.combinations(range(code.n), code.k - 1):
        assert not code.decodable(workers)
        assert code.condition(workers) == np.inf
        with pytest.raises(NotDecodable, match=f"{code.k - 1} answers .* any {code.k} of {code.n}"):
            code.decode([answers[i] for i in workers], workers)
        if numbers is None:
            rows = terms[list(workers)]
            nearest = np.linalg.lstsq(rows.T, blocks.T, rcond=None)[0]
            determined += float(np.abs(rows.T @ nearest - blocks.T).max()) < 1e-9
    # The answers truly do not determine the product: least squares leaves a residual. Of MatDot's single sum a few sets
    # would: those with all nodes of a quadrature rule.
    assert determined <= (0.4 if m > 1 else 0) * math.comb(code.n, code.k - 1)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_any_partition_any_sizes_any_answers(p: int, m: int, q: int, spare: int, data: st.DataObject) -> None:
    n = p * m * q + m - 1 + spare
    code = entangled(n, p, m, q, numbers=FIELD)
    rows, inner, columns = (data.draw(st.integers(1, 9)) for _ in range(3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    A, B = rng.integers(-50, 50, (rows, inner)), rng.integers(-50, 50, (inner, columns))
    workers = data.draw(st.permutations(range(n)))[: code.k]
    answers = answers_of(code, A, B)
    assert (code.decode([answers[i] for i in workers], workers, shape=(rows, columns)) == A @ B).all()


def test_more_than_k_answers_decode_too_and_no_worse() -> None:
    code = polynomial(12, 2, 4)
    A, B = operands()
    answers = answers_of(code, A, B)
    assert relative(code.decode(answers, range(12), shape=(13, 7)), A @ B) < 1e-14
    assert code.condition(range(12)) < code.condition(range(8))


def test_entangled_without_inner_blocks_is_polynomial_and_with_nothing_else_matdot() -> None:
    for one, other in ((entangled(9, 2, 1, 3, numbers=FIELD), polynomial(9, 2, 3, numbers=FIELD)),
                       (entangled(9, 1, 4, 1, numbers=FIELD), matdot(9, 4, numbers=FIELD))):  # fmt: skip
        for workers in itertools.combinations(range(9), one.k):
            assert (one.coefficients(workers) == other.coefficients(workers)).all()


def test_thresholds_are_the_papers() -> None:
    assert [one.k for one in (mds_product(9, 5), polynomial(9, 2, 3), matdot(9, 4), entangled(13, 2, 2, 3))] == [
        5,
        2 * 3,
        2 * 4 - 1,
        2 * 2 * 3 + 2 - 1,
    ]


# How exact: the bounds, worst of 1,000 sets drawn at random and of consecutive ones

BOUNDS = {(20, 4): 1e-10, (53, 7): 1e-8, (110, 10): 1e-6}


def sets_of(n: int, k: int, count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(1)
    yield from (rng.permutation(n)[:k] for _ in range(count))
    yield from ((first + np.arange(k)) % n for first in range(n))


@pytest.mark.parametrize(("n", "p"), BOUNDS)
def test_the_default_basis_keeps_its_digits_on_1000_sets(n: int, p: int) -> None:
    code = polynomial(n, p, p)
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2 * p, 5)), rng.standard_normal((5, 2 * p))
    answers = answers_of(code, A, B)
    worst = max(relative(code.decode([answers[i] for i in rows], rows), A @ B) for rows in sets_of(n, p * p, 1000))
    assert worst <= BOUNDS[n, p]


def test_over_the_field_1000_sets_of_110_workers_are_exact() -> None:
    code = polynomial(110, 10, 10, numbers=FIELD)
    rng = np.random.default_rng(0)
    A, B = rng.integers(-999, 999, (10, 5)), rng.integers(-999, 999, (5, 10))
    answers = answers_of(code, A, B)
    for rows in itertools.islice(sets_of(110, 100, 25), 0, None, 5):
        assert (code.decode([answers[i] for i in rows], rows) == A @ B).all()


def test_every_set_of_16_of_20_is_well_conditioned() -> None:
    code = polynomial(20, 4, 4)
    every = np.array(list(itertools.combinations(range(20), 16)))
    assert np.linalg.cond(code.evaluation.D[every]).max() < 1e6


def test_condition_numbers_of_the_reference() -> None:
    # Measured elsewhere, worst of 200 random and 2 consecutive sets: integers 4e12, Chebyshev 3e2, roots of unity 12.
    for basis, size in (("integers", 4e12), ("chebyshev", 3e2), ("roots", 12)):
        x = nodes(basis, 11)
        D = np.cos(np.arccos(x)[:, None] * np.arange(9)) if basis == "chebyshev" else powers(x, np.arange(9))
        assert size / 10 < worst_condition(D, sets=200)[0] < size * 10


def test_ill_conditioned_choices_warn_and_name_the_better_one() -> None:
    with pytest.warns(ConditionWarning, match=r"basis='integers' .* 1e\+25 at n=20; .* basis='random' has"):
        polynomial(20, 4, 4, basis="integers")
    with pytest.warns(ConditionWarning, match="MatDot code .*PrimeField.*polynomial"):
        matdot(110, 50)
    with pytest.warns(ConditionWarning, match="at least inf"):  # 300^255 is beyond float64
        polynomial(300, 16, 16, basis="integers")


def test_the_default_takes_real_numbers_while_they_are_sound() -> None:
    assert matdot(11, 5).basis == "chebyshev" and not matdot(11, 5).complex
    assert matdot(31, 13).basis == "roots" and matdot(31, 13).complex
    assert entangled(11, 2, 2, 2).basis == "chebyshev"
    assert entangled(31, 2, 3, 4).basis == "roots"
    assert entangled(31, 2, 3, 4).worst_condition() < 1e6
    assert [mds_product(9, 5).basis, polynomial(9, 2, 2).basis] == ["random", "random"]


# Types and sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_stays_float32(family: str) -> None:
    make, sizes, _ = FAMILIES[family]
    code = make(*sizes)
    A, B = (x.astype(np.float32) for x in operands())
    answers = answers_of(code, A, B)
    assert answers[0].dtype in (np.float32, np.complex64)
    decoded = code.decode(answers[-code.k :], range(code.n)[-code.k :], shape=(13, 7))
    assert decoded.dtype == np.float32
    assert relative(decoded, A @ B) < 1e-3


def test_a_vector_and_whole_numbers() -> None:
    code = mds_product(6, 4)
    A, B = operands(whole=True)
    answers = answers_of(code, A, B[:, 0])
    decoded = code.decode(answers[2:], range(2, 6), shape=(13,))
    assert decoded.shape == (13,) and relative(decoded, A @ B[:, 0]) < 1e-13


def test_fixed_point_rounds_a_and_b_and_nothing_else() -> None:
    numbers = PrimeField(10)
    code = polynomial(7, 2, 2, numbers=numbers)
    A, B = operands()
    decoded = code.decode(
        answers_of(code, A, B)[3:], range(3, 7), shape=(13, 7), fraction_bits=code.fraction_bits(A, B)
    )
    assert (decoded == np.rint(A * 1024) @ np.rint(B * 1024) / 1024**2).all()
    # Whole numbers beside floats are taken as they are.
    answers = answers_of(code, A, np.eye(11, dtype=int))
    decoded = code.decode(
        answers[:4], range(4), shape=(13, 11), fraction_bits=code.fraction_bits(A, np.eye(11, dtype=int))
    )
    assert (decoded == np.rint(A * 1024) / 1024).all()


def test_what_does_not_fit_the_field_is_refused_before_anything_is_encoded() -> None:
    code = polynomial(6, 2, 2, numbers=FIELD)
    big = np.full((4, 4), 2**15)
    with pytest.raises(Overflow, match=r"may reach 4\.295e\+09 units; .* = 1073741823"):
        code.encode(big, big)
    edge = np.full((4, 4), 2**14 - 1)
    assert (code.decode(answers_of(code, edge, edge)[1:5], range(1, 5)) == edge @ edge).all()


def test_the_worker_s_product_over_the_field_is_exact_for_long_inner_dimensions() -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.integers(0, P, shape).astype(np.uint32) for shape in ((2, 700_000), (700_000, 1)))
    expected = [sum(int(a) * int(b) for a, b in zip(row, right[:, 0], strict=True)) % P for row in left]
    assert multiply(left, right)[:, 0].tolist() == expected
    assert (
        matmul_mod(left[:, :9].astype(np.int64), right[:9].astype(np.int64))[:, 0]
        == multiply(left[:, :9], right[:9])[:, 0]
    ).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (40, 257), (2000, 1), (300, 301)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
def test_blocks_are_joined_as_one_sum_after_another_would(shape: tuple[int, int], dtype: type) -> None:
    rng = np.random.default_rng(0)
    answers: list[np.ndarray] = [rng.standard_normal(shape).astype(dtype) for _ in range(7)]
    coefficients = rng.standard_normal((7, 2, 3))
    if dtype == np.complex128:
        answers = [x + 1j * rng.standard_normal(shape) for x in answers]
        coefficients = coefficients + 1j * rng.standard_normal((7, 2, 3))
    expected = np.block(
        [[sum(a * x for a, x in zip(coefficients[:, c, b], answers, strict=True)) for b in range(3)] for c in range(2)]
    ).real
    assert np.abs(join(answers, coefficients) - expected).max() < (1e-4 if dtype == np.float32 else 1e-12)


def test_large_blocks_are_joined_by_several_threads() -> None:
    rng = np.random.default_rng(0)
    answers = [rng.standard_normal((700, 900)) for _ in range(8)]
    coefficients = rng.standard_normal((8, 2, 2))
    expected = np.tensordot(coefficients.T, np.array(answers), axes=(2, 0)).transpose(1, 2, 0, 3).reshape(1400, 1800)
    assert np.abs(join(answers, coefficients) - expected).max() < 1e-12


def test_worker_s_storage_and_work_are_a_pth_and_a_qth() -> None:
    A, B = np.ones((80, 60)), np.ones((60, 120))
    lefts, rights = polynomial(10, 4, 2).encode(A, B)
    assert lefts[0].nbytes * 4 == A.nbytes and rights[0].nbytes * 2 == B.nbytes
    rows, inner = lefts[0].shape
    assert rows * inner * rights[0].shape[1] * 8 == 80 * 60 * 120  # multiply-adds
    assert polynomial(10, 4, 2).work == 1 / 8
    assert matdot(9, 3).work == 1 / 3
    assert matdot(31, 13).work == 4 / 13  # complex
    assert mds_product(5, 4, basis="roots").work == 2 / 4  # complex times real


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: polynomial(15, 4, 4), "n=15 workers cannot give the p q = 16 answers that a polynomial code needs"),
        (lambda: matdot(4, 3), "2 m - 1 = 5"),
        (lambda: entangled(8, 2, 2, 2), "p m q [+] m - 1 = 9"),
        (lambda: mds_product(3, 4), "k = 4"),
        (lambda: polynomial(9, 0, 2), "p=0 must be a whole number"),
        (lambda: polynomial(9, 2, 2, basis="sine"), "basis='sine': polynomial codes have 'auto', 'random'"),
        (lambda: matdot(9, 2, basis="random"), "MatDot codes have 'auto', 'chebyshev', 'roots', 'integers'"),
        (lambda: matdot(9, 2, basis="roots", numbers=FIELD), "over a prime field the nodes are the integers"),
        (lambda: polynomial(4, 2, 2).encode(np.ones(3), np.ones((3, 3))), "A has shape .3,.*rows, inner"),
        (lambda: polynomial(4, 2, 2).encode(np.ones((2, 3)), np.ones((2, 2, 2))), "B has shape"),
        (lambda: polynomial(4, 2, 2).encode(np.ones((2, 3)), np.ones((2, 2))), "A has 3 columns and B 2 rows"),
        (lambda: polynomial(4, 2, 2).encode(np.ones((2, 3)) * np.nan, np.ones((3, 2))), "A has entries that are not"),
        (lambda: polynomial(4, 2, 2).encode(np.ones((2, 0)), np.ones((0, 2))), "nothing to multiply"),
        (lambda: polynomial(4, 2, 2).encode(np.ones((2, 3), complex), np.ones((3, 2))), "A has dtype complex128"),
        (lambda: polynomial(4, 2, 2).coefficients([0, 1, 2, 4]), "Worker 4 does not exist"),
        (lambda: polynomial(5, 2, 2).coefficients([0, 1, 2, 2]), "Worker 2 appears twice"),
        (lambda: polynomial(4, 2, 2).decode([np.ones((2, 2))] * 3, range(4)), "3 answers for 4 workers"),
        (lambda: polynomial(4, 2, 2).decode([np.ones((2, 2))] * 4, range(4), shape=(5, 4)), "does not fit a decoded"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidCode, match=message):
        call()


def test_the_repr_tells_what_you_hold() -> None:
    assert repr(polynomial(20, 4, 4)) == (
        "<polynomial code: n=20 workers, any k=16, A in 4 x 1 and B in 1 x 4 blocks, random basis>"
    )
    assert "over a field of 2147483647" in repr(matdot(9, 2, numbers=FIELD))


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(fl_gradcode.matmul.product_code).failed == 0
