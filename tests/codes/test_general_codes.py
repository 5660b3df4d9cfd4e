"""What each family over the reals promises beside the laws of all codes: any assignment, groups, and estimates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from fl_gradcode.codes import (
    GradientCode,
    bernoulli,
    cyclic_mds,
    cyclic_repetition,
    for_assignment,
    fractional_repetition,
    stochastic,
    vandermonde,
)
from fl_gradcode.errors import InvalidCode, NotDecodable
from fl_gradcode.placement.assignment import Assignment


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def subsets(n: int) -> Iterator[list[int]]:
    return ([i for i in range(n) if mask >> i & 1] for mask in range(2**n))


def at_random(n: int, k: int, r: int, extra: int, seed: int = 0) -> NDArray[np.bool_]:
    """Each shard on r to r + extra workers."""
    rng = generator(seed)
    held = np.zeros((n, k), bool)
    for j in range(k):
        held[rng.permutation(n)[: r + int(rng.integers(extra + 1))], j] = True
    return held


def neighbours(n: int, r: int) -> NDArray[np.bool_]:
    return np.array([[(i - j) % n < r for j in range(n)] for i in range(n)])


def kappas(code: GradientCode, patterns: int = 50) -> list[float]:
    """Over random sets of s stragglers, all of which decode."""
    rng, found = generator(1), list[float]()
    for _ in range(patterns):
        survivors = rng.permutation(code.n)[: code.n - code.s].tolist()
        assert code.decodable(survivors)
        found.append(code.kappa(survivors))
    return found


UNIVERSAL = [
    for_assignment(at_random(n, k, s + m, extra, seed), s=s, m=m)
    for seed, (n, k, s, m, extra) in enumerate(
        [(6, 6, 2, 1, 0), (7, 4, 2, 1, 2), (7, 9, 1, 2, 1), (8, 8, 3, 2, 3), (8, 3, 2, 3, 0), (6, 5, 0, 1, 2)]
    )
]
GROUPED = [fractional_repetition(n, s, m=m) for n, s, m in ((10, 3, 2), (10, 2, 3), (7, 1, 2), (9, 1, 2), (8, 2, 2))]
CLASSICAL = [*(cyclic_mds(7, s) for s in (0, 2, 4, 6)), cyclic_mds(8, 3), *(vandermonde(7, s) for s in range(7))]
FEWER = [*UNIVERSAL, *GROUPED[2:], *CLASSICAL]


@pytest.fixture(params=UNIVERSAL, ids=repr)
def universal(request: pytest.FixtureRequest) -> GradientCode:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("n", range(2, 14))
def test_a_cyclic_mds_code_is_real_exactly_if_its_roots_come_in_conjugate_pairs(n: int) -> None:
    for s in range(1, n):
        runs = [set(range(z, z + s)) for z in range(1, n - s + 1)]
        paired = [roots for roots in runs if roots == {n - t for t in roots}]
        assert len(paired) == (n - s) % 2
        if not paired:
            with pytest.raises(InvalidCode, match=rf"^n - s = {n} - {s} is even, .* Change n or s\.$"):
                cyclic_mds(n, s)
            continue
        B = cyclic_mds(n, s).B
        assert all(np.array_equal(B[:, j], np.roll(B[:, 0], j)) for j in range(n))
        assert np.flatnonzero(B[:, 0]).tolist() == list(range(s + 1))
        values = np.abs(np.fft.fft(B[:, 0]))  # of the polynomial, at all n-th roots of unity
        assert set(np.flatnonzero(values < 1e-9)) == paired[0]


@pytest.mark.parametrize(("n", "s"), [(n, s) for n in range(2, 13) for s in range(n)])
def test_the_real_vandermonde_code_is_that_of_divided_differences_at_chebyshev_points(n: int, s: int) -> None:
    code, x = vandermonde(n, s), np.cos(np.pi * (2 * np.arange(n) + 1) / (2 * n))
    np.testing.assert_allclose(np.linalg.norm(code.B, axis=1), 1.0)
    for i in range(n):
        assert set(code.shards_of(i)) == {(i + t) % n for t in range(s + 1)}
        scale = [code.B[i, j] * math.prod(x[i] - x[h] for h in code.holders_of(j) if h != i) for j in code.shards_of(i)]
        np.testing.assert_allclose(scale, scale[0], rtol=1e-9)
        assert scale[0] > 0


@pytest.mark.parametrize(("make", "few"), [(vandermonde, 16), (cyclic_mds, 19)])
def test_classical_codes_warn_where_rounding_grows_too_much(make: Callable[[int, int], GradientCode], few: int) -> None:
    make(few, few - 5)  # warnings are errors
    with pytest.warns(
        UserWarning, match=rf"with n=22 workers amplifies rounding errors beyond use; .* up to {few}\. Use"
    ) as seen:
        make(22, 3)
    assert [warning.filename for warning in seen] == [__file__]


@pytest.mark.parametrize(("make", "n"), [(vandermonde, n) for n in (12, 16)] + [(cyclic_mds, n) for n in (12, 16, 19)])
def test_where_classical_codes_do_not_warn_any_row_of_s_neighbours_may_straggle(
    make: Callable[[int, int], GradientCode], n: int
) -> None:
    for code in [make(n, s) for s in range(n) if make is vandermonde or (n - s) % 2]:
        for first in range(n):
            survivors = [(first + i) % n for i in range(n - code.s)]
            assert code.decodable(survivors), code
            # Far from the tolerance, 1e-8: other machines round otherwise.
            assert code.error_of(code.least_squares_vector(survivors)) < 2e-9, code


def test_an_assignment_may_come_in_any_form() -> None:
    held = at_random(6, 5, 3, 2)
    lists = [np.flatnonzero(row).tolist() for row in held]
    forms: list[Any] = [held, held.astype(int), held.tolist(), lists, Assignment(held)]
    for form in forms:
        assert np.array_equal(for_assignment(form, s=2).B, for_assignment(held, s=2).B)


def test_everybody_codes_what_it_holds_and_nothing_else() -> None:
    for n, k, s, m, extra in ((6, 6, 2, 1, 0), (7, 4, 2, 1, 3), (9, 20, 2, 2, 4)):
        held = at_random(n, k, s + m, extra)
        held[:, 0] = True
        blocks = for_assignment(held, s=s, m=m).blocks
        assert (np.any(blocks, axis=2) == held).all() and (np.all(blocks, axis=2) == held).all()


@pytest.mark.parametrize(("s", "m"), [(2, 1), (1, 2)])
def test_a_shard_with_a_holder_too_few_is_refused_by_name(s: int, m: int) -> None:
    held = np.ones((5, 3), bool)
    held[[0, 2, 3], 1] = False
    sentence = (
        f"Shard 1 is held by 2 workers (1, 4); tolerating s={s} stragglers{' at m=2' if m > 1 else ''} needs at least "
        f"3. Add a holder or lower {'s or m' if m > 1 else 's'}."
    )
    for holders in (None, 3):
        with pytest.raises(InvalidCode, match=f"^{re.escape(sentence)}$"):
            for_assignment(held, s=s, m=m, holders=holders)


def test_rows_have_length_one_and_span_no_more_than_they_must(universal: GradientCode) -> None:
    rows = universal.B.reshape(universal.n, -1)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [float(row.any()) for row in rows])  # some hold nothing
    assert np.linalg.matrix_rank(rows, tol=1e-9) <= universal.n - universal.s


def test_kappa_never_increases_as_replies_arrive(universal: GradientCode) -> None:
    for seed in range(20):
        arrivals = generator(seed).permutation(universal.n).tolist()
        seen = [universal.kappa(arrivals[:t]) for t in range(universal.n - universal.s, universal.n + 1)]
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(seen))


def test_no_other_valid_vector_has_a_smaller_kappa(universal: GradientCode) -> None:
    n, m, rng = universal.n, universal.m, generator()
    rows, target = universal.B.reshape(n, -1), np.tile(np.eye(m), (universal.k, 1))
    for missing in range(universal.s + 1):
        there = rng.permutation(n)[: n - missing]
        for padded in combinations(there.tolist(), n - universal.s):  # as if the others straggled too
            a = np.zeros((n, m))
            a[list(padded)] = np.linalg.lstsq(rows[list(padded)].T, target, rcond=1e-11)[0]
            assert universal.error_of(a) < 1e-8
            assert universal.kappa(there) <= universal.kappa_of(a) * (1 + 1e-9)


@given(st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_larger_assignments_decode_too(data: st.DataObject) -> None:
    n, m, seed = (data.draw(st.integers(*bounds)) for bounds in ((9, 40), (1, 3), (0, 2**30)))
    s, k, extra = (data.draw(st.integers(*bounds)) for bounds in ((0, n - m), (1, 2 * n), (0, 3)))
    code = for_assignment(at_random(n, k, s + m, extra, seed), s=s, m=m)
    survivors = generator(seed).permutation(n)[: n - s].tolist()
    updates = generator(seed).standard_normal((k, 6))
    total = code.decode(code.encode(updates)[survivors], survivors, length=6)
    assert np.linalg.norm(total - updates.sum(axis=0)) <= 1e-9 * np.linalg.norm(updates.sum(axis=0))


def test_kappa_is_moderate_where_classical_codes_have_lost_every_digit() -> None:
    assert np.median(kappas(for_assignment(neighbours(100, 11), s=10))) < 1e3
    assert np.median(kappas(for_assignment(neighbours(100, 13), s=10))) < 20
    assert np.median(kappas(for_assignment(np.ones((200, 200)), s=20, holders=21))) < 10
    with pytest.warns(UserWarning, match="n=100"):
        assert not vandermonde(100, 10).decodable(range(90))


def test_holders_are_chosen_evenly_among_those_who_may_hold() -> None:
    may = np.ones((12, 40), bool)
    may[:4, 20:] = False
    for allowed, holders, seed in product((np.ones((12, 40)), may), (3, 5), range(5)):
        code = for_assignment(allowed, s=2, holders=holders, rng=generator(seed))
        held = code.B != 0
        assert not (held & (np.asarray(allowed) == 0)).any()
        assert set(held.sum(axis=0)) == {holders}
        load = held.sum(axis=1) / np.asarray(allowed).sum(axis=1)
        assert np.ptp(load) <= 5 / 20  # a handful of shards
    for wrong in (2, 9):
        with pytest.raises(InvalidCode, match=rf"^holders={wrong} must be at least s \+ m = 3, and at most .*: 8\.$"):
            for_assignment(may, s=2, holders=wrong)


def test_a_code_depends_on_its_generator_alone() -> None:
    held = neighbours(8, 4)
    made = [for_assignment(held, s=2, rng=generator(seed)).B for seed in (5, 5, 6)]
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
    assert np.array_equal(for_assignment(held, s=2).B, for_assignment(held, s=2).B)


@pytest.mark.parametrize("code", GROUPED, ids=repr)
def test_groups_decode_from_any_m_replies_each_and_not_before(code: GradientCode) -> None:
    assert code.groups is not None
    assert {len(group) >= code.s + code.m for group in code.groups} == {True}
    chance = 0.0
    for survivors in subsets(code.n):
        enough = all(len(set(group).intersection(survivors)) >= code.m for group in code.groups)
        assert code.decodable(survivors) == enough
        dead = set(generator(len(survivors)).permutation(code.n)[: code.s + 1].tolist()) - set(survivors)
        waiting = set(range(code.n)) - dead - set(survivors)
        decoder = code.incremental()
        decoder.update(survivors)
        reachable = all(len(set(group) - dead) >= code.m for group in code.groups)
        assert decoder.hopeless(waiting) == (not reachable)
        chance += enough * 0.3 ** (code.n - len(survivors)) * 0.7 ** len(survivors)
    binomial = [[math.comb(len(g), t) * 0.7**t * 0.3 ** (len(g) - t) for t in range(len(g) + 1)] for g in code.groups]
    assert chance == pytest.approx(math.prod(sum(terms[code.m :]) for terms in binomial))


@pytest.mark.parametrize("d", range(8))
@pytest.mark.parametrize("code", GROUPED, ids=repr)
def test_groups_and_the_universal_construction_find_the_same_sum(code: GradientCode, d: int) -> None:
    updates, n, s = generator(d).standard_normal((code.k, d)), code.n, code.s
    other = for_assignment(np.any(code.blocks, axis=2), s=s, m=code.m)
    for each in (code, other):
        replies = each.encode(updates)
        assert replies.shape == (n, math.ceil(d / code.m))
        for stragglers in list(combinations(range(n), s))[::7]:
            there = [i for i in range(n)[::-1] if i not in stragglers]
            assert each.decode(replies[there], there).size == math.ceil(d / code.m) * code.m
            total = each.decode(replies[there], there, length=d)
            np.testing.assert_allclose(total, updates.sum(axis=0), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("code", GROUPED, ids=repr)
def test_inside_a_group_every_m_replies_are_far_from_singular(code: GradientCode) -> None:
    for group in code.groups or ():
        inside = code.blocks[list(group), code.shards_of(group[0])[0]]
        np.testing.assert_allclose(np.linalg.norm(inside, axis=1), 1.0)
        assert max(np.linalg.cond(inside[list(rows)]) for rows in combinations(range(len(group)), code.m)) < 100


def test_with_m_of_one_groups_are_plain_repetition_bit_for_bit() -> None:
    for n, s in ((6, 1), (8, 3), (12, 2)):
        code, g = fractional_repetition(n, s, m=1, rng=generator()), n // (s + 1)
        assert np.array_equal(code.B, [[float(i % g == j % g) for j in range(n)] for i in range(n)])
        updates, there = generator().standard_normal((n, 9)), generator().permutation(n)[: n - s].tolist()
        replies = np.array([sum(updates[j] for j in code.shards_of(i)) for i in range(n)])
        total = sum((replies[q] for q in range(1, g)), replies[0])
        assert code.decode(replies[there], there).tobytes() == total.tobytes()
    with pytest.raises(InvalidCode, match=r"^s=2 stragglers at m=3 need groups of 5 workers; there are n=4\. Lower s"):
        fractional_repetition(4, 2, m=3)
    with pytest.raises(InvalidCode, match=r"^k=1 shards cannot fill 2 groups; .* floor\(n / \(s \+ m\)\) = 2\.$"):
        fractional_repetition(7, 1, m=2, k=1)


@pytest.mark.parametrize("code", FEWER, ids=repr)
def test_coverage_is_all_ones_exactly_when_decodable(code: GradientCode) -> None:
    assert code.exact
    for survivors in subsets(code.n):
        decodable = code.decodable(survivors)
        assert decodable == (np.abs(code.coverage(survivors) - 1).max() <= 1e-8), survivors
        assert decodable == (code.decoding_error(survivors) <= 1e-8), survivors


def approximate(n: int = 7, s: int = 2, seed: int = 0) -> list[GradientCode]:
    return [bernoulli(n, s, rng=generator(seed)), stochastic(n, s, p=0.2, rng=generator(seed))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n", "s", "k"), [(9, 0, None), (9, 2, 4), (30, 3, 100), (1, 0, 5), (5, 4, None)])
def test_approximate_codes_lose_no_shard_and_hold_as_much_as_exact_ones(
    n: int, s: int, k: int | None, seed: int
) -> None:
    drawn, even = bernoulli(n, s, k=k, rng=generator(seed)), stochastic(n, s, k=k, p=0.25, rng=generator(seed))
    for code in (drawn, even):
        assert not code.exact and (code.n, code.s, code.k) == (n, s, k or n)
        assert all(code.holders_of(j) for j in range(code.k))
    assert set(drawn.B.ravel()) <= {0.0, 1.0}
    if k == 100:  # the mean of 3000 draws
        assert (drawn.B.sum() / 100 / (s + 1)) == pytest.approx(1, abs=4 * math.sqrt(1 / 300))
    assert {len(even.holders_of(j)) for j in range(even.k)} == {s + 1}
    assert np.ptp([len(even.shards_of(i)) for i in range(n)]) <= 1
    assert set(even.B.ravel()) - {0.0} == {1 / ((s + 1) * 0.75)}
    for code, again in zip((drawn, even), approximate(n, s, seed), strict=True):
        assert k or np.array_equal(code.B != 0, again.B != 0)


@pytest.mark.parametrize("code", [*approximate(), *UNIVERSAL[:2], cyclic_repetition(7, 2, rng=generator())], ids=repr)
def test_optimal_decoding_projects_and_errs_less_with_every_reply(code: GradientCode) -> None:
    error = {}
    for survivors in subsets(code.n):
        error[tuple(survivors)] = float(np.square(code.coverage(survivors) - 1).sum())
        _, sigma, Vt = np.linalg.svd(code.B[survivors], full_matrices=False)
        basis = Vt[sigma > 1e-10]
        np.testing.assert_allclose(code.coverage(survivors), basis.T @ basis.sum(axis=1), atol=1e-8)
    for there, worse in error.items():
        assert all(error[tuple(sorted({*there, i}))] <= worse + 1e-9 for i in range(code.n))


@pytest.mark.parametrize("code", approximate(), ids=repr)
def test_an_approximate_code_promises_nothing_and_waits_for_n_minus_s(code: GradientCode) -> None:
    for survivors in subsets(code.n):
        if not code.decodable(survivors):
            with pytest.raises(NotDecodable, match=r"do not determine the sum \(decoding error [0-9.e-]+\)\.$"):
                code.decoding_vector(survivors)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("n", "s"), [(6, 0), (8, 2), (8, 7)])
def test_adding_up_what_is_in_is_unbiased_with_the_variance_of_the_paper(n: int, s: int, p: float) -> None:
    code, mean, square = stochastic(n, s, k=5, p=p, rng=generator()), np.zeros(5), np.zeros(5)
    for survivors in subsets(n):
        chance = p ** (n - len(survivors)) * (1 - p) ** len(survivors)
        shares = code.coverage_of(np.isin(np.arange(n), survivors).astype(float))
        mean, square = mean + chance * shares, square + chance * np.square(shares - 1)
    np.testing.assert_allclose(mean, 1.0)
    np.testing.assert_allclose(square, p / ((s + 1) * (1 - p)), atol=1e-12)
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(InvalidCode, match=rf"^p={wrong} must be a probability below 1\.$"):
            stochastic(n, s, p=wrong, rng=generator())


def regularised(code: GradientCode, there: Sequence[int], ridge: float) -> NDArray[np.float64]:
    """a = (B_R B_R^T + ridge diag(|b_i|^2))^-1 B_R 1, for each block."""
    rows, target = code.B.reshape(code.n, -1)[list(there)], np.tile(np.eye(code.m), (code.k, 1))
    a = np.zeros((code.n, code.m))
    a[list(there)] = np.linalg.solve(rows @ rows.T + ridge * np.diag(np.square(rows).sum(axis=1)), rows @ target)
    return a if code.m > 1 else a[:, 0]


@pytest.mark.parametrize("code", [*approximate(), *UNIVERSAL[:4]], ids=repr)
def test_ridge_is_the_regularised_optimum(code: GradientCode) -> None:
    lengths = np.linalg.norm(code.B.reshape(code.n, -1), axis=1)
    for there in ([4, 0, 2], [1, 5, 3, 0], list(range(code.n))):
        weights = []
        for ridge in (10.0, 1.0, 1e-2, 1e-4):
            a = code.least_squares_vector(there, ridge=ridge)
            np.testing.assert_allclose(a, regularised(code, there, ridge), atol=1e-9, rtol=1e-7)
            weights.append(float(np.linalg.norm(a.reshape(code.n, -1) * lengths[:, None])))
        assert weights == sorted(weights) and weights[0] < weights[-1]
        limit = code.coverage_of(code.least_squares_vector(there, ridge=1e-12))
        np.testing.assert_allclose(limit, code.coverage_of(code.least_squares_vector(there)), atol=1e-4)
    with pytest.raises(InvalidCode, match=r"^ridge=(-1|nan) must be at least 0\.$"):
        code.least_squares_vector([0], ridge=-1)
    if code.m == 1:
        rows, squares = code.B[[4, 0, 2]], np.square(lengths[[4, 0, 2]])

        def cost(a: NDArray[np.float64]) -> float:
            return float(np.square(a @ rows - 1).sum() + 0.3 * np.square(a) @ squares)

        found = minimize(cost, np.zeros(3), tol=1e-10)
        np.testing.assert_allclose(code.least_squares_vector([4, 0, 2], ridge=0.3)[[4, 0, 2]], found.x, atol=1e-5)
