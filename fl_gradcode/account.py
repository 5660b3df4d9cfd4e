"""What a run has asked of each shard so far: the part of its privacy that a restart must not forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Account"]


class Account:
    """Rounds and draws of noise, shard by shard. It only grows.

    Args:
        holders: Shard -> how many hold it.
    """

    def __init__(self, holders: Mapping[int, int]) -> None:
        #: Shard -> the most holders that it has had.
        self.holders = dict(holders)
        #: Shard -> draws of noise after decoding: each is a release, also a second one of the same round.
        self.draws = dict.fromkeys(holders, 0)
        #: The last round that was asked, and the digest of the request; "": it cannot be asked alike again.
        self.asked: tuple[int, str] | None = None
        self._released: dict[int, list[tuple[int, int]]] = {shard: [] for shard in holders}

    @property
    def state(self) -> dict[str, Any]:
        """As JSON can hold it; what `merge` takes."""
        return {
            "released": [*self._released.items()],
            "draws": [*self.draws.items()],
            "holders": [*self.holders.items()],
            "asked": self.asked,
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another account of the same run has."""
        for shard, ranges in state["released"]:
            self.release(int(shard), *((int(first), int(last)) for first, last in ranges))
        for mine, key in ((self.draws, "draws"), (self.holders, "holders")):
            for shard, count in state.get(key, ()):
                mine[int(shard)] = max(mine[int(shard)], int(count))
        number, request = state.get("asked") or (0, "")
        if number and (self.asked is None or number >= self.asked[0]):
            self.asked = (int(number), str(request))

    def covers(self, state: Mapping[str, Any]) -> bool:
        """Whether it has all that the other one has released and drawn."""
        whole = Account(self.holders)
        whole.merge(self.state)
        whole.merge(state)
        return whole._released == self._released and whole.draws == self.draws

    def release(self, shard: int, *ranges: tuple[int, int]) -> None:
        """The shard's update was, or may have been, released in these rounds: first and last of each range."""
        self._released[shard] = _joined([*self._released[shard], *ranges])

    def released(self, shard: int) -> tuple[tuple[int, int], ...]:
        """Ranges of rounds in which its update may have been released."""
        return tuple(self._released[shard])

    def rounds(self, shard: int) -> int:
        """How many releases that were, or draws of noise, whichever is more."""
        return max(self.draws[shard], sum(last - first + 1 for first, last in self._released[shard]))

    @property
    def last_round(self) -> int:
        """The last round in which any shard was asked; 0: none was."""
        return max((last for ranges in self._released.values() for _, last in ranges), default=0)


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rounds, in as few ranges as there can be, ascending."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(one for one in ranges if one[0] <= one[1]):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found
