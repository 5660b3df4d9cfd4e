"""How one round is run: over which code, and what a message asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from ..codes import GradientCode
from ..runlog import ModeLine, RoundRow

__all__ = ["FixedMode", "ModeChooser", "RoundMode"]


@dataclass(frozen=True)
class RoundMode:
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
    def load(self) -> int:
        """The most shards of a message."""
        return 1 if self.send == "shards" else max(len(self.code.shards_of(i)) for i in range(self.code.n))

    @property
    def line(self) -> ModeLine:
        """Returns what the ledger row says of it."""
        return ModeLine(self.send, self.patience if self.send == "shards" else None, self.load)


class ModeChooser(ABC):
    """Chooses the mode of each round."""

    @abstractmethod
    def choose(self, *, complete: bool) -> RoundMode:
        """Returns the mode of the round that begins; `complete` says whether all n nodes are there."""

    def learn(self, row: RoundRow) -> None:
        """Learn from the ledger row of a round that has ended."""


class FixedMode(ModeChooser):
    """Every round is run in the same mode."""

    def __init__(self, mode: RoundMode) -> None:
        self._mode = mode

    def choose(self, *, complete: bool) -> RoundMode:
        """Returns the one mode."""
        return self._mode
