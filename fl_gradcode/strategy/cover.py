"""Whether a few of many sets may cover what is wanted: could those that are missing still bring all shards?"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

__all__ = ["may_cover"]

_WORK, _DEEP = 20_000, 100  # sets that are looked at for a cover, and how many it may have


def may_cover(wanted: AbstractSet[int], sets: Sequence[AbstractSet[int]], count: int) -> bool:
    """Whether `count` of the sets may cover all that is wanted; True too where it would take long to tell."""
    inside = [*{frozenset(one & wanted) for one in sets} - {frozenset()}]
    if not wanted <= frozenset().union(*inside):
        return False
    if count >= len(inside) or _greedy_cover(wanted, inside) <= count:  # mostly, and soon told
        return True
    if count * max(map(len, inside), default=0) < len(wanted):
        return False
    return count >= _DEEP or _covers(wanted, inside, count, [_WORK])


def _greedy_cover(wanted: AbstractSet[int], sets: Sequence[AbstractSet[int]]) -> int:
    """How many sets it takes if for each element in turn the one is taken that has most of the rest."""
    having: dict[int, list[AbstractSet[int]]] = {}
    for one in sets:
        for element in one:
            having.setdefault(element, []).append(one)
    left, taken = set(wanted), 0
    for element in sorted(wanted):
        if element in left:
            left -= max(having[element], key=lambda one: len(one & left))
            taken += 1
    return taken


def _covers(wanted: AbstractSet[int], sets: Sequence[AbstractSet[int]], count: int, left: list[int]) -> bool:
    left[0] -= len(sets)
    if not wanted or left[0] < 0:
        return True
    inside = [one & wanted for one in sets]
    if count * max(map(len, inside), default=0) < len(wanted):
        return False
    rarest = min(wanted, key=lambda j: sum(j in one for one in inside))
    return any(_covers(wanted - one, inside, count - 1, left) for one in inside if rarest in one)
