"""Collects the tags of a rehearsal or a round, or the workers' word that they agree, before vectors are asked for."""

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
from ..secagg import ShardClasses, tags_in
from .worker_registry import WorkerRegistry

__all__ = ["RehearsalRule", "collect_tags", "rehearse"]

_log = logging.getLogger(__name__)
_GRACE = 5.0  # seconds to wait on once enough workers have answered
#: The same in a round, as a part of the time so far: more tags than those of a majority help only where holders differ.
_SHARE = 0.1


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
    senders = _senders(classes)
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


def collect_tags(
    plan: Plan,
    classes: ShardClasses,
    messages: list[Message],
    registry: WorkerRegistry,
    grid: Grid,
    timeout: float | None,
) -> RehearsalRule:
    """Returns the tags of what the workers have computed for a round, whose vectors they keep back.

    Args:
        plan: The plan of the round.
        classes: The classes of the manifest.
        messages: The messages of the plan.
        registry: Which node is which worker.
        grid: The grid, an `EarlyStopGrid`.
        timeout: Seconds to wait for the tags; None for no limit.

    Raises:
        InvalidSetting: The strategy is driven by another loop.
    """
    if not isinstance(grid, EarlyStopGrid):
        raise InvalidSetting("A manifest with agree='always' needs the strategy's start().")
    rule = RehearsalRule(plan, _senders(classes), registry, grid)
    grid.expect(rule)
    grid.send_and_receive(messages, timeout=timeout)
    return rule


def _senders(classes: ShardClasses) -> list[list[int]]:
    """Returns the workers that send each class."""
    return [[i for i in range(classes.n) if c in classes.sent_by(i)] for c in range(len(classes))]


class RehearsalRule(StopRule):
    """Waits until all workers have answered, or enough of them and as much time again is over.

    Args:
        plan: A plan of kind "rehearse" or "compare", or of a round in which holders compare before vectors leave.
        classes: For each class, the workers that send it.
        registry: Which node is which worker.
        grid: The grid.

    Attributes:
        refused: Workers that refuse, and why.
        rejections: The same, as (node, worker, rejection).
        wait: Record of the wait.
        differing: Those of them whose own rules made them refuse.
    """

    def __init__(
        self, plan: Plan, classes: Iterable[Iterable[int]], registry: WorkerRegistry, grid: EarlyStopGrid
    ) -> None:
        self._round = plan.kind not in ("rehearse", "compare")
        self.label, self.wait = plan.label, Wait()
        self._plan, self._registry, self._source = plan, registry, grid.source
        self._classes = [frozenset(one) for one in classes]
        self._workers = frozenset().union(*self._classes)
        self._tags: dict[str, dict[int, str]] = {}  # request -> worker -> its tags
        self.refused: dict[int | None, str] = {}
        self.rejections: list[tuple[int, int | None, Rejection]] = []
        self.differing: set[int] = set()
        self._asked = 0

    @property
    def request(self) -> str:
        """In a round, digest of the request that most workers have answered, as hexadecimal; else empty."""
        return max(self._tags, key=lambda one: len(self._tags[one]), default="")

    @property
    def tags(self) -> dict[int, str]:
        """Worker -> its tags, as hexadecimal; in a comparison, an empty text."""
        return self._tags.get(self.request, {})

    @property
    def decided(self) -> bool:
        """Whether all have answered, or enough and the grace period is over."""
        answers = sum(map(len, self._tags.values())) + len(self.refused)
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
            self._refuse(arrival.node, worker, rejection)
            if rejection.kind == "secure-refused" and worker is not None:
                self.differing.add(worker)
            return
        try:
            told = Reply.find_in(reply.content)
            if told is None or (told.run, told.kind, told.round) != (self._plan.run, self._plan.kind, self._plan.round):
                raise ValueError("it answers something else")
            if self._registry.claim(arrival.node, told.worker, self._plan.round) is not None:
                raise ValueError("it answers as another worker")
            self._take(told, reply)
        except Exception as error:  # a reply is untrusted input
            self._refuse(arrival.node, worker, Rejection("layout", str(error)))
        if self.wake_at is None and self.enough:
            self.wake_at = self._source.now() + (_SHARE * at if self._round else max(at, _GRACE))

    def _refuse(self, node: int, worker: int | None, rejection: Rejection) -> None:
        self.refused[worker] = rejection.reason
        self.rejections.append((node, worker, rejection))

    def _take(self, told: Reply, reply: Message) -> None:
        request, tags = "", ""
        if self._plan.kind == "rehearse":
            tags = self._tags_in(reply)
        elif self._round:
            sent = sum(told.worker in one for one in self._classes)
            request, tags = told.request, "".join(tags_in(told.tags, sent))
            if not tags:
                raise ValueError("it holds no tags")
        for others in self._tags.values():
            others.pop(told.worker, None)
        self._tags.setdefault(request, {})[told.worker] = tags

    def _tags_in(self, reply: Message) -> str:
        record = reply.content.get(UPDATE)
        words = view(record[MASKED]) if isinstance(record, ArrayRecord) and MASKED in record else None
        if words is None or words.dtype != np.uint32 or words.ndim != 1 or words.size > 8 * len(self._classes):
            raise ValueError("it holds no tags")
        return words.astype("<u4").tobytes().hex()

    def finish(self, wait: Wait) -> list[Message]:
        """Returns no messages, because `offer` has recorded everything."""
        self.wait = wait
        return []
