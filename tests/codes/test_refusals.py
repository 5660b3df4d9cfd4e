"""What makes no sense is refused by every code, in a sentence that names it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fl_gradcode.codes import GradientCode, fractional_repetition, uncoded
from fl_gradcode.errors import FlGradcodeError, InvalidCode
from tests.codes.samples import PAIRS, cyclic, group_mds, supports


@pytest.mark.parametrize(
    "code", [*(cyclic(n, s) for n, s in PAIRS), fractional_repetition(8, 3), group_mds(6, 1, 2), uncoded(3)], ids=repr
)
def test_a_shard_with_a_holder_too_few_is_refused_by_name(code: GradientCode) -> None:
    # Tight codes: every shard has just enough holders, so taking any one away breaks the claim.
    for shard, holders in enumerate(supports(code)):
        assert len(holders) == code.s + code.m
        for gone in holders:
            B = code.B.copy()
            B[gone, shard] = 0.0
            rest = ", ".join(str(i) for i in holders if i != gone) or "none"
            sentence = (
                f"Shard {shard} is held by {len(holders) - 1} workers ({rest}); tolerating s={code.s} stragglers"
                f"{f' at m={code.m}' if code.m > 1 else ''} needs at least {len(holders)}. "
                f"Add a holder or lower {'s or m' if code.m > 1 else 's'}."
            )
            with pytest.raises(InvalidCode, match=f"^{re.escape(sentence)}$"):
                GradientCode(B, code.s)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2, 2), (0, 3), (3, 0), (3, 3, 0), ()])
def test_a_matrix_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    sentence = re.escape(f"An encoding matrix has shape (n, k) or (n, k, m), not {shape}.")
    with pytest.raises(InvalidCode, match=f"^{sentence}$"):
        GradientCode(np.ones(shape), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused(value: float) -> None:
    B = np.ones((3, 3))
    B[1, 2] = value
    with pytest.raises(InvalidCode, match=r"^The encoding matrix has entries that are not finite\.$"):
        GradientCode(B, 1)


@pytest.mark.parametrize("s", [-1, 4, 5])
def test_a_tolerance_outside_its_range_is_refused(s: int) -> None:
    sentence = rf"^s={s} stragglers of n=4 workers: s must be a whole number in 0\.\.n-1\.$"
    with pytest.raises(InvalidCode, match=sentence):
        fractional_repetition(4, s)
    with pytest.raises(InvalidCode, match=sentence):
        cyclic(4, s)
    with pytest.raises(InvalidCode, match=sentence):
        GradientCode(np.ones((4, 2)), s)


@pytest.mark.parametrize("n", [0, -3, 2.5])
def test_a_number_of_workers_that_is_not_a_count_is_refused(n: int) -> None:
    for make in (uncoded, lambda n: fractional_repetition(n, 0), lambda n: cyclic(n, 0)):
        with pytest.raises(InvalidCode, match=rf"^n={n} must be a whole number of at least 1\.$"):
            make(n)


def test_too_few_shards_are_refused() -> None:
    with pytest.raises(InvalidCode, match=r"^k=2 shards cannot fill 3 groups; k must be at least .* = 3\.$"):
        fractional_repetition(7, 1, k=2)
    with pytest.raises(InvalidCode, match=r"^k=0 must be a whole number of at least 1\.$"):
        fractional_repetition(7, 1, k=0)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [0, 1, 2, 3, 3], []])
def test_an_order_that_is_no_permutation_is_refused(order: list[int]) -> None:
    sentence = re.escape(f"order must name each worker 0..3 once, not {order}.")
    with pytest.raises(InvalidCode, match=f"^{sentence}$"):
        fractional_repetition(4, 1, order=order)


@pytest.mark.parametrize("groups", [((0,), (1,)), ((0, 1), (2,)), ((0, 1, 2, 3),), ((0, 1, 2, 9),)])
def test_groups_that_the_matrix_does_not_have_are_refused(groups: tuple[tuple[int, ...], ...]) -> None:
    # Decoding trusts them: `a` would be 1 on the first reply of each, and the sum wrong without a word.
    with pytest.raises(InvalidCode, match="(?i)group"):
        GradientCode(np.ones((3, 2)), 2, groups=groups)


@pytest.mark.parametrize(
    "ask", ["decodable", "decoding_vector", "coverage", "decoding_error", "kappa", "least_squares_vector"]
)
def test_workers_that_make_no_sense_are_refused(ask: str) -> None:
    for code in (fractional_repetition(4, 1), cyclic(4, 1)):
        for wrong in (4, -1):
            with pytest.raises(InvalidCode, match=rf"^Worker {wrong} does not exist: this code has workers 0\.\.3\.$"):
                getattr(code, ask)([0, wrong])
        twice = r"^Worker 2 appears twice among the survivors; each reply counts once\.$"
        with pytest.raises(InvalidCode, match=twice):
            getattr(code, ask)([2, 0, 1, 2])


def test_shards_and_workers_that_do_not_exist_are_refused() -> None:
    for wrong in (4, -1):
        with pytest.raises(InvalidCode, match=rf"^Shard {wrong} does not exist: this code has shards 0\.\.3\.$"):
            uncoded(4).holders_of(wrong)
        with pytest.raises(InvalidCode, match=rf"^Worker {wrong} does not exist: this code has workers 0\.\.3\.$"):
            uncoded(4).shards_of(wrong)


@pytest.mark.parametrize("shape", [(4,), (3, 2), (4, 2, 1)])
def test_updates_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    sentence = re.escape(f"Updates have shape {shape}; encoding needs (4, d), one row a shard.")
    with pytest.raises(InvalidCode, match=f"^{sentence}$"):
        uncoded(4).encode(np.ones(shape))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 2, 1)])
def test_replies_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    sentence = re.escape(f"Replies have shape {shape}; 2 survivors need one row each.")
    with pytest.raises(InvalidCode, match=f"^{sentence}$"):
        fractional_repetition(4, 1).decode(np.ones(shape), [0, 1])


@pytest.mark.parametrize("length", [-1, 6])
def test_a_length_that_does_not_fit_is_refused(length: int) -> None:
    sentence = rf"^length={length} does not fit a decoded vector of 5 entries\.$"
    with pytest.raises(InvalidCode, match=sentence):
        fractional_repetition(4, 1).decode(np.ones((2, 5)), [0, 1], length=length)


def test_not_decodable_is_what_a_caller_would_catch() -> None:
    for builtin in (ValueError, InvalidCode, FlGradcodeError):
        with pytest.raises(builtin, match="do not determine the sum"):
            fractional_repetition(4, 1).decode(np.ones((2, 3)), [0, 2])
