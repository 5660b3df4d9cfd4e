"""The two ways a phase sends its work: a coded vector a worker (`CodedPhase`) or one shard a message (`ShardPhase`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from flwr.app import ArrayRecord, Message

from ..codes import GradientCode, IncrementalDecoder, uncoded
from ..grid import Arrival
from ..planning import ShardQueue, turns_of
from ..protocol import Plan, Rejection, Reply, Row
from .cover import may_cover
from .phase import Phase
from .plan_messages import MessageFactory, whole_shard
from .round_mode import RoundMode
from .workers import WorkerRegistry

__all__ = ["CodedPhase", "ShardPhase", "open_phase"]

#: Sets of missing workers that are tried, to tell whether all is lost; where there are more, it is not.
_TRIED = 200


def open_phase(
    mode: RoundMode,
    factory: MessageFactory,
    code: GradientCode,
    shards: Sequence[int],
    before: ArrayRecord | None,
    registry: WorkerRegistry,
    *,
    kappa_max: float,
) -> Phase:
    """Returns a phase that sends in the round's mode.

    Args:
        mode: How the round is run.
        factory: Makes the messages of the phase's plan.
        code: The mode's code, restricted to the sampled shards.
        shards: The sampled shards, ascending.
        before: The arrays that are sent; None when evaluating.
        registry: Which node is which worker.
        kappa_max: See `Coded`.
    """
    if mode.send == "shards":
        return ShardPhase(factory, shards, before, registry, patience=mode.patience)
    return CodedPhase(factory, code, shards, before, registry, kappa_max=kappa_max)


class CodedPhase(Phase):
    """One message a worker, one coded vector back.

    Args:
        factory: Makes the messages; its plan holds every worker's row.
        code: The code over the sampled shards.
        shards: The sampled shards, ascending.
        before: The arrays that were sent; None when evaluating.
        registry: Which node is which worker.
        kappa_max: Replies beyond those that decode are waited for while noise is amplified more than so.
    """

    def __init__(
        self,
        factory: MessageFactory,
        code: GradientCode,
        shards: Sequence[int],
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        *,
        kappa_max: float = float("inf"),
    ) -> None:
        plan = factory.plan
        super().__init__(
            factory, code, shards, before, registry, row_of=_coded_row(plan), first_rows=plan.rows, spare=False
        )
        self._kappa_max = kappa_max
        self._participants = {i for i, row in plan.rows.items() if row.shards}
        self._trial: IncrementalDecoder | None = None

    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Whether it decodes without too much noise; or n - s replies are in, if the code promises no more."""
        if decoder.decodable:
            if self._kappa_max == float("inf"):
                return True
            vector = decoder.vector()
            return vector is not None and self.code.kappa_of(vector) <= self._kappa_max
        return not self.code.exact and len(decoder.survivors) >= len(self._participants) - self.code.s

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns the replies that complete the sum."""
        worker_of = {arrival.token: self.registry.worker_of(arrival.node) for arrival in arrivals}
        if None in worker_of.values():
            return list(arrivals)  # it cannot be told without reading
        best = self.replies.best
        survivors = best.decoder.survivors if best else []
        groups = self.code.groups
        if not final and groups and len(survivors) + len(arrivals) < len(groups) * self.code.m:
            return []
        new = [i for i in worker_of.values() if i is not None and self.replies.sender_of(i) is None]
        needed = {*survivors, *new}
        decoder = self._decoder_of([*survivors, *new])
        if groups is not None:  # the first m replies of a group suffice; with m > 1, more may lower the noise
            few = _first([*survivors, *new], groups, self.code.m)
            trial = self.code.incremental()
            trial.update(few)
            if self.code.m == 1 or self.enough(trial):
                needed, decoder = set(few), trial
        if not final and not self.enough(decoder):
            return []
        return [arrival for arrival in arrivals if worker_of[arrival.token] in needed]

    def _decoder_of(self, workers: Sequence[int]) -> IncrementalDecoder:
        """Returns a decoder that has these workers' replies; the last one, if there are only more of them."""
        trial = self._trial
        if trial is None or list(workers[: len(trial.survivors)]) != trial.survivors:
            trial = self._trial = self.code.incremental()
        trial.update(workers[len(trial.survivors) :])
        return trial

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Whether it stays undecodable even with all of `nodes`."""
        replies = self.replies
        if replies.best is not None and replies.best.decoder.decodable:
            return False  # only the noise is still waited for
        answered = {i for group in replies.groups.values() for i in group.senders}
        known, strangers = _known_of(nodes, self.registry)
        known = (known & self._participants) - answered
        missing = set(self.registry.missing(self._participants)) - answered if strangers else set()
        decoders = [group.decoder for group in replies.groups.values()] or [self.code.incremental()]
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


class ShardPhase(Phase):
    """One shard a message, one message outstanding a node; the first copy of each shard counts.

    Args:
        factory: Makes the messages; its plan holds every worker's shards.
        shards: The sampled shards, ascending.
        before: The arrays that were sent; None when evaluating.
        registry: Which node is which worker.
        patience: See `Shards`.
    """

    def __init__(
        self,
        factory: MessageFactory,
        shards: Sequence[int],
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        *,
        patience: float = 0.0,
    ) -> None:
        plan = factory.plan
        turns = turns_of({worker: row.shards for worker, row in plan.rows.items()})
        super().__init__(
            factory,
            uncoded(len(shards)),
            shards,
            before,
            registry,
            row_of=_shard_row(plan, shards),
            first_rows={worker: whole_shard(mine[0]) if mine else Row((), ()) for worker, mine in turns.items()},
            spare=True,
        )
        self._row = {shard: row for row, shard in enumerate(shards)}
        self._turns = {worker: mine for worker, mine in turns.items() if mine}
        self._queue = ShardQueue(self._turns, patience)
        self._unread: dict[str, int] = {}  # token -> shard
        self._sent: dict[int, set[int]] = {}  # node -> shards whose copy came from it
        self._failed: set[int] = set()  # nodes

    @property
    def wake_at(self) -> float | None:  # type: ignore[override]
        """When a second copy is due."""
        return self._queue.wake_at

    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Whether every shard has a copy."""
        return decoder.decodable

    def arrived(self, arrival: Arrival) -> None:
        """Its shard counts as covered until it is read."""
        shard = self._queue.finish(arrival.node, arrival.at)
        if shard is not None:
            self._unread[arrival.token] = shard
            self._sent.setdefault(arrival.node, set()).add(shard)

    def next_message(self, node: int, held: Message | None, now: float) -> Message | None:
        """Returns the message for the next shard of the node's own, by the rule of `ShardQueue`; none is asked twice.

        A node that is not known yet gets what was made for all: its client finds its first shard in it.
        """
        worker = self.registry.worker_of(node)
        if worker is None:
            return held
        if node in self._failed or worker not in self._turns:
            return None
        # A copy that does not count, because others agree on another layout, would not count the second time either.
        closed = self._covered() | self._sent.get(node, set())
        shard = self._queue.start(node, worker, closed, now)
        return None if shard is None else self.factory.one_shard(node, worker, shard)

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns the first copy of each shard, once all have one."""
        if any(arrival.token not in self._unread for arrival in arrivals):
            return list(arrivals)  # what they are cannot be told without reading
        done = self._done()
        first: dict[int, Arrival] = {}
        for arrival in arrivals:
            shard = self._unread[arrival.token]
            if shard not in done:
                first.setdefault(shard, arrival)
        return list(first.values()) if final or len(done) + len(first) == len(self._row) else []

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Whether some shard has no copy and no holder among `nodes`."""
        able = [node for node in nodes if node not in self._failed]
        _, strangers = _known_of(able, self.registry)
        possible = self._covered()
        for node in able:
            worker = self.registry.worker_of(node)
            mine = () if worker is None else self._turns.get(worker, ())
            possible.update(set(mine) - self._sent.get(node, set()))
        missing = [set(self._turns[i]) for i in self.registry.missing(self._turns)]
        return not may_cover(set(self._row) - possible, missing, min(strangers, len(missing)))

    def was_read(self, arrival: Arrival, *, good: bool) -> None:
        """A node that failed gets no more work in this phase."""
        worker = self.registry.worker_of(arrival.node)
        shard = self._unread.pop(arrival.token, None)
        if shard is not None and not good:
            self._sent[arrival.node].discard(shard)  # it may be asked again, if it comes back
        if shard is None and good and worker in self._turns:
            self._sent.setdefault(arrival.node, set()).add(self._turns[worker][0])  # asked before it was known
        if not good:
            self._failed.add(arrival.node)
            if not arrival.token:  # the message was refused: it never arrives
                self._queue.drop(arrival.node)

    def restarted(self, node: int) -> None:
        """Nobody works on its shard any more, and it may be asked again."""
        super().restarted(node)
        self._queue.drop(node)
        self._failed.discard(node)

    def _done(self) -> set[int]:
        """Shards whose update is in the group of replies that counts."""
        best = self.replies.best
        rows = best.senders if best else {}
        return {shard for shard, row in self._row.items() if row in rows}

    def _covered(self) -> set[int]:
        return self._done().union(self._unread.values())


