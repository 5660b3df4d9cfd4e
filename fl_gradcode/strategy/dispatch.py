"""How a phase sends its work: one coded vector a worker (`CodedDispatch`), or one shard a message (`ShardDispatch`)."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from flwr.app import Message

from ..codes import GradientCode, IncrementalDecoder, uncoded
from ..grid import Arrival
from ..planning import first_shards
from ..protocol import Plan, Reply, Row
from .adaptive import RoundMode
from .plan_messages import MessageFactory, whole_shard
from .replies import ReplyCollector
from .workers import WorkerRegistry

__all__ = ["CodedDispatch", "Dispatch", "ShardDispatch", "dispatch_of", "first_rows", "known_of", "may_cover"]

# To tell whether all is lost; what takes more than this is not.
_TRIED = 200  # sets of workers
_WORK, _DEEP = 20_000, 100  # sets that are looked at for a cover, and how many it may have


class Dispatch(Protocol):
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

    def next_message(self, node: int, held: Message | None, inbox: ReplyCollector, now: float) -> Message | None:
        """What a free node gets; see `StopRule`."""

    def choose(self, arrivals: Sequence[Arrival], inbox: ReplyCollector, *, final: bool) -> list[Arrival]:
        """Which replies to read; see `StopRule`."""

    def hopeless(self, nodes: Sequence[int], inbox: ReplyCollector) -> bool:
        """Whether it stays undecodable with replies of all these nodes; each that is not known may be any one of the
        missing workers."""

    def offered(self, arrival: Arrival, *, good: bool) -> None:
        """A reply was read."""

    def restarted(self, node: int) -> None:
        """The node was started again: what it was working on is lost."""

    def release(self) -> None:
        """The phase is over: let go of what is large."""


class CodedDispatch:
    """One message a worker, one coded vector back.

    Args:
        plan: What is asked; `plan.rows` holds every worker's row.
        code: The code over the sampled shards.
        registry: Who is who.
        kappa_max: Replies beyond those that decode are waited for while noise is amplified more than so.
    """

    spare = False
    wake_at = None

    def __init__(
        self, plan: Plan, code: GradientCode, registry: WorkerRegistry, *, kappa_max: float = float("inf")
    ) -> None:
        self.plan, self.code, self.registry, self.kappa_max = plan, code, registry, kappa_max
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

    def next_message(self, node: int, held: Message | None, inbox: ReplyCollector, now: float) -> Message | None:
        """Its one message."""
        return held

    def choose(self, arrivals: Sequence[Arrival], inbox: ReplyCollector, *, final: bool) -> list[Arrival]:
        """Those that complete the sum."""
        worker_of = {arrival.token: self.registry.worker_of(arrival.node) for arrival in arrivals}
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

    def hopeless(self, nodes: Sequence[int], inbox: ReplyCollector) -> bool:
        """Whether it stays undecodable even with all of `nodes`."""
        if inbox.best is not None and inbox.best.decoder.decodable:
            return False  # only the noise is still waited for
        answered = {i for bucket in inbox.buckets.values() for i in bucket.senders}
        known, strangers = known_of(nodes, self.registry)
        known = (known & self._participants) - answered
        missing = set(self.registry.missing(self._participants)) - answered if strangers else set()
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


def known_of(nodes: Iterable[int], registry: WorkerRegistry) -> tuple[set[int], int]:
    """Which workers they are, and how many more there may be among them: nodes that are not known, or that say that
    they are the same worker; where two do, at least one, until both were heard."""
    workers = [registry.worker_of(node) for node in nodes]
    known = {i for i in workers if i is not None}
    return known, max(len(workers) - len(known), int(registry.contested))


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


def dispatch_of(
    way: RoundMode,
    asking: MessageFactory,
    code: GradientCode,
    shards: Sequence[int],
    registry: WorkerRegistry,
    *,
    kappa_max: float,
) -> CodedDispatch | ShardDispatch:
    """How the phase sends; `code` is the way's, over the sampled shards."""
    if way.send == "shards":
        return ShardDispatch(asking.plan, registry, shards, asking.one_shard, way.patience)
    return CodedDispatch(asking.plan, code, registry, kappa_max=kappa_max)


def first_rows(plan: Plan) -> dict[int, Row]:
    """For each worker the shard that it starts with; see `first_shards`."""
    rows = dict.fromkeys(plan.rows, Row((), ()))
    first = first_shards({worker: row.shards for worker, row in plan.rows.items()})
    return {**rows, **{worker: whole_shard(shard) for worker, shard in first.items()}}


