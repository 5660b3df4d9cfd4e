"""Codes over the prime field: exact for every pattern of stragglers, by the arithmetic of Python's integers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fl_gradcode.codes import GradientCode, reed_solomon
from fl_gradcode.codes.prime_field import PrimeField, combine_mod, fold, inverse, lift_mod, matmul_mod, solve_mod
from fl_gradcode.errors import FlGradcodeError, InvalidCode, NotDecodable, Overflow
from tests.codes.test_points import second_points

P = 2147483647
ROOM = 2**30 - 1  # the largest sum that differs from all negative ones
EXTREME = [0, 1, 2, 65535, 65536, ROOM, ROOM + 1, P - 2, P - 1]
SIZES = [(n, s, m) for n in range(1, 9) for m in (1, 2, 3) for s in range(n - m + 1)]
SHAPES = [(5, 3, 1, 1), (6, 9, 2, 1), (6, 5, 1, 2), (6, 4, 0, 3), (7, 7, 2, 2), (8, 3, 3, 1), (8, 12, 1, 3)]


def at_random(n: int, k: int, s: int, m: int, extra: int, seed: int = 0) -> NDArray[np.bool_]:
    """Random holders, some shards with up to `extra` more than needed."""
    rng = np.random.default_rng((n, k, s, m, seed))
    held = np.zeros((n, k), bool)
    for j in range(k):
        held[rng.permutation(n)[: s + m + int(rng.integers(extra + 1))], j] = True
    return held


CODES = [
    *(reed_solomon(n, s, m=m) for n, s, m in SIZES),
    *(reed_solomon(n, s, m=m, k=k) for n, s, m in SIZES if n in (5, 8) for k in (1, 3, 11)),
    *(reed_solomon(n, s, m=m, assignment=at_random(n, k, s, m, e)) for n, k, s, m in SHAPES for e in (0, 3)),
    *(reed_solomon(n, s, m=m, assignment=np.ones((n, 4))) for n, s, m in ((5, 1, 1), (6, 2, 2), (8, 3, 1))),
    *(reed_solomon(n, s, m=m).restrict([0, n - 1]) for n, s, m in ((5, 1, 1), (6, 3, 1), (6, 1, 2))),
    reed_solomon(6, 1, assignment=[[0, 1, 2], [0, 2], [1, 2], [], [3, 1], [3, 0]]),  # worker 3 holds nothing
]
SMALL = [code for code in CODES if code.n <= 6]


@pytest.fixture(params=CODES, ids=repr)
def code(request: pytest.FixtureRequest) -> GradientCode:
    return request.param  # type: ignore[no-any-return]


def subsets(n: int) -> Iterator[list[int]]:
    return ([i for i in range(n) if mask >> i & 1] for mask in range(2**n))


def survivors_of(code: GradientCode) -> Iterator[list[int]]:
    """Whoever is left by each set of s stragglers, in some order of arrival; and some larger sets."""
    rng = np.random.default_rng(3)
    for stragglers in combinations(range(code.n), code.s):
        yield rng.permutation([i for i in range(code.n) if i not in stragglers]).tolist()
    yield from (rng.permutation(code.n)[:more].tolist() for more in range(code.n - code.s + 1, code.n + 1))


def integers(array: NDArray[Any]) -> NDArray[Any]:
    """Python's, which never wrap."""
    return np.array(array.tolist(), object).reshape(array.shape)


def rank(rows: list[list[int]]) -> int:
    rows, found = [[value % P for value in row] for row in rows], 0
    for column in range(len(rows[0])):
        pivot = next((r for r in range(found, len(rows)) if rows[r][column]), None)
        if pivot is not None:
            rows[found], rows[pivot] = rows[pivot], rows[found]
            for r in range(found + 1, len(rows)):
                factor = rows[r][column] * pow(rows[found][column], -1, P)
                rows[r] = [(v - factor * w) % P for v, w in zip(rows[r], rows[found], strict=True)]
            found += 1
    return found


def solvable(A: NDArray[Any], right: NDArray[Any]) -> bool:
    both = np.unique(np.hstack([A, right]), axis=0)
    return rank(both.tolist()) == rank(both[:, : A.shape[1]].tolist())


