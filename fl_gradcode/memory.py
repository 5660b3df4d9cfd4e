"""What each group or shard last sent, to stand in for it when it is missing.

The server knows single updates only where replies are not mixed: groups with m = 1, and one shard a message. It takes
one vector of the model's size for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bucket import Bucket, Stale
from .gradient_code import GradientCode

__all__ = ["Memory", "can_fill_in"]


def can_fill_in(code: GradientCode, *, shardwise: bool) -> bool:
    """Whether the server learns what the missing ones last sent."""
    return shardwise or (code.groups is not None and code.m == 1)


class Memory:
    """The last known update of each block of shards."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Stale] = {}

    def keep(
        self, code: GradientCode, shards: Sequence[int], server_round: int, bucket: Bucket, vector: NDArray[Any]
    ) -> None:
        """Remember what went into a sum."""
        for worker in np.flatnonzero(vector):
            block = tuple(shards[j] for j in code.shards_of(int(worker)))
            # Under sampling a group sends other shards each time: what overlaps is out of date.
            self._known = {one: stale for one, stale in self._known.items() if not set(one) & set(block)}
            update, metrics = bucket.updates[int(worker)], bucket.metrics[int(worker)]
            self._known[block] = Stale(block, server_round, update, metrics, bucket.key)

    def for_missing(
        self, code: GradientCode, shards: Sequence[int], survivors: Sequence[int], key: object
    ) -> tuple[Stale, ...]:
        """What is known of the groups without survivors; only where names, dtypes and shapes are the same."""
        there = set(survivors)
        found = []
        for group in code.groups or ():
            if not there.intersection(group):
                stale = self._known.get(tuple(shards[j] for j in code.shards_of(group[0])))
                if stale is not None and stale.key == key:
                    found.append(stale)
        return tuple(found)
