"""The rule that hands out shards, one a message, to workers as they become free.

The strategy and the planner's simulation use the same `ShardQueue`, so that a plan describes what a run does.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from .job_times import JobTimes

__all__ = ["ShardQueue", "first_shards", "turns_of"]

_SOON = 0.01  # of a job's time: at least so much later to look again whether a second copy is worth it


def first_shards(blocks: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Returns worker -> the shard that it starts with, such that as many different shards as possible are started.

    Holders of the same shards start evenly spread over them. If that leaves shards out, as in a cyclic assignment, a
    maximum matching decides.

    Args:
        blocks: Worker -> the shards that it holds, ascending; workers without shards are left out.
    """
    workers = [i for i in sorted(blocks) if len(blocks[i])]
    first: dict[int, int] = {}
    alike: dict[tuple[int, ...], list[int]] = {}
    for worker in workers:
        alike.setdefault(tuple(blocks[worker]), []).append(worker)
    for shards, same in alike.items():
        for place, worker in enumerate(same):
            first[worker] = shards[len(shards) * place // len(same)]
    everything = sorted({shard for i in workers for shard in blocks[i]})
    if len(set(first.values())) < min(len(workers), len(everything)):
        place_of = {shard: place for place, shard in enumerate(everything)}
        columns = [place_of[shard] for i in workers for shard in sorted(blocks[i])]
        ends = [0, *itertools.accumulate(len(blocks[i]) for i in workers)]
        shape = (len(workers), len(everything))
        indices = np.array(columns, np.int32), np.array(ends, np.int32)  # the only ones that SciPy 1.11 matches by
        held = csr_array(([True] * len(columns), *indices), shape=shape)
        for worker, column in zip(workers, maximum_bipartite_matching(held, perm_type="column"), strict=True):
            if column >= 0:
                first[worker] = everything[column]
    return first


def turns_of(blocks: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Returns worker -> its shards in the order in which it works on them, which starts with its first shard.

    Args:
        blocks: Worker -> the shards that it holds, ascending.
    """
    first = first_shards(blocks)
    turns = {}
    for worker, shards in blocks.items():
        start = list(shards).index(first[worker]) if len(shards) else 0
        turns[worker] = (*shards[start:], *shards[:start])
    return turns


class ShardQueue:
    """Hands out the shards of one round.

    A free worker gets the open shard that it holds and that the fewest workers are computing. Ties go to the next shard
    in its turn. A second copy of a shard is started only when the first has taken `patience` times as long as the free
    worker took for its last shard in this round.

    With `times`, an open shard that nobody is computing comes first, and then a second copy of the shard which is
    expected to take longest, once that is worth it; see `JobTimes`.

    Args:
        turns: Worker -> its shards in the order of `turns_of`.
        patience: Relative time until a second copy is started; 0 starts it at once.
        times: What the run has learned of its workers' times; then `patience` does not count.
        newest: Shard -> the round of its newest update that is known or under way from earlier rounds. If given, a
            worker starts with its open shards of the earliest round, see `staleness`.

    Attributes:
        wake_at: Time at which the next second copy is due for an idle worker, in the seconds of `now`; None for never.
    """

    def __init__(
        self,
        turns: Mapping[int, Sequence[int]],
        patience: float,
        *,
        times: JobTimes | None = None,
        newest: Callable[[int], int] | None = None,
    ) -> None:
        self._turns, self._patience, self._times, self._newest = turns, patience, times, newest
        self.wake_at: float | None = None
        self._working: dict[int, tuple[int, float, int]] = {}  # runner -> (shard, start time, worker)
        self._copies: dict[int, list[tuple[float, int]]] = {}  # shard -> (start time, worker) of each copy in progress
        self._took: dict[int, float] = {}  # runner -> seconds that it took for its last shard
        self._waiting: list[tuple[float, int, int]] = []  # heap of (due, turn, runner); outdated ones are skipped
        self._turn_of: dict[int, int] = {}  # runner that was given none -> its turn, a running number
        self._turn = itertools.count()

    def start(self, runner: int, worker: int, closed: Container[int], now: float) -> int | None:
        """Returns the shard that a free runner starts now, or None.

        Args:
            runner: The node or simulated worker that is free.
            worker: Worker whose shards the runner holds.
            closed: Shards that need no further copy, or none from this runner.
            now: The time in seconds.
        """
        turns = self._turns[worker]
        order = turns if self._newest is None else sorted(turns, key=self._newest)
        find = self._by_patience if self._times is None else self._by_times
        shard, soonest = find(runner, worker, order, closed, now)
        if shard is None:
            self._turn_of[runner] = next(self._turn)
            if soonest < math.inf:
                heapq.heappush(self._waiting, (soonest, self._turn_of[runner], runner))
            return None
        self._turn_of.pop(runner, None)
        self._working[runner] = shard, now, worker
        self._copies.setdefault(shard, []).append((now, worker))
        return shard

    def _by_patience(
        self, runner: int, worker: int, order: Sequence[int], closed: Container[int], now: float
    ) -> tuple[int | None, float]:
        """Returns the shard to start, or None, and when to look again."""
        took = self._took.get(runner) if self._patience else None
        shard, fewest, soonest = None, 0, math.inf
        for j in order:
            if j in closed:
                continue
            copies = self._copies.get(j)
            number = len(copies) if copies else 0
            if copies and took is not None:
                due = min(copies)[0] + self._patience * took
                if due > now:
                    self.wake(due, now)
                    soonest = min(soonest, due)
                    continue
            if shard is None or number < fewest:  # the first of several
                shard, fewest = j, number
                if took is None and not number:  # nothing is better, and nobody waits for the others
                    break
        return shard, soonest

    def _by_times(
        self, runner: int, worker: int, order: Sequence[int], closed: Container[int], now: float
    ) -> tuple[int | None, float]:
        """Returns the shard to start, or None, and when to look again."""
        times = self._times
        assert times is not None
        own = self._took.get(runner, times.typical(worker))
        shard, longest, soonest = None, -math.inf, math.inf
        for j in order:
            if j in closed:
                continue
            copies = self._copies.get(j)
            if not copies:
                return j, math.inf
            left = times.remaining(copies[0][1], now - copies[0][0])
            for began, other in copies[1:]:
                left = min(left, times.remaining(other, now - began))
            if own is None or times.is_worth(own, left):
                if left > longest:
                    shard, longest = j, left
            elif shard is None:
                due = now + _SOON * own  # at least: rounding may put it a moment before now
                for began, other in copies:
                    due = max(due, began + times.worth_after(own, other, now - began, soonest - began))
                soonest = min(soonest, due)
        if shard is None and soonest < math.inf:
            self.wake(soonest, now)
        return shard, soonest

    def finish(self, runner: int, now: float) -> int | None:
        """Note that the runner has finished; returns its shard, or None if it had none."""
        shard, began = self._stop(runner)
        if shard is not None:
            self._took[runner] = now - began
        return shard

    @property
    def working(self) -> dict[int, int]:
        """Runner -> the shard that it works on."""
        return {runner: shard for runner, (shard, *_) in self._working.items()}

    def took(self, runner: int) -> float:
        """Returns the seconds that a runner took for its last shard in this round; infinity if it has finished none."""
        return self._took.get(runner, math.inf)

    @property
    def typical(self) -> float:
        """Median of the seconds that runners took for their last shards in this round; infinity if none is done."""
        return statistics.median(self._took.values()) if self._took else math.inf

    def drop(self, runner: int) -> None:
        """Note that the runner has lost the shard that it was working on."""
        self._stop(runner)

    def _stop(self, runner: int) -> tuple[int | None, float]:
        if runner not in self._working:
            return None, 0.0
        shard, began, worker = self._working.pop(runner)
        self._copies[shard].remove((began, worker))
        return shard, began

    def awake(self, now: float) -> list[int]:
        """Returns the runners for which a second copy is due by now, in the order in which they were given none."""
        ready = []
        while self._waiting:
            due, turn, runner = self._waiting[0]
            if self._turn_of.get(runner) == turn:
                if due > now:
                    self.wake(due, now)
                    break
                ready.append((turn, runner))
            heapq.heappop(self._waiting)
        return [runner for _, runner in sorted(ready)]

    def wake(self, due: float, now: float) -> None:
        """Note that a second copy is due at a later time."""
        if self.wake_at is None or self.wake_at <= now or due < self.wake_at:
            self.wake_at = due