class ShardDispatch:
    """One shard a message, one message outstanding a node.

    Args:
        plan: `plan.rows` holds every worker's shards.
        registry: Who is who.
        shards: The sampled shards.
        compose: (node, worker, shard) -> the message that asks for this shard.
        patience: A shard that somebody works on is begun a second time only when that has taken so many times as long
            as the free node took for its last shard in this phase; 0: at once.
    """

    spare = True

    def __init__(
        self,
        plan: Plan,
        registry: WorkerRegistry,
        shards: Sequence[int],
        compose: Callable[[int, int, int], Message],
        patience: float = 0.0,
    ) -> None:
        self.plan, self.registry, self._patience = plan, registry, patience
        self.code = uncoded(len(shards))
        self._row = {shard: row for row, shard in enumerate(shards)}
        self._shards = {i: row.shards for i, row in plan.rows.items() if row.shards}
        self._start = {worker: row.shards[0] for worker, row in first_rows(plan).items() if row.shards}
        self._compose: Callable[[int, int, int], Message] | None = compose
        self._working: dict[int, int] = {}  # node -> shard
        self._began: dict[int, float] = {}  # node -> when it was sent that
        self._took: dict[int, float] = {}  # node -> seconds of the last shard that it did
        self._unread: dict[str, int] = {}  # token -> shard
        self._sent: dict[int, set[int]] = {}  # node -> shards whose copy came from it
        self.wake_at: float | None = None
        self._failed: set[int] = set()  # nodes

    def first_rows(self) -> dict[int, Row]:
        """Each worker's first shard."""
        return first_rows(self.plan)

    def row_of(self, reply: Reply) -> int | str:
        """The shard's place among the sampled ones."""
        mine = self._shards.get(reply.worker, ())
        if len(reply.shards) != 1 or reply.shards[0] not in mine:
            return f"it combines shards {list(reply.shards)}, asked was one of {list(mine)}"
        return self._row[reply.shards[0]]

    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Every shard has a copy."""
        return decoder.decodable

    def arrived(self, arrival: Arrival) -> None:
        """Its shard counts as covered until it is read."""
        shard = self._working.pop(arrival.node, None)
        began = self._began.pop(arrival.node, None)
        if began is not None:
            self._took[arrival.node] = arrival.at - began
        if shard is not None:
            self._unread[arrival.token] = shard
            self._sent.setdefault(arrival.node, set()).add(shard)

    def next_message(self, node: int, held: Message | None, inbox: ReplyCollector, now: float) -> Message | None:
        """The uncovered shard of its own with the fewest workers on it; where that is the same, round from its first.
        No node is asked twice for one.

        A node that is not known yet gets what was made for all: each client finds its first shard in it.
        """
        worker = self.registry.worker_of(node)
        if worker is None:
            return held
        mine = self._shards.get(worker, ())
        if node in self._failed or not mine or self._compose is None:
            return None
        start = mine.index(self._start[worker])
        # A copy that does not count, because others agree on another layout, would not count the second time either.
        closed = self._covered(inbox) | self._sent.get(node, set())
        in_turn = [j for j in mine[start:] + mine[:start] if j not in closed]
        open_shards = [j for j in in_turn if self._is_due(j, node, now)]
        if not open_shards:
            return None
        busy = Counter(self._working.values())
        shard = min(open_shards, key=lambda j: busy[j])  # the first of those
        self._working[node], self._began[node] = shard, now
        return self._compose(node, worker, shard)

    def _is_due(self, shard: int, node: int, now: float) -> bool:
        """Whether to begin a copy now; if not, it is looked at again when it may be."""
        began = [self._began[other] for other, its in self._working.items() if its == shard]
        if not began or not self._patience or node not in self._took:
            return True
        due = min(began) + self._patience * self._took[node]
        if due > now and (self.wake_at is None or self.wake_at <= now or due < self.wake_at):
            self.wake_at = due
        return due <= now

    def choose(self, arrivals: Sequence[Arrival], inbox: ReplyCollector, *, final: bool) -> list[Arrival]:
        """The first copy of each shard, once all have one."""
        if any(arrival.token not in self._unread for arrival in arrivals):
            return list(arrivals)  # what they are cannot be told without reading
        done = self._done(inbox)
        first: dict[int, Arrival] = {}
        for arrival in arrivals:
            shard = self._unread[arrival.token]
            if shard not in done:
                first.setdefault(shard, arrival)
        return list(first.values()) if final or len(done) + len(first) == len(self._row) else []

    def hopeless(self, nodes: Sequence[int], inbox: ReplyCollector) -> bool:
        """Whether some shard has no copy and no holder among `nodes`."""
        able = [node for node in nodes if node not in self._failed]
        _, strangers = known_of(able, self.registry)
        possible = self._covered(inbox)
        for node in able:
            worker = self.registry.worker_of(node)
            mine = () if worker is None else self._shards.get(worker, ())
            possible.update(set(mine) - self._sent.get(node, set()))
        missing = [set(self._shards[i]) for i in self.registry.missing(self._shards)]
        return not may_cover(set(self._row) - possible, missing, min(strangers, len(missing)))

    def offered(self, arrival: Arrival, *, good: bool) -> None:
        """A node that failed gets no more work in this phase."""
        worker = self.registry.worker_of(arrival.node)
        shard = self._unread.pop(arrival.token, None)
        if shard is not None and not good:
            self._sent[arrival.node].discard(shard)  # it may be asked again, if it comes back
        if shard is None and good and worker in self._start:
            self._sent.setdefault(arrival.node, set()).add(self._start[worker])  # it was asked before it was known
        if not good:
            self._failed.add(arrival.node)
            if not arrival.token:  # the message was refused: it never arrives
                self._working.pop(arrival.node, None)
                self._began.pop(arrival.node, None)

    def restarted(self, node: int) -> None:
        """Nobody works on its shard any more, and it may be asked again."""
        self._working.pop(node, None)
        self._began.pop(node, None)
        self._failed.discard(node)

    def release(self) -> None:
        """Let go of the message that all were made of."""
        self._compose = None

    def _done(self, inbox: ReplyCollector) -> set[int]:
        """Shards whose update is in the bucket that counts."""
        best = inbox.best
        rows = best.senders if best else {}
        return {shard for shard, row in self._row.items() if row in rows}

    def _covered(self, inbox: ReplyCollector) -> set[int]:
        return self._done(inbox).union(self._unread.values())
