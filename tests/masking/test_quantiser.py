"""Floats become integers whose sums cannot overflow, the same on every holder, and metrics become digits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode.errors import InvalidSetting
from fl_gradcode.masking.quantiser import RoundedSum, digits_of, fixed_order_norm, restored
from fl_gradcode.secagg import FIELD, INTEGERS, Quantiser, Ring

KEY = hashlib.sha256(b"dither").digest()


def rounded(
    quantiser: Quantiser, updates: Sequence[NDArray[Any]], weights: Sequence[float]
) -> tuple[NDArray[np.int32], int] | None:
    """The integers and the number of clipped entries, or None."""
    total = RoundedSum(quantiser, updates[0].size)
    if not all(total.add(update, weight) for update, weight in zip(updates, weights, strict=True)):
        return None
    integers, clipped, failed = total.finish(KEY)
    return None if failed else (integers, clipped)


@pytest.mark.parametrize("ring", [INTEGERS, FIELD], ids=lambda ring: ring.name)
@pytest.mark.parametrize("headroom", [1, 4, 8])
@pytest.mark.parametrize("bound", [2.0**-20, 0.1, 1.0, 3.0, 2048.0, 2.0**20])
@pytest.mark.parametrize("k", [1, 7, 20, 32768])
def test_a_sum_of_shards_never_overflows(ring: Ring, headroom: int, bound: float, k: int) -> None:
    try:
        quantiser = Quantiser(ring, k, bound, headroom=headroom)
    except InvalidSetting:
        assert Fraction(ring.half, 2**headroom * k) < Fraction(bound) * 2  # there was less than a bit of room
        return
    f = quantiser.fraction_bits
    assert 0 <= f <= 30
    assert k * (Fraction(bound) * 2**f + 1) < ring.half
    assert f == 30 or Fraction(bound) * k * 2 ** (f + 1 + headroom) > ring.half  # one bit more would not fit
    for extreme in (-1e38, 1e38):
        made = rounded(quantiser, [np.full(3, extreme, np.float32)], [1.0])
        assert made is not None
        assert k * np.abs(made[0].astype(np.int64)).max() <= quantiser.limit(k) < ring.half
        signed = ring.to_signed(ring.from_signed(made[0]))
        assert (signed == made[0]).all()


def test_the_number_of_fraction_bits_for_twenty_shards() -> None:
    assert Quantiser(INTEGERS, 20, headroom=4).fraction_bits == 22
    assert Quantiser(FIELD, 20, headroom=4).fraction_bits == 21


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"headroom": 0}, "headroom=0"),
        ({"headroom": 17}, "headroom=17"),
        ({"largest_weight": 0.0}, "largest_weight=0.0"),
        ({"largest_weight": float("nan")}, "largest_weight=nan"),
        ({"clip": "both"}, "clip='both'"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"noise": 8.0, "largest_weight": 2.0}, "every shard has weight 1"),
        ({"noise": 2.0**29}, "do not fit the ring"),
        ({"bound": 2.0**20, "k": 2**15}, "do not fit the ring"),
        ({"k": 0}, "k=0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidSetting, match=told):
        Quantiser(**{"ring": INTEGERS, "k": 20, **settings})  # type: ignore[arg-type]


def test_rounding_is_unbiased_and_at_most_one_unit() -> None:
    quantiser = Quantiser(INTEGERS, 20)
    update = np.full(200_000, 0.3, np.float64)
    made = rounded(quantiser, [update], [1.0])
    assert made is not None
    exact = 0.3 * 2.0**quantiser.fraction_bits
    assert {*np.unique(made[0]).tolist()} == {math.floor(exact), math.floor(exact) + 1}
    share = exact - math.floor(exact)
    assert abs(float(made[0].mean()) - exact) < 4 * math.sqrt(share * (1 - share) / update.size)


def test_a_class_is_rounded_once_in_any_order() -> None:
    rng = np.random.default_rng(0)
    updates = [rng.standard_normal(70_000).astype(np.float32) for _ in range(3)]
    quantiser = Quantiser(INTEGERS, 12, 0.75, largest_weight=8.0)
    made = rounded(quantiser, updates, [8.0, 4.0, 1.0])
    assert made is not None
    total = sum(
        w / 8.0 * np.clip(u.astype(np.float64), -0.75, 0.75) for w, u in zip((8.0, 4.0, 1.0), updates, strict=True)
    )
    apart = made[0] - total * 2.0**quantiser.fraction_bits
    assert apart.min() > -1 and apart.max() <= 1
    assert made[1] == sum(int((np.abs(u) > 0.75).sum()) for u in updates)
    for order in permutations(range(3)):
        again = rounded(quantiser, [updates[i] for i in order], [(8.0, 4.0, 1.0)[i] for i in order])
        assert again is not None and (again[0] == made[0]).all()


def test_large_updates_are_added_up_earlier_and_give_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    updates = [rng.standard_normal(50_000).astype(np.float32) for _ in range(5)]
    quantiser = Quantiser(INTEGERS, 12, 0.75)
    together = rounded(quantiser, updates, [1.0] * 5)
    assert together is not None
    for most in (0, 300_000):  # one by one, and two at a time
        monkeypatch.setattr("fl_gradcode.masking.quantiser._MOST_KEPT", most)
        alone = rounded(quantiser, updates, [1.0] * 5)
        assert alone is not None and (alone[0] == together[0]).all() and alone[1] == together[1]
        updates[3][49_999] = np.nan
        assert rounded(quantiser, updates, [1.0] * 5) is None
        updates[3][49_999] = 0.1
        together = rounded(quantiser, updates, [1.0] * 5)
        assert together is not None


def test_what_is_added_up_are_whole_numbers_that_floats_hold_exactly() -> None:
    rng = np.random.default_rng(0)
    quantiser = Quantiser(INTEGERS, 3, headroom=1, largest_weight=3.0)
    total = RoundedSum(quantiser, 10_000)
    exact = [Fraction(0)] * 10_000
    for weight in (3.0, 2.0, 1.0):
        update = rng.uniform(-1.2, 1.2, 10_000)
        assert total.add(update, weight)
        factor = 2.0 ** (quantiser.fraction_bits + 16) * (weight / 3.0)
        exact = [
            x + round(Fraction(min(1.0, max(-1.0, u)) * factor)) for x, u in zip(exact, update.tolist(), strict=True)
        ]
    total._add_up()
    assert total._total is not None and total._total.tolist() == exact
    assert max(map(abs, exact)) < 2**48


def test_a_long_update_is_scaled_to_the_bound() -> None:
    quantiser = Quantiser(INTEGERS, 4, 2.0, "norm")
    long, short = np.full(40_000, 0.5), np.full(40_000, 0.001)
    for update, norm in ((long, 2.0), (short, 0.2)):
        made = rounded(quantiser, [update], [1.0])
        assert made is not None
        size = float(np.linalg.norm(made[0] * 2.0**-quantiser.fraction_bits))
        assert size == pytest.approx(norm, rel=1e-5)
        assert made[1] == (update is long)
    assert np.linalg.norm(long * (2.0 / 100.0 * (1 - 2.0**-40))) < 2.0


def test_the_norm_has_one_order_of_addition() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 5, 65_536, 100_001):
        values = rng.standard_normal(size)
        squares = [0.0] * 2**16
        for position, value in enumerate(values.tolist()):
            squares[position % 2**16] += value * value
        while len(squares) > 1:
            squares = [x + y for x, y in zip(squares[: len(squares) // 2], squares[len(squares) // 2 :], strict=True)]
        assert fixed_order_norm(values) == math.sqrt(squares[0])
    assert fixed_order_norm(np.array([1e200])) == math.inf
    assert fixed_order_norm(np.array([np.nan])) is None and fixed_order_norm(np.array([np.inf])) is None


@pytest.mark.parametrize("clip", ["entries", "norm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 70_000])
def test_what_is_not_finite_never_reaches_an_integer(clip: str, bad: float, place: int) -> None:
    update = np.zeros(80_000, np.float32)
    update[place] = bad
    quantiser = Quantiser(INTEGERS, 4, clip=clip)  # type: ignore[arg-type]
    assert rounded(quantiser, [np.zeros(80_000), update], [1.0, 1.0]) is None


@pytest.mark.parametrize("weight", [-0.001, 1.001, math.nan, math.inf])
def test_weights_outside_their_range_make_no_integers(weight: float) -> None:
    assert rounded(Quantiser(INTEGERS, 4), [np.zeros(3)], [weight]) is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_quick_look_at_a_chunk_never_lets_a_large_entry_through(dtype: Any) -> None:
    """An entry just above the bound is clipped and counted, however small all others are."""
    quantiser = Quantiser(INTEGERS, 4, 0.5)
    for size in (1, 40_000):
        update = np.zeros(size, dtype)
        update[-1] = np.nextafter(dtype(0.5), dtype(1))
        made = rounded(quantiser, [update], [1.0])
        assert made is not None and made[1] == 1 and made[0].max() <= 2 ** (quantiser.fraction_bits - 1) + 1
    crowd = np.full(40_000, 0.4, dtype)  # none is too large, although their squares add up to more
    made = rounded(quantiser, [crowd], [1.0])
    assert made is not None and made[1] == 0


def test_integers_do_not_depend_on_the_float_width_of_the_holder() -> None:
    rng = np.random.default_rng(0)
    update = rng.standard_normal(1000).astype(np.float32)
    quantiser = Quantiser(INTEGERS, 4)
    one, other = (rounded(quantiser, [u], [1.0]) for u in (update, update.astype(np.float64)))
    assert one is not None and other is not None and (one[0] == other[0]).all()
    zero = rounded(quantiser, [np.array([-0.0, 0.0])], [1.0])
    assert zero is not None and zero[0].tolist() == [0, 0]


@pytest.mark.parametrize("bits", range(1, 31, 7))
def test_jitter_shows_alike_wherever_the_value_lies(bits: int) -> None:
    """Of two holders that differ, the difference of integers tells the jitter and not where the value lies."""
    rng = np.random.default_rng(bits)
    jitter = 2.0**-8 / 2**22
    quantiser = Quantiser(INTEGERS, 20)
    unit = 2.0**-quantiser.fraction_bits
    shown = []
    for offset in (0.0, 0.5 - 1e-3):  # in the middle of a unit, and where nearest rounding turns
        base = (rng.integers(-1000, 1000, 400_000) + offset) * unit
        one, other = (rounded(quantiser, [u], [1.0]) for u in (base, base + jitter))
        assert one is not None and other is not None
        shown.append(int((one[0] != other[0]).sum()))
    assert abs(shown[0] - shown[1]) < 6 * math.sqrt(sum(shown))


def test_digits_of_sums_are_sums_of_digits() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.standard_normal((50, 6)) * 10.0 ** rng.integers(-6, 13, (50, 6)), [[0, -0.0, 1, -1, 2**-31, 2.0**44]]]
    )
    words = np.zeros(36, np.int32)
    for row in values:
        digits = digits_of(row.tolist())
        assert digits is not None and np.abs(digits).max() < 2**15
        words += digits
    exact = [
        sum((Fraction(round(Fraction(x) * 2**30), 2**30) for x in column), Fraction()) for column in values.T.tolist()
    ]
    assert restored(words).tolist() == [float(x) for x in exact]


def test_numbers_that_have_no_digits() -> None:
    assert digits_of([2.0**45]) is None and digits_of([-(2.0**45)]) is None
    assert digits_of([2.0**45 - 1]) is not None
    spoilt = digits_of([math.nan, 1.0, math.inf])
    assert spoilt is not None
    assert np.isnan(restored(spoilt)).tolist() == [True, False, True]


def test_settings_have_digests_of_their_own() -> None:
    base: dict[str, Any] = {
        "ring": INTEGERS,
        "k": 20,
        "bound": 1.0,
        "clip": "entries",
        "headroom": 4,
        "largest_weight": 1.0,
        "noise": 0.0,
    }
    others: list[dict[str, Any]] = [
        {"ring": FIELD},
        {"k": 21},
        {"bound": 1.0 + 2**-52},
        {"clip": "norm"},
        {"headroom": 5},
        {"largest_weight": 2.0},
        {"noise": 1.0},
    ]
    digests = {Quantiser(**{**base, **one}).digest for one in [{}, *others]}
    assert len(digests) == 8
