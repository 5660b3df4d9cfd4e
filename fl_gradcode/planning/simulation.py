"""How long rounds take under a scheme, simulated without Flower: from an idle start, and over a run.

Over a run, workers that were not needed are busy until they have finished, since nothing can be cancelled in Flower: a
worker that owes a reply gets no new work; it gets the current round's as soon as it is free. The same rules as those of
`EarlyStopGrid` on a `VirtualGrid`, and on the same draws the same times: only much faster, since nothing is sent.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from ..latency import Parts
from .schemes import Scheme, first_shards

__all__ = ["RoundTimes", "idle_rounds", "steady_rounds"]


class RoundTimes:
    """Round times of one scheme, with what they cost.

    Attributes:
        seconds: Of each round, shape (rounds,).
        computed: Shards that all workers together work on in a round, on average, needed or not.
        messages: Messages sent in a round, on average.
    """

    def __init__(self, seconds: NDArray[np.float64], computed: float, messages: float) -> None:
        self.seconds, self.computed, self.messages = seconds, computed, messages

    @property
    def mean(self) -> float:
        """Mean seconds of a round, without the first twentieth, in which a run settles."""
        return float(self.seconds[len(self.seconds) // 20 :].mean())

    @property
    def error(self) -> float:
        """Standard error of the mean, by 10 batch means: rounds of a run depend on each other."""
        kept = self.seconds[len(self.seconds) // 20 :]
        kept = kept[: len(kept) // 10 * 10]
        if not len(kept) or not np.isfinite(kept).all():
            return float("nan")
        return float(kept.reshape(10, -1).mean(axis=1).std(ddof=1) / np.sqrt(10))


def steady_rounds(scheme: Scheme, parts: Parts, *, model_megabytes: float = 0.0) -> RoundTimes:
    """Rounds of one run, each beginning when the one before has ended.

    Args:
        scheme: With as many workers as `parts`.
        parts: Drawn times of each round, from `Latency.parts`.
        model_megabytes: Size of the model: it goes down with each message, and up, 1/m of it, with each reply.
    """
    if scheme.shardwise:
        return _shardwise(scheme, parts, model_megabytes, idle=False)
    durations = parts.seconds(scheme.loads.astype(np.float64), _megabytes(scheme, model_megabytes))
    busy, now = np.zeros(scheme.n), 0.0
    seconds = np.empty(len(durations))
    messages = computed = begun = 0
    for t, duration in enumerate(durations):
        begin = np.maximum(busy, now)
        finish = begin + duration
        end = float(_end(scheme, finish))
        asked = (begin <= end) & (begin < np.inf)
        busy = np.where(asked, finish, busy)
        seconds[t], now = end - now, end
        messages += int(asked.sum())
        computed += int(scheme.loads[asked].sum())
        begun += 1
        if end == np.inf:  # whoever is waited for never answers, in this and all later rounds
            seconds[t:] = np.inf
            break
    return RoundTimes(seconds, computed / begun, messages / begun)


def idle_rounds(scheme: Scheme, parts: Parts, *, model_megabytes: float = 0.0) -> RoundTimes:
    """Rounds that each find every worker idle: what most closed forms are about; arguments as for `steady_rounds`."""
    if scheme.shardwise:
        return _shardwise(scheme, parts, model_megabytes, idle=True)
    durations = parts.seconds(scheme.loads.astype(np.float64), _megabytes(scheme, model_megabytes))
    return RoundTimes(_end(scheme, durations), float(scheme.loads.sum()), float(scheme.n))


def _megabytes(scheme: Scheme, model: float) -> float:
    return model * (1 + 1 / scheme.m)


def _end(scheme: Scheme, finish: NDArray[np.float64]) -> NDArray[np.float64]:
    """When a round may end, given when each worker finishes; over the last axis."""
    if scheme.enough is not None:
        return np.asarray(np.partition(finish, scheme.enough - 1, axis=-1)[..., scheme.enough - 1])
    filled = np.concatenate([finish, np.full((*finish.shape[:-1], 1), np.inf)], axis=-1)[..., scheme.table]
    return np.asarray(np.sort(filled, axis=-1)[..., scheme.m - 1].max(axis=-1))


def _shardwise(scheme: Scheme, parts: Parts, model_megabytes: float, *, idle: bool) -> RoundTimes:
    durations = parts.seconds(1.0, _megabytes(scheme, model_megabytes))
    run = _Shardwise(scheme)
    seconds = np.empty(len(durations))
    begun = 0
    for t, duration in enumerate(durations):
        begun += 1
        if idle:
            run.now = 0.0
            run.owed.clear()
        began = run.now
        run.round(duration.tolist())
        seconds[t] = run.now - began
        if run.now == np.inf and not idle:
            seconds[t:] = np.inf
            break
    return RoundTimes(seconds, run.messages / begun, run.messages / begun)


class _Shardwise:
    """One shard a message: an event loop with the rules of `shardwise.ShardDispatch`."""

    def __init__(self, scheme: Scheme) -> None:
        self.patience, self.n, self.k = scheme.patience, scheme.n, scheme.k
        first = first_shards(dict(enumerate(scheme.blocks)))
        self.turns: list[tuple[int, ...]] = []  # of each worker, its shards from its first on
        for worker, block in enumerate(scheme.blocks):
            start = block.index(first[worker]) if block else 0
            self.turns.append((*block[start:], *block[:start]))
        self.now = 0.0
        self.owed: list[tuple[float, int]] = []  # of earlier rounds: (finish, worker)
        self.messages = 0
        self.wake: float | None = None  # when an idle worker's next second copy is due

    def round(self, duration: list[float]) -> None:
        self.duration = duration
        self.closed: set[int] = set()
        self.working: dict[int, int] = {}  # worker -> shard
        self.began: dict[int, float] = {}
        self.copies: list[list[float]] = [[] for _ in range(self.k)]  # of each shard, since when it is worked on
        self.took: dict[int, float] = {}
        self.wake = None
        woken: float | None = None
        self.events = [(finish, order, worker, True) for order, (finish, worker) in enumerate(self.owed)]
        heapq.heapify(self.events)
        self.order = len(self.owed)
        held = {worker for _, worker in self.owed}
        self.idle: list[int] = []
        self._hand_out([worker for worker in range(self.n) if worker not in held])
        while len(self.closed) < self.k:
            wake = self._wake_after(woken)
            if wake is not None and (not self.events or wake < self.events[0][0]):
                self.now = max(self.now, wake)
                woken = wake
                offered, self.idle = self.idle, []
                self._hand_out(offered)
                continue
            if not self.events or self.events[0][0] == np.inf:
                self.now = np.inf
                return
            self.now = max(self.now, self.events[0][0])
            free = []
            while self.events and self.events[0][0] <= self.now:
                _, _, worker, late = heapq.heappop(self.events)
                if not late:
                    shard, began = self.working.pop(worker), self.began.pop(worker)
                    self.closed.add(shard)
                    self.copies[shard].remove(began)
                    self.took[worker] = self.now - began
                free.append(worker)
            if len(self.closed) < self.k:
                self._hand_out(free)
        self.owed = [(finish, worker) for finish, _, worker, _ in sorted(self.events)]

    def _wake_after(self, woken: float | None) -> float | None:
        return None if self.wake == woken else self.wake

    def _hand_out(self, workers: list[int]) -> None:
        for worker in workers:
            due = [j for j in self.turns[worker] if j not in self.closed and self._is_due(j, worker)]
            if not due:
                self.idle.append(worker)
                continue
            shard = min(due, key=lambda j: len(self.copies[j]))
            self.working[worker], self.began[worker] = shard, self.now
            self.copies[shard].append(self.now)
            heapq.heappush(self.events, (self.now + self.duration[worker], self.order, worker, False))
            self.order += 1
            self.messages += 1

    def _is_due(self, shard: int, worker: int) -> bool:
        if not self.patience or worker not in self.took or not self.copies[shard]:
            return True
        due = min(self.copies[shard]) + self.patience * self.took[worker]
        if due > self.now and (self.wake is None or self.wake <= self.now or due < self.wake):
            self.wake = due
        return due <= self.now
