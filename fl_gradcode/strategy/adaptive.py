"""Chooses the mode of each round from the durations of past rounds.

The shards that a worker stores never change in a run, but the shards that it *computes* may. `AdaptiveModes` replays
the job times of recent rounds in each mode that the stored shards allow, and picks the mode whose rounds would have
been shortest.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..codes import GradientCode
from ..planning import Scheme, steady_rounds
from ..runlog import History, RoundRow
from .round_mode import ModeChooser, RoundMode

__all__ = ["AdaptiveModes", "regrouped"]

_log = logging.getLogger(__name__)

_PATIENCES = (0.0, 1.0, 2.0, 4.0)
_WINDOW = 16  # number of rounds that a replay covers
_LEAST = 3  # number of rounds needed before the first choice
_WORKERS = 100  # for each so many workers, decisions are a round further apart, up to the window
_SETTLE = 6  # leading rounds of a replay that are ignored, because they start with idle nodes
_RECENT = 5  # all workers must have answered within this many rounds before fewer holders compute a shard
_BETTER = 0.95  # a new mode must shorten the rounds to at most this fraction
_TRIAL = 8  # rounds of the present mode that are remembered to compare it with the next mode
# A mode fails its trial if its mean round, or its last round, takes this many times as long as before.
_WORSE, _FAR_WORSE = 1.2, 3.0
_ALLOWED = 0.02  # of what plain rounds would have taken: what a run may lose by trying coded vectors
_PAYS_BACK = 5  # rounds within which coded vectors are to save what their first round may lose
_AT_ONCE = 1.5  # times a plain round: a round of coded vectors that takes longer is the last one


class AdaptiveModes(ModeChooser):
    """Chooses a mode by replaying recent rounds, and reverts a choice that turns out slower than the mode before it.

    The first rounds send one shard a message with patience 2, which costs almost nothing when all workers are equally
    fast. After that, the candidates are several values of patience, and coded vectors in which all or only some of a
    shard's holders compute it. With fewer holders at work, fewer stragglers are tolerated: a round is lost if all
    holders that compute a shard fail at once. These modes are therefore candidates only while all nodes are connected
    and every worker has answered recently. They are suspended for some rounds after a round that was not exact.

    A replay is wrong where latency does not behave as the model assumes, for example where nodes share a machine or
    the load of the machines changes. Each change is therefore on trial. A mode whose rounds take longer than those of
    the previous mode is abandoned at once. It is excluded for a number of rounds that doubles with each failure.

    Only coded vectors can lose much against plain FedAvg: if all of a job's time grows with its shards, a round with a
    load of L takes L plain rounds. So the chooser estimates what plain rounds would have taken, and tries coded vectors
    only if the run can afford that: with what it has saved so far, 2 % of the plain rounds, and what the replay says
    that five rounds save. One round that takes more than 1.5 plain ones ends the trial. After that, only what has been
    saved counts.

    Args:
        code: The code whose shards the workers store, with m = 1, over the reals.
        smaller: Whether a shard may be computed by fewer workers than hold it.
        coded: Whether coded vectors are candidates; if not, every mode sends one shard a message.
        every: Number of rounds between two decisions. With more than 300 workers there are more, up to 16, because the
            replay of a decision takes the server longer than a round.
    """

    def __init__(self, code: GradientCode, *, smaller: bool = True, coded: bool = True, every: int = 3) -> None:
        self.code, self.smaller, self.coded = code, smaller, coded
        self.every = max(every, min(_WINDOW, code.n // _WORKERS))
        self.mode = self._safe = RoundMode(code, "shards", 2.0)
        #: Mode -> mean duration of a round in seconds, as predicted at the last decision.
        self.predicted: dict[str, float] = {}
        self._history = History(code.n, _WINDOW)
        self._heard: dict[int, int] = {}
        self._failed = -_WINDOW
        self._round = 0
        self._decided = 0
        self._took: deque[float] = deque(maxlen=_TRIAL)  # seconds that rounds in the present mode took
        self._timed = 0  # the round of the last of them
        self._before: tuple[RoundMode, float] | None = None  # the previous mode and the mean seconds of its rounds
        self._banned: dict[str, tuple[int, int]] = {}  # kind of mode -> (excluded until round, length in rounds)
        self._plain = _PlainRounds()
        self._lost = 0.0  # seconds: the most that a round of coded vectors has lost

    def choose(self, *, complete: bool) -> RoundMode:
        """Returns the mode that would have been fastest, or the present mode unless another is clearly better."""
        if self._worse():
            before = self._safe if self._before is None else self._before[0]
            key, length = _kind(self.mode), self._banned.get(_kind(self.mode), (0, _WINDOW // 2))[1] * 2
            self._banned[key] = (self._round + length, length)
            _log.info("From round %d on: %s again, which was faster.", self._round + 1, _name(before))
            self._change(before, on_trial=False)
            self._decided = self._round
        elif self._history.rounds >= _LEAST and (
            self._round >= self._decided + self.every or self._failed == self._round
        ):
            self._decided = self._round
            self._decide()
        if not complete and self.mode.code is not self.code:
            return self._safe
        return self.mode

    def learn(self, row: RoundRow) -> None:
        """Record the job times of a round and the workers that answered in it."""
        if row.train is None:
            return
        self._round = row.round
        self._history.add_row(row)
        self._plain.add(row)
        for phase in row.phases:
            for job in phase.timings:
                if job.worker is not None:
                    self._heard[job.worker] = self._round
        if row.train.outcome != "exact":
            self._failed = self._round
        elif row.way == self.mode.line:  # false for a round that fell back to the safe mode because nodes were missing
            seconds = row.train.seconds
            self._timed = self._round
            self._took.append((seconds.waiting or 0.0) - (seconds.verifying or 0.0))

    def _worse(self) -> bool:
        """Returns whether the present mode has failed, by its last round or, if it is on trial, by its mean."""
        if self.mode.send == "coded" and self._took and self._timed == self._round:
            plain = self._plain.of(self._round)
            if plain and self._took[-1] > _AT_ONCE * plain:
                self._lost = max(self._lost, self._took[-1] - plain)
                return True
        if self._before is None or not self._took:
            return False
        reference = self._before[1]
        if self._took[-1] > _FAR_WORSE * reference:
            return True
        # In the first round of a mode, some nodes are still busy with work from the previous mode.
        return len(self._took) > 3 and float(np.mean([*self._took][1:])) > _WORSE * reference

    def _change(self, mode: RoundMode, *, on_trial: bool) -> None:
        if _name(mode) != _name(self.mode):
            self._before = (self.mode, float(np.mean(self._took))) if on_trial and self._took else None
            self._took.clear()
        self.mode = mode

    def _decide(self) -> None:
        fixed, compute = self._history.tables()
        times = fixed + compute
        modes = self._modes(np.median(times, axis=0))
        parts = self._history.replay(max(2 * _WINDOW, 2 * len(times)))
        seconds = {}
        for name, mode in modes.items():
            seconds[name] = float(steady_rounds(_scheme(mode), parts).seconds[_SETTLE:].mean())
        self.predicted = seconds
        now = _name(self.mode)
        shardwise = min((taken for name, taken in seconds.items() if modes[name].send == "shards"), default=0.0)
        behind = self._plain.lead < _ALLOWED / 2 * self._plain.total
        allowed = {
            name: taken
            for name, taken in seconds.items()
            if (
                self._affords(modes[name].load, shardwise - taken) or name == now
                if modes[name].send == "coded"
                else not behind or modes[name].patience == _PATIENCES[-1]  # the nearest to plain rounds
            )
        }
        seconds = allowed or seconds
        best = min(seconds, key=lambda name: seconds[name])
        if now not in seconds or seconds[best] < _BETTER * seconds[now]:
            if best != now:
                _log.info("From round %d on: %s (%.3g s expected).", self._round + 1, best, seconds[best])
            self._change(modes[best], on_trial=now in seconds)
        else:
            self._change(modes[now], on_trial=True)  # the same mode, regrouped by the latest speeds

    def _affords(self, load: int, saves: float) -> bool:
        """Returns whether the run can afford that a first round of coded vectors takes as long as it may.

        Args:
            load: Number of shards of a message.
            saves: Seconds that a round saves, by the replay.
        """
        risk = max(self._lost, (load - 1) * self._plain.mean)
        return self._plain.lead + (0.0 if self._lost else _PAYS_BACK * max(0.0, saves)) >= risk

    def _modes(self, speeds: NDArray[np.float64]) -> dict[str, RoundMode]:
        modes = [RoundMode(self.code, "shards", patience) for patience in _PATIENCES]
        stored = RoundMode(self.code, "coded")
        heard = all(self._heard.get(i, -_WINDOW) > self._round - _RECENT for i in range(self.code.n))
        if self.coded and self.code.groups and self.smaller and heard and self._failed <= self._round - _WINDOW:
            largest = max(map(len, self.code.groups))
            fewer = [RoundMode(regrouped(self.code, size, speeds), "coded") for size in range(2, largest)]
            modes += [mode for mode in fewer if mode.load < stored.load]
        if self.coded:
            modes.append(stored)
        free = [mode for mode in modes if self._banned.get(_kind(mode), (0, 0))[0] <= self._round]
        return {_name(mode): mode for mode in free or [self._safe]}


class _PlainRounds:
    """What the rounds of a run took, and what they would have taken if the server had waited for each worker's shard.

    The latter is an estimate. Of a job of several shards, the seconds that the client spent on computing are divided by
    their number. A job that is not done counts with its time so far until it is.
    """

    def __init__(self) -> None:
        self._took: dict[int, float] = {}  # round -> seconds
        self._done: dict[int, dict[int, float]] = {}  # round -> worker -> seconds of one shard
        self._owed: dict[int, dict[int, float]] = {}  # round -> worker -> seconds of one shard at least
        self._shares: dict[int, list[float]] = {}  # round -> for jobs that are done: one shard's share of their time
        self._sum_taken, self._sum_plain = 0.0, 0.0  # of rounds before the last ones

    def add(self, row: RoundRow) -> None:
        """Take in a row of the ledger, whose late jobs are of earlier rounds."""
        if row.train is None or row.train.seconds.waiting is None:
            return
        self._took[row.round] = row.train.seconds.waiting - (row.train.seconds.verifying or 0.0)
        for owed, job in [(False, job) for phase in row.phases for job in phase.timings] + [
            (True, job) for phase in row.phases for job in phase.owing
        ]:
            if job.worker is None or job.kind != "train" or not job.shards or job.round not in self._took:
                continue
            if job.seconds is None:
                continue
            if owed:
                shares = self._shares.get(job.round)
                share = 1 / job.shards if not shares else float(np.median(shares)) if job.shards > 1 else 1.0
                self._owed.setdefault(job.round, {})[job.worker] = share * job.seconds
            else:
                computing = job.seconds if job.computing is None else min(job.computing, job.seconds)
                one = job.seconds - computing * (1 - 1 / job.shards)
                if job.shards > 1 and job.seconds > 0:
                    self._shares.setdefault(job.round, []).append(one / job.seconds)
                self._done.setdefault(job.round, {}).setdefault(job.worker, one)
        for old in [number for number in self._took if number <= row.round - _WINDOW]:
            self._sum_plain += self.of(old)
            self._sum_taken += self._took.pop(old)
            for table in (self._done, self._owed, self._shares):
                table.pop(old, None)

    def of(self, server_round: int) -> float:
        """Returns the seconds that a plain round would have taken, of the last rounds; 0 if nothing is known."""
        owed, done = self._owed.get(server_round, {}), self._done.get(server_round, {})
        return max({**owed, **done}.values(), default=0.0)

    @property
    def mean(self) -> float:
        """Mean seconds of a plain round, of the last rounds."""
        return sum(map(self.of, self._took)) / max(1, len(self._took))

    @property
    def total(self) -> float:
        """Seconds that all rounds so far would have taken as plain ones."""
        return self._sum_plain + sum(map(self.of, self._took))

    @property
    def lead(self) -> float:
        """Seconds that the run is ahead of plain rounds, with what it may lose against them."""
        return (1 + _ALLOWED) * self.total - self._sum_taken - sum(self._took.values())


def regrouped(code: GradientCode, size: int, seconds: Sequence[float] | NDArray[np.float64]) -> GradientCode:
    """Returns a code in which each shard is computed by only about `size` of the workers that hold it.

    Each group of the code is split into groups of at least `size` workers, with slow workers spread evenly.

    Args:
        code: A fractional repetition code with m = 1.
        size: Number of workers in a new group, at least 1.
        seconds: Time that each worker takes, in seconds, shape (n,).
    """
    assert code.groups is not None and code.m == 1
    B = np.zeros((code.n, code.k))
    groups: list[tuple[int, ...]] = []
    for group in code.groups:
        parts = max(1, len(group) // size)
        dealt = sorted(group, key=lambda i: -float(seconds[i]))
        block = code.shards_of(group[0])
        own = code.k == code.n and set(block) == set(group)
        for number in range(parts):
            members = tuple(sorted(dealt[number::parts]))
            shards = members if own else block[number::parts]
            if shards:
                B[np.ix_(members, shards)] = 1.0
                groups.append(members)
    least = min(sum(1 for i in code.holders_of(j) if B[i, j]) for j in range(code.k))
    return GradientCode(B, least - 1, code.name, tuple(groups))


def _scheme(mode: RoundMode) -> Scheme:
    blocks = tuple(mode.code.shards_of(i) for i in range(mode.code.n))
    if mode.send == "shards":
        return Scheme(_name(mode), blocks, groups=mode.code.groups or (), shardwise=True, patience=mode.patience)
    enough = None if mode.code.groups else mode.code.n - mode.code.s
    return Scheme(_name(mode), blocks, enough=enough, groups=mode.code.groups or ())


def _name(mode: RoundMode) -> str:
    if mode.send == "shards":
        return f"one shard a message, patience {mode.patience:g}"
    return f"coded vectors of {mode.load} shards"


def _kind(mode: RoundMode) -> str:
    """Returns the key under which a mode is excluded after a failed trial; all coded modes share one."""
    return _name(mode) if mode.send == "shards" else "coded"
