"""Collects the tags of a rehearsal from all workers, or their word that they agree, before vectors are asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from ..errors import InvalidSetting, RoundFailed
from ..grid import Arrival, EarlyStopGrid, StopRule, Wait
from ..protocol import MASKED, UPDATE, Plan, Rejection, Reply, rejection_of, view
from ..secagg import ShardClasses
from .worker_registry import WorkerRegistry

__all__ = ["rehearse"]

_log = logging.getLogger(__name__)
_GRACE = 5.0  # seconds to wait on once enough workers have answered


def rehearse(
    plan: Plan,
    classes: ShardClasses,
    messages: Callable[[Plan, bool], list[Message]],
    registry: WorkerRegistry,
    grid: Grid,
    timeout: float | None,
    *,
    votes: int = 0,
) -> None:
    """Let the holders of each class compare what they compute, before any of them sends a vector.

    Args:
        plan: The plan of the round.
        classes: The classes of the manifest.
        messages: Returns the messages of a plan of kind "rehearse" or "compare", with the model's arrays or without.
        registry: Which node is which worker.
        grid: The grid, an `EarlyStopGrid`.
        timeout: Seconds to wait for the answers to one message; None for no limit.
        votes: Number of holders of each class that may differ from the others, who are then left alone.

    Raises:
        RoundFailed: They differ, or too few of them answer. The message names them.
        InvalidSetting: The strategy is driven by another loop.
    """
    if not isinstance(grid, EarlyStopGrid):
        raise InvalidSetting("A manifest with a rehearsal needs the strategy's start().")
    senders = [[i for i in range(classes.n) if c in classes.sent_by(i)] for c in range(len(classes))]
    tags: dict[int, str] = {}
    for kind in ("rehearse", "compare"):
        asked = replace(plan, kind=kind, tags=tags)
        rule = RehearsalRule(asked, senders, registry, grid)
        grid.expect(rule)
        grid.send_and_receive(messages(asked, kind == "rehearse"), timeout=timeout)
        # Who has not rehearsed refuses too, and differs from nobody.
        differing = rule.differing & tags.keys() if kind == "compare" else set()
        if not rule.enough or any(len(differing & {*one}) > votes for one in senders):
            reasons = "; ".join(sorted({*rule.refused.values()})[:3]) or "too few answered"
            raise RoundFailed(f"The rehearsal of round {plan.round} failed, and no vector was sent: {reasons}.")
        for worker in sorted(differing):
            _log.warning("%s The other holders of its shards go on without it.", rule.refused[worker])
        tags = rule.tags


class RehearsalRule(StopRule):
    """Waits until all workers have answered, or enough of them and as much time again is over.

    Args:
        plan: A plan of kind "rehearse" or "compare".
        classes: For each class, the workers that send it.
        registry: Which node is which worker.
        grid: The grid.

    Attributes:
        tags: Worker -> its tags, as hexadecimal; in a comparison, an empty text.
        refused: Workers that refuse, and why.
        differing: Those of them whose own rules made them refuse.
    """

    def __init__(
        self, plan: Plan, classes: Iterable[Iterable[int]], registry: WorkerRegistry, grid: EarlyStopGrid
    ) -> None:
        self.label = plan.label
        self._plan, self._registry, self._source = plan, registry, grid.source
        self._classes = [frozenset(one) for one in classes]
        self._workers = frozenset().union(*self._classes)
        self.tags: dict[int, str] = {}
        self.refused: dict[int | None, str] = {}
        self.differing: set[int] = set()
        self._asked = 0

    @property
    def decided(self) -> bool:
        """Whether all have answered, or enough and the grace period is over."""
        answers = len(self.tags) + len(self.refused)
        if answers >= max(self._asked, 1) or len(self.tags) == len(self._workers):
            return True
        return self.wake_at is not None and self._source.now() >= self.wake_at

    @property
    def enough(self) -> bool:
        """Whether more than half of the senders of each class have answered."""
        return all(2 * len(one & self.tags.keys()) > len(one) for one in self._classes)

    def sent(self, node: int) -> None:
        """Count the nodes that were asked."""
        self._asked += 1

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Take the tags of a reply."""
        worker = self._registry.worker_of(arrival.node)
        if reply is None or reply.has_error():
            rejection = Rejection("no-reply", arrival.failure) if reply is None else rejection_of(reply)
            self.refused[worker] = rejection.reason
            if rejection.kind == "secure-refused" and worker is not None:
                self.differing.add(worker)
            return
        try:
            told = Reply.find_in(reply.content)
            if told is None or (told.run, told.kind, told.round) != (self._plan.run, self._plan.kind, self._plan.round):
                raise ValueError("it answers something else")
            if self._registry.claim(arrival.node, told.worker, self._plan.round) is not None:
                raise ValueError("it answers as another worker")
            self.tags[told.worker] = self._tags_in(reply) if self._plan.kind == "rehearse" else ""
        except Exception as error:  # a reply is untrusted input
            self.refused[worker] = str(error)
        if self.wake_at is None and self.enough:
            self.wake_at = self._source.now() + max(at, _GRACE)

    def _tags_in(self, reply: Message) -> str:
        record = reply.content.get(UPDATE)
        words = view(record[MASKED]) if isinstance(record, ArrayRecord) and MASKED in record else None
        if words is None or words.dtype != np.uint32 or words.ndim != 1 or words.size > 8 * len(self._classes):
            raise ValueError("it holds no tags")
        return words.astype("<u4").tobytes().hex()

    def finish(self, wait: Wait) -> list[Message]:
        """Returns no messages, because `offer` has recorded everything."""
        return []
