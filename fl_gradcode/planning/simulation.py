"""Simulates without Flower how long rounds take under a scheme, from an idle start or over a run.

Flower cannot cancel work, so over a run a worker stays busy until it has finished, even if its reply is no longer
needed. A worker that owes a reply gets no new work; when it is free, it gets the work of the current round. These are
the rules of an `EarlyStopGrid` on a `VirtualGrid`. The simulation gives the same times for the same draws, and is much
faster because nothing is sent.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..latency import Parts
from .job_times import LEARNED, JobTimes
from .schemes import Scheme, patience_of
from .work_queue import ShardQueue, turns_of

__all__ = ["RoundTimes", "coded_rounds", "idle_rounds", "steady_rounds"]


class RoundTimes:
    """The round times and costs of one scheme.

    Attributes:
        seconds: Seconds of each round, shape (rounds,).
        computed: Mean number of shards that all workers together compute in a round, whether needed or not.
        messages: Mean number of messages sent in a round.
        ages: Mean age of the updates of each round, in rounds; zeros but with bounded staleness.
    """

    def __init__(
        self,
        seconds: NDArray[np.float64],
        computed: float,
        messages: float,
        ages: NDArray[np.float64] | None = None,
    ) -> None:
        self.seconds, self.computed, self.messages = seconds, computed, messages
        self.ages = np.zeros(len(seconds)) if ages is None else ages

    @property
    def mean(self) -> float:
        """Mean seconds of a round, without the first twentieth of the rounds, in which a run settles."""
        return float(self.seconds[len(self.seconds) // 20 :].mean())

    @property
    def error(self) -> float:
        """Standard error of the mean in seconds, from 10 batch means because the rounds of a run are dependent."""
        kept = self.seconds[len(self.seconds) // 20 :]
        kept = kept[: len(kept) // 10 * 10]
        if not len(kept) or not np.isfinite(kept).all():
            return float("nan")
        return float(kept.reshape(10, -1).mean(axis=1).std(ddof=1) / np.sqrt(10))


def steady_rounds(scheme: Scheme, parts: Parts, *, model_megabytes: float = 0.0) -> RoundTimes:
    """Returns the times of one run, in which each round begins when the one before has ended.

    Args:
        scheme: The scheme, with as many workers as `parts`.
        parts: Drawn times of each round, from `Latency.parts`.
        model_megabytes: Size of the model, which each message carries to a worker; a reply carries 1/m of it back.
    """
    if scheme.shardwise:
        return _shardwise(scheme, parts, model_megabytes, idle=False)
    durations = parts.seconds(scheme.loads.astype(np.float64), _megabytes(scheme, model_megabytes))
    return coded_rounds(scheme, durations[None])[0]


def coded_rounds(scheme: Scheme, durations: NDArray[np.float64]) -> list[RoundTimes]:
    """Returns the times of several runs under a scheme with one message a worker and round.

    Args:
        scheme: The scheme; it is not `shardwise`.
        durations: Seconds of each job, shape (runs, rounds, n).
    """
    end_of, loads = _end(scheme), scheme.loads
    runs, rounds, n = durations.shape
    busy, now = np.zeros((runs, n)), np.zeros((runs, 1))
    seconds = np.empty((runs, rounds))
    messages, computed, begun = (np.zeros(runs) for _ in range(3))
    for t in range(rounds):
        begin = np.maximum(busy, now)
        finish = begin + durations[:, t]
        end = end_of(finish)[:, None]
        asked = (begin <= end) & (begin < np.inf)
        busy = np.where(asked, finish, busy)
        messages += asked.sum(axis=1)
        computed += asked @ loads
        begun += now[:, 0] < np.inf
        # Once the workers that are waited for never answer, no later round ends either.
        seconds[:, t] = np.subtract(end, now, out=np.full_like(end, np.inf), where=now < np.inf)[:, 0]
        now = end
    return [RoundTimes(*one) for one in zip(seconds, computed / begun, messages / begun, strict=True)]


def idle_rounds(scheme: Scheme, parts: Parts, *, model_megabytes: float = 0.0) -> RoundTimes:
    """Returns the times of rounds in which every worker starts idle, as in most closed forms.

    The arguments are those of `steady_rounds`.
    """
    if scheme.shardwise:
        return _shardwise(scheme, parts, model_megabytes, idle=True)
    durations = parts.seconds(scheme.loads.astype(np.float64), _megabytes(scheme, model_megabytes))
    return RoundTimes(_end(scheme)(durations), float(scheme.loads.sum()), float(scheme.n))


def _megabytes(scheme: Scheme, model: float) -> float:
    return model * (1 + 1 / scheme.m)


def _end(scheme: Scheme) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Returns the function from the workers' finish times, along the last axis, to when a round may end."""
    if scheme.enough is not None:
        last = scheme.enough - 1
        return lambda finish: np.asarray(np.partition(finish, last, axis=-1)[..., last])
    table, m = scheme.table, scheme.m
    if m == 1 and not (table == scheme.n).any():
        return lambda finish: np.asarray(finish[..., table].min(axis=-1).max(axis=-1))

    def of_groups(finish: NDArray[np.float64]) -> NDArray[np.float64]:
        filled = np.concatenate([finish, np.full((*finish.shape[:-1], 1), np.inf)], axis=-1)[..., table]
        return np.asarray(np.sort(filled, axis=-1)[..., m - 1].max(axis=-1))

    return of_groups