def _coded_row(plan: Plan) -> Callable[[Reply], int | Rejection]:
    """Returns what tells a coded reply's row: its worker's."""

    def row_of(reply: Reply) -> int | Rejection:
        asked = plan.rows[reply.worker].shards
        if reply.shards != asked:
            wrong = f"it combines shards {list(reply.shards)}, asked were {list(asked)}"
            return Rejection("wrong-shards", wrong)
        return reply.worker

    return row_of


def _shard_row(plan: Plan, shards: Sequence[int]) -> Callable[[Reply], int | Rejection]:
    """Returns what tells a single shard's row: its place among the sampled shards."""
    row = {shard: place for place, shard in enumerate(shards)}

    def row_of(reply: Reply) -> int | Rejection:
        mine = plan.rows[reply.worker].shards
        if len(reply.shards) != 1 or reply.shards[0] not in mine:
            wrong = f"it combines shards {list(reply.shards)}, asked was one of {list(mine)}"
            return Rejection("wrong-shards", wrong)
        return row[reply.shards[0]]

    return row_of


def _known_of(nodes: Iterable[int], registry: WorkerRegistry) -> tuple[set[int], int]:
    """Returns which workers they are, and how many more there may be among them.

    More are nodes that are not known, or that say that they are the same worker: where two do, at least one, until both
    were heard.
    """
    workers = [registry.worker_of(node) for node in nodes]
    known = {i for i in workers if i is not None}
    return known, max(len(workers) - len(known), int(registry.contested))


def _first(workers: Sequence[int], groups: Sequence[Sequence[int]], m: int) -> list[int]:
    """Returns the first m workers of each group."""
    group_of = {i: q for q, group in enumerate(groups) for i in group}
    seen: dict[int, list[int]] = {}
    for worker in workers:
        inside = seen.setdefault(group_of.get(worker, -1), [])
        if len(inside) < m:
            inside.append(worker)
    return [i for q, inside in seen.items() if q >= 0 for i in inside]
