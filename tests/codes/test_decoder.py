"""The incremental decoder gives, after each arrival, the answer that a decoder from scratch would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fl_gradcode.codes import GradientCode, cyclic_repetition, fractional_repetition, uncoded

# Singular values below this share of the largest are rounding: a row of ones is a row of ones.
RANK = 1e-11


def cyclic(n: int, s: int, seed: int = 1) -> GradientCode:
    return cyclic_repetition(n, s, rng=np.random.default_rng(seed))


def nameless(n: int, s: int) -> GradientCode:
    """Fractional repetition as a bare matrix: the library does not know that there are groups."""
    return GradientCode(fractional_repetition(n, s).B, s, "nameless")


def group_mds(n: int, s: int, m: int) -> GradientCode:
    """Groups of at least s + m workers, one shard each; any m replies of a group give its m blocks."""
    rng = np.random.default_rng((n, s, m))
    g = n // (s + m)
    B = np.zeros((n, g, m))
    for q in range(g):
        B[q::g, q] = np.linalg.qr(rng.standard_normal((len(range(q, n, g)), m)))[0]
    return GradientCode(B, s, "group MDS")


# Workers 0 and 4 suffice: -2 times row 0 minus row 4 is all ones.
IDLE = np.array([[-1, 0, -1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, -1], [-1, -1, 1, 1, 0], [1, -1, 1, -1, -1]], float)

SMALL = [
    uncoded(4),
    *(fractional_repetition(n, s) for n, s in ((1, 0), (4, 1), (5, 1), (5, 2), (6, 1), (6, 4))),
    fractional_repetition(6, 2, k=7, order=[5, 0, 3, 1, 4, 2]),
    fractional_repetition(6, 1).restrict([0, 1, 3]),
    *(cyclic(n, s) for n, s in ((1, 0), (4, 1), (5, 2), (5, 0), (6, 2), (6, 5))),
    cyclic(6, 3).restrict([0, 4]),
    *(nameless(n, s) for n, s in ((4, 1), (5, 2), (6, 1))),
    *(group_mds(n, s, m) for n, s, m in ((5, 1, 2), (6, 0, 3), (6, 1, 2))),
    # One survivor is enough, and the rounding of the coefficients must not hide it.
    cyclic(6, 5, seed=11),
    # Some workers are never needed: others decode alone, even when more are missing than the code has slack.
    GradientCode(np.array([[1.0, 1.0], [1.0, 0.0]]), 0, "idle worker"),
    GradientCode(IDLE, 0, "idle workers"),
    GradientCode(np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]), 0, "spare and idle worker"),
]


@pytest.fixture(params=SMALL, ids=repr)
def code(request: pytest.FixtureRequest) -> GradientCode:
    return request.param  # type: ignore[no-any-return]


def conditions(code: GradientCode) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`a` decodes if and only if `matrix.T @ a` is the target; a has one column for each of the m blocks."""
    return code.B.reshape(code.n, -1), np.tile(np.eye(code.m), (code.k, 1))


def from_scratch(code: GradientCode, survivors: Sequence[int]) -> tuple[NDArray[np.float64], float]:
    """The shortest least-squares solution over the survivors, shape (n, m), and its error."""
    matrix, target = conditions(code)
    a = np.zeros((code.n, code.m))
    if len(survivors):
        a[list(survivors)] = np.linalg.lstsq(matrix[list(survivors)].T, target, rcond=RANK)[0]
    return a, float(np.abs(matrix.T @ a - target).max())


@cache
def solvable(code: GradientCode, survivors: frozenset[int]) -> bool:
    return from_scratch(code, sorted(survivors))[1] <= 1e-8


def expected_vector(code: GradientCode, arrivals: Sequence[int]) -> NDArray[np.float64]:
    """Groups: 1 on the first reply of each. Otherwise the shortest solution over all replies. Shape (n, m)."""
    if code.groups is None:
        return from_scratch(code, arrivals)[0]
    a = np.zeros((code.n, 1))
    a[[next(i for i in arrivals if i in group) for group in code.groups]] = 1.0
    return a


