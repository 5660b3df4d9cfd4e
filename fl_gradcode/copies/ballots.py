"""Counts equal copies of a group or shard before one is used, and tells which senders are alone with theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Ballots"]

T = TypeVar("T")

#: (row of the code, (node, worker)).
Vote = tuple[int, tuple[int, int]]


@dataclass
class _Candidate(Generic[T]):
    """One content, and who sent it."""

    copy: T
    votes: list[Vote] = field(default_factory=list)


class Ballots(Generic[T]):
    """The copies of each unit of a phase: of each group of a code, or of each shard.

    Of e liars at most e agree on something wrong, so a copy that e + 1 senders agree on is right. s + 2e + 1 holders
    are enough for that, if s of them do not answer and e lie. Copies need not agree in each bit, as float arithmetic
    differs between machines, so a liar may still be off by what counts as agreeing.

    Args:
        enough: Number of equal copies that decide, e + 1.
        agree: Whether two copies agree.
    """

    def __init__(self, enough: int, agree: Callable[[T, T], bool]) -> None:
        self._enough, self._agree = enough, agree
        self._candidates: dict[int, list[_Candidate[T]]] = {}
        self._winner: dict[int, _Candidate[T]] = {}
        self._voted: set[tuple[int, int]] = set()  # unit, worker

    def add(self, unit: int, row: int, sender: tuple[int, int], copy: T) -> bool:
        """Count a copy; returns whether it has decided the unit.

        Args:
            unit: Number of the group or shard.
            row: Row of the code for which it was sent.
            sender: Node and worker that sent it. Only the worker's first copy of a unit counts: a liar may answer
                with this one whatever it is asked for.
            copy: The copy; only the first of equal ones is kept.
        """
        if (unit, sender[1]) in self._voted:
            return False
        self._voted.add((unit, sender[1]))
        candidates = self._candidates.setdefault(unit, [])
        for candidate in candidates:
            if self._agree(candidate.copy, copy):
                break
        else:
            candidate = _Candidate(copy)
            candidates.append(candidate)
        candidate.votes.append((row, sender))
        if unit in self._winner or len(candidate.votes) < self._enough:
            return False
        self._winner[unit] = candidate
        return True

    def winner(self, unit: int) -> tuple[Vote, T]:
        """Returns the copy of a unit that is decided, with the first of its senders."""
        candidate = self._winner[unit]
        return candidate.votes[0], candidate.copy

    def votes_for(self, unit: int) -> list[Vote]:
        """Returns who sent the copy of a decided unit, in order of arrival."""
        return [*self._winner[unit].votes]

    def most_equal(self, unit: int) -> int:
        """Returns the largest number of equal copies of a unit so far."""
        return max((len(candidate.votes) for candidate in self._candidates.get(unit, ())), default=0)

    @property
    def enough(self) -> int:
        """Number of equal copies that decide."""
        return self._enough

    def wrong(self) -> dict[int, tuple[int, int]]:
        """Returns node -> (worker, unit) of each sender whose copy of a decided unit is another than the one used."""
        return {
            node: (worker, unit)
            for unit, winner in self._winner.items()
            for candidate in self._candidates[unit]
            if candidate is not winner
            for _, (node, worker) in candidate.votes
        }
