"""The mode of each round, chosen from what past rounds took.

What is stored never changes in a run; what is *computed* of it may. `AdaptiveModes` replays the job times of the last
rounds in each mode that the stored shards allow, and takes the one whose rounds would have been shortest.
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
_WINDOW = 16  # rounds that are replayed
_LEAST = 3  # rounds that are needed to choose
_SETTLE = 6  # of a replay: its first rounds begin idle
_RECENT = 5  # rounds within which all must have answered before fewer holders compute a shard
_BETTER = 0.95  # change only for a mode whose rounds would have been so much shorter
_TRIAL = 8  # rounds of a mode that are remembered to compare it with the next
_WORSE, _FAR_WORSE = 1.2, 3.0  # times what the mode before took: of three rounds' mean, and of one round


class AdaptiveModes(ModeChooser):
    """Chooses by replaying the last rounds, and takes a choice back that turns out worse than what it replaced.

    It begins with one shard a message and patience 2, which costs next to nothing where all are alike. From then on it
    considers every patience, and coded vectors over as many holders of each shard as are stored, or fewer. Fewer
    tolerate fewer: if all holders of a shard that compute it are lost at once, the round is. They are considered only
    while all nodes are there and every worker has answered within the last rounds, and for some time no longer after a
    round that was not exact.

    Where the latency is not as assumed (shards that cost more together than one by one, nodes that share a machine), a
    replay is wrong. So each change is on trial: a mode whose rounds take longer than those of the mode before it is
    left at once, and not tried again for a time that doubles.

    Args:
        code: What is stored; m = 1, over the reals.
        smaller: Whether fewer holders than are stored may compute a shard.
        every: Rounds between two decisions.
    """

    def __init__(self, code: GradientCode, *, smaller: bool = True, every: int = 3) -> None:
        self.code, self.smaller, self.every = code, smaller, every
        self.mode = self._safe = RoundMode(code, "shards", 2.0)
        #: What each mode's rounds would have lasted, in seconds, at the last decision.
        self.predicted: dict[str, float] = {}
        self._history = History(code.n, _WINDOW)
        self._heard: dict[int, int] = {}
        self._failed = -_WINDOW
        self._round = 0
        self._decided = 0
        self._took: deque[float] = deque(maxlen=_TRIAL)  # seconds of the present mode's rounds
        self._before: tuple[RoundMode, float] | None = None  # the mode before it, and what that one's rounds took
        self._banned: dict[str, tuple[int, int]] = {}  # until which round, for how long

    def choose(self, *, complete: bool) -> RoundMode:
        """The one that would have been fastest; the same as before unless another is clearly better."""
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
        """Learn the job times of a round, and who was heard in it."""
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
        elif row.way == self.mode.line:  # not the safe mode of a round in which somebody was missing
            self._took.append(float(row.train.seconds.waiting or 0.0))

    def _worse(self) -> bool:
        """Whether the present mode is on trial and has failed it."""
        if self._before is None or not self._took:
            return False
        reference = self._before[1]
        if self._took[-1] > _FAR_WORSE * reference:
            return True
        # The first round of a mode still meets nodes that are busy with the last one's.
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
            self._change(modes[now], on_trial=True)  # regrouped by the newest speeds

    def _modes(self, speeds: NDArray[np.float64]) -> dict[str, RoundMode]:
        modes = [RoundMode(self.code, "shards", patience) for patience in _PATIENCES]
        stored = RoundMode(self.code, "coded")
        heard = all(self._heard.get(i, -_WINDOW) > self._round - _RECENT for i in range(self.code.n))
        if self.code.groups and self.smaller and heard and self._failed <= self._round - _WINDOW:
            largest = max(map(len, self.code.groups))
            fewer = [RoundMode(regrouped(self.code, size, speeds), "coded") for size in range(2, largest)]
            modes += [mode for mode in fewer if mode.load < stored.load]
        modes.append(stored)
        free = [mode for mode in modes if self._banned.get(_kind(mode), (0, 0))[0] <= self._round]
        return {_name(mode): mode for mode in free or [self._safe]}


def regrouped(code: GradientCode, size: int, seconds: Sequence[float] | NDArray[np.float64]) -> GradientCode:
    """The same stored shards, of which each is computed by about `size` of its holders only.

    Each group is split into groups of `size` workers (the rest is dealt to them), slow ones spread evenly.

    Args:
        code: Fractional repetition, m = 1.
        size: Workers of a new group, at least 1.
        seconds: How slow each worker is, shape (n,).
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
    """What fails a trial together: coded vectors, however long."""
    return _name(mode) if mode.send == "shards" else "coded"