def close(vector: NDArray[np.float64] | None, expected: NDArray[np.float64]) -> bool:
    return vector is not None and bool(
        np.linalg.norm(vector.reshape(expected.shape) - expected) <= 1e-8 * np.linalg.norm(expected)
    )


def masks(n: int) -> Iterator[frozenset[int]]:
    return (frozenset(i for i in range(n) if mask >> i & 1) for mask in range(2**n))


def test_every_order_of_arrival_is_answered_as_from_scratch(code: GradientCode) -> None:
    for arrivals in permutations(range(code.n)):
        decoder = code.incremental()
        assert not decoder.decodable
        for t, worker in enumerate(arrivals, 1):
            answer = decoder.add(worker)
            assert answer == decoder.decodable == solvable(code, frozenset(arrivals[:t])), arrivals[:t]
        assert decoder.survivors == list(arrivals)


def test_the_vector_is_that_of_all_who_came(code: GradientCode) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        arrivals = [int(i) for i in rng.permutation(code.n)]
        decoder = code.incremental()
        assert decoder.vector() is None
        for t, worker in enumerate(arrivals, 1):
            if decoder.add(worker):
                assert close(decoder.vector(), expected_vector(code, arrivals[:t]))
            else:
                assert decoder.vector() is None


def test_the_vector_need_not_be_asked_for_at_each_arrival(code: GradientCode) -> None:
    for seed in range(5):
        arrivals = [int(i) for i in np.random.default_rng(seed).permutation(code.n)]
        decoder = code.incremental()
        for worker in arrivals:
            decoder.add(worker)
        assert close(decoder.vector(), expected_vector(code, arrivals))


def test_general_codes_shorten_the_vector_with_each_further_arrival() -> None:
    for code in (cyclic(8, 3), nameless(8, 3), group_mds(8, 2, 2)):
        decoder = code.incremental()
        norms = []
        for worker in (3, 1, 6, 0, 2, 7, 5, 4):
            if decoder.add(worker):
                vector = decoder.vector()
                assert vector is not None
                norms.append(float(np.linalg.norm(vector)))
        assert len(norms) > 1
        assert norms == sorted(norms, reverse=True)
        assert norms[-1] < 0.9 * norms[0]


def test_groups_keep_their_first_reply_when_more_arrive() -> None:
    decoder = fractional_repetition(6, 2).incremental()
    assert decoder.update([4, 1])
    before = decoder.vector()
    decoder.update([0, 2, 3])
    after = decoder.vector()
    assert before is not None
    assert after is not None
    assert before.tolist() == after.tolist() == [0, 1, 0, 0, 1, 0]


def test_several_arrivals_at_once_are_several_arrivals(code: GradientCode) -> None:
    arrivals = [int(i) for i in np.random.default_rng(1).permutation(code.n)]
    for first in range(code.n + 1):
        for second in range(first, code.n + 1):
            decoder = code.incremental()
            assert decoder.update(arrivals[:first]) == solvable(code, frozenset(arrivals[:first]))
            assert decoder.update(arrivals[first:second]) == solvable(code, frozenset(arrivals[:second]))
            assert decoder.survivors == arrivals[:second]
            if decoder.decodable:
                assert close(decoder.vector(), expected_vector(code, arrivals[:second]))


def test_hopeless_means_that_no_further_arrivals_would_help(code: GradientCode) -> None:
    for survivors in masks(code.n):
        decoder = code.incremental()
        decoder.update(sorted(survivors))
        for outstanding in masks(code.n):
            if not survivors & outstanding:
                helps = any(solvable(code, survivors | more) for more in masks(code.n) if more <= outstanding)
                assert decoder.hopeless(outstanding) == (not helps), (survivors, outstanding)
        assert decoder.survivors == sorted(survivors)  # asking changes nothing


def test_asking_whether_all_is_lost_does_not_count_as_an_arrival(code: GradientCode) -> None:
    decoder = code.incremental()
    assert not decoder.hopeless(range(code.n))
    assert decoder.hopeless([])
    assert not decoder.decodable
    assert decoder.update(range(code.n))
    assert not decoder.hopeless([])


