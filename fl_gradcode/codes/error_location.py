"""Locates wrong replies under a Reed-Solomon code over a prime field.

Whatever the updates are, each entry of all replies, seen over the workers, is orthogonal to the powers 0, ..., s - 1 of
the workers' points. (The decoding equations `C B = (1, 0, ..., 0)` say so: all rows of C but those of the sum
vanish on B.) So replies that break this are wrong, and where there are enough of these checks, they say which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidCode
from ._points import points, powers
from .encoding_matrix import EncodingMatrix
from .prime_field import P, PrimeField, inverse, matmul_mod

__all__ = ["locate_wrong_replies", "locates_wrong_replies"]

_WIDTH = 2048  # products of a 31-bit and an 11-bit number whose sum is exact in float64
_ROWS = 64  # so that a piece fits a core's cache


def locates_wrong_replies(code: EncodingMatrix) -> bool:
    """Returns whether `locate_wrong_replies` works for this code: every `reed_solomon` code, over all its shards."""
    return isinstance(code.numbers, PrimeField) and code.exact and code.once(_has_checks)


def _has_checks(code: EncodingMatrix) -> bool:
    flat = np.asarray(code.blocks, np.int64).reshape(code.n, -1)
    return not matmul_mod(powers(points(code.n), code.s), flat).any()


def locate_wrong_replies(
    code: EncodingMatrix,
    replies: Sequence[Sequence[NDArray[Any]]],
    workers: Sequence[int],
    most: int,
    random: Callable[[int], NDArray[np.int64]],
) -> tuple[int, ...] | None:
    """Returns the workers whose replies are wrong, ascending, or None if more than `most` are.

    All entries of a reply are projected to one number with random weights, which must be drawn after the replies are
    fixed: a wrong reply escapes with probability at most 2/p (Schwartz and Zippel). Up to `most` wrong ones are located
    for sure where `2 most` checks are left, that is, where at most s - 2 most workers are missing. More than `most`
    wrong replies are noticed, unless their senders agree on a common error.

    Args:
        code: A code for which `locates_wrong_replies` holds.
        replies: For each worker, the vectors that it sent, of whole numbers in 0..p-1; the same shapes for all.
        workers: Worker numbers, in the order of the replies.
        most: Largest number of wrong replies, e.
        random: Function (size) -> that many random numbers in 0..p-1, int64.

    Raises:
        InvalidCode: The code has no checks, or too many workers are missing.

    References:
        Peterson's and Berlekamp's and Massey's decoding of Reed-Solomon codes with erasures and errors. For gradient
        codes: Chen, Wang, Charles, Papailiopoulos, "DRACO", 2018.
    """
    there = set(workers)
    # A worker that holds none of these shards would send zeros, which change no check.
    missing = [i for i in code.active if i not in there]
    checks = code.s - len(missing)
    if not locates_wrong_replies(code):
        raise InvalidCode(f"A {code.name} code cannot tell which replies are wrong. Use reed_solomon.")
    if checks < 2 * most:
        raise InvalidCode(
            f"{len(missing)} of {len(code.active)} workers are missing; with s={code.s}, {most} wrong replies are "
            f"located while at most {code.s - 2 * most} are."
        )
    if not checks:
        return ()
    projected, every = _project(replies, random), points(code.n)
    x = every[list(workers)]
    scale = _product_of_differences(x, every[missing])
    syndromes = matmul_mod(powers(x, checks), (projected * scale % P)[:, None])[:, 0].tolist()
    if not any(syndromes):
        return ()
    locator = _shortest_recurrence(syndromes)
    size = len(locator) - 1
    wrong = [i for i, at in zip(workers, inverse(x).tolist(), strict=True) if _value(locator, at) == 0]
    # The recurrence fits all checks by construction. Errors explain it only if it has as many roots as its length.
    if size > most or len(wrong) != size:
        return None
    return tuple(sorted(wrong))


def _project(
    replies: Sequence[Sequence[NDArray[Any]]], random: Callable[[int], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Returns one number for each reply: the sum of its entries times random weights modulo p.

    A vector is read as rows of 2,048 entries, and the weight of an entry is that of its row times that of its column.
    The columns' weights are multiplied in three parts of at most 11 bits, so that float64 sums of a row are exact.
    """
    total = np.zeros(len(replies), np.int64)
    columns = random(_WIDTH)
    parts = np.stack([columns >> 22, columns >> 11 & 0x7FF, columns & 0x7FF], axis=1).astype(np.float64)
    for part in range(len(replies[0])):
        length = len(replies[0][part])
        rows = random(-(-length // _WIDTH))
        for at, vectors in enumerate(replies):
            sums = np.empty(len(rows), np.int64)
            for first in range(0, len(rows), _ROWS):
                few = vectors[part][first * _WIDTH : (first + _ROWS) * _WIDTH]
                padded = few.astype(np.float64) if not few.size % _WIDTH else np.zeros(-(-few.size // _WIDTH) * _WIDTH)
                padded[: few.size] = few
                high, middle, low = (padded.reshape(-1, _WIDTH) @ parts).astype(np.int64).T % P
                sums[first : first + _ROWS] = ((high << 22) % P + (middle << 11) + low) % P
            total[at] += int(matmul_mod(sums[None, :], rows[:, None])[0, 0]) if len(rows) else 0
    return total % P


def _product_of_differences(x: NDArray[np.int64], missing: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns `prod_t (x_i - x_t)` over the missing points x_t, for each x_i: what erasures multiply errors by."""
    result = np.ones_like(x)
    for gone in missing:
        result = result * (x - gone) % P
    return result


def _shortest_recurrence(values: Sequence[int]) -> list[int]:
    """Returns the connection polynomial of the shortest linear recurrence that yields all values (Massey 1969).

    It is returned with as many coefficients as the length of the recurrence and one, lowest first.
    """
    current, previous = [1], [1]
    length, shift, last = 0, 1, 1
    for at, value in enumerate(values):
        found = (value + sum(c * values[at - i] for i, c in enumerate(current[1 : length + 1], start=1))) % P
        if not found:
            shift += 1
            continue
        factor = found * pow(last, P - 2, P) % P
        changed = current + [0] * max(0, len(previous) + shift - len(current))
        for i, c in enumerate(previous):
            changed[i + shift] = (changed[i + shift] - factor * c) % P
        if 2 * length <= at:
            length, previous, last, shift = at + 1 - length, current, found, 1
        else:
            shift += 1
        current = changed
    return [*current, *[0] * (length + 1)][: length + 1]


def _value(polynomial: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % P
    return value
