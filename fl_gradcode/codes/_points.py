"""The points at which Reed-Solomon codes over the prime field evaluate polynomials: fixed, and without any pattern.

A shard's share in a decoded sum, as one of its holders sent it, is a quotient of products of differences of points. At
the points 1..n it is often a small number such as 3 or -2. Where holders of a shard differ, a sum of 3 times one's
integers and -2 times the others' is as small as a true sum, and nobody notices. At points without a pattern, such a
quotient is 0, 1, or an element that is as good as random and puts such a sum out of range.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from itertools import count

import numpy as np
from numpy.typing import NDArray

from .prime_field import P

__all__ = ["points", "powers"]

_LABEL = "fl-gradcode/reed-solomon/point/"


@lru_cache(maxsize=64)
def points(n: int) -> NDArray[np.int64]:
    """Returns the points of workers 0..n-1, distinct elements other than 0, shape (n,), int64, read-only.

    Candidate t is the number in the first 31 bits of SHA-256 of "fl-gradcode/reed-solomon/point/t", with t in decimal.
    Candidates that are 0, p, or an earlier point are left out. So a worker's point is the same for every n.
    """
    found: dict[int, None] = {}  # in order
    for number in count():
        if len(found) == n:
            break
        candidate = int.from_bytes(sha256(f"{_LABEL}{number}".encode()).digest()[:4], "big") >> 1
        if 0 < candidate < P:
            found[candidate] = None
    result = np.array(list(found), np.int64)
    result.setflags(write=False)
    return result


def powers(at: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Returns the powers 0, ..., number - 1 of some points modulo p, shape (number, points).

    Any `number` of its columns are linearly independent if the points differ.
    """
    rows = np.ones((number, len(at)), np.int64)
    for power in range(1, number):
        rows[power] = rows[power - 1] * at % P
    return rows
