"""When a round with bounded staleness may end: enough shards are of this round, and none is too old."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

__all__ = ["StalenessRule"]

_HALF = 0.5


@dataclass(frozen=True)
class StalenessRule:
    """When a round may end without an update of this round from each shard.

    The strategy and the planner's simulation use the same rule. A shard's *age* is the number of rounds since its last
    known update began, 0 for one of this round.

    Attributes:
        bound: Largest age of an update that may be used again.
        fresh: Least share of the shards that must have an update of this round, and least share of the weight, of
            which half is enough.
        grace: How long to wait on for further updates once there are enough, as a share of the time that the round took
            until the last update came.

    References:
        Compared by experiment in docs/staleness.md. Related: Gu et al., "Fast federated learning in the presence of
        arbitrary device unavailability", 2021 (MIFA, memory without redundancy or bound).
    """

    bound: int
    fresh: float
    grace: float

    def needed(self, k: int) -> int:
        """Returns how many of k shards must have an update of this round."""
        return math.ceil(self.fresh * k - 1e-9)

    def oldest(self, server_round: int) -> int:
        """Returns the earliest round whose updates may be used in a round."""
        return max(1, server_round - self.bound)

    def enough_weight(self, fresh: float, reused: float) -> bool:
        """Returns whether updates of this round have enough weight beside those that are used again.

        A model that mostly repeats an earlier step overshoots: nobody has computed where it should go from here.

        Args:
            fresh: Weight of the updates of this round.
            reused: Weight of the others.
        """
        return fresh >= min(self.fresh, _HALF) * (fresh + reused) * (1 - 1e-9)

    def too_old(self, versions: Iterable[tuple[int, int]], server_round: int) -> Collection[int]:
        """Returns the shards that the round has to wait for, of (shard, round of its last known update)."""
        return {shard for shard, version in versions if version < self.oldest(server_round)}

    def waits_until(self, began: float, last: float) -> float:
        """Returns until when to wait on for further updates.

        Args:
            began: When the round began, in seconds.
            last: When the last update of this round came, in seconds on the same clock.
        """
        return last + self.grace * (last - began)
