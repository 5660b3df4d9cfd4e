"""The rule that hands out shards, one a message, to workers as they become free.

The strategy and the simulation of the planner use the same `ShardQueue`, so that a plan is about what a run does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

__all__ = ["ShardQueue", "first_shards", "turns_of"]


def first_shards(blocks: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Returns the shard that each worker starts with: as many different ones as can be.

    Holders of the same shards start evenly spread over them. Where that is not enough, as in a cyclic assignment, a
    maximum matching says who starts with what.

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
        held = csr_array([[shard in blocks[i] for shard in everything] for i in workers])
        for worker, column in zip(workers, maximum_bipartite_matching(held, perm_type="column"), strict=True):
            if column >= 0:
                first[worker] = everything[column]
    return first


def turns_of(blocks: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Returns the order in which each worker goes through its shards: from its first one on, then from the beginning.

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

    A free worker gets the open shard of its own that fewest are working on; where several are equal, the next in its
    turn. A shard that somebody works on is begun a second time only when it has taken `patience` times as long as the
    free worker took for its last shard in this round.

    Args:
        turns: Worker -> its shards in the order of `turns_of`.
        patience: 0 begins second copies at once.

    Attributes:
        wake_at: When an idle worker's next second copy is due, in the seconds of `now`; None: never.
    """

    def __init__(self, turns: Mapping[int, Sequence[int]], patience: float) -> None:
        self._turns, self._patience = turns, patience
        self.wake_at: float | None = None
        self._working: dict[int, tuple[int, float]] = {}  # runner -> shard, since when
        self._copies: dict[int, list[float]] = {}  # shard -> since when each of its copies is worked on
        self._took: dict[int, float] = {}  # runner -> seconds of the last shard that it finished

    def start(self, runner: int, worker: int, closed: Collection[int], now: float) -> int | None:
        """Returns the shard that a free runner begins now, or None.

        Args:
            runner: Who works: a node, or a simulated worker.
            worker: Whose shards it holds.
            closed: Shards that need no further copy, or none from this runner.
            now: The time, in seconds.
        """
        due = [j for j in self._turns[worker] if j not in closed and self._is_due(j, runner, now)]
        if not due:
            return None
        shard = min(due, key=lambda j: len(self._copies.get(j, ())))  # the first of those
        self._working[runner] = shard, now
        self._copies.setdefault(shard, []).append(now)
        return shard

    def finish(self, runner: int, now: float) -> int | None:
        """The runner is done: returns its shard, or None if it had none."""
        shard, began = self._stop(runner)
        if shard is not None:
            self._took[runner] = now - began
        return shard

    def drop(self, runner: int) -> None:
        """What the runner was working on is lost."""
        self._stop(runner)

    def _stop(self, runner: int) -> tuple[int | None, float]:
        if runner not in self._working:
            return None, 0.0
        shard, began = self._working.pop(runner)
        self._copies[shard].remove(began)
        return shard, began

    def _is_due(self, shard: int, runner: int, now: float) -> bool:
        """Whether to begin a copy now; if not, it is looked at again when it may be."""
        copies = self._copies.get(shard)
        if not copies or not self._patience or runner not in self._took:
            return True
        due = min(copies) + self._patience * self._took[runner]
        if due > now and (self.wake_at is None or self.wake_at <= now or due < self.wake_at):
            self.wake_at = due
        return due <= now
