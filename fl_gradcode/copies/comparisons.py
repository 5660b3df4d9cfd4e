"""What the copies of a run's shards have shown, and how long its first rounds wait for second copies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message

from .._text import numbered
from ..protocol import Plan, Reply
from ..runlog import PhaseRow
from .copies import MOST_APART, Copies
from .disagreement import DISAGREEMENT, Disagreement

__all__ = ["Comparisons", "Verification", "not_compared", "shards_of_several"]

_REMEMBERED = 8  # phases whose late replies are compared
_MOST_IN_VAIN = 3  # rounds in succession that wait in vain for second copies of shards whose holders disagreed


@dataclass(frozen=True)
class Verification:
    """What a phase waits for after it could be decoded.

    Attributes:
        wanted: Shards of which a second copy is wanted.
        seconds: Longest time to wait on; a phase never waits longer than it took until then.
    """

    wanted: frozenset[int]
    seconds: float


class Comparisons:
    """What the copies of a run's shards have shown so far.

    Args:
        verify: Number of rounds at the start of the run that may wait for second copies.
        insists: Whether rounds wait for second copies of shards whose holders disagree as long as they do.

    Attributes:
        twice: Shards whose update was seen from two holders, who agreed.
        compared: Shards whose update was seen from two holders.
    """

    def __init__(self, verify: int, *, insists: bool = False) -> None:
        self.twice: set[int] = set()
        self.compared: set[int] = set()
        self._insists, self._in_vain = insists, 0
        self._apart: set[int] = set()  # shards whose holders disagreed when they were last compared
        self._left = verify
        self._seconds: float | None = None  # that verification may still take; None before the first round
        self._recent: dict[str, Copies] = {}

    @property
    def over(self) -> bool:
        """Whether no further round waits for second copies."""
        return self._left <= 0

    def resume(self, rows: Iterable[PhaseRow]) -> None:
        """Take over what earlier rounds of a resumed run compared."""
        for row in rows:
            self._left -= 1
            self.compared |= {*row.compared}
            if row.replica_disagreement is not None and row.replica_disagreement <= DISAGREEMENT:
                self.twice |= {*row.compared}

    def open(self, plan: Plan, before: ArrayRecord | None, *, compares: bool) -> Copies:
        """Returns where the copies of a new phase are noted; the copies of the last phases are remembered.

        Args:
            plan: Plan of the phase.
            before: The arrays that training starts from; None when evaluating.
            compares: Whether copies of a shard should agree at all.
        """
        copies = Copies(plan, before, compares=compares)
        self._recent.pop(plan.label, None)
        self._recent[plan.label] = copies
        while len(self._recent) > _REMEMBERED:
            del self._recent[next(iter(self._recent))]
        return copies

    def wanted(self, plan: Plan) -> Verification | None:
        """Returns which second copies a phase of training waits for, and how long; None if it waits for none."""
        done = self.over or self._seconds == 0
        insists = self._insists and self._apart and self._in_vain < _MOST_IN_VAIN
        if done and not insists:
            return None
        several = shards_of_several(plan)
        if insists and several & self._apart:
            return Verification(several & self._apart if done else several - self.twice, math.inf)
        if done or not several - self.twice:
            return None
        return Verification(several - self.twice, math.inf if self._seconds is None else self._seconds)

    def close(self, copies: Copies, *, most: float, waited: float) -> None:
        """Take over what a phase of training compared.

        Args:
            copies: The copies of the phase.
            most: Seconds that it might have waited on for second copies.
            waited: Seconds that it waited on for second copies.
        """
        self._learn(copies)
        self._left -= 1
        if self._insists and waited:
            self._in_vain = 0 if copies.compared & self._apart else self._in_vain + 1
        if most:  # in all, verification takes no longer than it might have in the first round
            self._seconds = max(0.0, (most if self._seconds is None else self._seconds) - waited)

    def _learn(self, copies: Copies) -> None:
        if copies.plan.kind == "train":
            apart = {shard for shards in copies.disagreements for shard in shards}
            self._apart = (self._apart - copies.compared) | apart
            self.twice = (self.twice | copies.compared) - apart
            self.compared |= copies.compared

    def late(
        self, label: str, message: Message | None, worker: int | None
    ) -> tuple[float, Disagreement | None, frozenset[int]] | None:
        """Compare a reply to an earlier phase with what was used.

        Returns how far it is apart, the disagreement if that is too much, and who is to blame if that is known; None if
        nothing could be compared.

        Args:
            label: The phase that asked, such as "train 3".
            message: The reply.
            worker: Worker that sent it; a reply in another's name is not compared.
        """
        copies = self._recent.get(label)
        if copies is None or message is None or not message.has_content():
            return None
        try:
            reply = Reply.find_in(message.content)
        except Exception:  # a reply is untrusted input, and this one is not needed
            return None
        if reply is None or worker is None or reply.worker != worker:
            return None
        apart = copies.add_late(reply, message)
        if apart is None:
            return None
        self._learn(copies)
        about = (one for one in copies.disagreements.values() if reply.worker in one.holders)
        return min(apart, MOST_APART), next(about, None) if apart > DISAGREEMENT else None, copies.to_blame()


def shards_of_several(plan: Plan) -> frozenset[int]:
    """Returns the shards that several workers hold."""
    holders = Counter(shard for row in plan.rows.values() for shard in row.shards)
    return frozenset(shard for shard, number in holders.items() if number > 1)


def not_compared(shards: Collection[int], rounds: int) -> str:
    """Returns a sentence about shards of which no two copies were seen.

    Args:
        shards: The shards.
        rounds: Number of rounds so far.
    """
    after, which = f"After {rounds} round{'' if rounds == 1 else 's'}", numbered("shard", sorted(shards), 11)
    return (
        f"{after}, no second copy has come of {which}: whether their holders compute the same update was not seen. "
        "Copies are compared when they come."
    )
