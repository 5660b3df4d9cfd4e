"""The registry of which node is which worker, learnt from replies because node ids change.

A phase works on a copy of the run's registry, and the run takes over that copy when the phase ends.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable

from flwr.app import Message

from ..errors import RoundFailed, VersionMismatch
from ..protocol import Reply

__all__ = ["WorkerRegistry"]

_log = logging.getLogger(__name__)


class WorkerRegistry:
    """Maps each node to its worker, as far as known."""

    def __init__(self) -> None:
        self._named: dict[int, int] = {}
        #: Worker -> shard -> SHA-256 of its data, as last reported under an open plan or to a probe.
        self.holdings: dict[int, dict[int, str]] = {}
        self._worker: dict[int, int] = {}
        self._answered: dict[int, dict[int, set[int]]] = {}  # worker -> round -> nodes

    def copy(self) -> WorkerRegistry:
        """Returns a registry with the same knowledge, for use in a new phase."""
        other = WorkerRegistry()
        other.holdings = {worker: dict(shards) for worker, shards in self.holdings.items()}
        other._worker = dict(self._worker)
        other._answered = {
            worker: {server_round: set(nodes) for server_round, nodes in rounds.items()}
            for worker, rounds in self._answered.items()
        }
        other._named = dict(self._worker)
        return other

    def worker_of(self, node: int) -> int | None:
        """Returns the worker that this node is, or None if it is not known."""
        return self._worker.get(node)

    def named(self, node: int) -> int | None:
        """Returns the worker that this node was when the phase began, or what it reported in the phase, or None.

        Unlike `worker_of`, this method still knows nodes that have failed since.
        """
        return self._named.get(node)

    @property
    def contested(self) -> bool:
        """Whether two nodes claim to be the same worker; both must be heard before one can be blamed."""
        return len(set(self._worker.values())) < len(self._worker)

    def learn(self, node: int, worker: int) -> None:
        """Record the worker number that a node reported."""
        self._worker[node] = worker
        self._named.setdefault(node, worker)

    def forget(self, node: int) -> None:
        """Forget a node that failed: it may return as another worker, so its next message holds the whole plan."""
        self._worker.pop(node, None)

    def answered(self, node: int, worker: int, server_round: int) -> None:
        """Record that a node answered as `worker`.

        Raises:
            RoundFailed: The same two nodes answered as the same worker in this round and in the round before. Once is
                normal, because a restarted node has a new id. Twice means that two nodes were given one number.
        """
        self.learn(node, worker)
        rounds = self._answered.setdefault(worker, {})
        rounds.setdefault(server_round, set()).add(node)
        both = rounds[server_round] & rounds.get(server_round - 1, set())
        for old in [r for r in rounds if r < server_round - 1]:
            del rounds[old]
        if len(both) > 1:
            named = " and ".join(map(str, sorted(both)[:2]))
            raise RoundFailed(
                f"Nodes {named} both answer as worker {worker}, in rounds {server_round - 1} and {server_round}. "
                "Give each node its own partition-id."
            )

    def keep(self, nodes: Iterable[int]) -> None:
        """Forget all nodes but these; a worker whose node is gone may come back as another node."""
        listed = set(nodes)
        self._worker = {node: worker for node, worker in self._worker.items() if node in listed}

    def learn_from(self, node: int, message: Message | None, *, run: str) -> None:
        """Learn which worker a node is from a reply that is not used; an error reply makes the node unknown."""
        if message is None:
            return
        if message.has_error():
            self.forget(node)
            return
        with contextlib.suppress(ValueError, VersionMismatch):
            reply = Reply.find_in(message.content)
            if reply is not None and reply.kind == "probe":
                self.learn(node, reply.worker)
                self.holdings[reply.worker] = dict(reply.holds)
            elif reply is not None and reply.run == run:
                self.answered(node, reply.worker, reply.round)
                if reply.holds:
                    self.holdings[reply.worker] = dict(reply.holds)

    def missing(self, workers: Iterable[int]) -> list[int]:
        """Returns the workers whose node is not known."""
        known = set(self._worker.values())
        return [i for i in workers if i not in known]
