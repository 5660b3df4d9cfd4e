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
_SETTLE = 6  # leading rounds of a replay that are ignored, because they start with idle nodes
_RECENT = 5  # all workers must have answered within this many rounds before fewer holders compute a shard
_BETTER = 0.95  # a new mode must shorten the rounds to at most this fraction
_TRIAL = 8  # rounds of the present mode that are remembered to compare it with the next mode
# A mode fails its trial if its mean round, or its last round, takes this many times as long as before.
_WORSE, _FAR_WORSE = 1.2, 3.0


class AdaptiveModes(ModeChooser):
    """Chooses a mode by replaying recent rounds, and reverts a choice that turns out slower than the mode before it.

    The first rounds send one shard a message with patience 2, which costs almost nothing when all workers are equally
    fast. After that, the candidates are several values of patience, and coded vectors in which all or only some of a
    shard's holders compute it. With fewer holders at work, fewer stragglers are tolerated: a round is lost if all
    holders that compute a shard fail at once. These modes are therefore candidates only while all nodes are connected
    and every worker has answered recently. They are suspended for some rounds after a round that was not exact.

    A replay is wrong where latency does not behave as the model assumes, for example where nodes share a machine. Each
    change is therefore on trial. A mode whose rounds take longer than those of the previous mode is abandoned at once.
    It is excluded for a number of rounds that doubles with each failure.

    Args:
        code: The code whose shards the workers store, with m = 1, over the reals.
        smaller: Whether a shard may be computed by fewer workers than hold it.
        coded: Whether coded vectors are candidates; if not, every mode sends one shard a message.
        every: Number of rounds between two decisions.
    """

    def __init__(self, code: GradientCode, *, smaller: bool = True, coded: bool = True, every: int = 3) -> None:
        self.code, self.smaller, self.coded, self.every = code, smaller, coded, every
        self.mode = self._safe = RoundMode(code, "shards", 2.0)
        #: Mode -> mean duration of a round in seconds, as predicted at the last decision.
        self.predicted: dict[str, float] = {}
        self._history = History(code.n, _WINDOW)
        self._heard: dict[int, int] = {}
        self._failed = -_WINDOW
        self._round = 0
        self._decided = 0
        self._took: deque[float] = deque(maxlen=_TRIAL)  # seconds that rounds in the present mode took
        self._before: tuple[RoundMode, float] | None = None  # the previous mode and the mean seconds of its rounds
        self._banned: dict[str, tuple[int, int]] = {}  # kind of mode -> (excluded until round, length in rounds)

    def choose(self, *, complete: bool) -> RoundMode:
        """Returns the mode that would have been fastest, or the present mode unless another is clearly better."""
        if self._worse():
            assert self._before is not None
            key, length = _kind(self.mode), self._banned.get(_kind(self.mode), (0, _WINDOW // 2))[1] * 2
            self._banned[key] = (self._round + length, length)
            _log.info("From round %d on: %s again, which was faster.", self._round + 1, _name(self._before[0]))
            self._change(self._before[0], on_trial=False)
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
        for phase in row.phases:
            for job in phase.timings:
                if job.worker is not None:
                    self._heard[job.worker] = self._round
        if row.train.outcome != "exact":
            self._failed = self._round
        elif row.way == self.mode.line:  # false for a round that fell back to the safe mode because nodes were missing
            seconds = row.train.seconds
            self._took.append((seconds.waiting or 0.0) - (seconds.verifying or 0.0))

    def _worse(self) -> bool:
        """Returns whether the present mode is on trial and has failed it."""
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
        best = min(seconds, key=lambda name: seconds[name])
        if now not in seconds or seconds[best] < _BETTER * seconds[now]:
            if best != now:
                _log.info("From round %d on: %s (%.3g s expected).", self._round + 1, best, seconds[best])
            self._change(modes[best], on_trial=now in seconds)
        else:
            self._change(modes[now], on_trial=True)  # the same mode, regrouped by the latest speeds

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