def _shardwise(scheme: Scheme, parts: Parts, model_megabytes: float, *, idle: bool) -> RoundTimes:
    durations = parts.seconds(1.0, _megabytes(scheme, model_megabytes))
    run = _Shardwise(scheme)
    seconds = np.empty(len(durations))
    begun = 0
    for t, duration in enumerate(durations):
        begun += 1
        if idle:
            run = _Shardwise(scheme, run.messages)
        began = run.now
        run.round(duration.tolist())
        seconds[t] = run.now - began
        if run.now == np.inf and not idle:
            seconds[t:] = np.inf
            break
    return RoundTimes(seconds, run.messages / begun, run.messages / begun)


class _Shardwise:
    """Simulates rounds with one shard a message, by an event loop around a `ShardQueue`."""

    def __init__(self, scheme: Scheme, messages: int = 0) -> None:
        self.patience, self.n, self.k = patience_of(scheme), scheme.n, scheme.k
        self.turns = turns_of(dict(enumerate(scheme.blocks)))
        self.now = 0.0
        self.owed: list[tuple[float, int, float]] = []  # (finish time, worker, start time) of jobs from earlier rounds
        self.messages = messages
        self.times = JobTimes(scheme.n) if scheme.patience == LEARNED else None

    def round(self, duration: list[float]) -> None:
        self.duration = duration
        self.queue = ShardQueue(self.turns, self.patience, times=self.times)
        self.closed: set[int] = set()
        woken: float | None = None
        self.events = [(finish, order, worker, began, True) for order, (finish, worker, began) in enumerate(self.owed)]
        heapq.heapify(self.events)
        self.order = len(self.owed)
        held = {worker for _, worker, _ in self.owed}
        ended: list[tuple[int, float]] = []
        self._hand_out([worker for worker in range(self.n) if worker not in held])
        while len(self.closed) < self.k:
            wake = None if self.queue.wake_at == woken else self.queue.wake_at
            if wake is not None and (not self.events or wake < self.events[0][0]):
                self.now = max(self.now, wake)
                woken = wake
                for worker in self.queue.awake(self.now):
                    self._hand_out([worker])
                continue
            if not self.events or self.events[0][0] == np.inf:
                self.now = np.inf
                return
            self.now = max(self.now, self.events[0][0])
            free = []
            while self.events and self.events[0][0] <= self.now:
                finish, _, worker, began, late = heapq.heappop(self.events)
                ended.append((worker, finish - began))
                shard = None if late else self.queue.finish(worker, self.now)
                if shard is not None:
                    self.closed.add(shard)
                free.append(worker)
            if len(self.closed) < self.k:
                self._hand_out(free)
        self.owed = [(finish, worker, began) for finish, _, worker, began, _ in sorted(self.events)]
        if self.times is not None:
            for worker, seconds in ended:
                self.times.saw(worker, seconds)

    def _hand_out(self, workers: list[int]) -> None:
        for worker in workers:
            if self.queue.start(worker, worker, self.closed, self.now) is None:
                continue
            event = (self.now + self.duration[worker], self.order, worker, self.now, False)
            heapq.heappush(self.events, event)
            self.order += 1
            self.messages += 1
