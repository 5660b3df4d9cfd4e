"""The registry of which node is which worker, learnt from replies because node ids change.

Whatever a node claims binds that node alone: it is one worker, and has one vote on data. A worker is one node, the one
that was known first as long as it answers. Who contradicts that is left out by name, and ends nobody else's run.

A phase works on a copy of the run's registry, and the run takes over that copy when the phase ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Message

from ..errors import VersionMismatch
from ..protocol import Rejection, Reply

__all__ = ["WorkerRegistry"]

_SILENT = 2  # rounds without an answer after which another node may take over a worker
_MOST_QUARANTINED = 10_000


@dataclass(frozen=True)
class _Speaker:
    """The node that speaks for a worker, and the last round in which it did."""

    node: int
    round: int


class WorkerRegistry:
    """Maps each node to its worker, as far as known."""

    def __init__(self) -> None:
        self._named: dict[int, int] = {}
        #: Node -> shard -> SHA-256 of its data, as it last reported under an open plan or to a probe.
        self.holdings: dict[int, dict[int, str]] = {}
        #: Node whose replies count no more in this run -> why, as a sentence without its full stop.
        self.quarantined: dict[int, str] = {}
        self._worker: dict[int, int] = {}
        self._speaker: dict[int, _Speaker] = {}
        self._first: dict[int, int] = {}  # worker -> the node that it was first, as long as that node is listed
        self._spoke_for: dict[int, int] = {}  # node -> the worker that it last was
        self._engine: dict[int, int] = {}  # node -> worker, as the engine knows it
        self._was: dict[int, int] = {}  # node that is listed and whose replies count no more -> the worker that it was

    def copy(self) -> WorkerRegistry:
        """Returns a registry with the same knowledge, for use in a new phase."""
        other = WorkerRegistry()
        other.holdings = dict(self.holdings)
        other.quarantined = dict(self.quarantined)
        other._worker = dict(self._worker)
        other._speaker = dict(self._speaker)
        other._first = dict(self._first)
        other._spoke_for = dict(self._spoke_for)
        other._engine = dict(self._engine)
        other._was = dict(self._was)
        other._named = dict(self._worker)
        return other

    def worker_of(self, node: int) -> int | None:
        """Returns the worker that this node is, or None if it is not known."""
        return self._worker.get(node)

    def node_of(self, worker: int) -> int | None:
        """Returns the node that this worker is, or None if it is not known."""
        return next((node for node, mine in self._worker.items() if mine == worker), None)

    def named(self, node: int) -> int | None:
        """Returns the worker that this node was when the phase began, or what it reported in the phase, or None.

        Unlike `worker_of`, this method still knows nodes that have failed since.
        """
        return self._named.get(node)

    def learn_from_engine(self, workers: Mapping[int, int]) -> None:
        """Take over which node is which worker from an engine that knows it; no node can claim otherwise."""
        self._engine.update(workers)
        for node, worker in workers.items():
            self._named.setdefault(node, worker)
            if node not in self.quarantined:
                self._worker[node] = worker

    def forget(self, node: int) -> None:
        """Forget a node that failed: it may return as another worker, so its next message holds the whole plan."""
        self._worker.pop(node, None)

    def quarantine(self, node: int, why: str) -> None:
        """Let a node's replies count no more in this run.

        Args:
            node: The node.
            why: The reason, as a sentence without its full stop.
        """
        if node in self.quarantined or len(self.quarantined) >= _MOST_QUARANTINED:
            return
        self.quarantined[node] = why
        self.holdings.pop(node, None)
        worker = self._worker.pop(node, None)
        if worker is not None:
            self._was[node] = worker
        if worker is not None and self._speaker.get(worker, _Speaker(-1, 0)).node == node:
            del self._speaker[worker]
        self._first = {worker: first for worker, first in self._first.items() if first != node}

    @property
    def silenced(self) -> set[int]:
        """Workers whose node is there and whose replies count no more."""
        return {*self._was.values()} - {*self._worker.values()}

    def claim(self, node: int, worker: int, server_round: int) -> Rejection | None:
        """Record that a node answers as `worker`; returns None if it may, else the rejection of its reply.

        A node that was another worker before contradicts itself. A worker that another node is keeps that node, unless
        it has been silent for two rounds: a restarted node has a new id. If it answers again after all, there are two,
        and the later one is left out from then on.

        Args:
            node: The node.
            worker: The worker that it says it is.
            server_round: The round that it answers.
        """
        if node in self.quarantined:
            return Rejection("quarantined", self.quarantined[node])
        mine = self._engine.get(node, self._worker.get(node, worker))
        if mine != worker:
            self.quarantine(node, f"it answers as worker {worker}, and is worker {mine}")
            return Rejection("contradiction", self.quarantined[node])
        speaker = self._speaker.get(worker)
        if speaker is not None and speaker.node != node:
            if self._first.get(worker) == node and server_round >= speaker.round:
                self.quarantine(speaker.node, f"it answers as worker {worker}, which is node {node}")
            elif server_round - speaker.round < _SILENT:
                self.forget(node)
                why = (
                    f"it answers as worker {worker}, which is node {speaker.node}: give each node its own partition-id"
                )
                return Rejection("duplicate-worker", why)
            self._worker.pop(speaker.node, None)
        old = self._spoke_for.get(node, worker)
        if old != worker:  # it was another worker before it failed
            if self._speaker.get(old, _Speaker(-1, 0)).node == node:
                del self._speaker[old]
            if self._first.get(old) == node:
                del self._first[old]
        self._spoke_for[node] = worker
        self._worker[node] = worker
        self._named.setdefault(node, worker)
        self._first.setdefault(worker, node)
        self._speaker[worker] = _Speaker(node, server_round)
        return None

    def keep(self, nodes: Iterable[int]) -> None:
        """Forget all nodes but these, with what they claimed; a worker whose node is gone may come back as another."""
        listed = set(nodes)
        self._worker = {node: worker for node, worker in self._worker.items() if node in listed}
        self._speaker = {worker: one for worker, one in self._speaker.items() if one.node in listed}
        self._first = {worker: node for worker, node in self._first.items() if node in listed}
        self._was = {node: worker for node, worker in self._was.items() if node in listed}
        self._spoke_for = {node: worker for node, worker in self._spoke_for.items() if node in listed}
        self.holdings = {node: shards for node, shards in self.holdings.items() if node in listed}

    def learn_from(self, node: int, message: Message | None, *, run: str, server_round: int) -> None:
        """Learn which worker a node is from a reply that is not used; an error reply makes the node unknown.

        Args:
            node: The node.
            message: Its reply, or None.
            run: Name of the run; replies to another one teach nothing.
            server_round: The round that asked.
        """
        if message is None:
            return
        if message.has_error():
            self.forget(node)
            return
        with contextlib.suppress(ValueError, VersionMismatch):
            reply = Reply.find_in(message.content)
            known = reply is not None and (reply.kind == "probe" or reply.run == run)
            if reply is not None and known and self.claim(node, reply.worker, server_round) is None and reply.holds:
                self.holdings[node] = dict(reply.holds)

    def missing(self, workers: Iterable[int]) -> list[int]:
        """Returns the workers whose node is not known."""
        known = set(self._worker.values())
        return [i for i in workers if i not in known]
