"""Validates the arguments of the public functions of `codes`, so that all other code can trust its input."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidCode

__all__ = ["as_float", "as_pattern", "check_count", "check_groups", "check_holders", "check_tolerance", "check_workers"]


def as_float(values: ArrayLike) -> NDArray[np.floating]:
    """Returns the values as an array: float32 and float64 unchanged, everything else as float64."""
    array = np.asarray(values)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def as_pattern(assignment: Any, k: int | None = None) -> NDArray[np.bool_]:
    """Returns an assignment as a boolean matrix, shape (n, k), in which row i marks the shards of worker i.

    Args:
        assignment: A matrix of zeros and ones or of booleans (an array or anything with `__array__`), or a list with
            the list of each worker's shard numbers.
        k: Number of shards for lists; by default one more than the largest shard number.

    Raises:
        InvalidCode: The assignment is empty, of another form, or names a shard twice or one that does not exist.
    """
    if isinstance(assignment, list | tuple) and not _rows_of_flags(assignment):
        try:
            rows = [[operator.index(j) for j in row] for row in assignment]
        except TypeError:
            raise InvalidCode(
                "An assignment is a 0/1 matrix of shape (n, k), or a list with the list of each worker's shard numbers."
            ) from None
        if any(len(set(row)) < len(row) for row in rows):
            raise InvalidCode(
                "The assignment names a shard twice for one worker. If it is a matrix of zeros and ones, pass it as an "
                "array: numpy.array(assignment)."
            )
        shards = [j for row in rows for j in row]
        if k is not None and max(shards, default=0) >= k:
            raise InvalidCode(f"Shard {max(shards)} in the assignment does not exist; with k={k} they are 0..{k - 1}.")
        if min(shards, default=0) < 0:
            raise InvalidCode(f"Shard {min(shards)} in the assignment is negative; shards are numbered from 0.")
        pattern = np.zeros((len(rows), max(max(shards, default=-1) + 1, k or 0)), bool)
        for worker, row in enumerate(rows):
            pattern[worker, row] = True
    else:
        given = np.asarray(assignment)
        if given.ndim != 2 or not ((given == 0) | (given == 1)).all():
            raise InvalidCode(
                f"An assignment is a matrix of zeros and ones of shape (n, k), not {given.dtype} of shape "
                f"{given.shape}."
            )
        pattern = given.astype(bool)
    if 0 in pattern.shape:
        raise InvalidCode("The assignment is empty: it needs at least one worker and one shard.")
    return pattern


def _rows_of_flags(rows: Any) -> bool:
    """Returns whether nested lists are a matrix of booleans, and not lists of shard numbers."""
    nested = [row for row in rows if not np.isscalar(row)]
    return all(isinstance(flag, bool | np.bool_) for row in nested for flag in row) and any(map(len, nested))


def check_groups(blocks: NDArray[Any], groups: tuple[tuple[int, ...], ...]) -> None:
    """Check that each group can decode the sum of its own block of shards.

    Within a group, all rows must be constant over the block and zero elsewhere. For m = 1 the constant must be 1,
    because decoding takes one reply of each group as it is.

    Args:
        blocks: The encoding matrix B, shape (n, k, m).
        groups: The workers of each group.

    Raises:
        InvalidCode: The groups overlap, are empty, or do not fit B.
    """
    n, _, m = blocks.shape
    members = [i for group in groups for i in group]
    if len(set(members)) != len(members) or not set(members) <= set(range(n)) or not all(groups):
        raise InvalidCode(f"groups={groups} must be non-empty and name each of the workers 0..{n - 1} at most once.")
    held: NDArray[np.bool_] = np.asarray(blocks.any(axis=2))
    for group in groups:
        if any((held[i] != held[group[0]]).any() for i in group):
            raise InvalidCode(f"The workers of group {group} must hold the same shards.")
        block = np.flatnonzero(held[group[0]])
        inside = blocks[np.ix_(np.array(group), block)]
        if (inside != inside[:, :1]).any():
            raise InvalidCode(f"The workers of group {group} must have one coefficient for all shards of their block.")
        if m == 1 and (inside != 1).any():
            raise InvalidCode(
                f"The workers of group {group} must have coefficient 1: decoding takes one reply as it is."
            )
    if (held[[group[0] for group in groups]].sum(axis=0) != 1).any():
        raise InvalidCode("Every shard must belong to exactly one group.")


def check_holders(holders: Sequence[Sequence[int]], s: int, m: int) -> None:
    """Check that each shard has at least s + m holders, without which some s stragglers make the sum undecodable.

    Raises:
        InvalidCode: A shard has fewer holders. The message names it.
    """
    for shard, workers in enumerate(holders):
        if len(workers) < s + m:
            listed = ", ".join(map(str, workers)) or "none"
            raise InvalidCode(
                f"Shard {shard} is held by {len(workers)} workers ({listed}); tolerating s={s} "
                f"stragglers{f' at m={m}' if m > 1 else ''} needs at least {s + m}. Add a holder or lower "
                f"{'s or m' if m > 1 else 's'}."
            )


def check_workers(workers: Iterable[int], n: int) -> list[int]:
    """Returns the worker numbers as a list, after checking that each is in 0..n-1 and none appears twice."""
    listed = [int(i) for i in workers]
    for i in listed:
        if not 0 <= i < n:
            raise InvalidCode(f"Worker {i} does not exist: this code has workers 0..{n - 1}.")
    if len(set(listed)) != len(listed):
        twice = next(i for i in listed if listed.count(i) > 1)
        raise InvalidCode(f"Worker {twice} appears twice among the survivors; each reply counts once.")
    return listed


def check_tolerance(s: Any, n: int) -> int:
    """Returns the straggler tolerance as an int, after checking that it is a whole number in 0..n-1."""
    if not isinstance(s, int | float | np.integer | np.floating) or not 0 <= s < n or s % 1:
        raise InvalidCode(f"s={s!r} stragglers of n={n} workers: s must be a whole number in 0..n-1.")
    return int(s)


def check_count(value: Any, name: str) -> int:
    """Returns the value as an int, after checking that it is a whole number of at least 1."""
    if not isinstance(value, int | float | np.integer | np.floating) or not value >= 1 or value % 1:
        raise InvalidCode(f"{name}={value!r} must be a whole number of at least 1.")
    return int(value)
