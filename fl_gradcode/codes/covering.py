"""Decides whether a few of many sets may cover a wanted set, such as the shards that missing workers could deliver."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

__all__ = ["may_cover"]

_WORK, _DEEP = 20_000, 100  # most sets that the exact search visits, and most sets of a cover that it looks for


def may_cover(wanted: AbstractSet[int], sets: Sequence[AbstractSet[int]], count: int) -> bool:
    """Returns whether `count` of the sets may cover `wanted`; also True if deciding it would take too long."""
    inside = [*{frozenset(candidate & wanted) for candidate in sets} - {frozenset()}]
    if not wanted <= frozenset().union(*inside):
        return False
    if count >= len(inside) or _greedy_cover(wanted, inside) <= count:  # cheap, and enough in most cases
        return True
    if count * max(map(len, inside), default=0) < len(wanted):
        return False
    return count >= _DEEP or _covers(wanted, inside, count, [_WORK])


def _greedy_cover(wanted: AbstractSet[int], sets: Sequence[AbstractSet[int]]) -> int:
    """Returns the size of a greedy cover: for each element in turn, the set that covers most of the rest."""
    containing: dict[int, list[AbstractSet[int]]] = {}
    for candidate in sets:
        for element in candidate:
            containing.setdefault(element, []).append(candidate)
    left, taken = set(wanted), 0
    for element in sorted(wanted):
        if element in left:
            left -= max(containing[element], key=lambda candidate: len(candidate & left))
            taken += 1
    return taken


def _covers(wanted: AbstractSet[int], sets: Sequence[AbstractSet[int]], count: int, left: list[int]) -> bool:
    left[0] -= len(sets)
    if not wanted or left[0] < 0:
        return True
    inside = [candidate & wanted for candidate in sets]
    if count * max(map(len, inside), default=0) < len(wanted):
        return False
    rarest = min(wanted, key=lambda j: sum(j in candidate for candidate in inside))
    return any(_covers(wanted - candidate, inside, count - 1, left) for candidate in inside if rarest in candidate)
