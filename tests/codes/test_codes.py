"""Laws that every gradient code obeys, and what each family promises beside them."""

from __future__ import annotations

import math
import re
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations, permutations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode.codes import GradientCode, cyclic_repetition, fractional_repetition, uncoded
from fl_gradcode.errors import InvalidCode, NotDecodable
from tests.codes.samples import (
    CODES,
    FRACTIONAL,
    GENERAL,
    PAIRS,
    cyclic,
    group_mds,
    shuffled,
    supports,
)

# Singular values below this share of the largest are rounding: a row of ones is a row of ones.
RANK = 1e-11


@pytest.fixture(params=CODES, ids=repr)
def code(request: pytest.FixtureRequest) -> GradientCode:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=FRACTIONAL, ids=repr)
def fractional(request: pytest.FixtureRequest) -> GradientCode:
    return request.param  # type: ignore[no-any-return]


def subsets(n: int) -> Iterator[list[int]]:
    return ([i for i in range(n) if mask >> i & 1] for mask in range(2**n))


def large_enough(code: GradientCode, seed: int = 3) -> Iterator[list[int]]:
    """The survivors of every set of s stragglers, each in some order of arrival."""
    rng = np.random.default_rng(seed)
    for stragglers in combinations(range(code.n), code.s):
        yield [int(i) for i in rng.permutation([i for i in range(code.n) if i not in stragglers])]


