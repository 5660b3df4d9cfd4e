"""Which node is which worker of a coded matrix, and which of them hold their block."""

from __future__ import annotations

import logging
from collections.abc import Collection

from .errors import RoundFailed
from .grid import EarlyStopGrid
from .roster import poll_nodes
from .stop import Wait

__all__ = ["Nodes"]

_log = logging.getLogger(__name__)


class Nodes:
    """Node -> worker, for one matrix.

    Worker i is the node that a virtual or in-process grid knows as worker i; elsewhere nodes are numbered in the order
    of their ids, which says nothing, and whoever comes for a node that is gone takes over its number.
    """

    def __init__(self, grid: EarlyStopGrid, n: int) -> None:
        self._grid, self._n = grid, n
        self.worker: dict[int, int] = {}
        #: Nodes that said that they hold their block, and nodes that have been sent it, by the label of the phase.
        self.holding: set[int] = set()
        self.sent: dict[str, set[int]] = {}

    def present(self, wanted: int, least: int, timeout: float) -> dict[int, int]:
        """Node -> worker of the nodes that are online: waits up to `timeout` seconds for `wanted` of them.

        Raises:
            RoundFailed: Fewer than `least` are there.
        """
        settling = 0.0 if self._grid.source.fixed_nodes else timeout
        online = sorted(poll_nodes(self._grid, settling, f"{wanted} nodes", lambda nodes: len(nodes) >= wanted))
        if len(online) < least:
            raise RoundFailed(
                f"{len(online)} nodes are online after {timeout:g} s; the product needs {least} answers. Start more "
                "nodes, or build the code for fewer."
            )
        if len(online) < wanted:
            _log.warning("Going on with %d of %d nodes; the others count as stragglers.", len(online), wanted)
        self._number(online)
        return dict(sorted(self.worker.items(), key=lambda pair: pair[1]))

    def learn(self, wait: Wait, holding: Collection[int]) -> None:
        """What a phase told of who holds a block: its answers, and late ones to the phases before."""
        self.holding.update(holding)
        for node, label, wrong in wait.late:
            if node in self.sent.get(label, ()) and node in self.worker and not wrong:
                self.holding.add(node)

    def _number(self, online: list[int]) -> None:
        listed = set(online)
        self.worker = {node: worker for node, worker in self.worker.items() if node in listed}
        self.holding &= listed
        free = [i for i in range(self._n) if i not in set(self.worker.values())]
        new = [node for node in online if node not in self.worker]
        known = self._grid.source.known_workers() if free and new else {}
        for node in new:
            if known.get(node) in free:
                self.worker[node] = known[node]
                free.remove(known[node])
        self.worker.update(zip([node for node in new if node not in self.worker], free, strict=False))
