"""Simulates rounds with bounded staleness, which end with some shards' last updates; see `staleness`."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..latency import Parts
from ..staleness import StalenessRule
from .job_times import LEARNED, JobTimes
from .schemes import Scheme, patience_of
from .simulation import RoundTimes
from .work_queue import ShardQueue, turns_of

__all__ = ["StaleRounds", "stale_means", "stale_rounds"]


@dataclass(frozen=True)
class StaleRounds:
    """Rounds of a scheme with one shard a message and bounded staleness.

    Attributes:
        scheme: The scheme; with exact rounds, it is one of the plan's.
        bound: Largest age of an update, in rounds.
        steady: Mean seconds of a round over a run.
        age: Mean age of the updates that are used.
        exact: Mean seconds of the scheme's exact rounds on the same draws.
    """

    scheme: Scheme
    bound: int
    steady: float
    age: float
    exact: float


def stale_rounds(scheme: Scheme, parts: Parts, rule: StalenessRule, *, model_megabytes: float = 0.0) -> RoundTimes:
    """Returns the times of one run with bounded staleness, and the mean age of the updates of each round.

    Shards are taken to weigh the same: where one weighs more than the others together, a run waits for it more often.

    Args:
        scheme: A scheme with one shard a message.
        parts: Drawn times of each round.
        rule: When a round may end.
        model_megabytes: Size of the model.
    """
    durations = parts.seconds(1.0, 2 * model_megabytes)
    run = _Run(scheme, rule)
    seconds, ages = np.empty(len(durations)), np.zeros(len(durations))
    begun = 0
    for t, duration in enumerate(durations):
        begun += 1
        began = run.now
        run.round(t + 1, duration.tolist())
        seconds[t] = run.now - began
        if run.now == np.inf:
            seconds[t:] = np.inf
            break
        ages[t] = t + 1 - np.mean(run.versions)
    return RoundTimes(seconds, run.messages / begun, run.messages / begun, ages)


def stale_means(
    scheme: Scheme, draws: Sequence[Parts], rule: StalenessRule, exact: float, *, first: int, model_megabytes: float
) -> StaleRounds:
    """Returns the mean seconds and ages over several runs.

    Args:
        scheme: A scheme with one shard a message.
        draws: Drawn times of each run.
        rule: When a round may end.
        exact: Mean seconds of the scheme's exact rounds.
        first: Round of a run from which on rounds count.
        model_megabytes: Size of the model.
    """
    runs = [stale_rounds(scheme, parts, rule, model_megabytes=model_megabytes) for parts in draws]
    steady = float(np.mean([run.seconds[first:].mean() for run in runs]))
    age = float(np.mean([run.ages[first:].mean() for run in runs]))
    return StaleRounds(scheme, rule.bound, steady, age, exact)


class _Run:
    """An event loop around a `ShardQueue`, as `StalePhase` runs it on a `VirtualGrid`."""

    def __init__(self, scheme: Scheme, rule: StalenessRule) -> None:
        self.rule, self.patience, self.n, self.k = rule, patience_of(scheme), scheme.n, scheme.k
        self.turns = turns_of(dict(enumerate(scheme.blocks)))
        self.now, self.messages = 0.0, 0
        self.versions = [0] * self.k
        self.owed: list[tuple[float, int, int, int, float]] = []  # finish time, worker, shard, round, start time
        self.times = JobTimes(scheme.n) if scheme.patience == LEARNED else None

    def round(self, number: int, duration: list[float]) -> None:
        under_way = [0] * self.k
        for _, _, shard, number_asked, _ in self.owed:
            under_way[shard] = max(under_way[shard], number_asked)
        self.number, self.duration, self.under_way = number, duration, under_way
        self.queue = ShardQueue(self.turns, self.patience, times=self.times, newest=self._newest)
        self.closed: set[int] = set()
        self.too_old = len(self.rule.too_old(enumerate(self.versions), number))
        self.events = [(job[0], order, *job[1:]) for order, job in enumerate(self.owed)]
        heapq.heapify(self.events)
        self.order = len(self.owed)
        held = {worker for _, worker, *_ in self.owed}
        ended: list[tuple[int, float]] = []
        self._hand_out([worker for worker in range(self.n) if worker not in held])
        began = last = self.now
        woken: float | None = None
        while len(self.closed) < self.k:
            until = np.inf
            if self._suffices():
                until = max(self.now, self.rule.waits_until(began, last))
            wake = None if self.queue.wake_at == woken else self.queue.wake_at
            soonest = self.events[0][0] if self.events else np.inf
            if wake is not None and wake < min(soonest, until):
                self.now, woken = max(self.now, wake), wake
                for worker in self.queue.awake(self.now):
                    self._hand_out([worker])
                continue
            if until < soonest or soonest == np.inf:
                self.now = until
                break
            self.now = max(self.now, soonest)
            free = []
            while self.events and self.events[0][0] <= self.now:
                finish, _, worker, shard, asked, sent = heapq.heappop(self.events)
                ended.append((worker, finish - sent))
                if asked == number:
                    self.queue.finish(worker, self.now)
                    if shard not in self.closed:
                        self.closed.add(shard)
                        last = self.now
                self._update(shard, asked)
                free.append(worker)
            if len(self.closed) < self.k:
                self._hand_out(free)
        self.owed = [(event[0], *event[2:]) for event in sorted(self.events)]
        if self.times is not None:
            for worker, seconds in ended:
                self.times.saw(worker, seconds)

    def _update(self, shard: int, asked: int) -> None:
        oldest, known = self.rule.oldest(self.number), self.versions[shard]
        self.versions[shard] = max(known, asked)
        self.too_old -= known < oldest <= asked

    def _suffices(self) -> bool:
        return not self.too_old and len(self.closed) >= self.rule.needed(self.k)

    def _newest(self, shard: int) -> int:
        known = 0 if self.versions[shard] == self.number else self.versions[shard]
        return max(known, self.under_way[shard])

    def _hand_out(self, workers: list[int]) -> None:
        for worker in workers:
            shard = self.queue.start(worker, worker, self.closed, self.now)
            if shard is not None:
                event = (self.now + self.duration[worker], self.order, worker, shard, self.number, self.now)
                heapq.heappush(self.events, event)
                self.order += 1
                self.messages += 1
