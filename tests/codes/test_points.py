"""The points of codes over the prime field, and that no sum weighs a shard's holders by small numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode.codes import GradientCode, reed_solomon
from fl_gradcode.codes._points import points, powers

P = 2147483647


def second_points(n: int) -> tuple[list[int], int]:
    """The points by a second computation, and how many candidates were left out."""
    found: list[int] = []
    known = {0, P}
    number = 0
    while len(found) < n:
        digest = hashlib.sha256(b"fl-gradcode/reed-solomon/point/%d" % number).hexdigest()
        candidate = int(f"{int(digest, 16):0256b}"[:31], 2)
        number += 1
        if candidate not in known:
            known.add(candidate)
            found.append(candidate)
    return found, number - n


def test_points_are_those_of_the_hash_and_a_repeated_one_is_left_out() -> None:
    # Computed by sha256sum.
    assert points(4).tolist() == [2128884885, 1649740729, 1051897520, 1557673670]
    found, left_out = second_points(100_000)
    assert left_out, "a repetition is to be seen"
    assert points(100_000).tolist() == found
    assert len({*found}) == len(found) and min(found) > 0 and max(found) < P
    for n in (0, 1, 2, 7, 1000):  # a worker's point does not depend on n
        assert points(n).tolist() == found[:n]


def test_nobody_can_change_the_points_of_codes_made_later() -> None:
    with pytest.raises(ValueError, match="read-only"):
        points(4)[0] = 1


def test_powers_are_those_of_python() -> None:
    x = points(5)
    for number in range(5):
        assert powers(x, number).tolist() == [[pow(value, power, P) for value in x.tolist()] for power in range(number)]


def test_weights_of_further_holders_never_add_up_to_zero() -> None:
    """They are powers 0, ..., c - 1 of the first point g, with the sum (g^c - 1) / (g - 1)."""
    g, order = int(points(1)[0]), P - 1
    for prime in (2, 3, 7, 11, 31, 151, 331):  # p - 1 = 2 3^2 7 11 31 151 331
        while not order % prime and pow(g, order // prime, P) == 1:
            order //= prime
    assert order == 357913941


# ---- shares of holders that differ ----

MORE = [[0, 1, 2], [0, 2, 3], [1, 2, 3], [0, 1, 3], [1, 2], [0, 1, 2, 3]]  # up to five holders, where two would do
CODES = [
    *(reed_solomon(n, s) for n, s in ((4, 1), (6, 1), (7, 3), (8, 2))),
    *(reed_solomon(n, s, m=2) for n, s in ((5, 2), (6, 2), (7, 2))),
    reed_solomon(6, 1, assignment=MORE),
]
#: A share u / v in lowest terms is small if both numbers are below the first, or if v = 1 and u is below the second.
SMALL_FRACTION, SMALL = 2**8, 2**16


def shares(code: GradientCode) -> Iterator[tuple[bool, NDArray[np.int64]]]:
    """How some holders of a shard enter the sum from n - s replies, for every shard, replies, and holders.

    Where these holders sent u and the others w, the sum has w + share (u - w), shape (m, m). The share of all holders
    is the identity. Yields whether it must be the identity or zero, because those whose replies are used are among
    these holders or among the others, and the share.
    """
    for some in combinations(range(code.n), code.n - code.s):
        a = code.decoding_vector(list(some)).reshape(code.n, code.m)
        for j in range(code.k):
            holders = code.holders_of(j)
            own = {i: a[i, :, None] * code.blocks[i, j] % P for i in holders}
            used = {i for i in holders if own[i].any()}
            for number in range(1, len(holders) + 1):
                for these in combinations(holders, number):
                    alone = not used.intersection(these) or used.issubset(these)
                    yield alone, sum((own[i] for i in these), np.zeros((code.m, code.m), np.int64)) % P


@pytest.mark.parametrize("code", CODES, ids=str)
def test_some_holders_of_a_shard_decide_alone_or_count_by_no_small_number(code: GradientCode) -> None:
    """The sum of holders that differ has the share of their difference, and passes the range test if that is small.

    With noise, the difference has an independent number of several units in each entry, since noise is bound to the
    integers. A share u / v then leaves it small only in entries that v divides. So u alone decides: v = 1. Without
    noise, a difference may have a common divisor, so that small fractions count, too.
    """
    seen: set[int | str] = set()
    for alone, share in shares(code):
        if alone:
            assert any((share == whole * np.eye(code.m, dtype=int)).all() for whole in (0, 1))
            seen.add(int(share[0, 0]))
            continue
        seen.add("mixed")
        signed = np.where(share > P // 2, share - P, share)
        assert (np.abs(signed) >= SMALL).all()
        multiples = share[..., None] * np.arange(1, SMALL_FRACTION) % P
        assert (np.minimum(multiples, P - multiples) >= SMALL_FRACTION).all()
    assert seen == {0, 1, "mixed"}
