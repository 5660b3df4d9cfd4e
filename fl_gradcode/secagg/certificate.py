"""The certificate of a graph: whatever at most T workers know, all other classes stay hidden in one sum.

The condition is that the graph without the classes of any at most T workers is connected and has at least 2 classes.
Under it, the server and these workers learn the sum over the other classes and nothing else. The proof is on the page
docs/secure-aggregation.md.
Sets of exactly T workers do not suffice: a larger set may take away a small component that a smaller one leaves.

References:
    Zhao, Sun, "Secure summation: capacity region, groupwise key, and feasibility", arXiv 2205.08458, for the condition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations, islice
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .._text import numbered
from ..errors import InvalidSetting, NotCertified
from .classes import ShardClasses
from .graph import ClassGraph, split_into_cohorts, vertex_order

__all__ = ["Certificate", "certify", "choose_graph"]

# Sets of workers times the square of the classes: all sets of at most 3 of 64 workers with 64 classes.
_MOST_WORK = 180_000_000
# Sets that are looked at together. A graph that fails mostly does so among the first few.
_FIRST, _CHUNK = 256, 4096
# Circulants that are tried before the search ends.
_MOST_TRIED = 2000


@dataclass(frozen=True)
class Certificate:
    """How it was established that a graph hides all but sums.

    Attributes:
        colluders: Number T of workers that may collude with the server.
        method: "repetition" (no worker has more than one class, and the graph's connectivity is above T), "enumerated"
            (all sets of at most T workers were looked at), or "connectivity" (it is above the number of classes that T
            workers can have).
        sets: Number of sets that were looked at, 0 for the other methods.
    """

    colluders: int
    method: Literal["repetition", "enumerated", "connectivity"]
    sets: int


def certify(classes: ShardClasses, graph: ClassGraph, *, colluders: int, min_classes: int = 3) -> Certificate:
    """Returns the certificate of a graph, or refuses the graph.

    Args:
        classes: The classes; their `holders` say who knows which seeds.
        graph: The graph.
        colluders: Number T of workers that may collude with the server.
        min_classes: Fewest classes in a cohort. With 2, each holder reads the other class off the sum.

    Raises:
        NotCertified: The condition does not hold, or it cannot be checked for so many workers.
    """
    _check_colluders(colluders)
    if type(min_classes) is not int or min_classes < 2:
        raise InvalidSetting(f"min_classes={min_classes!r} must be at least 2: a sum of one class is its update.")
    if sorted(c for cohort in graph.cohorts for c in cohort) != list(range(len(classes))):
        raise NotCertified("The cohorts must have each class exactly once.")
    smallest = min(map(len, graph.cohorts))
    if smallest < min_classes:
        raise NotCertified(
            f"A sum would be taken over {smallest} classes; at least {min_classes} are required. Use more groups of "
            f"workers, fewer cohorts, or a lower min_classes."
        )
    if classes.sending == "coded" and len(graph.cohorts) > 1:
        cohort_of = {c: number for number, cohort in enumerate(graph.cohorts) for c in cohort}
        for worker in range(classes.n):
            if len({cohort_of[c] for c in classes.sent_by(worker)}) > 1:
                raise NotCertified(f"The coded reply of worker {worker} would mix two cohorts; use one cohort.")
    supports = _distinct(classes.supports)
    most = max(map(len, supports), default=0)
    if most <= 1 and colluders <= smallest - 2 and graph.connectivity() > colluders:
        return Certificate(colluders, "repetition", 0)
    if colluders * most <= smallest - 2 and graph.connectivity() > colluders * most:
        return Certificate(colluders, "connectivity", 0)
    count = _sets(supports, colluders)
    if count * len(classes) ** 2 > _MOST_WORK:
        raise NotCertified(
            f"There are {count} sets of at most {colluders} of {len(supports)} workers, too many to look at all. Use a "
            f"graph of connectivity {colluders * most + 1} or more, fractional repetition, or fewer colluders."
        )
    bad = _failing_set(supports, graph, colluders)
    if bad is not None:
        raise NotCertified(_reason(classes, graph, bad))
    return Certificate(colluders, "enumerated", count)


def choose_graph(
    classes: ShardClasses, *, colluders: int, cohorts: int = 1, min_classes: int = 3
) -> tuple[ClassGraph, Certificate]:
    """Returns the graph that costs a worker the fewest streams among those that are tried, and its certificate.

    It is a path for T = 0. For fractional repetition it is the Harary graph of connectivity T + 1. Otherwise circulants
    are tried in the order of their degrees, or a Harary graph is taken if there are too many sets of workers.

    Args:
        classes: The classes.
        colluders: Number T of workers that may collude with the server.
        cohorts: Number of separate sums.
        min_classes: Fewest classes in a cohort.

    Raises:
        NotCertified: No graph has the property, or none that can be checked was found.
    """
    _check_colluders(colluders)
    parts = split_into_cohorts(vertex_order(classes.holders), cohorts)

    def certified(family: Literal["path", "harary", "circulant"], *parameters: int) -> tuple[ClassGraph, Certificate]:
        graph = ClassGraph(family, parameters, parts)
        return graph, certify(classes, graph, colluders=colluders, min_classes=min_classes)

    if colluders == 0:
        return certified("path")
    most = max(map(len, classes.supports))
    size = min(map(len, parts))
    if most <= 1:
        return certified("harary", colluders + 1)
    supports = _distinct(classes.supports)
    if _sets(supports, colluders) * len(classes) ** 2 > _MOST_WORK:
        return certified("harary", colluders * most + 1)
    complete = certified("harary", max(map(len, parts)))  # if this fails, every graph does
    for offsets in islice(_offsets(size), _MOST_TRIED):
        graph = ClassGraph("circulant", offsets, parts)
        if _failing_set(supports, graph, colluders) is None:
            return certified("circulant", *offsets)
    return certified("harary", colluders * most + 1) if colluders * most <= size - 2 else complete


def _check_colluders(colluders: int) -> None:
    if type(colluders) is not int or colluders < 0:
        raise InvalidSetting(f"colluders={colluders!r} must be a whole number of at least 0.")


def _offsets(size: int) -> Iterator[tuple[int, ...]]:
    """Yields offsets of circulants with 1 among them, by degree and then in ascending order."""
    others = range(2, size // 2 + 1)
    for degree in range(2, size):
        for count in range(degree // 2 + 1):
            for more in combinations(others, count):
                if sum(1 if 2 * one == size else 2 for one in (1, *more)) == degree:
                    yield (1, *more)


def _sets(supports: list[tuple[int, ...]], colluders: int) -> int:
    return sum(comb(len(supports), t) for t in range(colluders + 1))


def _distinct(supports: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    """Returns the different sets of classes that workers have: workers with equal ones count as one."""
    return sorted({support for support in supports if support})


def _failing_set(supports: list[tuple[int, ...]], graph: ClassGraph, colluders: int) -> list[tuple[int, ...]] | None:
    """Returns the classes of each of at most so many workers without which a cohort falls apart, or None."""
    size = sum(map(len, graph.cohorts))
    adjacent = np.eye(size, dtype=np.float32)
    for a, b in graph.edges:
        adjacent[a, b] = adjacent[b, a] = 1
    known = np.zeros((len(supports), size), bool)
    for row, support in zip(known, supports, strict=True):
        row[list(support)] = True
    sets = chain.from_iterable(combinations(range(len(supports)), t) for t in range(colluders + 1))
    chunk = _FIRST
    while few := list(islice(sets, chunk)):
        gone = np.array([known[list(one)].any(axis=0) for one in few])
        for cohort in graph.cohorts:
            columns = np.array(cohort)
            fine = _connected(~gone[:, columns], adjacent[np.ix_(columns, columns)])
            if not fine.all():
                return [supports[i] for i in few[int(np.argmin(fine))]]
        chunk = _CHUNK
    return None


def _connected(alive: NDArray[np.bool_], adjacent: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns for each row whether its vertices are connected and at least two.

    Args:
        alive: The vertices that are left, shape (sets, vertices).
        adjacent: Adjacency matrix with ones on its diagonal.
    """
    reached = np.zeros_like(alive)
    reached[np.arange(len(alive)), alive.argmax(axis=1)] = True
    reached &= alive
    count = reached.sum(axis=1)
    while True:
        reached = (reached.astype(np.float32) @ adjacent > 0) & alive
        more = reached.sum(axis=1)
        if (more == count).all():
            left = alive.sum(axis=1)
            return np.asarray((more == left) & (left >= 2))
        count = more


def _reason(classes: ShardClasses, graph: ClassGraph, colluding: list[tuple[int, ...]]) -> str:
    workers = sorted(classes.supports.index(support) for support in colluding)
    who = f"The server and {numbered('worker', workers)}" if workers else "The server alone"
    gone = {c for support in colluding for c in support}
    for cohort in graph.cohorts:
        rest = set(cohort) - gone
        if len(rest) < 2:
            return (
                f"{who} would know all but {len(rest)} of the {len(cohort)} classes in a sum, and so read what is "
                "left. Allow fewer colluders, or use more classes."
            )
    parts = len(graph.components(sorted(gone)))
    return (
        f"{who} would learn {parts} separate sums: without their classes, the graph falls into {parts} parts. Use a "
        "graph of higher connectivity."
    )
