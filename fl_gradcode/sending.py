"""How a phase sends: one coded vector a worker (here), or one shard a message (`shardwise`).

A `Sending` tells a `Phase` what a reply stands for, what a free node gets next, which replies to read, and when all is
lost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from flwr.app import Message

from .arrivals import Arrival
from .gradient_code import GradientCode
from .inbox import Inbox
from .incremental import IncrementalDecoder
from .roster import Roster
from .wire import Plan, Reply, Row

__all__ = ["CodedSending", "Sending", "known_of", "may_cover"]

# To tell whether all is lost; what takes more than this is not.
_TRIED = 200  # sets of workers
_WORK, _DEEP = 20_000, 100  # sets that are looked at for a cover, and how many it may have


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
        """Whether it stays undecodable with replies of all these nodes; each that is not known may be any one of the
        missing workers."""

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
        answered = {i for bucket in inbox.buckets.values() for i in bucket.senders}
        known, strangers = known_of(nodes, self.roster)
        known = (known & self._participants) - answered
        missing = set(self.roster.missing(self._participants)) - answered if strangers else set()
        decoders = [bucket.decoder for bucket in inbox.buckets.values()] or [self.code.incremental()]
        for decoder in decoders:
            silent = len(self._participants - known - set(decoder.survivors)) - min(strangers, len(missing))
            if silent <= self.code.s:
                return False  # what the code guarantees
        if not self.code.exact:
            return True
        return all(self._is_lost(decoder, known, missing, strangers) for decoder in decoders)

    def _is_lost(self, decoder: IncrementalDecoder, known: set[int], missing: set[int], strangers: int) -> bool:
        """Whether nothing that so many of the missing workers send completes what is known."""
        lost = decoder.hopeless(known | missing)
        if lost or strangers >= len(missing):
            return lost
        shards = {i: set(self.code.shards_of(i)) for i in self._participants}
        wanted = set(range(self.code.k)).difference(*(shards[i] for i in known | set(decoder.survivors)))
        if not may_cover(wanted, [shards[i] for i in missing], strangers):
            return True
        if math.comb(len(missing), strangers) > _TRIED:
            return False
        return all(decoder.hopeless(known | set(few)) for few in itertools.combinations(missing, strangers))

    def offered(self, arrival: Arrival, *, good: bool) -> None:
        """Nothing to do."""

    def restarted(self, node: int) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Let go of the decoder."""
        self._trial = None


def known_of(nodes: Iterable[int], roster: Roster) -> tuple[set[int], int]:
    """Which workers they are, and how many more there may be among them: nodes that are not known, or that say that
    they are the same worker; where two do, at least one, until both were heard."""
    workers = [roster.worker_of(node) for node in nodes]
    known = {i for i in workers if i is not None}
    return known, max(len(workers) - len(known), int(roster.contested))


def may_cover(wanted: AbstractSet[int], sets: Sequence[AbstractSet[int]], count: int) -> bool:
    """Whether `count` of the sets may cover all that is wanted; True too where it takes long to tell."""
    inside = [*{frozenset(one & wanted) for one in sets} - {frozenset()}]
    if not wanted <= frozenset().union(*inside):
        return False
    if count >= len(inside) or _greedy_cover(wanted, inside) <= count:  # mostly, and soon told
        return True
    if count * max(map(len, inside), default=0) < len(wanted):
        return False
    return count >= _DEEP or _covers(wanted, inside, count, [_WORK])


def _greedy_cover(wanted: AbstractSet[int], sets: Sequence[AbstractSet[int]]) -> int:
    """How many sets it takes if for each element in turn the one is taken that has most of the rest."""
    having: dict[int, list[AbstractSet[int]]] = {}
    for one in sets:
        for element in one:
            having.setdefault(element, []).append(one)
    left, taken = set(wanted), 0
    for element in sorted(wanted):
        if element in left:
            left -= max(having[element], key=lambda one: len(one & left))
            taken += 1
    return taken


def _covers(wanted: AbstractSet[int], sets: Sequence[AbstractSet[int]], count: int, left: list[int]) -> bool:
    left[0] -= len(sets)
    if not wanted or left[0] < 0:
        return True
    inside = [one & wanted for one in sets]
    if count * max(map(len, inside), default=0) < len(wanted):
        return False
    rarest = min(wanted, key=lambda j: sum(j in one for one in inside))
    return any(_covers(wanted - one, inside, count - 1, left) for one in inside if rarest in one)


def _first(workers: Sequence[int], groups: Sequence[Sequence[int]], m: int) -> list[int]:
    """The first m of each group."""
    group_of = {i: q for q, group in enumerate(groups) for i in group}
    seen: dict[int, list[int]] = {}
    for worker in workers:
        inside = seen.setdefault(group_of.get(worker, -1), [])
        if len(inside) < m:
            inside.append(worker)
    return [i for q, inside in seen.items() if q >= 0 for i in inside]
