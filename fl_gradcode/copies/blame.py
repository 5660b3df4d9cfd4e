"""Whom to blame for disagreements: the one smallest set of workers without which the copies agree."""

from __future__ import annotations

import itertools
from collections.abc import Collection

__all__ = ["to_blame"]

_MOST_TRIED = 20_000


def to_blame(pairs: Collection[tuple[int, int]], most: int) -> frozenset[int]:
    """Returns the smallest set of workers that takes part in every disagreement, if there is just one such set.

    Of three copies, one that differs from the two others is to blame. Of two, neither is known to be, and the result
    is empty. Where a code gives each worker several shards, a worker that disagrees with two others about two shards is
    to blame, since otherwise both of them would be.

    Args:
        pairs: The workers of each two copies that disagree.
        most: Largest number of workers to blame.
    """
    workers = sorted({worker for pair in pairs for worker in pair})
    tried = 0
    for size in range(1, min(most, len(workers)) + 1):
        covers = []
        for some in itertools.combinations(workers, size):
            tried += 1
            if tried > _MOST_TRIED:
                return frozenset()
            if all(one in some or other in some for one, other in pairs):
                covers.append(some)
                if len(covers) > 1:
                    return frozenset()
        if covers:
            return frozenset(covers[0])
    return frozenset()
