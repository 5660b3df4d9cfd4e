"""Measured jobs as arrays: how their time grows with the load, and what each worker would take in each round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting

__all__ = ["DEFAULT_SHARE", "JobTables", "Jobs", "Split", "job_tables", "split_of"]

#: Share of a job's time that is taken to grow with its shards where nothing tells.
DEFAULT_SHARE = 0.8
_GRID = np.linspace(0.0, 1.0, 101)
_REPEATS, _BLOCKS = 200, 20  # resampled fits, and blocks of rounds that they draw
_ENOUGH = 10  # jobs of a worker with each of two loads, for a share of its own
_CELLS = 30_000_000  # most cells of a table of rounds
_GONE = 5  # last rounds without an answer after which a worker has stopped answering

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Jobs:
    """Measured jobs, each an entry of arrays of shape (jobs,).

    Attributes:
        n: Number of workers.
        round: Round that sent the job, int64.
        worker: Number of the worker, int64.
        shards: Number of shards, above 0.
        seconds: Seconds from send to reply; a lower bound where the reply is still owed.
        computing: Seconds that grow with the shards; NaN where they are not known.
    """

    n: int
    round: NDArray[np.int64]
    worker: NDArray[np.int64]
    shards: Array
    seconds: Array
    computing: Array

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which jobs say how much of their time they spent computing, shape (jobs,)."""
        return np.asarray((self.computing >= 0) & (self.computing <= self.seconds))


@dataclass(frozen=True)
class Split:
    """The share of a one-shard job's time that grows with the shards.

    Attributes:
        share: The share, between 0 and 1.
        origin: "measured" (the clients said it), "fitted" to jobs of several loads, "given", or "assumed".
        interval: Ends of a 90 % interval of a fitted share; None for others.
        workers: Worker -> a fitted share of its own.
    """

    share: float
    origin: str
    interval: tuple[float, float] | None = None
    workers: tuple[tuple[int, float], ...] = ()

    def told(self) -> str:
        """Returns the share and where it comes from, in words."""
        if self.origin == "fitted" and self.interval is not None:
            low, high = self.interval
            own = f", with shares of their own for {len(self.workers)} workers" if self.workers else ""
            return f"{self.share:.2f} (fitted to jobs of several loads, 90 % interval {low:.2f} to {high:.2f}{own})"
        how = {"measured": "median of what clients measured", "given": "given", "assumed": "assumed, not measured"}
        return f"{self.share:.2f} ({how.get(self.origin, self.origin)})"


@dataclass(frozen=True)
class JobTables:
    """The seconds of each worker in each round, without gaps.

    Attributes:
        fixed: Seconds that do not grow with the shards, shape (rounds, n).
        compute: Seconds for each shard, shape (rounds, n).
        missing: Number of pairs of a round and a worker without a time, which take the worker's next known time, or its
            last one.
        stopped: Worker -> the last round that it answered, for workers that answered none of the last rounds.
        late: Worker -> the first round that it answered, for workers that answered none of the first rounds.
    """

    fixed: Array
    compute: Array
    missing: int
    stopped: tuple[tuple[int, int], ...]
    late: tuple[tuple[int, int], ...] = ()


def split_of(jobs: Jobs, *, given: float | None = None, rng: np.random.Generator | None = None) -> Split:
    """Returns the share of a job's time that grows with its shards.

    Where clients say what they spent computing, it is the median of what they say. Else, where jobs have several loads,
    the share is fitted: seconds = level of the worker * (1 - share + share * shards) * noise, by least squares of the
    logarithms. Its interval comes from fits to resampled blocks of rounds.

    Args:
        jobs: The jobs.
        given: What the user says; it takes precedence over a fit, and what clients measured over both.
        rng: Draws the blocks.
    """
    known = jobs.known & (jobs.seconds > 0)
    if known.any():
        one = jobs.computing[known] / jobs.shards[known]
        return Split(float(np.median(one / (jobs.seconds[known] - jobs.computing[known] + one))), "measured")
    if given is not None:
        return Split(given, "given")
    use = jobs.seconds > 0
    loads, column = np.unique(jobs.shards[use], return_inverse=True)
    if not 1 < len(loads) <= 100 or jobs.n * len(loads) > 100_000:
        return Split(DEFAULT_SHARE, "assumed")
    logs, worker = np.log(jobs.seconds[use]), jobs.worker[use]
    rounds = np.unique(jobs.round[use], return_inverse=True)[1]
    blocks = min(_BLOCKS, int(rounds.max()) + 1)
    block = rounds * blocks // (int(rounds.max()) + 1)
    cells = jobs.n * len(loads)
    at = (block * jobs.n + worker) * len(loads) + column
    shape = (blocks, jobs.n, len(loads))
    counts = np.bincount(at, minlength=blocks * cells).reshape(shape).astype(np.float64)
    sums = np.bincount(at, weights=logs, minlength=blocks * cells).reshape(shape)
    both = (counts.sum(axis=0) > 0).sum(axis=1) > 1  # a worker with one load says nothing of the share
    if not both.any():
        return Split(DEFAULT_SHARE, "assumed")
    counts, sums = counts[:, both], sums[:, both]
    growth = np.log1p(_GRID[:, None] * (loads - 1))  # (shares, loads), relative to one shard
    best = float(_GRID[_best(counts.sum(axis=0), sums.sum(axis=0), growth)])
    rng = np.random.default_rng(0) if rng is None else rng
    drawn = []
    for picks in rng.integers(blocks, size=(_REPEATS, blocks)):
        weights = np.bincount(picks, minlength=blocks).astype(np.float64)
        total = np.asarray(np.tensordot(weights, counts, 1))
        if ((total > 0).sum(axis=1) > 1).any():
            drawn.append(_GRID[_best(total, np.tensordot(weights, sums, 1), growth)])
    low, high = np.quantile(drawn, [0.05, 0.95]) if len(drawn) > 1 else (0.0, 1.0)
    own = []
    for place, number in enumerate(np.flatnonzero(both)):
        count = counts[:, place].sum(axis=0)
        if np.sum(count >= _ENOUGH) > 1:
            share = _GRID[_best(count[None], sums[:, place].sum(axis=0)[None], growth)]
            own.append((int(number), float(share)))
    return Split(best, "fitted", (float(min(low, best)), float(max(high, best))), tuple(own))


