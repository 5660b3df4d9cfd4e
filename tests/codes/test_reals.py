"""Adding up vectors: the same numbers as a plain sum in float64, whatever the length, the order and the type."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode.codes.reals import combine
from fl_gradcode.errors import InvalidCode

BLOCK = 262144  # entries in a block of the running sum
LENGTHS = [0, 1, 2, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 17]


def vectors(count: int, length: int, dtype: type[np.floating] = np.float64) -> NDArray[np.floating]:
    return np.random.default_rng(length).standard_normal((count, length)).astype(dtype)


def check(replies: NDArray[np.floating], a: NDArray[np.float64], out: NDArray[np.floating]) -> None:
    """The result lies within the rounding that any summation in its type may have."""
    columns = a.reshape(len(replies), -1)
    x = replies.astype(np.float64)
    expected = np.einsum("tl,td->ld", columns, x).ravel()
    scale = np.einsum("tl,td->ld", np.abs(columns), np.abs(x)).ravel()
    assert out.dtype == replies.dtype
    assert out.shape == expected.shape
    assert (np.abs(out - expected) <= (len(replies) + 2) * np.finfo(replies.dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_combination_is_the_plain_sum(length: int, dtype: type[np.floating]) -> None:
    replies = vectors(4, length, dtype)
    a = np.array([0.3, 1.0, -2.5, 1e-3])
    check(replies, a, combine(replies, a))
    check(replies, a, combine(list(replies), a, order=[2, 0, 3, 1]))
    check(replies[:1], a[:1], combine(replies[:1], a[:1]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_each_column_of_coefficients_makes_a_block_of_the_result(length: int, dtype: type[np.floating]) -> None:
    replies = vectors(3, length, dtype)
    a = np.array([[1.0, 0.0, 0.2], [0.0, 0.0, 1.0], [-0.7, 0.0, 3.0]])
    out = combine(replies, a)
    check(replies, a, out)
    for column in range(3):
        block = out[column * length : (column + 1) * length]
        assert block.tobytes() == combine(replies, a[:, column]).tobytes()


@pytest.mark.parametrize("length", [2_800_001, 30 * BLOCK])
def test_long_vectors_have_the_bits_of_their_pieces(length: int) -> None:
    # So long that the work may be shared by threads: where they meet, nothing may be lost or added twice.
    replies = vectors(5, length, np.float32)
    a = np.array([0.3, 1.0, 0.0, -2.5, 1e-3])
    pieces = [combine(replies[:, start : start + BLOCK], a) for start in range(0, length, BLOCK)]
    expected = np.concatenate(pieces)
    check(replies[:, :1000], a, expected[:1000])
    assert combine(replies, a).tobytes() == expected.tobytes()
    both = combine(replies, np.stack([a, a], axis=1))
    assert both[:length].tobytes() == both[length:].tobytes() == expected.tobytes()


def test_copies_are_added_without_rounding_of_their_own() -> None:
    replies = vectors(4, 3 * BLOCK, np.float32)
    expected = replies[0].copy()
    for reply in replies[1:]:
        expected += reply
    assert combine(replies, np.ones(4)).tobytes() == expected.tobytes()


def test_vectors_that_do_not_lie_in_one_piece_are_combined_too() -> None:
    replies = vectors(3, 2000)[:, ::2]
    a = np.array([0.5, -1.5, 2.0])
    check(replies, a, combine(replies, a))


@pytest.mark.parametrize("length", [5, BLOCK + 1])
def test_a_reply_with_coefficient_zero_is_not_read(length: int) -> None:
    replies = vectors(3, length)
    expected = combine(replies[[0, 2]], np.array([2.0, 1.0]))
    replies[1] = np.nan
    assert combine(replies, np.array([2.0, 0.0, 1.0])).tobytes() == expected.tobytes()
    a = np.array([[2.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert np.isfinite(combine(replies, a)).all()
    unread: list[NDArray[np.floating]] = [np.ones(length), np.zeros(0)]  # too short to be read
    assert combine(unread, np.array([1.0, -0.0])).tolist() == [1.0] * length


@pytest.mark.parametrize("length", [3, BLOCK + 1])
def test_no_coefficient_at_all_gives_zeros(length: int) -> None:
    assert combine(np.full((2, length), np.nan), np.zeros(2)).tolist() == [0.0] * length
    assert combine(np.full((2, length), np.nan), np.zeros((2, 2))).tolist() == [0.0] * (2 * length)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_coefficient_one_copies_bit_for_bit(dtype: type[np.floating]) -> None:
    info = np.finfo(dtype)
    odd = np.array([-0.0, 0.0, info.smallest_subnormal, info.max, -info.tiny, np.inf, np.nan, 1 / 3], dtype)
    reply = np.concatenate([odd, vectors(1, BLOCK, dtype)[0], odd])
    others = np.full_like(reply, 7.0)
    out = combine([others, reply, others], np.array([0.0, 1.0, 0.0]))
    assert out.tobytes() == reply.tobytes()
    assert not np.shares_memory(out, reply)


def test_adding_with_coefficient_one_rounds_once() -> None:
    first, second = vectors(2, 1000, np.float32)
    assert combine([first, second], np.ones(2)).tobytes() == (first + second).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("a", [[1.0, 1.0, 1.0, 1.0], [0.1, -1.7, 1.0, 3.0], [0.0, 1.0, 0.3, 1.0]], ids=str)
def test_bits_do_not_depend_on_the_order_of_arrival(a: list[float], dtype: type[np.floating]) -> None:
    replies, workers = vectors(4, 300, dtype), np.array([30, 4, 17, 8])
    coefficients = np.array(a)
    results = {
        combine(replies[list(p)], coefficients[list(p)], order=workers[list(p)].tolist()).tobytes()
        for p in permutations(range(4))
    }
    assert len(results) == 1


def test_replies_are_added_in_ascending_order_of_their_workers() -> None:
    replies = np.array([[1.0], [1e16], [-1e16]])  # only (1e16 - 1e16) + 1 keeps the 1
    ones = np.ones(3)
    assert combine(replies, ones, order=[9, 2, 5]).tolist() == [1.0]
    assert combine(replies, ones, order=[2, 5, 9]).tolist() == [0.0]
    assert combine(replies, ones).tolist() == [0.0]
    assert combine(replies[::-1], ones).tolist() == [1.0]


def test_what_was_given_stays_as_it_was() -> None:
    replies, a = vectors(3, BLOCK + 5), np.array([1.0, 2.0, 1.0])
    before = replies.copy()
    replies.setflags(write=False)
    a.setflags(write=False)
    combine(replies, a, order=[2, 1, 0])
    assert np.array_equal(replies, before)


def test_views_with_gaps_are_added_too() -> None:
    wide = vectors(3, 2 * BLOCK + 6)
    a = np.array([0.5, 1.0, -1.0])
    assert combine(wide[:, ::2], a).tobytes() == combine(wide[:, ::2].copy(), a).tobytes()


@pytest.mark.parametrize("replies", [[], np.zeros((0, 4))])
def test_nothing_to_combine_is_refused(replies: list[NDArray[np.float64]] | NDArray[np.float64]) -> None:
    with pytest.raises(InvalidCode, match=r"^There is no reply to combine\.$"):
        combine(replies, np.zeros(0))