def conditions(B: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`a` decodes if and only if `matrix.T @ a` is the target; a has one column for each of the m blocks."""
    n, k, m = B.shape if B.ndim == 3 else (*B.shape, 1)
    return B.reshape(n, k * m), np.tile(np.eye(m), (k, 1))


def error_of(code: GradientCode, a: NDArray[np.float64]) -> float:
    matrix, target = conditions(code.B)
    return float(np.abs(matrix.T @ a.reshape(code.n, -1) - target).max())


def minimum_norm(code: GradientCode, survivors: Sequence[int]) -> NDArray[np.float64]:
    """The shortest least-squares solution over the survivors, shape (n, m)."""
    matrix, target = conditions(code.B)
    a = np.zeros((code.n, target.shape[1]))
    if len(survivors):
        a[list(survivors)] = np.linalg.lstsq(matrix[list(survivors)].T, target, rcond=RANK)[0]
    return a


@cache
def decodable_sets(code: GradientCode) -> dict[tuple[int, ...], bool]:
    return {tuple(survivors): code.decodable(survivors) for survivors in subsets(code.n)}


def groups_of(code: GradientCode) -> list[tuple[int, ...]]:
    """The groups of a repetition code, read off the matrix."""
    return sorted(set(supports(code)))


# Laws of all codes.


def test_any_s_stragglers_decode(code: GradientCode) -> None:
    updates = np.random.default_rng(0).standard_normal((code.k, 7))
    replies = code.encode(updates)
    expected = updates.sum(axis=0)
    for survivors in large_enough(code):
        assert code.decodable(survivors)
        a = code.decoding_vector(survivors)
        assert a.shape == ((code.n,) if code.m == 1 else (code.n, code.m))
        assert not a[[i for i in range(code.n) if i not in survivors]].any()
        assert error_of(code, a) <= 1e-8
        total = code.decode(replies[survivors], survivors, length=7)
        assert total.dtype == np.float64
        assert np.linalg.norm(total - expected) <= 1e-9 * np.linalg.norm(expected)


def test_float32_stays_float32(code: GradientCode) -> None:
    updates = np.random.default_rng(0).standard_normal((code.k, 12)).astype(np.float32)
    replies = code.encode(updates)
    assert replies.dtype == np.float32
    for survivors in list(large_enough(code))[:5]:
        total = code.decode(replies[survivors], survivors, length=12)
        assert total.dtype == np.float32
        allowed = 1e-6 * max(1.0, code.kappa(survivors)) * math.sqrt(code.k * 12)
        assert np.linalg.norm(total - updates.astype(np.float64).sum(axis=0)) <= allowed


def test_a_reply_more_never_hurts(code: GradientCode) -> None:
    sets = decodable_sets(code)
    for survivors, decodable in sets.items():
        if decodable:
            assert all(sets[tuple(sorted({*survivors, i}))] for i in range(code.n))


def test_decodable_agrees_with_brute_force(code: GradientCode) -> None:
    for survivors, decodable in decodable_sets(code).items():
        assert decodable == (error_of(code, minimum_norm(code, survivors)) <= 1e-8), survivors


def test_what_does_not_decode_is_refused_with_its_error(code: GradientCode) -> None:
    matrix, target = conditions(code.B)
    undecodable = [survivors for survivors, decodable in decodable_sets(code).items() if not decodable]
    for survivors in undecodable[:10] + undecodable[-10:]:
        error = np.abs(matrix.T @ minimum_norm(code, survivors) - target).max()
        sentence = (
            f"The replies of {len(survivors)} of {code.n} workers do not determine the sum (decoding error "
            f"{error:.2g}); any {code.n - code.s} replies do."
        )
        with pytest.raises(NotDecodable, match=f"^{re.escape(sentence)}$"):
            code.decoding_vector(survivors)


def test_coverage_and_error_are_those_of_the_best_vector(code: GradientCode) -> None:
    matrix, target = conditions(code.B)
    for survivors in subsets(min(code.n, 5)):
        fit = matrix.T @ minimum_norm(code, survivors)
        coverage = fit.reshape(code.k, code.m, code.m).trace(axis1=1, axis2=2) / code.m
        np.testing.assert_allclose(code.coverage(survivors), coverage, atol=1e-8)
        assert code.decoding_error(survivors) == pytest.approx(np.abs(fit - target).max(), abs=1e-8)


def test_workers_hold_the_shards_of_their_nonzeros(code: GradientCode) -> None:
    assert [code.holders_of(j) for j in range(code.k)] == supports(code)
    for i in range(code.n):
        assert code.shards_of(i) == tuple(j for j in range(code.k) if i in supports(code)[j])


def test_every_shard_has_holders_enough_for_the_converse(code: GradientCode) -> None:
    assert min(map(len, supports(code))) >= code.s + code.m


# Noise amplification.


@pytest.mark.parametrize(
    ("code", "survivors"),
    [
        (cyclic(7, 2), [6, 0, 3, 4, 1]),
        (cyclic(7, 2), range(7)),
        (cyclic(6, 3, seed=4), [5, 2, 0]),
        (group_mds(8, 2, 2), [0, 1, 6, 7, 3, 4]),
        (fractional_repetition(7, 2, k=9), [6, 5, 1]),
    ],
    ids=str,
)
def test_kappa_is_the_growth_of_independent_noise(code: GradientCode, survivors: Sequence[int]) -> None:
    # Each (worker, shard, block) has a rounding error of its own, standard deviation 1; summed without a code,
    # k of them meet in each entry.
    B = code.B.reshape(code.n, code.k, code.m)
    a = code.decoding_vector(survivors).reshape(code.n, code.m)
    noise = np.random.default_rng(0).standard_normal((20_000, *B.shape))
    decoded = np.einsum("il,ijb,tijb->tl", a, B, noise, optimize=True)
    assert code.kappa(survivors) == pytest.approx(np.sqrt(np.square(decoded).mean() / code.k), rel=0.02)


def test_fractional_repetition_amplifies_nothing(fractional: GradientCode) -> None:
    for survivors, decodable in decodable_sets(fractional).items():
        if decodable:
            assert fractional.kappa(survivors) == pytest.approx(1.0, abs=1e-15)
            assert fractional.decoding_error(survivors) == 0.0


# General codes.


@pytest.mark.parametrize("code", GENERAL, ids=repr)
def test_general_codes_decode_with_the_shortest_vector(code: GradientCode) -> None:
    for survivors in subsets(code.n):
        if decodable_sets(code)[tuple(survivors)]:
            a = code.decoding_vector(survivors).reshape(code.n, -1)
            shortest = minimum_norm(code, survivors)
            assert np.linalg.norm(a - shortest) <= 1e-8 * np.linalg.norm(shortest), survivors


@pytest.mark.parametrize(("n", "s"), PAIRS)
def test_cyclic_repetition_holds_the_next_s_shards(n: int, s: int) -> None:
    code = cyclic(n, s)
    for i in range(n):
        assert set(code.shards_of(i)) == {(i + t) % n for t in range(s + 1)}
        assert code.B[i, i] == 1.0


def test_cyclic_repetition_depends_on_nothing_but_its_generator() -> None:
    assert np.array_equal(cyclic(7, 3).B, cyclic(7, 3).B)
    assert not np.array_equal(cyclic(7, 3).B, cyclic(7, 3, seed=2).B)
    one = np.random.default_rng(1)
    assert not np.array_equal(cyclic_repetition(7, 3, rng=one).B, cyclic_repetition(7, 3, rng=one).B)


@pytest.mark.parametrize("n", [2, 5, 9, 15, 20])
def test_cyclic_repetition_keeps_its_promise_for_the_largest_s(n: int) -> None:
    # Every worker holds everything, and all rows are the vector of ones up to the rounding of the coefficients.
    for seed in range(25):
        code = cyclic(n, n - 1, seed)
        assert np.abs(code.B - 1.0).max() < 1e-9
        assert [i for i in range(n) if not code.decodable([i])] == [], f"seed {seed}"


def test_a_worker_that_is_not_needed_is_not_waited_for() -> None:
    code = GradientCode(np.array([[1.0, 1.0], [1.0, 0.0]]), 0)
    assert code.decodable([0])
    assert code.decoding_vector([0]).tolist() == pytest.approx([1.0, 0.0])


def test_decodable_agrees_with_brute_force_on_random_matrices() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        B = rng.integers(-1, 2, size=(int(rng.integers(2, 7)), int(rng.integers(1, 6)))).astype(float)
        if B.any(axis=0).all():
            code = GradientCode(B, 0)
            for survivors in subsets(code.n):
                solvable = error_of(code, minimum_norm(code, survivors)) <= 1e-8
                assert code.decodable(survivors) == solvable, (B.tolist(), survivors)


# Fractional repetition.


def test_fractional_repetition_decodes_as_soon_as_each_group_has_a_reply(fractional: GradientCode) -> None:
    groups = groups_of(fractional)
    for survivors, decodable in decodable_sets(fractional).items():
        assert decodable == all(set(group).intersection(survivors) for group in groups)


def test_fractional_repetition_takes_the_first_reply_of_each_group(fractional: GradientCode) -> None:
    for seed in range(20):
        arrivals = shuffled(fractional.n, seed)[: fractional.n - seed % (fractional.s + 1)]
        first = {min(group, key=(*arrivals, *range(fractional.n)).index) for group in groups_of(fractional)}
        a = fractional.decoding_vector(arrivals)
        assert a.tolist() == [float(i in first) for i in range(fractional.n)]


def test_fractional_repetition_covers_the_groups_that_answered(fractional: GradientCode) -> None:
    for survivors in subsets(fractional.n):
        covered = [float(bool(set(holders).intersection(survivors))) for holders in supports(fractional)]
        assert fractional.coverage(survivors).tolist() == covered
        assert fractional.decoding_error(survivors) == 1.0 - min(covered)


def block_sums(code: GradientCode, updates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replies whose bits are the same within a group, whatever the linear algebra library does."""
    return np.array([sum((updates[j] for j in code.shards_of(i)), np.zeros(updates.shape[1])) for i in range(code.n)])


@pytest.mark.parametrize(
    "code", [*FRACTIONAL, fractional_repetition(20, 3), fractional_repetition(30, 2, order=shuffled(30, 0))], ids=repr
)
def test_decoded_bits_do_not_depend_on_who_came_first(code: GradientCode) -> None:
    replies = block_sums(code, np.random.default_rng(0).standard_normal((code.k, 50)))
    expected = code.decode(replies, range(code.n))
    for seed in range(20):
        arrivals = shuffled(code.n, seed)[: code.n - seed % (code.s + 1)]
        assert code.decode(replies[arrivals], arrivals).tobytes() == expected.tobytes(), arrivals


def test_decoding_adds_the_block_sums_in_group_order() -> None:
    for n, s in ((6, 1), (8, 1), (12, 2), (9, 0)):
        code = fractional_repetition(n, s)
        replies = block_sums(code, np.random.default_rng(0).standard_normal((n, 50)))
        total = np.zeros(50)
        for q in range(n // (s + 1)):  # worker q is the first of group q
            total = total + replies[q]
        arrivals = shuffled(n, 5)
        assert code.decode(replies[arrivals], arrivals).tobytes() == total.tobytes()


def sizes(n: int, s: int, k: int) -> Iterator[GradientCode]:
    yield fractional_repetition(n, s, k=k)
    yield fractional_repetition(n, s, k=k, order=shuffled(n, n + s))


@pytest.mark.parametrize("n", range(1, 13))
def test_groups_and_blocks_are_even(n: int) -> None:
    for s in range(n):
        g = n // (s + 1)
        for code in (code for k in {g, n, 2 * n + 1} for code in sizes(n, s, k)):
            assert code.groups is not None
            assert sorted(i for group in code.groups for i in group) == list(range(n))
            members = [len(group) for group in code.groups]
            assert len(members) == g
            assert max(members) - min(members) <= 1
            assert min(members) >= s + 1
            assert all(holders in code.groups for holders in supports(code))
            blocks = [supports(code).count(group) for group in code.groups]
            assert max(blocks) - min(blocks) <= 1
            assert min(blocks) >= 1
            assert set(code.B.ravel()) <= {0.0, 1.0}


@pytest.mark.parametrize(("n", "s"), PAIRS)
def test_a_worker_holds_its_own_shard_when_there_are_n(n: int, s: int) -> None:
    for code in (*sizes(n, s, n), uncoded(n), cyclic(n, s)):
        assert all(i in code.shards_of(i) for i in range(n))


@pytest.mark.parametrize("n", range(2, 13))
def test_consecutive_workers_in_order_land_in_different_groups(n: int) -> None:
    for s, seed in product(range(n), range(3)):
        order = shuffled(n, seed)
        code = fractional_repetition(n, s, order=order)
        g = n // (s + 1)
        for start in range(n - g + 1):
            assert len({code.holders_of(worker) for worker in order[start : start + g]}) == g


# Tables and figures of reference/codes.md, section 2.


@pytest.mark.parametrize(
    ("n", "s", "groups", "load"),
    [(64, 3, [4] * 16, 0.0625), (10, 2, [3, 3, 4], 1 / 3), (11, 3, [5, 6], 0.5), (7, 3, [7], 1)],
)
def test_loads_of_fractional_repetition_are_the_published_ones(n: int, s: int, groups: list[int], load: float) -> None:
    code = fractional_repetition(n, s, k=2 * (n // (s + 1)))  # the number of groups divides k
    assert code.groups is not None
    assert sorted(map(len, code.groups)) == groups
    assert {len(code.shards_of(i)) / code.k for i in range(n)} == {load}


TABLE = [(4, 0.05, 0.601, 0.9999), (4, 0.1, 0.106, 0.998), (4, 0.2, 0.0005, 0.975), (8, 0.3, 0.0003, 0.9995)]


@pytest.mark.parametrize(("r", "p", "any_set", "anytime"), TABLE)
def test_chance_to_decode_is_the_published_one(r: int, p: float, any_set: float, anytime: float) -> None:
    code = fractional_repetition(64, r - 1)
    assert code.groups is not None
    assert sum(math.comb(64, t) * p**t * (1 - p) ** (64 - t) for t in range(r)) == pytest.approx(any_set, rel=0.1)
    exact = math.prod(1 - p ** len(group) for group in code.groups)
    assert exact == pytest.approx(anytime, abs=5e-4)
    rng = np.random.default_rng(0)
    decoded = np.mean([code.decodable(np.flatnonzero(rng.random(64) >= p)) for _ in range(1000)])
    assert decoded == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 1000) + 1e-9)


@pytest.mark.parametrize(("n", "s"), [(8, 1), (8, 2), (7, 2), (7, 0)])
def test_chance_to_decode_is_a_product_over_groups(n: int, s: int) -> None:
    p, code = 0.3, fractional_repetition(n, s)
    chance = sum(
        p ** (n - len(survivors)) * (1 - p) ** len(survivors)
        for survivors, decodable in decodable_sets(code).items()
        if decodable
    )
    assert chance == pytest.approx(math.prod(1 - p ** len(group) for group in groups_of(code)))


@pytest.mark.parametrize(("n", "s", "t"), [(8, 1, 3), (6, 2, 3), (8, 3, 5)])
def test_mean_squared_error_is_hypergeometric(n: int, s: int, t: int) -> None:
    r, code = s + 1, fractional_repetition(n, s)
    errors = [np.square(code.coverage(live) - 1).mean() for live in subsets(n) if len(live) == n - t]
    assert np.mean(errors) == pytest.approx(math.comb(n - r, t - r) / math.comb(n, t))


# Upload reduction, m > 1.


@pytest.mark.parametrize("d", [0, 1, 2, 5, 6, 7])
@pytest.mark.parametrize(("n", "s", "m"), [(7, 1, 2), (8, 1, 3), (6, 0, 3)])
def test_replies_are_a_fraction_of_the_update(n: int, s: int, m: int, d: int) -> None:
    code = group_mds(n, s, m, k=4)
    updates = np.random.default_rng(0).standard_normal((4, d))
    replies = code.encode(updates)
    blocks = np.hstack([updates, np.zeros((4, -d % m))]).reshape(4, m, -1)
    assert replies.shape == (n, math.ceil(d / m))
    np.testing.assert_allclose(replies, np.einsum("ijl,jld->id", code.B, blocks), atol=1e-12)
    survivors = shuffled(n, d)[s:]
    padded = code.decode(replies[survivors], survivors)
    assert padded.shape == (math.ceil(d / m) * m,)
    np.testing.assert_allclose(padded[d:], 0, atol=1e-12)
    assert code.decode(replies[survivors], survivors, length=d).shape == (d,)


def test_group_mds_decodes_as_soon_as_each_group_has_m_replies() -> None:
    for n, s, m in ((8, 2, 2), (7, 1, 2), (8, 1, 3)):
        code = group_mds(n, s, m)
        for survivors, decodable in decodable_sets(code).items():
            assert decodable == all(len(set(group).intersection(survivors)) >= m for group in groups_of(code))


def test_m_of_one_written_as_three_axes_is_the_same_code() -> None:
    flat = cyclic(5, 2)
    deep = GradientCode(flat.B[:, :, None], 2)
    assert deep.m == 1
    updates = np.random.default_rng(0).standard_normal((5, 3))
    np.testing.assert_allclose(deep.encode(updates), flat.encode(updates), atol=1e-13)
    np.testing.assert_allclose(deep.decode(deep.encode(updates)[:3], [0, 1, 2]), updates.sum(axis=0))


# Some of the shards.


@pytest.mark.parametrize(
    "code",
    [fractional_repetition(7, 2), fractional_repetition(6, 1, k=9), cyclic(6, 2), group_mds(8, 1, 2, k=5)],
    ids=repr,
)
def test_restricting_drops_columns_and_keeps_the_promise(code: GradientCode) -> None:
    for shards in subsets(code.k):
        if shards:
            part = code.restrict(shards[::-1])
            assert np.array_equal(part.B, code.B[:, shards])
            assert (part.s, part.m, part.n) == (code.s, code.m, code.n)
            assert all(error_of(part, part.decoding_vector(survivors)) <= 1e-8 for survivors in large_enough(part))
            if code.groups is not None:
                assert part.groups == tuple(g for g in code.groups if set(code.shards_of(g[0])).intersection(shards))


def test_restricting_repetition_waits_only_for_groups_that_still_hold_something() -> None:
    code = fractional_repetition(6, 1).restrict([0, 3])  # group 0 holds both
    assert code.groups == ((0, 3),)
    assert code.decoding_vector([4, 3, 0]).tolist() == [0, 0, 0, 1, 0, 0]
    assert not code.decodable([1, 2, 4, 5])


def test_restricting_to_all_shards_changes_nothing() -> None:
    code = cyclic(5, 1)
    assert code.restrict([4, 3, 2, 1, 0, 0]) is code
    assert code.restrict([1, 1]).k == 1


@pytest.mark.parametrize("shards", [[], [-1, 2], [0, 4]])
def test_restricting_to_shards_that_are_not_there_is_refused(shards: list[int]) -> None:
    listed = re.escape(str(shards))
    with pytest.raises(InvalidCode, match=rf"^Shards {listed} are not a non-empty subset of 0\.\.3\.$"):
        uncoded(4).restrict(shards)


# A code is a value.


def test_the_matrix_cannot_be_changed(code: GradientCode) -> None:
    with pytest.raises(ValueError, match="read-only"):
        code.B[0] = 2.0


def test_changing_the_array_that_was_given_does_not_change_the_code() -> None:
    B = np.ones((3, 2))
    code = GradientCode(B, 2)
    B[:] = 7.0
    assert (code.B == 1.0).all()
    assert B.flags.writeable


def test_a_code_says_what_it_is() -> None:
    assert repr(cyclic(7, 2)) == "<cyclic repetition code: n=7 workers, k=7 shards, s=2 stragglers>"
    assert repr(group_mds(8, 2, 2)).endswith("k=2 shards, s=2 stragglers, m=2>")


def test_whole_numbers_are_encoded_as_float64() -> None:
    code = fractional_repetition(4, 1)
    replies = code.encode([[1, 2], [3, 4], [5, 6], [7, 8]])
    assert replies.dtype == np.float64
    assert code.decode(replies[[3, 0]].astype(int), [3, 0]).tolist() == [16.0, 20.0]


def test_no_reply_decodes_nothing(code: GradientCode) -> None:
    assert not code.decodable([])
    assert code.coverage([]).tolist() == [0.0] * code.k
    with pytest.raises(NotDecodable):
        code.decode(np.ones((0, 3)), [])


def test_the_first_arrivals_decide_even_when_all_are_asked_at_once() -> None:
    code = fractional_repetition(4, 1)
    for arrivals in permutations(range(4)):
        first = {next(i for i in arrivals if i % 2 == q) for q in (0, 1)}
        assert set(np.flatnonzero(code.decoding_vector(arrivals))) == first
        assert np.array_equal(code.least_squares_vector(arrivals), code.decoding_vector(arrivals))


@pytest.mark.parametrize("make", [uncoded, lambda n: fractional_repetition(n, 2)], ids=["uncoded", "repetition"])
def test_repetition_takes_memory_for_its_workers_alone(make: Callable[[int], GradientCode]) -> None:
    n = 2000
    tracemalloc.start()
    try:
        code = make(n)
        code.error_of(code.decoding_vector(range(n)))
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 8 * n * n / 10 and most < 8 * n * n / 3  # n n numbers of 8 bytes are the whole of B
    wanted = np.arange(n)[:, None] % len(code.groups or ()) == np.arange(n) % len(code.groups or ())
    assert (wanted == code.B).all() and code.B.dtype == np.float64 and not code.B.flags.writeable