def test_two_rounds_do_not_know_of_each_other(code: GradientCode) -> None:
    first, second = code.incremental(), code.incremental()
    first.update(range(code.n))
    assert not second.decodable
    assert second.survivors == []
    second.add(0)
    assert second.decodable == solvable(code, frozenset([0]))


@st.composite
def codes_and_orders(draw: st.DrawFn) -> tuple[GradientCode, list[int]]:
    n = draw(st.integers(1, 20))
    s = draw(st.integers(0, n - 1))
    family = draw(st.sampled_from(["fractional", "cyclic", "nameless"]))
    if family == "fractional":
        k = draw(st.integers(n // (s + 1), 2 * n))
        code = fractional_repetition(n, s, k=k, order=draw(st.permutations(range(n))))
    else:
        code = cyclic(n, s, draw(st.integers(0, 999))) if family == "cyclic" else nameless(n, s)
    return code, draw(st.permutations(range(n)))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(codes_and_orders())
@example((cyclic(15, 14, seed=1), list(range(15))))
@example((cyclic(20, 10, seed=3), list(range(20))))
def test_random_orders_are_answered_as_from_scratch(drawn: tuple[GradientCode, list[int]]) -> None:
    code, arrivals = drawn
    decoder = code.incremental()
    for t, worker in enumerate(arrivals, 1):
        was = decoder.decodable
        answer = decoder.add(worker)
        error = from_scratch(code, arrivals[:t])[1]
        if not 1e-10 < error < 1e-6:  # in between the rounding decides, here and there
            assert answer == (error <= 1e-8), arrivals[:t]
        assert answer or not was
        if answer:
            vector = decoder.vector()
            assert vector is not None
            assert np.abs(vector @ code.B - 1).max() <= 1e-8
            assert not vector[arrivals[t:]].any()


# Size.


def test_fractional_repetition_over_1000_workers_stops_at_the_last_group() -> None:
    code = fractional_repetition(1000, 10)
    decoder = code.incremental()
    arrivals = [int(i) for i in np.random.default_rng(0).permutation(1000)]
    group_of = {worker: holders for worker in range(1000) for holders in [code.holders_of(worker)]}
    first: dict[tuple[int, ...], int] = {}  # group -> its first worker
    for worker in arrivals:
        first.setdefault(group_of[worker], worker)
        assert decoder.add(worker) == (len(first) == 90)
        if decoder.decodable:
            break
    assert 90 < len(decoder.survivors) < 990
    vector = decoder.vector()
    assert vector is not None
    assert set(np.flatnonzero(vector)) == set(first.values())
    assert (vector @ code.B == 1.0).all()


def test_cyclic_repetition_over_1000_workers_stops_when_the_sum_is_exact() -> None:
    code = cyclic(1000, 10, seed=0)
    decoder = code.incremental()
    arrivals = [int(i) for i in np.random.default_rng(0).permutation(1000)]
    vectors = []
    for worker in arrivals:
        if decoder.add(worker):
            vector = decoder.vector()
            assert vector is not None
            assert not vector[arrivals[len(decoder.survivors) :]].any()
            assert np.abs(vector @ code.B - 1).max() <= 1e-8
            vectors.append(vector)
    # Fewer than n - s never decode; the rounding may cost a reply or two more.
    assert 8 <= len(vectors) <= 11
    lengths = [float(np.linalg.norm(vector)) for vector in vectors]
    assert lengths == sorted(lengths, reverse=True)
    shortest, error = from_scratch(code, range(1000))
    assert error <= 1e-8
    assert close(vectors[-1], shortest)


def test_rounding_of_rows_that_were_taken_out_does_not_hide_a_solution() -> None:
    B = np.array([[1, 0, 0, 1, 1], [0, 0, 1, 0, 1], [0, 0, 1, 0, 1], [1, 0, 0, 0, 0], [1, 1, 0, 1, 0]], float)
    code = GradientCode(B, 0)
    decoder = code.incremental()
    assert [decoder.add(worker) for worker in (1, 2, 4)] == [False, False, True]
