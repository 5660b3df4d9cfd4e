"""Lists and seconds as people read them."""

from __future__ import annotations

import math

import pytest

from fl_gradcode._text import duration_text, listed, numbered, seconds_text


@pytest.mark.parametrize(
    ("count", "most", "text"),
    [
        (0, 8, ""),
        (1, 8, "1"),
        (2, 8, "1 and 2"),
        (3, 8, "1, 2 and 3"),
        (4, 4, "1, 2, 3 and 4"),
        (5, 4, "1, 2, 3 and 2 more"),
        (100, 4, "1, 2, 3 and 97 more"),
    ],
)
def test_long_lists_are_cut(count: int, most: int, text: str) -> None:
    assert listed(range(1, count + 1), most) == text


def test_numbered_things_have_their_plural() -> None:
    assert numbered("worker", [3]) == "worker 3"
    assert numbered("worker", [3, 4]) == "workers 3 and 4"
    assert numbered("shard", range(9), 3) == "shards 0, 1 and 7 more"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (math.inf, "never"),
        (0.0, "0 s"),
        (1e-5, "< 1 ms"),
        (0.01234, "12.3 ms"),
        (0.5, "0.5 s"),
        (12.345, "12.3 s"),
        (1234.5, "1234 s"),
        (40_000.0, "11.1 h"),
    ],
)
def test_seconds_have_a_unit_that_suits_them(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.14159, "3.14 s"), (99.9, "99.9 s"), (200, "3 min 20 s"), (7_260, "2 h 1 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_told_in_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
