"""Graphs on classes, with one key for each edge, recomputed by every node from a family and its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from ..errors import InvalidSetting

__all__ = ["ClassGraph", "Family", "split_into_cohorts", "vertex_order"]

#: Families of graphs.
Family = Literal["path", "harary", "circulant"]


@dataclass(frozen=True)
class ClassGraph:
    """A graph on the classes, or one for each cohort of classes.

    Attributes:
        family: "path", "harary" (one parameter, the connectivity) or "circulant" (the offsets).
        parameters: Parameters of the family.
        cohorts: The classes of each cohort, in the order in which the family connects them.
    """

    family: Family
    parameters: tuple[int, ...]
    cohorts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        wanted = {"path": range(1), "harary": range(1, 2), "circulant": range(1, 1 << 15)}.get(self.family)
        if wanted is None or len(self.parameters) not in wanted or any(one < 1 for one in self.parameters):
            raise InvalidSetting(
                f"A graph is ['path'], ['harary', connectivity] or ['circulant', offset, ...], not "
                f"{[self.family, *self.parameters]}."
            )

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All edges (c, c') with c < c', ascending."""
        found = {
            (min(cohort[a], cohort[b]), max(cohort[a], cohort[b]))
            for cohort in self.cohorts
            for a, b in _edges(self.family, self.parameters, len(cohort))
        }
        return tuple(sorted(found))

    def edges_at(self, classes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Returns the edges of which at least one end is among the classes, ascending."""
        ours = set(classes)
        return tuple(edge for edge in self.edges if not ours.isdisjoint(edge))

    def connectivity(self) -> int:
        """Returns a number of classes such that removing any fewer leaves every cohort connected; 0: not known."""
        smallest = min(map(len, self.cohorts))
        if self.family == "path":
            return min(1, smallest - 1)
        return min(self.parameters[0], smallest - 1) if self.family == "harary" else 0

    def components(self, without: Sequence[int] = ()) -> list[tuple[int, ...]]:
        """Returns the connected components of the graph without some classes, each ascending."""
        gone = set(without)
        rest = sorted({c for cohort in self.cohorts for c in cohort} - gone)
        neighbours: dict[int, list[int]] = {c: [] for c in rest}
        for a, b in self.edges:
            if a in neighbours and b in neighbours:
                neighbours[a].append(b)
                neighbours[b].append(a)
        found, seen = [], set[int]()
        for first in rest:
            if first in seen:
                continue
            seen.add(first)
            component = [first]
            for c in component:
                new = [other for other in neighbours[c] if other not in seen]
                seen.update(new)
                component += new
            found.append(tuple(sorted(component)))
        return found


def _edges(family: Family, parameters: tuple[int, ...], size: int) -> set[tuple[int, int]]:
    if family == "path":
        return {(v, v + 1) for v in range(size - 1)}
    if family == "circulant":
        if any(offset > size // 2 for offset in parameters):
            raise InvalidSetting(f"Offsets {parameters} of a circulant graph on {size} classes go up to {size // 2}.")
        return _circulant(parameters, size)
    return _harary(parameters[0], size)


def _circulant(offsets: Sequence[int], size: int) -> set[tuple[int, int]]:
    return {(min(v, w), max(v, w)) for v in range(size) for o in offsets if (w := (v + o) % size) != v}


def _harary(connectivity: int, size: int) -> set[tuple[int, int]]:
    """Returns the fewest edges on `size` vertices with a vertex connectivity; the complete graph if they are few.

    Each vertex has as many edges as the connectivity, and one vertex has one more if both numbers are odd.

    References:
        Harary, "The maximum connectivity of a graph", PNAS 48, 1962.
    """
    if connectivity >= size - 1:
        return {(v, w) for v in range(size) for w in range(v + 1, size)}
    if connectivity == 1:  # a perfect matching has this degree, and is not connected
        return {(v, v + 1) for v in range(size - 1)}
    found = _circulant(range(1, connectivity // 2 + 1), size)
    if connectivity % 2:
        half = size // 2
        found |= {(v, v + half) for v in range(half)}
        if size % 2:
            found.add((half, 2 * half))
    return found


def vertex_order(holders: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Returns all classes in the order in which a graph connects them.

    Classes with the same holders stand next to each other if no two classes have overlapping but different holders, as
    with fractional repetition and one shard a message: edges between them cost a worker one stream instead of two.
    """
    sets = {tuple(sorted(one)) for one in holders}
    disjoint = sum(map(len, sets)) == len({worker for one in sets for worker in one})
    numbers = range(len(holders))
    return tuple(sorted(numbers, key=lambda c: (sorted(holders[c]), c)) if disjoint else numbers)


def split_into_cohorts(order: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    """Returns the classes in consecutive cohorts whose sizes differ by at most one.

    Raises:
        InvalidSetting: There are not that many classes.
    """
    if not 1 <= count <= len(order):
        raise InvalidSetting(f"cohorts={count} must be in 1..{len(order)}, the number of classes.")
    return tuple(tuple(part.tolist()) for part in np.array_split(np.array(order), count))
