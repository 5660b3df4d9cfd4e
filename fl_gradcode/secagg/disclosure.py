"""What the server and some workers learn from the replies to a request, computed for the actual code and graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._text import listed, numbered
from ..codes import check_workers, rank_mod
from .classes import ShardClasses
from .graph import ClassGraph

__all__ = ["Leakage", "leakage"]


@dataclass(frozen=True)
class Leakage:
    """What is learnt, beyond what the colluders know themselves.

    Attributes:
        colluders: Workers whose keys and data the server has.
        replies: Workers whose replies it has; with one shard a message, of all their shards.
        known: Classes that the colluders hold.
        components: Connected components of the graph without these classes.
        learnt: The components whose sums are learnt as a whole.
        dimensions: Number of independent combinations of the other classes' blocks that are learnt.
        blocks: Number m of blocks of an update.
        shards: The shards of each component.
    """

    colluders: tuple[int, ...]
    replies: tuple[int, ...]
    known: tuple[int, ...]
    components: tuple[tuple[int, ...], ...]
    learnt: tuple[int, ...]
    dimensions: int
    blocks: int
    shards: tuple[tuple[int, ...], ...]

    @property
    def protects(self) -> bool:
        """Whether nothing but one sum over all other classes, at least two of them, can be learnt."""
        return len(self.components) == 1 and len(self.components[0]) > 1

    @property
    def sentence(self) -> str:
        """What is learnt, in one sentence."""
        who = f"The server and {numbered('worker', self.colluders)}" if self.colluders else "The server"
        verb, besides = ("learn", ", besides what they hold themselves,") if self.colluders else ("learns", "")
        if not self.components:
            return f"{who} hold all shards themselves, so nothing is left to hide."
        if not self.dimensions:
            return f"{who} {verb}{besides} nothing from these replies."
        if self.dimensions < self.blocks * max(1, len(self.learnt)) or not self.learnt:
            return (
                f"{who} {verb}{besides} {self.dimensions} of {self.blocks * len(self.components)} combinations of the "
                f"blocks of {self._sums(range(len(self.components)))}."
            )
        return f"{who} {verb}{besides} {self._sums(self.learnt)}, and nothing else."

    def _sums(self, numbers: Iterable[int]) -> str:
        told = []
        for number in numbers:
            shards = self.shards[number]
            if len(self.components[number]) == 1:
                what = "the update" if len(shards) == 1 else "the sum of the updates"
                told.append(f"{what} of {numbered('shard', shards)} alone, which should be hidden")
            else:
                told.append(f"the sum of the updates of {len(shards)} shards ({listed(shards)})")
        return listed(told, most=4)


def leakage(
    classes: ShardClasses, graph: ClassGraph, *, colluders: Iterable[int] = (), missing: Iterable[int] = ()
) -> Leakage:
    """Returns what the server learns from the replies to one request, together with some workers.

    A combination of replies is free of masks exactly if its coefficients are constant on each component of the graph
    without the colluders' classes. So what is learnt is the row space of the replies, restricted to the other classes,
    intersected with the span of the components' indicators, block by block.

    Args:
        classes: The classes.
        graph: The graph of masks.
        colluders: Workers whose keys and data the server has.
        missing: Workers whose replies it does not have.

    Raises:
        InvalidCode: A worker does not exist.
    """
    with_server, lost = (tuple(sorted(check_workers(set(one), classes.n))) for one in (colluders, missing))
    replies = tuple(i for i in range(classes.n) if i not in lost)
    known = {c for i in with_server for c in classes.supports[i]}
    others = [c for c in range(len(classes)) if c not in known]
    components = graph.components(sorted(known))
    m, place = classes.m, {c: number for number, c in enumerate(others)}
    rows = [row for i in replies for row in _rows(classes, i, place)]
    view = np.array(rows, np.int64).reshape(len(rows), len(others) * m)
    view = np.unique(view, axis=0) if rows else view  # holders of one class send the same
    sums = np.zeros((len(components), m, len(others), m), np.int64)
    for number, component in enumerate(components):
        for block in range(m):
            sums[number, block, [place[c] for c in component], block] = 1
    indicators = sums.reshape(len(components) * m, len(others) * m)
    seen = rank_mod(view)
    together = rank_mod(np.concatenate([view, indicators]))
    learnt = tuple(
        number
        for number in range(len(components))
        if rank_mod(np.concatenate([view, indicators[number * m : (number + 1) * m]])) == seen
    )
    return Leakage(
        with_server,
        replies,
        tuple(sorted(known)),
        tuple(components),
        learnt,
        seen + len(indicators) - together,
        m,
        tuple(tuple(sorted(j for c in component for j in classes.members[c])) for component in components),
    )


def _rows(classes: ShardClasses, worker: int, place: dict[int, int]) -> list[NDArray[np.int64]]:
    """Returns the coefficients of the other classes' blocks in what a worker sends."""
    if classes.sending == "shardwise":
        found = []
        for c in classes.sent_by(worker):
            if c in place:
                row = np.zeros(len(place), np.int64)
                row[place[c]] = 1
                found.append(row)
        return found
    row = np.zeros((len(place), classes.m), np.int64)
    for c in classes.sent_by(worker):
        if c in place:
            row[place[c]] = classes.matrix[worker, c]
    return [row.reshape(-1)]
