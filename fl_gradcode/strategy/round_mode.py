"""The mode of a round: its code, and what each message asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from ..codes import GradientCode
from ..runlog import ModeLine, RoundRow

__all__ = ["FixedMode", "ModeChooser", "RoundMode"]


@dataclass(frozen=True)
class RoundMode:
    """The mode of one round.

    Attributes:
        code: The code that says which worker computes which shards.
        send: "coded" for one coded vector a worker, "shards" for one shard a message.
        patience: With "shards", relative time until a second copy of a shard is requested; see `Shards`.
    """

    code: GradientCode
    send: Literal["coded", "shards"]
    patience: float = 0.0

    @property
    def load(self) -> int:
        """Largest number of shards that a message asks for."""
        return 1 if self.send == "shards" else max(len(self.code.shards_of(i)) for i in range(self.code.n))

    @property
    def line(self) -> ModeLine:
        """The mode as it appears in the ledger row."""
        return ModeLine(self.send, self.patience if self.send == "shards" else None, self.load)


class ModeChooser(ABC):
    """Chooses the mode of each round."""

    @abstractmethod
    def choose(self, *, complete: bool) -> RoundMode:
        """Returns the mode of the round that begins; `complete` says whether all n nodes are connected."""

    def learn(self, row: RoundRow) -> None:
        """Learn from the ledger row of a round that has ended; does nothing by default."""


class FixedMode(ModeChooser):
    """Chooses the same mode for every round."""

    def __init__(self, mode: RoundMode) -> None:
        self._mode = mode

    def choose(self, *, complete: bool) -> RoundMode:
        """Returns the mode given to the constructor."""
        return self._mode
