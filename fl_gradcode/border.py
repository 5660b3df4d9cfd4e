"""Checks at the border of the mathematics: everything behind them trusts its input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InvalidCode

__all__ = ["as_float", "check_groups", "check_tolerance", "check_workers"]


def as_float(values: ArrayLike) -> NDArray[np.floating]:
    """float32 and float64 as they are, everything else as float64."""
    array = np.asarray(values)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def check_groups(B: NDArray[np.float64], groups: tuple[tuple[int, ...], ...]) -> None:
    """Decoding takes one reply of each group: rows within a group must be alike, and the blocks add up to 1."""
    members = [i for group in groups for i in group]
    if len(set(members)) != len(members) or not set(members) <= set(range(len(B))) or not all(groups):
        raise InvalidCode(
            f"groups={groups} must be non-empty and name each of the workers 0..{len(B) - 1} at most once."
        )
    for group in groups:
        if any((B[i] != B[group[0]]).any() for i in group):
            raise InvalidCode(f"The workers of group {group} must have the same row of B.")
    if B.ndim != 2 or (B[[group[0] for group in groups]].sum(axis=0) != 1).any():
        raise InvalidCode("The rows of one worker of each group must add up to 1 for every shard.")


def check_workers(workers: Iterable[int], n: int) -> list[int]:
    """Worker numbers as a list; each in 0..n-1, none twice."""
    listed = [int(i) for i in workers]
    for i in listed:
        if not 0 <= i < n:
            raise InvalidCode(f"Worker {i} does not exist: this code has workers 0..{n - 1}.")
    if len(set(listed)) != len(listed):
        twice = next(i for i in listed if listed.count(i) > 1)
        raise InvalidCode(f"Worker {twice} appears twice among the survivors; each reply counts once.")
    return listed


def check_tolerance(s: Any, n: int) -> int:
    """The straggler tolerance as a whole number in 0..n-1."""
    if not isinstance(s, int | float | np.number) or s != int(s) or not 0 <= s < n:
        raise InvalidCode(f"s={s!r} stragglers of n={n} workers: s must be a whole number in 0..n-1.")
    return int(s)
