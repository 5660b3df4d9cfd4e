"""How a round is run: which code, and how it is sent; always the same, or chosen from what past rounds took.

What is stored never changes in a run; what is *computed* of it may. `AdaptiveWays` replays the job times of the last
rounds under each way that the stored shards allow, and takes the one whose rounds would have been shortest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .gradient_code import GradientCode
from .history import History
from .round_times import steady_rounds
from .schemes import Scheme

__all__ = ["AdaptiveWays", "FixedWay", "Way", "Ways", "regrouped"]

_log = logging.getLogger(__name__)

_PATIENCES = (0.0, 1.0, 2.0, 4.0)
_WINDOW = 16  # rounds that are replayed
_LEAST = 3  # rounds that are needed to choose
_SETTLE = 6  # of a replay: its first rounds begin idle
_BETTER = 0.95  # change only for a way whose rounds would have been so much shorter


@dataclass(frozen=True)
class Way:
    """How one round is run.

    Attributes:
        code: Who computes which shards.
        send: One coded vector a worker, or one shard a message.
        patience: Of second copies, with "shards".
    """

    code: GradientCode
    send: Literal["coded", "shards"]
    patience: float = 0.0

    @property
    def entry(self) -> dict[str, Any]:
        """For the ledger row."""
        if self.send == "shards":
            return {"send": "shards", "patience": self.patience, "load": 1}
        return {"send": "coded", "patience": None, "load": max(len(self.code.shards_of(i)) for i in range(self.code.n))}


class Ways(Protocol):
    """Chooses the way of each round."""

    def choose(self) -> Way:
        """For the round that begins."""

    def learn(self, row: Mapping[str, Any]) -> None:
        """From the ledger row of a round that has ended."""


@dataclass(frozen=True)
class FixedWay:
    """Always the same."""

    way: Way

    def choose(self) -> Way:
        """That."""
        return self.way

    def learn(self, row: Mapping[str, Any]) -> None:
        """Nothing."""


class AdaptiveWays:
    """Chooses by replaying the last rounds.

    It begins with one shard a message and patience 2, which costs next to nothing where all are alike. From then on it
    considers every patience, and coded vectors over as many holders of each shard as are stored, or fewer. Fewer
    tolerate fewer: they are considered only while every worker has answered within the last rounds, and no longer after
    a round that was not exact.

    Args:
        code: What is stored; m = 1, over the reals.
        every: Rounds between two decisions.
    """

    def __init__(self, code: GradientCode, *, every: int = 3) -> None:
        self.code, self.every = code, every
        self.way = Way(code, "shards", 2.0)
        #: What each way's rounds would have lasted, in seconds, at the last decision.
        self.predicted: dict[str, float] = {}
        self._history = History(code.n, _WINDOW)
        self._heard: dict[int, int] = {}
        self._failed = -_WINDOW
        self._round = 0
        self._decided = 0

    def choose(self) -> Way:
        """The one that would have been fastest; the same as before unless another is clearly better."""
        if self._history.rounds >= _LEAST and self._round >= self._decided + self.every:
            self._decided = self._round
            self._decide()
        return self.way

    def learn(self, row: Mapping[str, Any]) -> None:
        """Job times, and who was heard."""
        entry = row.get("train")
        if not entry:
            return
        self._round = int(row["round"])
        self._history.add_row(row)
        for one in entry["timings"]:
            if one["worker"] is not None:
                self._heard[one["worker"]] = self._round
        if entry["outcome"] != "exact":
            self._failed = self._round

    def _decide(self) -> None:
        fixed, compute = self._history.tables()
        times = fixed + compute
        ways = self._ways(np.median(times, axis=0))
        parts = self._history.replay(max(2 * _WINDOW, 2 * len(times)))
        seconds = {}
        for name, way in ways.items():
            seconds[name] = float(steady_rounds(_scheme(way), parts).seconds[_SETTLE:].mean())
        self.predicted = seconds
        now = _name(self.way)
        best = min(seconds, key=lambda name: seconds[name])
        if now not in seconds or seconds[best] < _BETTER * seconds[now]:
            if best != now:
                _log.info("From round %d on: %s (%.3g s expected).", self._round + 1, best, seconds[best])
            self.way = ways[best]
        else:
            self.way = ways[now]  # regrouped by the newest speeds

    def _ways(self, speeds: NDArray[np.float64]) -> dict[str, Way]:
        ways = [Way(self.code, "shards", patience) for patience in _PATIENCES]
        ways.append(Way(self.code, "coded"))
        everybody = all(self._heard.get(i, -_WINDOW) > self._round - _WINDOW for i in range(self.code.n))
        if self.code.groups and everybody and self._failed <= self._round - _WINDOW:
            largest = max(map(len, self.code.groups))
            ways += [Way(regrouped(self.code, size, speeds), "coded") for size in range(2, largest)]
        return {_name(way): way for way in ways}


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


def _scheme(way: Way) -> Scheme:
    blocks = tuple(way.code.shards_of(i) for i in range(way.code.n))
    if way.send == "shards":
        return Scheme(_name(way), blocks, groups=way.code.groups or (), shardwise=True, patience=way.patience)
    enough = None if way.code.groups else way.code.n - way.code.s
    return Scheme(_name(way), blocks, enough=enough, groups=way.code.groups or ())


def _name(way: Way) -> str:
    if way.send == "shards":
        return f"one shard a message, patience {way.patience:g}"
    return f"coded vectors of {way.entry['load']} shards"