def brute_force(code: GradientCode, survivors: Sequence[int]) -> bool:
    """Whether some vectors over the survivors hold, in every shard, their block once and no other."""
    matrix = code.B.reshape(code.n, -1)[list(survivors)].T
    return solvable(matrix, np.tile(np.eye(code.m, dtype=int), (code.k, 1)))


def test_whole_numbers_come_back_exactly(code: GradientCode) -> None:
    most = ROOM // code.k
    updates = np.random.default_rng(0).integers(-most, most, size=(code.k, 7), endpoint=True)
    updates[:, 0], updates[:, 1] = most, -most
    replies = code.encode(updates)
    assert replies.dtype == np.int64 and replies.min() >= 0 and replies.max() < P
    for survivors in survivors_of(code):
        total = code.decode(replies[survivors], survivors, length=7)
        assert total.dtype == np.int64
        assert total.tolist() == integers(updates).sum(axis=0).tolist()


def test_floats_come_back_within_their_rounding_and_multiples_of_the_unit_exactly(code: GradientCode) -> None:
    assert isinstance(code.numbers, PrimeField)
    updates = np.random.default_rng(0).standard_normal((code.k, 6))
    multiples = np.rint(updates * 2**10) / 2**10  # of 2^-16, and exact as float32
    for given_, allowed in ((updates, code.numbers.rounding(code.k)), (multiples, 0), (multiples.astype("f4"), 0)):
        expected = np.array([math.fsum(column) for column in given_.T])
        replies = code.encode(given_)
        assert replies.dtype == np.uint32
        for survivors in list(survivors_of(code))[::3]:
            total = code.decode(replies[survivors], survivors, length=6)
            assert total.dtype == np.float64
            assert np.abs(total - expected).max() <= allowed


def test_the_vector_is_right_in_every_shard(code: GradientCode) -> None:
    blocks = integers(code.blocks).reshape(code.n, -1)
    for survivors in list(survivors_of(code))[::2]:
        a = integers(code.decoding_vector(survivors)).reshape(code.n, code.m)
        assert not a[[i for i in range(code.n) if i not in survivors]].any()
        assert (blocks.T @ a % P == np.tile(np.eye(code.m, dtype=int), (code.k, 1))).all()
        assert (code.kappa(survivors), code.decoding_error(survivors)) == (1.0, 0.0)
        assert code.coverage(survivors).tolist() == [1.0] * code.k