def _best(counts: Array, sums: Array, growth: Array) -> int:
    """Returns the place in the grid of the share with the smallest sum of squares; counts have shape (workers, loads).

    With the level of each worker fitted, the sum of squares is a constant - 2 (sum of y g) + (sum of g^2), where g is
    the growth less the worker's mean of it.
    """
    total = counts.sum(axis=1)
    means = np.divide(growth @ counts.T, total, out=np.zeros((len(growth), len(total))), where=total > 0)
    cross = (growth @ sums.T - means * sums.sum(axis=1)).sum(axis=1)
    squares = ((growth**2) @ counts.T - means**2 * total).sum(axis=1)
    return int(np.argmin(squares - 2 * cross))


def job_tables(jobs: Jobs, split: Split) -> JobTables:
    """Returns what each worker would take in each round.

    Several jobs of a worker in one round count with their mean. A gap takes the worker's next known time. The previous
    time would be wrong: a slow job that kept the worker busy for several rounds would count once for each of them.
    After its last known time a worker keeps that one, and a worker without any time gets the median of all others.

    Raises:
        InvalidSetting: There are no jobs, or too many rounds and workers.
    """
    rounds, place = np.unique(jobs.round, return_inverse=True)
    if not len(rounds):
        raise InvalidSetting("There are no times to plan with.")
    if len(rounds) * jobs.n > _CELLS:
        raise InvalidSetting(
            f"{len(rounds)} rounds of {jobs.n} workers are more than {_CELLS:,} times; give a part of the rounds."
        )
    share = np.full(jobs.n, split.share)
    for worker, own in split.workers:
        share[worker] = own
    share_of = share[jobs.worker]
    unit = jobs.seconds / (1 - share_of + share_of * jobs.shards)
    known = jobs.known
    fixed = np.where(known, jobs.seconds - jobs.computing, (1 - share_of) * unit)
    compute = np.where(known, jobs.computing / jobs.shards, share_of * unit)
    cells, at = len(rounds) * jobs.n, place * jobs.n + jobs.worker
    counts = np.bincount(at, minlength=cells)
    tables = []
    for values in (fixed, compute):
        mean = np.full(cells, np.nan)
        np.divide(np.bincount(at, weights=values, minlength=cells), counts, out=mean, where=counts > 0)
        tables.append(mean.reshape(len(rounds), jobs.n))
    seen = counts.reshape(len(rounds), jobs.n) > 0
    stopped, late = _silent(seen[::-1]), _silent(seen)
    return JobTables(
        _filled(tables[0], seen),
        _filled(tables[1], seen),
        int((~seen).sum()),
        tuple((worker, int(rounds[::-1][row])) for worker, row in stopped),
        tuple((worker, int(rounds[row])) for worker, row in late),
    )


def _silent(seen: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Returns the workers without an answer in the first rows, and the first row of an answer of each.

    A worker that answers seldom is not one of them: its silence must be long beside its own pauses.
    """
    first = np.argmax(seen, axis=0)
    found = []
    for worker in map(int, np.flatnonzero(seen.any(axis=0) & (first >= max(_GONE, len(seen) // 10)))):
        rows = np.flatnonzero(seen[:, worker])
        pause = int(np.diff(rows).max()) if len(rows) > 1 else 0
        if first[worker] > 2 * pause:
            found.append((worker, int(first[worker])))
    return found


def _filled(table: Array, seen: NDArray[np.bool_]) -> Array:
    if seen.all():
        return table
    middle = float(np.median(table[seen]))
    result = table.copy()
    for worker in np.flatnonzero(~seen.all(axis=0)):
        rows = np.flatnonzero(seen[:, worker])
        if not len(rows):
            result[:, worker] = middle
            continue
        following = np.minimum(np.searchsorted(rows, np.arange(len(table))), len(rows) - 1)
        result[:, worker] = table[rows[following], worker]
    return result
