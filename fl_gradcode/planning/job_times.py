"""What a run has learned of how long its workers take for a shard, and how long a job in progress still will."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEARNED", "JobTimes"]

#: The value of `patience` with which second copies start by learned times.
LEARNED: Final = "learned"

_RECENT = 0.3  # weight of the last job in a worker's typical time
_KEPT = 200  # jobs that are kept besides four of each worker
_LONGER = 0.5  # a job of which nothing is known takes so many times longer as it has taken yet
#: A second copy starts if it is expected to take at most 1 / 0.6 times as long as the first copy still will.
_EAGER = 0.6


class JobTimes:
    """The times of a run's jobs of one shard, by which second copies are started.

    A worker's *typical* time is an exponential average of its jobs' times. The times of all workers' last jobs, each
    relative to what was typical of its worker then, show how a job's time varies. From them follows how much longer a
    job is expected to take that has taken some time already, its mean residual life. To the jobs that took longer than
    that, one is added that takes half as long again, so that something is expected where few jobs or none are known.

    Args:
        n: Number of workers.

    References:
        A copy of the task with the longest expected time to its end is started first, as by Zaharia et al., "Improving
        MapReduce performance in heterogeneous environments", OSDI 2008.
    """

    def __init__(self, n: int) -> None:
        self._typical: dict[int, float] = {}
        self._relative: deque[float] = deque(maxlen=4 * n + _KEPT)
        self._new = True

    def saw(self, worker: int, seconds: float) -> None:
        """Note that a job has ended.

        Args:
            worker: Number of the worker.
            seconds: Time from the message to the reply.
        """
        if not 0 < seconds < float("inf"):
            return
        typical = self._typical.get(worker)
        if typical is not None:
            self._relative.append(seconds / typical)
            self._new = True
        self._typical[worker] = seconds if typical is None else (1 - _RECENT) * typical + _RECENT * seconds

    def typical(self, worker: int) -> float | None:
        """Returns the seconds that a worker typically takes for a shard; None if it is not known."""
        return self._typical.get(worker)

    def remaining(self, worker: int, elapsed: float) -> float:
        """Returns how many seconds a worker's job is expected to take longer.

        Args:
            worker: Number of the worker.
            elapsed: Seconds that the job has taken yet.
        """
        typical = self._typical.get(worker)
        if typical is None:
            return _LONGER * elapsed
        times, sums, _ = self._tables() if self._new else self._known
        relative = elapsed / typical
        shorter = bisect.bisect_right(times, relative)
        longer = len(times) - shorter
        return typical * (sums[shorter] - longer * relative + _LONGER * relative) / (longer + 1)

    @staticmethod
    def is_worth(own: float, remaining: float) -> bool:
        """Returns whether to start a second copy of a job.

        Args:
            own: Seconds that the second copy would take.
            remaining: Seconds that the first copy is expected to take longer.
        """
        return _EAGER * own <= (1 + 1e-6) * remaining  # `worth_after` is where they may be equal

    def worth_after(self, own: float, worker: int, elapsed: float, before: float = math.inf) -> float:
        """Returns the seconds of the first copy from which on a second one is worth it; it is not after `elapsed`.

        Args:
            own: Seconds that the second copy would take.
            worker: Number of the worker with the first copy.
            elapsed: Seconds that the first copy has taken yet.
            before: Seconds from which on the exact number does not matter.
        """
        typical, wanted = self._typical.get(worker), _EAGER * own / _LONGER
        if typical is None:
            return wanted
        times, _, left = self._tables()
        # What remains grows where a job of the table would have ended, and shrinks in between.
        first = bisect.bisect_right(times, elapsed / typical)
        if first < len(times):
            if typical * times[first] >= before:
                return typical * times[first]
            enough = left[first:] >= _EAGER * own / typical
            place = int(enough.argmax())
            if enough[place]:
                return typical * times[first + place]
        return max(wanted, typical * times[-1]) if times else wanted

    def _tables(self) -> tuple[list[float], list[float], NDArray[np.float64]]:
        """Returns the relative times, ascending; the sum of those from each on; and what remains right after each."""
        if self._new:
            self._new = False
            times = sorted(self._relative)
            sums = [*itertools.accumulate(reversed(times), initial=0.0)][::-1]
            at, longer = np.array(times), np.arange(len(times))[::-1]
            left = (np.array(sums[1:]) - longer * at + _LONGER * at) / (longer + 1)
            self._known = times, sums, left
        return self._known