@given(st.data())
@settings(deadline=None, max_examples=80, derandomize=True)
def test_larger_codes_come_back_exactly(data: st.DataObject) -> None:
    n, m, seed = (data.draw(st.integers(*bounds)) for bounds in ((9, 30), (1, 3), (0, 2**30)))
    s, k, extra = (data.draw(st.integers(*bounds)) for bounds in ((0, n - m), (1, 2 * n), (0, 3)))
    code = reed_solomon(n, s, m=m, assignment=at_random(n, k, s, m, extra, seed))
    rng = np.random.default_rng(seed)
    survivors = rng.permutation(n)[: n - data.draw(st.integers(0, s))].tolist()
    updates = rng.integers(-(ROOM // k), ROOM // k, size=(k, 5), endpoint=True)
    assert code.decode(code.encode(updates)[survivors], survivors, length=5).tolist() == updates.sum(axis=0).tolist()
    few = rng.permutation(n)[: int(rng.integers(n - s))].tolist()
    assert not code.decodable(few) or (code.blocks[few].any(axis=2).sum(axis=0) >= m).all()


@pytest.mark.parametrize(("k", "m", "sooner"), [(1000, 1, False), (200, 2, True)])  # sooner: k m < n - s
def test_a_thousand_workers_of_whom_a_hundred_straggle(k: int, m: int, sooner: bool) -> None:
    code, rng = reed_solomon(1000, 100, k=k, m=m), np.random.default_rng(0)
    updates = rng.integers(-(ROOM // k), ROOM // k, size=(k, 20), endpoint=True)
    replies = code.encode(updates)
    for count in (900, 950, 899):
        survivors = rng.permutation(1000)[:count].tolist()
        assert code.decodable(survivors) == (count >= 900 or sooner)
        if code.decodable(survivors):
            assert code.decode(replies[survivors], survivors).tolist() == updates.sum(axis=0).tolist()


def test_decodable_agrees_with_brute_force_and_with_the_converse() -> None:
    for code in SMALL:
        for survivors in subsets(code.n):
            assert code.decodable(survivors) == brute_force(code, survivors), (code, survivors)
            live = [len(set(survivors).intersection(code.holders_of(j))) for j in range(code.k)]
            assert min(live) >= code.m or not code.decodable(survivors)


def test_decodable_agrees_with_brute_force_on_random_matrices() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        B = rng.integers(-1, 2, size=(int(rng.integers(2, 6)), int(rng.integers(1, 5))))
        if B.any(axis=0).all():
            code = GradientCode(B, 0, numbers=PrimeField())
            for survivors in subsets(code.n):
                assert code.decodable(survivors) == brute_force(code, survivors), (B.tolist(), survivors)


def test_what_does_not_decode_covers_nothing_and_is_refused() -> None:
    B = np.tile(np.eye(2, dtype=int), (2, 1))
    grouped = GradientCode(B, 1, groups=((0, 2), (1, 3)), numbers=PrimeField())
    for code in (grouped, *SMALL):
        assert code.coverage(range(code.n)).tolist() == [1.0] * code.k
        for survivors in [survivors for survivors in subsets(code.n) if not code.decodable(survivors)]:
            assert code.coverage(survivors).tolist() == [0.0] * code.k
            assert code.decoding_error(survivors) == 1.0
            with pytest.raises(NotDecodable, match=rf"\(decoding error 1\); any {code.n - code.s} replies do\.$"):
                code.decoding_vector(survivors)


def test_a_worker_codes_the_shards_that_it_holds_and_no_other() -> None:
    for (n, k, s, m), extra in ((shape, extra) for shape in SHAPES for extra in (0, 3)):
        held = at_random(n, k, s, m, extra)
        nonzero = np.any(reed_solomon(n, s, m=m, assignment=held).blocks, axis=2)
        assert not (nonzero & ~held).any()
        assert extra or (nonzero == held).all()
    for n, s, m in SIZES:
        for i in range(n):
            assert set(reed_solomon(n, s, m=m).shards_of(i)) == {(i + t) % n for t in range(s + m)}
            assert len(reed_solomon(n, s, m=m, k=2 * n).shards_of(i)) == 2 * (s + m)


@pytest.mark.parametrize(("n", "s", "m"), [(3, 1, 1), (8, 1, 1), (8, 2, 1), (8, 2, 2)])
def test_everyone_who_holds_a_shard_takes_part(n: int, s: int, m: int) -> None:
    assert reed_solomon(n, s, m=m, assignment=np.ones((n, 1))).holders_of(0) == tuple(range(n))


def test_powers_of_the_points_pick_one_block_of_each_shard(code: GradientCode) -> None:
    rho = code.s + code.m
    C = np.array([[pow(x, rho - 1 - row, P) for x in second_points(code.n)[0]] for row in range(rho)], object)
    found = C @ integers(code.blocks).reshape(code.n, -1) % P
    assert (found == np.tile(np.eye(rho, code.m, dtype=int), (1, code.k))).all()


@pytest.mark.parametrize(("n", "s"), [(n, s) for n in range(2, 9) for s in range(n)])
def test_with_m_of_one_it_is_the_divided_difference_code(n: int, s: int) -> None:
    code, (points, _) = reed_solomon(n, s), second_points(n)
    for i, j in np.argwhere(code.B).tolist():
        held, x = [points[h] for h in code.holders_of(j)], points[i]
        assert code.B[i, j] == pow(math.prod(x - y for y in held if y != x), -1, P)
        # The same code as monic Reed-Solomon, after scaling its rows.
        scale = pow(math.prod(x - y for y in points if y != x), -1, P)
        assert code.B[i, j] == scale * math.prod(x - y for y in points if y not in held) % P
    for stragglers in combinations(points, s):
        a = code.decoding_vector([i for i in range(n) if points[i] not in stragglers])
        assert a.tolist() == [math.prod(x - t for t in stragglers) % P for x in points]


@pytest.mark.parametrize(("n", "s", "m"), [(7, 3, 1), (12, 4, 2), (20, 6, 3)])
def test_closed_form_and_elimination_find_the_same_sum(n: int, s: int, m: int) -> None:
    code, rng = reed_solomon(n, s, m=m), np.random.default_rng(n)
    updates = rng.integers(-999, 999, size=(n, 6))
    for missing in range(s + 1):
        name, there = rng.permutation(n), rng.permutation(n)[: n - missing].tolist()
        renamed = GradientCode(code.B[name], s, numbers=code.numbers)  # points in no order: no closed form
        total = renamed.decode(renamed.encode(updates)[there], there)
        assert total.tolist() == updates.sum(axis=0).tolist()
        if missing == s:  # n - s rows of that rank: there is no other vector
            assert np.array_equal(renamed.decoding_vector(there), code.decoding_vector(name[there])[name])


@pytest.mark.parametrize(("n", "s", "m"), [(7, 3, 1), (12, 4, 2), (20, 6, 3)])
def test_the_closed_form_is_recognised_and_takes_the_first_replies_that_decode(n: int, s: int, m: int) -> None:
    """Elimination would take those with the lowest numbers."""
    code, order = reed_solomon(n, s, m=m), list(range(n))[::-1]
    used = np.any(code.decoding_vector(order).reshape(n, m), axis=1)
    assert used.tolist() == [False] * s + [True] * (n - s)


@pytest.mark.parametrize("values", [EXTREME, [P - 1], [2**31 - 2**16 - 1]], ids=["extreme", "largest", "low half"])
@pytest.mark.parametrize("inner", [1, 63, 64, 65, 1000])
def test_products_are_those_of_python(inner: int, values: list[int]) -> None:
    rng = np.random.default_rng(inner)
    left, right = rng.choice(values, (3, inner)), rng.choice(values, (inner, 2))
    expected = integers(left) @ integers(right) % P
    assert matmul_mod(left, right).tolist() == expected.tolist()
    assert matmul_mod(-left, right).tolist() == (-expected % P).tolist()
    long = np.repeat(right, 4097, axis=1)  # several pieces of 8192 entries
    for vectors, sign in ((long, 1), (long.astype(np.uint32), 1), (list(long), 1), (-long, -1)):
        found = combine_mod(vectors, left.T).reshape(3, -1)
        assert np.array_equal(found, np.repeat((sign * expected % P).astype(int), 4097, axis=1))
    most = np.full((1, 2**20 - 1), P - 1)
    assert matmul_mod(most, most.T).tolist() == [[2**20 - 1]]
    assert inverse(np.array([*EXTREME[1:], -7])).tolist() == [pow(v % P, -1, P) for v in [*EXTREME[1:], -7]]
    assert lift_mod(np.array(EXTREME)).tolist() == [v if v <= ROOM else v - P for v in EXTREME]


def test_folding_changes_nothing_modulo_p_and_leaves_little() -> None:
    largest = [(P - 1) ** 2, 2**62 - 1, *EXTREME]
    values = np.array([*largest, *(-v for v in largest)])
    folded = values.copy()
    fold(folded)
    assert [v % P for v in folded.tolist()] == [v % P for v in values.tolist()]
    assert np.abs(folded).max() < 2**32


def test_solve_finds_a_solution_exactly_if_there_is_one() -> None:
    rng = np.random.default_rng(0)
    for trial in range(300):
        rows, unknowns, sides = rng.integers(1, 5, 3).tolist()
        A = rng.choice(EXTREME if trial % 2 else [0, 1, P - 1], (rows, unknowns))
        right = rng.choice([0, 1, P - 1], (rows, sides))
        x = solve_mod(A, right)
        assert (x is not None) == solvable(A, right)
        assert x is None or (integers(A) @ integers(x) % P).tolist() == right.tolist()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("n", "s", "m"), [(1, 0, 1), (4, 1, 1), (6, 2, 2)])
@pytest.mark.parametrize("bits", [None, 0, 16, 30])  # None: whole numbers
def test_the_largest_sum_decodes_and_one_more_is_refused(n: int, s: int, m: int, bits: int | None, sign: int) -> None:
    code, unit = reed_solomon(n, s, m=m, fraction_bits=bits or 0), 1 if bits is None else 2.0**-bits
    updates = np.full((n, 2 * m), sign) * unit
    updates[-1] *= ROOM - (n - 1)
    survivors = list(range(s, n))
    assert code.decode(code.encode(updates)[survivors], survivors).tolist() == [sign * ROOM * unit] * 2 * m
    for row, change in ((0, sign), (n - 1, sign), (0, -sign * 3)):
        larger = updates.copy()
        larger[row, 0] += change * unit  # -3: of the other sign than the rest, and counted all the same
        if n > 1 or change == sign:
            for error in (Overflow, OverflowError, FlGradcodeError):
                with pytest.raises(error, match=r"Scale the updates down"):
                    code.encode(larger)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 16384.0])
def test_what_has_no_place_in_the_field_is_refused(value: float) -> None:
    for dtype in (np.float32, np.float64):
        updates = np.zeros((4, 3), dtype)
        updates[2, 1] = value
        with pytest.raises(Overflow, match=r"^An entry of size .* does not fit: at fraction_bits=16 there is room up"):
            reed_solomon(4, 1).encode(updates)


@pytest.mark.parametrize("d", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_length_cuts_the_padding(d: int, m: int) -> None:
    code, survivors, updates = reed_solomon(6, 1, m=m), [5, 0, 3, 1, 2], np.arange(6 * d).reshape(6, d)
    replies, total = code.encode(updates), updates.sum(axis=0).tolist()
    assert replies.shape == (6, math.ceil(d / m))
    assert code.decode(replies[survivors], survivors).tolist() == total + [0] * (-d % m)
    assert code.decode(replies[survivors], survivors, length=d).tolist() == total
    with pytest.raises(InvalidCode, match=rf"^length={d + m} does not fit a decoded vector of \d entries\.$"):
        code.decode(replies[survivors], survivors, length=d + m)


def test_integers_of_any_type_are_taken_as_they_are_and_replies_of_other_types_refused() -> None:
    code, updates = reed_solomon(3, 1), np.array([[1, 0], [1, 1], [0, 1]])
    for dtype in (bool, np.int8, np.uint8, np.int32, np.uint64):
        assert code.decode(code.encode(updates.astype(dtype))[[2, 0]], [2, 0]).tolist() == [2, 2]
    for other in ("float64", "float32", "int32", "uint64"):
        with pytest.raises(InvalidCode, match=rf"^Replies over the field .* are int64 or uint32, not {other}\.$"):
            code.decode(np.ones((2, 3), other), [0, 1])


BITS = "fraction_bits={} must be a whole number in 0..30."
REFUSED: dict[str, dict[str, Any]] = {
    **{BITS.format(repr(bits)): {"fraction_bits": bits} for bits in (-1, 31, 2.5, "16", None, True, math.nan)},
    "The assignment is of shape (5, 3); n and k ask for (4, k).": {"assignment": np.ones((5, 3))},
    "The assignment is of shape (4, 3); n and k ask for (4, 2).": {"assignment": np.ones((4, 3)), "k": 2},
    "s=1 stragglers at m=4 need 5 holders of each shard; there are n=4 workers.": {"m": 4},
    "k=0 must be a whole number of at least 1.": {"k": 0},
    "Shard 1 is held by 2 workers (0, 2); tolerating s=1 stragglers at m=2 needs at least 3. Add a holder or lower s "
    "or m.": {"assignment": [[0, 1], [0], [0, 1], []], "m": 2},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(sentence: str) -> None:
    with pytest.raises(InvalidCode, match=f"^{re.escape(sentence)}$"):
        reed_solomon(4, 1, **REFUSED[sentence])


def test_a_matrix_over_the_field_holds_whole_numbers() -> None:
    with pytest.raises(InvalidCode, match=rf"^An encoding matrix over the field of {P} .* not float64\.$"):
        GradientCode(np.ones((3, 3)), 1, numbers=PrimeField())
    assert GradientCode(np.full((2, 1), -1), 1, numbers=PrimeField()).B.tolist() == [[P - 1]] * 2
