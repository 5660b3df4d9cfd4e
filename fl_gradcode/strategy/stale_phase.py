"""Training with bounded staleness: a phase that may end with last updates, and the late replies that renew them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from ..codes import IncrementalDecoder, may_cover, uncoded
from ..copies import Copies
from ..grid import Arrival, Late, Wait
from ..protocol import Plan, Rejection
from ..roster import WorkerRegistry
from ..staleness import UNKNOWN, StalenessRule, UpdateMemory
from .options import Approximation
from .phase import Scrutiny
from .plan_messages import MessageFactory
from .replies import Group, ReplyCollector
from .reply_groups import ReplyGroup, StaleUpdate, StaleUpdates
from .round_mode import RoundMode
from .stop_rules import ShardPhase, shard_row

__all__ = ["LateUpdates", "StalePhase"]


class LateUpdates:
    """Reads replies to earlier rounds of training, and remembers those that are newer than what is known.

    They are checked as replies in time are.

    Args:
        memory: The last known update of each shard.
        rule: How old an update may be.
    """

    def __init__(self, memory: UpdateMemory, rule: StalenessRule) -> None:
        self.memory, self.rule = memory, rule
        self._phase: tuple[Plan, ArrayRecord | None, list[int]] | None = None
        self._replies: ReplyCollector | None = None

    def open(
        self, plan: Plan, before: ArrayRecord | None, shards: Sequence[int], replies: ReplyCollector | None = None
    ) -> None:
        """Note the round of training that begins, and who learns what late replies say of apps and devices."""
        self._phase, self._replies = (plan, before, list(shards)), replies

    def wants(self, late: Late) -> bool:
        """Returns whether a late reply is newer than what is known of its shard."""
        asked, owed = _trained_in(late.label), self.memory.owed_by(late.node)
        if self._phase is None or owed is None or owed[1] != asked:  # an earlier run may have had the same name
            return False
        return asked >= self.rule.oldest(self._phase[0].round) and asked > self.memory.versions.get(owed[0], 0)

    def read(self, late: Late, message: Message | None, registry: WorkerRegistry) -> Rejection | None:
        """Remember the update of a late reply, if it is newer; returns why it is not fit to be used, or None."""
        wanted, asked = self.wants(late), _trained_in(late.label)
        self.memory.answered(late.node)
        if self._phase is None or not wanted or message is None or message.has_error():
            return None
        plan, before, shards = self._phase
        plan = replace(plan, round=asked)
        row_of = shard_row(plan, shards)
        copies = Copies(plan, before, compares=False)
        replies = ReplyCollector(plan, uncoded(len(shards)), before, registry, copies, row_of, spare=True)
        rejection = replies.read(late.node, message, "")
        for group in replies.groups.values():
            assert isinstance(group, ReplyGroup)
            for row, (update, metrics) in group.copies.items():
                sender = group.senders[row][1]
                with np.errstate(all="ignore"):
                    self.memory.keep(shards[row], asked, update, metrics, group.key, sender=sender, late=True)
        if self._replies is not None:
            self._replies.learn_from_late(replies)
        return rejection


class StalePhase(ShardPhase):
    """A phase of training that ends once enough shards have an update of this round and no other is too old.

    A free node gets the shard whose newest update, known or under way, is of the earliest round.

    Args:
        factory: Makes the messages; its plan holds every worker's shards.
        shards: All shards, ascending.
        before: The arrays that were sent.
        registry: Which node is which worker.
        scrutiny: What the replies are held against.
        mode: The mode of the round.
        late_updates: Has the last updates.
    """

    def __init__(
        self,
        factory: MessageFactory,
        shards: Sequence[int],
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        scrutiny: Scrutiny,
        *,
        mode: RoundMode,
        late_updates: LateUpdates,
    ) -> None:
        self._late, self._memory, self._rule = late_updates, late_updates.memory, late_updates.rule
        times, newest = mode.times_of(factory.plan.kind), self._memory.newest
        super().__init__(
            factory, shards, before, registry, scrutiny, patience=mode.patience, times=times, newest=newest
        )
        late_updates.open(self.plan, before, shards, self.replies)
        self._memory.forget_those_of(registry.silenced)
        self.late_updates = late_updates
        self._began = self._last = 0.0

    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Returns whether the rule is met, or every shard has a copy."""
        return decoder.decodable or self._suffices(self.replies.best, decoder.survivors)

    def suffices_without(self, group: Group, workers: Collection[int]) -> bool:
        """Returns whether a group of replies suffices without what these workers sent."""
        rows = [row for row in group.decoder.survivors if group.senders[row][1] not in workers]
        return group.decodes_without(workers) or self._suffices(group, rows)

    def _suffices(self, group: Group | None, rows: Sequence[int]) -> bool:
        if group is None or len(rows) < self._rule.needed(len(self._row)) or not self._memory.knows(group.key):
            return False
        there = {*rows}
        others = [shard for shard, row in self._row.items() if row not in there]
        if self._rule.too_old(((shard, self._memory.versions.get(shard, 0)) for shard in others), self.plan.round):
            return False
        fresh = sum(_weight_in(group, row) for row in there)
        return self._rule.enough_weight(fresh, sum(map(self._memory.weight, others)))

    @property
    def linger_until(self) -> float | None:  # type: ignore[override]
        """Time until which to wait on for further updates, in seconds on the grid's clock; None for not at all."""
        best = self.replies.best
        waits = [] if self.verifies_until is None else [self.verifies_until]
        if self.decided and best is not None and not best.decoder.decodable:
            waits.append(self._rule.waits_until(self._began, self._last))
        return max(waits, default=None)

    @property
    def keeps_late(self) -> bool:  # type: ignore[override]
        """Whether replies that come after the phase are wanted: they renew the last updates."""
        return True

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Read one reply, which either counts or is rejected with a reason."""
        known = len(self._done())
        super().offer(arrival, reply, at)
        if len(self._done()) > known:
            self._began, self._last = arrival.at - at, arrival.at

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns the first copy of each shard: all of them are used."""
        if not self._memory.versions or self._strange:
            return super().choose(arrivals, final=final)
        done = self._done()
        first: dict[int, Arrival] = {}
        for arrival in arrivals:
            shard = self._unread[arrival.token]
            if shard not in done or shard in self.unverified:
                first.setdefault(shard, arrival)
        return list(first.values())

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Returns whether the rule cannot be met even if all of `nodes` answer, nor every shard have a copy."""
        if not super().hopeless(nodes):
            return False
        possible, missing, strangers = self._within_reach([node for node in nodes if node not in self._failed])
        lacking = ((shard, self._memory.newest(shard)) for shard in self._row.keys() - possible)
        too_old = {*self._rule.too_old(lacking, self.plan.round)}
        if too_old and not may_cover(too_old, missing, min(strangers, len(missing))):
            return True
        more = [shards - possible for shards in missing]
        number = len(possible) + _largest(map(len, more), strangers)
        if number < self._rule.needed(len(self._row)):
            return True
        weights = {shard: self._weight_of(shard) for shard in self._row}
        weight = sum(weights[shard] for shard in possible)
        weight += _largest((sum(weights[shard] for shard in shards) for shards in more), strangers)
        return not self._rule.enough_weight(weight, sum(weights.values()) - weight)

    def _weight_of(self, shard: int) -> float:
        """Returns the weight of a shard's update of this round, or else of its last known one."""
        group, row = self.replies.best, self._row[shard]
        return _weight_in(group, row) if group and row in group.copies else self._memory.weight(shard)

    def restarted(self, node: int) -> None:
        """Release the shard that a restarted node was working on, and allow new work for the node."""
        super().restarted(node)
        self._memory.answered(node)

    def settle(self) -> None:
        """Find out who sent wrong values, whose earlier updates count no more either."""
        super().settle()
        self._memory.forget_those_of(self.registry.silenced)

    def arrived_late(self, late: Late, reply: Message | None) -> None:
        """Learn from a reply to an earlier phase; see `Phase`."""
        super().arrived_late(late, reply)
        self._memory.forget_those_of(self.registry.silenced)

    def finish(self, wait: Wait) -> list[Message]:
        """End the wait, and note what nodes are still working on."""
        for node in (*wait.lapsed, *wait.restarted):
            self._memory.answered(node)
        working = self._queue.working
        for job in wait.owing:
            if job.label == self.label:  # a node that was not known when it was asked chooses its shard itself
                self._memory.asked(job.node, working.get(job.node, UNKNOWN), self.plan.round)
        return super().finish(wait)

    def estimate(
        self, group: Group, approximation: Approximation | None, stale_updates: StaleUpdates | None
    ) -> tuple[NDArray[Any], tuple[StaleUpdate, ...]] | None:
        """Returns ones for the shards with an update of this round, and the last updates of the others."""
        rows = [*group.decoder.survivors]
        if not self._suffices(group, rows):
            return None
        vector = np.zeros(self.code.n, self.code.B.dtype)
        vector[rows] = 1
        others = self._memory.of([shard for shard, row in self._row.items() if row not in {*rows}])
        return vector, tuple(StaleUpdate((one.shard,), one.round, one.update, one.metrics, group.key) for one in others)

    def remember(self, group: Group, *, used: bool) -> None:
        """Remember the updates of this round, also if there were too few for a model."""
        assert isinstance(group, ReplyGroup)
        for shard, row in self._row.items():
            if row in group.copies:
                sender = group.senders[row][1]
                # The layout of updates that were not used replaces no other one.
                self._memory.keep(shard, self.plan.round, *group.copies[row], group.key, sender=sender, late=not used)
        if used:
            self.ages = self._memory.ages(self.plan.round)


def _weight_in(group: Group, row: int) -> float:
    assert isinstance(group, ReplyGroup)
    return float(group.copies[row][1][0])


def _largest(numbers: Iterable[float], how_many: int) -> float:
    """Returns the sum of the largest ones."""
    return sum(sorted(numbers, reverse=True)[:how_many])


def _trained_in(label: str) -> int:
    """Returns the round of a phase of training by its label, or 0 for another phase."""
    kind, _, number = label.partition(" ")
    return int(number) if kind == "train" and number.isdecimal() else 0
