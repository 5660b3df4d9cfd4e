"""The mode of a round: its code, and what each message asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..codes import GradientCode
from ..planning import LEARNED, JobTimes
from ..runlog import ModeLine, RoundRow

__all__ = ["FixedMode", "LearnedTimes", "ModeChooser", "RoundMode"]


@dataclass(frozen=True)
class RoundMode:
    """The mode of one round.

    Attributes:
        code: The code that says which worker computes which shards.
        send: "coded" for one coded vector a worker, "shards" for one shard a message.
        patience: With "shards", relative time until a second copy of a shard is requested; see `Shards`.
        times: With patience "learned", what the run has learned of each kind of phase.
    """

    code: GradientCode
    send: Literal["coded", "shards"]
    patience: float | Literal["learned"] = 0.0
    times: Mapping[str, JobTimes] | None = field(default=None, compare=False)

    @property
    def load(self) -> int:
        """Largest number of shards that a message asks for."""
        return 1 if self.send == "shards" else max(len(self.code.shards_of(i)) for i in range(self.code.n))

    @property
    def line(self) -> ModeLine:
        """The mode as it appears in the ledger row."""
        learned = self.patience == LEARNED
        patience = self.patience if self.send == "shards" and not isinstance(self.patience, str) else None
        return ModeLine(self.send, patience, self.load, learned)

    def times_of(self, kind: str) -> JobTimes | None:
        """Returns what the run has learned of the jobs of a kind of phase; None if that is not asked for."""
        return None if self.times is None else self.times[kind]


class ModeChooser(ABC):
    """Chooses the mode of each round."""

    @abstractmethod
    def choose(self, *, complete: bool) -> RoundMode:
        """Returns the mode of the round that begins; `complete` says whether all n nodes are connected."""

    def learn(self, row: RoundRow) -> None:
        """Learn from the ledger row of a round that has ended; does nothing by default."""


class LearnedTimes(ModeChooser):
    """Chooses one shard a message in every round, with second copies by the times of the run so far.

    Args:
        code: The code.
    """

    def __init__(self, code: GradientCode) -> None:
        self._times = {"train": JobTimes(code.n), "evaluate": JobTimes(code.n)}
        self._mode = RoundMode(code, "shards", LEARNED, self._times)

    def choose(self, *, complete: bool) -> RoundMode:
        """Returns the mode, with what was learned yet."""
        return self._mode

    def learn(self, row: RoundRow) -> None:
        """Note the time of each job of one shard that has ended."""
        for phase in row.phases:
            for job in phase.timings:
                if job.worker is not None and job.shards == 1 and job.seconds is not None:
                    self._times[job.kind].saw(job.worker, job.seconds)


class FixedMode(ModeChooser):
    """Chooses the same mode for every round."""

    def __init__(self, mode: RoundMode) -> None:
        self._mode = mode

    def choose(self, *, complete: bool) -> RoundMode:
        """Returns the mode given to the constructor."""
        return self._mode
