"""How a phase sends: one coded vector a worker (here), or one shard a message (`shardwise`).

A `Sending` tells a `Phase` what a reply stands for, what a free node gets next, which replies to read, and when all is
lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from flwr.app import Message

from .arrivals import Arrival
from .gradient_code import GradientCode
from .inbox import Inbox
from .incremental import IncrementalDecoder
from .roster import Roster
from .wire import Plan, Reply, Row

__all__ = ["CodedSending", "Sending"]


class Sending(Protocol):
    """The decisions of a phase that depend on how it sends."""

    #: How replies add up: one row each.
    code: GradientCode
    #: Whether several replies for a row are normal.
    spare: bool

    @property
    def wake_at(self) -> float | None:
        """When to offer idle nodes work again; see `StopRule`."""

    def first_rows(self) -> dict[int, Row]:
        """What each worker is asked for first."""

    def row_of(self, reply: Reply) -> int | str:
        """Which row of `code` a reply stands for; a text says why none."""

    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Whether nothing more is to be waited for."""

    def arrived(self, arrival: Arrival) -> None:
        """A reply is in, not read yet."""

    def next_message(self, node: int, held: Message | None, inbox: Inbox, now: float) -> Message | None:
        """What a free node gets; see `StopRule`."""

    def choose(self, arrivals: Sequence[Arrival], inbox: Inbox, *, final: bool) -> list[Arrival]:
        """Which replies to read; see `StopRule`."""

    def hopeless(self, nodes: Sequence[int], inbox: Inbox) -> bool:
        """Whether it stays undecodable with replies of all these nodes; one that is not known may be any missing
        worker."""

    def offered(self, arrival: Arrival, *, good: bool) -> None:
        """A reply was read."""

    def restarted(self, node: int) -> None:
        """The node was started again: what it was working on is lost."""

    def release(self) -> None:
        """The phase is over: let go of what is large."""


class CodedSending:
    """One message a worker, one coded vector back.

    Args:
        plan: What is asked; `plan.rows` holds every worker's row.
        code: The code over the sampled shards.
        roster: Who is who.
        kappa_max: Replies beyond those that decode are waited for while noise is amplified more than so.
    """

    spare = False
    wake_at = None

    def __init__(self, plan: Plan, code: GradientCode, roster: Roster, *, kappa_max: float = float("inf")) -> None:
        self.plan, self.code, self.roster, self.kappa_max = plan, code, roster, kappa_max
        self._participants = {i for i, row in plan.rows.items() if row.shards}
        self._trial: IncrementalDecoder | None = None

    def first_rows(self) -> dict[int, Row]:
        """All it holds."""
        return self.plan.rows

    def row_of(self, reply: Reply) -> int | str:
        """The worker."""
        asked = self.plan.rows[reply.worker].shards
        if reply.shards != asked:
            return f"it combines shards {list(reply.shards)}, asked were {list(asked)}"
        return reply.worker

    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Decodable, without amplifying noise too much; or n - s replies if the code promises no more."""
        if decoder.decodable:
            if self.kappa_max == float("inf"):
                return True
            vector = decoder.vector()
            return vector is not None and self.code.kappa_of(vector) <= self.kappa_max
        return not self.code.exact and len(decoder.survivors) >= len(self._participants) - self.code.s

    def arrived(self, arrival: Arrival) -> None:
        """Nothing to do."""

    def next_message(self, node: int, held: Message | None, inbox: Inbox, now: float) -> Message | None:
        """Its one message."""
        return held

    def choose(self, arrivals: Sequence[Arrival], inbox: Inbox, *, final: bool) -> list[Arrival]:
        """Those that complete the sum."""
        worker_of = {arrival.token: self.roster.worker_of(arrival.node) for arrival in arrivals}
        if None in worker_of.values():
            return list(arrivals)  # it cannot be told without reading
        best = inbox.best
        survivors = best.decoder.survivors if best else []
        groups = self.code.groups
        if not final and groups and len(survivors) + len(arrivals) < len(groups) * self.code.m:
            return []
        new = [i for i in worker_of.values() if i is not None and inbox.sender_of(i) is None]
        needed = {*survivors, *new}
        decoder = self._told_of([*survivors, *new])
        if groups is not None:  # the first m replies of a group suffice; with m > 1, more may lower the noise
            few = _first([*survivors, *new], groups, self.code.m)
            trial = self.code.incremental()
            trial.update(few)
            if self.code.m == 1 or self.enough(trial):
                needed, decoder = set(few), trial
        if not final and not self.enough(decoder):
            return []
        return [arrival for arrival in arrivals if worker_of[arrival.token] in needed]

    def _told_of(self, workers: Sequence[int]) -> IncrementalDecoder:
        """A decoder that knows these workers' replies; the last one, if they only have become more."""
        trial = self._trial
        if trial is None or list(workers[: len(trial.survivors)]) != trial.survivors:
            trial = self._trial = self.code.incremental()
        trial.update(workers[len(trial.survivors) :])
        return trial

    def hopeless(self, nodes: Sequence[int], inbox: Inbox) -> bool:
        """Whether it stays undecodable even with all of `nodes`."""
        if inbox.best is not None and inbox.best.decoder.decodable:
            return False  # only the noise is still waited for
        workers = [self.roster.worker_of(node) for node in nodes]
        outstanding = {i for i in workers if i is not None}
        if None in workers or self.roster.contested:
            outstanding.update(self.roster.missing(self._participants))
        outstanding &= self._participants
        outstanding -= {i for bucket in inbox.buckets.values() for i in bucket.senders}
        decoders = [bucket.decoder for bucket in inbox.buckets.values()] or [self.code.incremental()]
        for decoder in decoders:
            if len(self._participants - outstanding - set(decoder.survivors)) <= self.code.s:
                return False  # what the code guarantees
        return not self.code.exact or all(decoder.hopeless(outstanding) for decoder in decoders)

    def offered(self, arrival: Arrival, *, good: bool) -> None:
        """Nothing to do."""

    def restarted(self, node: int) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Let go of the decoder."""
        self._trial = None


def _first(workers: Sequence[int], groups: Sequence[Sequence[int]], m: int) -> list[int]:
    """The first m of each group."""
    group_of = {i: q for q, group in enumerate(groups) for i in group}
    seen: dict[int, list[int]] = {}
    for worker in workers:
        inside = seen.setdefault(group_of.get(worker, -1), [])
        if len(inside) < m:
            inside.append(worker)
    return [i for q, inside in seen.items() if q >= 0 for i in inside]
