"""Measured job times of past rounds, split into a fixed part and a part that grows with the number of shards.

The ledger holds the times. `History` turns them into a `Latency` that replays them, so that the planner, or the
strategy with `send="adaptive"`, can compute how long the same rounds would have taken under another scheme.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .._text import numbered
from ..errors import InvalidSetting
from ..latency import Jobs, Latency, Parts, job_tables, replay, split_of
from .rows import RoundRow

__all__ = ["History", "Timing"]

_STARTING = 3.0  # times that a run's first jobs take longer than later ones, from which on the first round is a start
_LATER = 3  # later rounds of a run without which that is not said


@dataclass(frozen=True)
class Timing:
    """The duration of one job of one worker.

    Attributes:
        round: Round that sent the job.
        worker: Number of the worker.
        shards: Number of shards in the job.
        seconds: Seconds from send to reply, or so far if the reply is owed.
        computing: Seconds that the client says it spent on the shards; None if it did not say.
        owing: True if the reply is not in yet, so that `seconds` is a lower bound.
    """

    round: int
    worker: int
    shards: float
    seconds: float
    computing: float | None = None
    owing: bool = False


class History:
    """The job times of n workers.

    Args:
        n: Number of workers.
        window: Number of latest rounds that count; None counts all.

    Attributes:
        notes: What to know of the times of a ledger, in clauses: which rounds were left out, and what is missing.
    """

    def __init__(self, n: int, window: int | None = None) -> None:
        self.n, self.window = n, window
        self.notes: tuple[str, ...] = ()
        self._timings: list[Timing] = []

    @classmethod
    def of_ledger(cls, rows: Sequence[RoundRow]) -> History:
        """Returns the training times of a ledger.

        A shard is counted as what a worker owns, one n-th of the data. Runs that were appended to one file follow each
        other. The first round of a run, or after a resume, is left out if at least half of all workers took three times
        as long in it as in later rounds: then processes were starting.

        Raises:
            InvalidSetting: There is no row, no time, or the rows are of codes for different numbers of workers.
        """
        if not rows:
            raise InvalidSetting("The ledger has no rounds yet; let the run finish at least one.")
        sizes = {row.code.n for row in rows}
        if len(sizes) > 1:
            raise InvalidSetting(
                f"The ledger has codes for {' and '.join(map(str, sorted(sizes)))} workers; give the ledger of one run."
            )
        history = cls(sizes.pop())
        before: RoundRow | None = None
        first = 0
        begun: list[int] = []  # rounds in which processes may have been starting
        for row in rows:
            if before is not None and (row.run != before.run or row.round <= before.round):
                first = max((one.round for one in history._timings), default=0)
            if row.round == 1 or row.resumed:
                begun.append(first + row.round)
            before = row
            history.add_row(row, first=first, size=history.n / row.code.k)
        if not history.rounds:
            raise InvalidSetting("The ledger has no training times: no reply to a training message has come in yet.")
        history._leave_out_starts(begun)
        if any(row.code.name != "uncoded" for row in rows):
            history.notes += (
                "the rounds were coded, and a worker that is busy in a round leaves no time for it, so waiting for all "
                "may take longer than shown",
            )
        return history

    def _leave_out_starts(self, begun: Sequence[int]) -> None:
        """Forget the first rounds of runs in which processes were still starting."""
        by_round: dict[int, dict[int, list[float]]] = {}
        for one in self._timings:
            if not one.owing:
                by_round.setdefault(one.round, {}).setdefault(one.worker, []).append(one.seconds / one.shards)
        starts = []
        for start, end in itertools.pairwise([*begun, max(by_round, default=0) + 1]):
            later = [jobs for number, jobs in by_round.items() if start < number < end]
            if len(later) < _LATER:
                continue
            slower = 0
            for worker, seconds in by_round.get(start, {}).items():
                usual = [one for jobs in later for one in jobs.get(worker, ())]
                slower += int(bool(usual) and np.median(seconds) >= _STARTING * np.median(usual))
            if 2 * slower >= self.n:
                starts.append(start)
        self._timings = [one for one in self._timings if one.round not in starts]
        if starts:
            self.notes += (
                f"{numbered('round', starts)} left out: most workers took three times as long as later, as they do "
                "while processes start",
            )

    def add_row(self, row: RoundRow, *, first: int = 0, size: float = 1.0) -> None:
        """Adds the training times of a ledger row.

        Args:
            row: The row. Late replies to training also stand in its evaluation phase.
            first: Number that is added to the row's round numbers.
            size: What one shard of the row counts as.
        """
        self.add(
            Timing(
                first + job.round,
                job.worker,
                size * job.shards,
                job.seconds,
                None if owing else job.computing,
                owing,
            )
            for owing, jobs in (
                (False, [job for phase in row.phases for job in phase.timings]),
                (True, [job for phase in row.phases for job in phase.owing]),
            )
            for job in jobs
            if job.worker is not None
            and job.kind == "train"
            and job.seconds is not None
            # A later round than this row's is another run's, whose nodes still owed replies when this run began.
            and job.round is not None
            and job.round <= row.round
        )

    def add(self, timings: Iterable[Timing]) -> None:
        """Adds job times and drops those older than the window.

        A reply that is still owed stays: it counts as owed since the oldest round of the window.
        """
        new = [one for one in timings if one.shards > 0 and 0 <= one.worker < self.n]
        if self.window is not None and new:
            oldest = max(one.round for one in (*self._timings, *new)) - self.window + 1
            new = [replace(one, round=max(one.round, oldest)) if one.owing else one for one in new]
            self._timings = [one for one in self._timings if one.round >= oldest]
            new = [one for one in new if one.round >= oldest]
        self._timings += new

    @property
    def rounds(self) -> int:
        """Number of rounds with at least one job time."""
        return len({one.round for one in self._timings})

    def split(self) -> float:
        """Returns the median share of compute in a job of one shard, between 0 and 1.

        It is 1 if no client reported its computing seconds. That is the cautious guess, since redundancy then costs
        most.
        """
        return split_of(self.jobs(), given=1.0).share

    def tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns (fixed seconds, compute seconds per shard), each of shape (rounds, n); see `job_tables`.

        Raises:
            InvalidSetting: There are no times.
        """
        jobs = self.jobs()
        tables = job_tables(jobs, split_of(jobs, given=1.0))
        return tables.fixed, tables.compute

    def replay(self, rounds: int) -> Parts:
        """Returns the measured rounds, repeated until there are `rounds` of them, for simulating other schemes."""
        fixed, compute = self.tables()
        turns = np.arange(rounds) % len(fixed)
        return Parts(fixed[turns], compute[turns], np.zeros((rounds, self.n)))

    def jobs(self) -> Jobs:
        """Returns the job times as arrays.

        A reply that is still owed counts with its seconds so far, if these are more than those of the worker's other
        jobs in that round, and than most of its finished jobs of as many shards: less is only how long the worker has
        been at it. A job is listed in each round in which it is owed, and the entry with most seconds counts.
        """
        done = [one for one in self._timings if not one.owing]
        finished: dict[tuple[int, float], list[float]] = {}
        for one in done:
            finished.setdefault((one.worker, one.shards), []).append(one.seconds)
        usual = {of: float(np.median(seconds)) for of, seconds in finished.items()}
        longest: dict[tuple[int, int], float] = {}
        for one in done:
            longest[one.round, one.worker] = max(one.seconds, longest.get((one.round, one.worker), -1.0))
        owed: dict[tuple[int, int], Timing] = {}
        for one in self._timings:
            least = max(longest.get((one.round, one.worker), -1.0), usual.get((one.worker, one.shards), -1.0))
            if one.owing and one.seconds > least:
                owed[one.round, one.worker] = one
        both = [*done, *owed.values()]
        return Jobs(
            self.n,
            np.array([one.round for one in both], dtype=np.int64),
            np.array([one.worker for one in both], dtype=np.int64),
            np.array([one.shards for one in both], dtype=np.float64),
            np.array([one.seconds for one in both], dtype=np.float64),
            np.array([np.nan if one.computing is None else one.computing for one in both], dtype=np.float64),
        )

    def latency(self) -> Latency:
        """Returns a latency that replays the measured rounds and starts again after the last one.

        The split of the times is that of `fl_gradcode.latency.split_of`.
        """
        jobs = self.jobs()
        tables = job_tables(jobs, split_of(jobs))
        return Latency(fixed=replay(tables.fixed, name="fixed"), compute=replay(tables.compute, name="compute"))
