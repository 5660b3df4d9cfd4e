"""Which node is which worker: learnt from replies, never from node ids, which change.

A phase works on a copy of the run's registry, and the run goes on with that copy when the phase is over.
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
    """Node -> worker, as far as known."""

    def __init__(self) -> None:
        self._named: dict[int, int] = {}
        #: Worker -> shard -> SHA-256 of its data, as last told under an open plan or by a probe.
        self.holdings: dict[int, dict[int, str]] = {}
        self._worker: dict[int, int] = {}
        self._answered: dict[int, dict[int, set[int]]] = {}  # worker -> round -> nodes

    def copy(self) -> WorkerRegistry:
        """Returns a registry with the same knowledge, for a phase that begins."""
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
        """Returns the worker that this node is, or None: it has to be told who it is."""
        return self._worker.get(node)

    def named(self, node: int) -> int | None:
        """Returns the worker that this node was known as when the phase began, or else what it said in it, or None.

        Unlike `worker_of`, it still knows a node that has failed since.
        """
        return self._named.get(node)

    @property
    def contested(self) -> bool:
        """Whether two of the nodes that are listed say that they are the same worker: hear both, to name them."""
        return len(set(self._worker.values())) < len(self._worker)

    def learn(self, node: int, worker: int) -> None:
        """A node reported its worker number."""
        self._worker[node] = worker
        self._named.setdefault(node, worker)

    def forget(self, node: int) -> None:
        """The node failed: it may be another worker next time, so it gets the whole plan again."""
        self._worker.pop(node, None)

    def answered(self, node: int, worker: int, server_round: int) -> None:
        """A node answered as `worker`.

        Raises:
            RoundFailed: In this round and the one before, the same two nodes answered as the same worker. Once
                is normal (a restarted node has a new id); twice means that two nodes were given one number.
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
        """Forget nodes that are gone: whoever was one of them may come back as another node."""
        listed = set(nodes)
        self._worker = {node: worker for node, worker in self._worker.items() if node in listed}

    def learn_from(self, node: int, message: Message | None, *, run: str) -> None:
        """Read who a node is off a reply that is not used; an error says only that it may have changed."""
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
        """Those of `workers` whose node is not known."""
        known = set(self._worker.values())
        return [i for i in workers if i not in known]
