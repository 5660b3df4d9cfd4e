"""What past rounds say about the workers: measured job times, split into what is fixed and what grows with the shards.

A ledger row has the times; `History` turns those of the last rounds into a `Latency` that replays them, so that a
planner (or the strategy itself, with `send="adaptive"`) can ask how long rounds would have taken under another scheme.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting
from .latency import Latency, Parts
from .traces import replay

__all__ = ["History", "Timing"]


@dataclass(frozen=True)
class Timing:
    """One job of one worker.

    Attributes:
        round: The round that asked.
        worker: Who did it.
        shards: How many shards it was.
        seconds: From send to reply; with `owing`, so far.
        computing: Seconds that the client spent on the shards, as it says; None if it did not.
        owing: The reply is not in yet: `seconds` is a lower bound.
    """

    round: int
    worker: int
    shards: float
    seconds: float
    computing: float | None = None
    owing: bool = False


class History:
    """Timings of n workers.

    Args:
        n: Number of workers.
        window: How many rounds back count; None: all.
    """

    def __init__(self, n: int, window: int | None = None) -> None:
        self.n, self.window = n, window
        self._timings: list[Timing] = []

    @classmethod
    def of_ledger(cls, rows: Sequence[Mapping[str, Any]]) -> History:
        """The training times of a ledger; a shard is counted as what a worker owns, one n-th of the data.

        Runs that were appended to one file follow each other.

        Raises:
            InvalidSetting: No row, rows of an older version, or of codes for different numbers of workers.
        """
        try:
            history = cls._of_rows(rows)
            history.split()
        except InvalidSetting:
            raise
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidSetting(
                f"A line of the file is no ledger row ({type(error).__name__}: {error}); name the ledger of a run."
            ) from error
        if not history.rounds:
            raise InvalidSetting(
                "The ledger has no training times: it was written by an older version, or by no round."
            )
        return history

    @classmethod
    def _of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> History:
        sizes = {int(row["code"]["n"]) for row in rows if row.get("code")}
        if not rows or not sizes:
            raise InvalidSetting("The ledger has no rounds yet; let the run finish at least one.")
        if len(sizes) > 1:
            raise InvalidSetting(f"The ledger has codes for {sorted(sizes)} workers; give one that is of one run.")
        history = cls(sizes.pop())
        before: tuple[Any, int] | None = None
        first = 0
        for row in rows:
            run, number = row.get("run"), int(row["round"])
            if before is not None and (run != before[0] or number <= before[1]):
                first = max((one.round for one in history._timings), default=0)
            before = run, number
            history.add_row(row, first=first, size=history.n / int((row.get("code") or {}).get("k", history.n)))
        return history

    def add_row(self, row: Mapping[str, Any], *, first: int = 0, size: float = 1.0) -> None:
        """Learn from a ledger row.

        Args:
            row: Late replies to training are also in what it says of evaluation.
            first: What to add to the numbers of its rounds.
            size: What to count one of its shards as.
        """
        for owing, name in ((False, "timings"), (True, "owing")):
            self.add(
                Timing(
                    first + int(one["round"]),
                    int(one["worker"]),
                    size * float(one["shards"]),
                    float(one["seconds"]),
                    None if owing else one.get("computing"),
                    owing,
                )
                for kind in ("train", "evaluate")
                for one in (row.get(kind) or {}).get(name, ())
                # A later round than this one is another run's: its nodes still owed replies when this run began.
                if one["worker"] is not None
                and one["kind"] == "train"
                and one["seconds"] is not None
                and int(one["round"]) <= int(row["round"])
            )

    def add(self, timings: Iterable[Timing]) -> None:
        """Learn; what is older than the window is forgotten, but not that somebody still owes a reply."""
        new = [one for one in timings if one.shards > 0 and 0 <= one.worker < self.n]
        if self.window is not None and new:
            oldest = max(one.round for one in (*self._timings, *new)) - self.window + 1
            new = [replace(one, round=max(one.round, oldest)) if one.owing else one for one in new]
            self._timings = [one for one in self._timings if one.round >= oldest]
            new = [one for one in new if one.round >= oldest]
        self._timings += new

    @property
    def rounds(self) -> int:
        """How many rounds have left a time."""
        return len({one.round for one in self._timings})

    def split(self) -> float:
        """Share of compute in a job of one shard, of the median job that says so; 1 if none does.

        1 is the cautious guess: under it redundancy costs most.
        """
        shares = [
            (one.computing / one.shards) / (one.seconds - one.computing + one.computing / one.shards)
            for one in self._timings
            if one.computing is not None and one.seconds > 0 and 0 <= one.computing <= one.seconds
        ]
        return float(np.median(shares)) if shares else 1.0

    def tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(fixed seconds, compute seconds a shard) of each round and worker, each of shape (rounds, n).

        A round in which a worker left no time takes that of the next round in which it did: how long it was busy says
        nothing of what comes after, whereas the time that kept it busy would count once for each round that it missed.
        After its last one, that one; a worker that never left a time, the median of the others. What is owed counts as
        a time, so far.
        """
        rounds = sorted({one.round for one in self._timings})
        if not rounds:
            raise InvalidSetting("There are no times to plan with.")
        place = {number: t for t, number in enumerate(rounds)}
        share = self.split()
        seen: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        longest: dict[tuple[int, int], float] = defaultdict(lambda: -1.0)
        for one in self._timings:
            if not one.owing:
                seen[place[one.round], one.worker].append(_parts(one, share))
                longest[one.round, one.worker] = max(one.seconds, longest[one.round, one.worker])
        owed: dict[tuple[int, int], Timing] = {}
        for one in self._timings:
            # Had it come in, it would have taken longer than this. The last word counts: it has owed longest.
            if one.owing and one.seconds > longest[one.round, one.worker]:
                owed[one.round, one.worker] = one
        for key, one in owed.items():
            seen[place[key[0]], key[1]].append(_parts(one, share))
        values = np.full((2, len(rounds), self.n), np.nan)
        for (t, worker), pairs in seen.items():
            values[:, t, worker] = np.mean(pairs, axis=0)
        return _filled(values[0]), _filled(values[1])

    def replay(self, rounds: int) -> Parts:
        """The rounds as they were, again and again: what a simulation of other schemes needs."""
        fixed, compute = self.tables()
        turns = np.arange(rounds) % len(fixed)
        return Parts(fixed[turns], compute[turns], np.zeros((rounds, self.n)))

    def latency(self) -> Latency:
        """A latency that replays the rounds, from the first again after the last."""
        fixed, compute = self.tables()
        return Latency(fixed=replay(fixed, name="fixed"), compute=replay(compute, name="compute"))


def _parts(one: Timing, share: float) -> tuple[float, float]:
    """Fixed seconds, and compute seconds of a shard."""
    if one.computing is not None and 0 <= one.computing <= one.seconds:
        return one.seconds - one.computing, one.computing / one.shards
    unit = one.seconds / (1 - share + share * one.shards)
    return (1 - share) * unit, share * unit


def _filled(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """No gaps: the next known round of the same worker, after the last one that one, or else the median of all."""
    known = ~np.isnan(table)
    middle = float(np.median(table[known]))
    result = table.copy()
    for worker in range(table.shape[1]):
        rows = np.flatnonzero(known[:, worker])
        if not len(rows):
            result[:, worker] = middle
            continue
        following = np.minimum(np.searchsorted(rows, np.arange(len(table))), len(rows) - 1)
        result[:, worker] = table[rows[following], worker]
    return result
