"""The stop rules of coded rounds: one coded vector per worker (`CodedPhase`), or one shard per message (`ShardPhase`).

They decide what a free node is asked, which of the received replies are read, when enough is in, and when the phase is
hopeless.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Sequence, Set
from functools import lru_cache
from typing import Literal

from flwr.app import ArrayRecord, Message

from ..codes import GradientCode, IncrementalDecoder, may_cover, uncoded
from ..grid import Arrival
from ..planning import JobTimes, ShardQueue, turns_of
from ..protocol import Plan, Rejection, Reply, Row
from ..roster import WorkerRegistry
from .phase import Phase, Scrutiny
from .plan_messages import MessageFactory, whole_shard
from .reply_groups import MaskedReplies
from .round_mode import RoundMode

__all__ = ["CodedPhase", "ShardPhase", "known_of", "open_phase", "shard_row"]

#: Most sets of missing workers that are tried to prove a phase hopeless. If there are more, it counts as not hopeless.
_TRIED = 200
#: Part of the time that a node took for its last shard, within which it must be able to return a second copy. Less than
#: all of it, since in an engine the time until a message is sent counts too.
_LIKELY = 0.8
_NONE: frozenset[int] = frozenset()


def open_phase(
    mode: RoundMode,
    factory: MessageFactory,
    code: GradientCode,
    shards: Sequence[int],
    before: ArrayRecord | None,
    registry: WorkerRegistry,
    scrutiny: Scrutiny,
    *,
    kappa_max: float,
) -> Phase:
    """Returns a phase that dispatches its work in the round's mode.

    Args:
        mode: Mode of the round.
        factory: Makes the messages of the phase's plan.
        code: The mode's code, restricted to the sampled shards.
        shards: The sampled shards, ascending.
        before: The arrays that are sent; None when evaluating.
        registry: Which node is which worker.
        scrutiny: What the replies are held against.
        kappa_max: Noise amplification above which to wait for further replies; see `Coded`.
    """
    if mode.send == "shards":
        times = mode.times_of(factory.plan.kind)
        return ShardPhase(factory, shards, before, registry, scrutiny, patience=mode.patience, times=times)
    return CodedPhase(factory, code, shards, before, registry, scrutiny, kappa_max=kappa_max)


class CodedPhase(Phase):
    """A phase in which each worker gets one message and returns one coded vector.

    Args:
        factory: Makes the messages; its plan holds every worker's row.
        code: The code over the sampled shards.
        shards: The sampled shards, ascending.
        before: The arrays that were sent; None when evaluating.
        registry: Which node is which worker.
        scrutiny: What the replies are held against.
        kappa_max: Wait for further replies while decoding would amplify noise by more than this factor.
    """

    def __init__(
        self,
        factory: MessageFactory,
        code: GradientCode,
        shards: Sequence[int],
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        scrutiny: Scrutiny,
        *,
        kappa_max: float = float("inf"),
    ) -> None:
        plan = factory.plan
        super().__init__(
            factory,
            code,
            shards,
            before,
            registry,
            scrutiny,
            row_of=_coded_row(plan),
            first_rows=plan.rows,
            spare=False,
        )
        self._kappa_max = kappa_max
        self._participants = {i for i, row in plan.rows.items() if row.shards}
        self._by_unit = self.votes > 0 and code.groups is not None
        self._trial: IncrementalDecoder | None = None
        self._came: list[int] = []  # workers whose reply has arrived, in order
        self._located: tuple[object, bool] = (None, False)  # as of when, and whether wrong replies could be told
        self._strange = False  # whether a reply has arrived from a node whose worker is not known
        self._group_of: dict[int, int] = {}
        if code.groups is not None and code.m == 1 and code.exact and kappa_max == float("inf"):
            self._group_of = {i: number for number, group in enumerate(code.groups) for i in group}
        self._lacking = {*self._group_of.values()}  # groups of which no reply has arrived

    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Returns whether the replies decode without too much noise.

        For a code that promises no exact sum, n - s replies are also enough.
        """
        if decoder.decodable:
            if self.votes and not self._by_unit:
                return self._leaves_room(decoder)
            if self._kappa_max == float("inf"):
                return True
            vector = decoder.vector()
            return vector is not None and self.code.kappa_of(vector) <= self._kappa_max
        return not self.code.exact and len(decoder.survivors) >= len(self._participants) - self.code.s

    def _leaves_room(self, decoder: IncrementalDecoder) -> bool:
        """Returns whether so few replies are missing that wrong ones are located."""
        missing = self._participants - {*decoder.survivors}
        astray = self.replies.astray & missing
        if len(missing) <= self.tolerance or len(missing) - len(astray) > self.tolerance:
            return len(missing) <= self.tolerance
        # Their senders are liars if the rest agree about it; otherwise more replies have to tell.
        best = self.replies.best
        if not isinstance(best, MaskedReplies) or decoder is not best.decoder:
            return True
        as_of = (id(best), len(decoder.survivors), len(astray))
        if self._located[0] != as_of:
            self._located = as_of, self.located_in(best) is not None
        return self._located[1]

    def arrived(self, arrival: Arrival) -> None:
        """Note whose reply it is, so that `choose` need not look at all of them again."""
        worker = self.registry.worker_of(arrival.node)
        self._strange |= worker is None
        if worker is not None:
            self._came.append(worker)
            self._lacking.discard(self._group_of.get(worker, -1))

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns the replies that complete the sum, and then those that are second copies."""
        if self.decided or self.distrusted or self._by_unit:
            return list(arrivals)  # the phase waits on, to compare what comes
        if not final and not self._strange and self._surely_too_few(len(arrivals)):
            return []
        worker_of = {arrival.token: self.registry.worker_of(arrival.node) for arrival in arrivals}
        if None in worker_of.values():
            return list(arrivals)  # only reading a reply from an unknown node tells which worker sent it
        best = self.replies.best
        survivors = best.decoder.survivors if best else []
        groups = self.code.groups
        if not final and groups and len(survivors) + len(arrivals) < len(groups) * self.code.m:
            return []
        new = [i for i in worker_of.values() if i is not None and self.replies.sender_of(i) is None]
        needed = {*survivors, *new}
        decoder = self._decoder_of([*survivors, *new])
        if groups is not None:  # the first m replies of a group suffice, but for m > 1 further ones may lower the noise
            few = _first([*survivors, *new], groups, self.code.m)
            trial = self.code.incremental()
            trial.update(few)
            if self.code.m == 1 or self.enough(trial):
                needed, decoder = set(few), trial
        if not final and not self.enough(decoder):
            return []
        return [arrival for arrival in arrivals if worker_of[arrival.token] in needed]

    def _surely_too_few(self, unread: int) -> bool:
        """Returns whether the replies that have arrived do not suffice, if that is known without looking at each."""
        if self._group_of:
            return bool(self._lacking)
        # Until a reply was read, all that arrived are unread, and the decoder of them only has to grow.
        return unread == len(self._came) and not self.replies.groups and not self.enough(self._decoder_of(self._came))

    def _decoder_of(self, workers: Sequence[int]) -> IncrementalDecoder:
        """Returns a decoder that holds these workers' replies; the last one is reused if it only has to grow."""
        trial = self._trial
        grows = workers is self._came and not self.replies.groups
        if trial is None or not (grows or list(workers[: len(trial.survivors)]) == trial.survivors):
            trial = self._trial = self.code.incremental()
        trial.update(workers[len(trial.survivors) :])
        return trial

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Returns whether the phase stays undecodable even if all of `nodes` answer."""
        replies = self.replies
        if replies.best is not None and replies.best.decoder.decodable:
            return False  # further replies would only lower the noise
        answered = {i for group in replies.groups.values() for i in group.senders}
        known, strangers = known_of(nodes, self.registry)
        known = (known & self._participants) - answered
        missing = set(self.registry.missing(self._participants)) - answered if strangers else set()
        decoders = [group.decoder for group in replies.groups.values()] or [self.code.incremental()]
        for decoder in decoders:
            silent = len(self._participants - known - set(decoder.survivors)) - min(strangers, len(missing))
            elsewhere = len((answered | self.replies.astray) - set(decoder.survivors) - known)
            if silent - (elsewhere if elsewhere <= self.liars_left and not self._by_unit else 0) <= self.tolerance:
                return False  # the code guarantees to decode
        if not self.code.exact:
            return True
        return all(self._is_lost(decoder, known, missing, strangers) for decoder in decoders)

    def _is_lost(self, decoder: IncrementalDecoder, known: set[int], missing: set[int], strangers: int) -> bool:
        """Returns whether the sum stays incomplete whichever `strangers` of the missing workers answer."""
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
    """A phase in which each message asks for one shard, and the first copy of each shard counts.

    A node has at most one message outstanding.

    Args:
        factory: Makes the messages; its plan holds every worker's shards.
        shards: The sampled shards, ascending.
        before: The arrays that were sent; None when evaluating.
        registry: Which node is which worker.
        scrutiny: What the replies are held against.
        patience: Relative time until a second copy of a shard is requested; see `Shards`.
        times: With patience "learned", what the run has learned.
        newest: Shard -> the round of its newest update so far, by which work is handed out; see `ShardQueue`.
    """

    def __init__(
        self,
        factory: MessageFactory,
        shards: Sequence[int],
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        scrutiny: Scrutiny,
        *,
        patience: float | Literal["learned"] = 0.0,
        times: JobTimes | None = None,
        newest: Callable[[int], int] | None = None,
    ) -> None:
        plan = factory.plan
        turns = turns_of({worker: tuple(sorted(row.shards)) for worker, row in plan.rows.items()})
        super().__init__(
            factory,
            _own_shards(len(shards)),
            shards,
            before,
            registry,
            scrutiny,
            row_of=shard_row(plan, shards),
            first_rows={worker: whole_shard(mine[0]) if mine else Row((), ()) for worker, mine in turns.items()},
            spare=True,
        )
        self._row = {shard: row for row, shard in enumerate(shards)}
        self._turns = {worker: mine for worker, mine in turns.items() if mine}
        patience = 0.0 if self.votes or isinstance(patience, str) else patience
        self._queue = ShardQueue(self._turns, patience, times=None if self.votes else times, newest=newest)
        self._unread: dict[str, int] = {}  # token -> shard
        self._waiting: Counter[int] = Counter()  # shard -> number of its copies that are not read
        self._strange: set[str] = set()  # tokens of replies that are not read, and whose shard is not known
        self._reads_all = False  # whether all that waits is read next
        self._new: set[int] = set()  # shards that have a copy, none of which is read
        self._sent: dict[int, set[int]] = {}  # node -> shards whose copy came from it
        self._failed: set[int] = set()  # nodes
        self._done_shards: set[int] = set()
        self._done_as_of: tuple[int, int] = (id(None), 0)  # the group that counts, and how many of its copies were lost
        self._done_number = 0  # of its copies
        self._reopened = True  # whether a node without work may have some again
        #: The group that counted, and whether the phase was decided, when nodes without work were last asked for.
        self._offered: tuple[object, bool] = (None, False)

    @property
    def wake_at(self) -> float | None:  # type: ignore[override]
        """Time at which a second copy is due, in seconds on the grid's clock; None if none is due."""
        return self._queue.wake_at

    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Returns whether every shard has a copy."""
        return decoder.decodable

    def arrived(self, arrival: Arrival) -> None:
        """Count the reply's shard as covered until the reply is read."""
        shard = self._queue.finish(arrival.node, arrival.at)
        if shard is None:
            self._strange.add(arrival.token)
            return
        self._unread[arrival.token] = shard
        self._waiting[shard] += 1
        self._sent.setdefault(arrival.node, set()).add(shard)
        if shard not in self._done():
            self._new.add(shard)

    def next_message(self, node: int, held: Message | None, now: float) -> Message | None:
        """Returns the message for the node's next shard by the rule of `ShardQueue`, or None if it has nothing to do.

        A node is never asked for the same shard twice. A node whose worker is not known yet gets the message that holds
        the whole plan, in which its client finds its first shard.
        """
        worker = self.registry.worker_of(node)
        if worker is None:
            return held
        if node in self._failed or worker not in self._turns:
            return None
        # A copy whose layout differs from the other replies' does not count, and a second one would not count either.
        mine = self._sent.get(node, _NONE)
        unread: Collection[int] = () if self.votes else self._waiting
        closed: Container[int] = _AnyOf(self._done(), unread, mine)
        if self.verifies_until is not None:
            # A second copy, which is not worth it if it makes the node late for the next round.
            if now + _LIKELY * self._queue.took(node) > self.verifies_until:
                return None
            closed = _AllBut(self.unverified, mine)
        shard = self._queue.start(node, worker, closed, now)
        if held is not None and shard == self._turns[worker][0] and len(Plan.rows_in(held.content) or ()) == 1:
            return held  # it asks for this shard
        return None if shard is None else self.factory.one_shard(node, worker, shard)

    def awake(self, nodes: Collection[int], now: float) -> Collection[int]:
        """Returns the nodes for which a second copy is due."""
        return self._queue.awake(now)

    def reopens(self) -> bool:
        """Returns whether a node for which there was no work may have some again.

        A copy that counts leaves less to do. More is left after a loss, if other replies count than before, once second
        copies are wanted, and while copies disagree.
        """
        offered = (self.replies.best, self.decided)
        reopens = self._reopened or offered != self._offered or bool(self.votes or self.copies.disagreements)
        self._reopened, self._offered = False, offered
        return reopens

    def copies_lost(self) -> None:
        """Note that copies count no more which counted before."""
        super().copies_lost()
        self._reopened = self._reads_all = True  # what waits to be read may be of the same worker

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns the first copy of each shard, once all have one, and then second copies."""
        if self.decided or self.distrusted or self.votes:
            return list(arrivals)  # the phase waits on, to compare what comes
        if self._strange or self._reads_all:
            self._reads_all = False
            return list(arrivals)  # only reading these replies tells which shards they hold, or whether they count
        done = self._done()
        if not final and len(done) + len(self._new) < len(self._row):
            return []
        first: dict[int, Arrival] = {}
        for arrival in arrivals:
            shard = self._unread[arrival.token]
            if shard not in done:
                first.setdefault(shard, arrival)
        return list(first.values())

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Returns whether some shard has neither a copy nor a holder among `nodes`."""
        able = [node for node in nodes if node not in self._failed]
        possible, missing, strangers = self._within_reach(able)
        if self.votes:
            return self._lacks_votes(able, strangers)
        return not may_cover(self._row.keys() - possible, missing, min(strangers, len(missing)))

    def _within_reach(self, able: Sequence[int]) -> tuple[set[int], list[set[int]], int]:
        """Returns the shards that have a copy or may get one from nodes that have not failed.

        Besides these, the shards of each worker that no node is known to be, and how many of the nodes may be one.
        """
        _, strangers = known_of(able, self.registry)
        possible = {*self._covered()}
        for node in able:
            possible.update(self._shards_of(node) - self._sent.get(node, set()))
        return possible, [{*self._turns[i]} for i in self.registry.missing(self._turns)], strangers

    def longest_linger(self, seconds: float) -> float:
        """Returns the time that most nodes take for one shard, if that is less than the phase took."""
        return min(seconds, self._queue.typical)

    def was_read(self, arrival: Arrival, *, good: bool) -> None:
        """Give no more work in this phase to a node whose reply does not count."""
        worker = self.registry.worker_of(arrival.node)
        shard = self._unread.pop(arrival.token, None)
        self._strange.discard(arrival.token)
        if shard is not None:
            self._waiting[shard] -= 1
            if not self._waiting[shard]:
                del self._waiting[shard]
                self._new.discard(shard)
            if not good:
                self._sent[arrival.node].discard(shard)  # the node may be asked again if it restarts
        if shard is None and good and worker in self._turns:
            # The node was asked for its first shard before its worker was known.
            self._sent.setdefault(arrival.node, set()).add(self._turns[worker][0])
        if not good:
            self._reopened = True
            self._failed.add(arrival.node)
            if not arrival.token:  # the message could not be sent, so no reply will arrive
                self._queue.drop(arrival.node)

    def restarted(self, node: int) -> None:
        """Release the shard that a restarted node was working on, and allow new work for the node."""
        super().restarted(node)
        self._reopened = True
        self._queue.drop(node)
        self._failed.discard(node)

    def _done(self) -> Set[int]:
        """Returns the shards whose update is in the group of replies that counts; not to be changed."""
        best = self.replies.best
        as_of = (id(best), 0 if best is None else best.losses)
        rows = {} if best is None else best.copies
        if as_of != self._done_as_of:
            self._done_shards, self._done_as_of, self._done_number = set(), as_of, 0
            self._new = {*self._waiting}
        elif len(rows) == self._done_number:  # asked for each free node at each arrival
            return self._done_shards
        for row in itertools.islice(reversed(rows), len(rows) - self._done_number):
            self._done_shards.add(self.shards[row])
            self._new.discard(self.shards[row])
        self._done_number = len(rows)
        return self._done_shards

    def _covered(self) -> Set[int]:
        """Returns the shards that have a copy, read or not; not to be changed."""
        return self._done() if self.votes else self._done() | self._waiting.keys()

    def _shards_of(self, node: int) -> set[int]:
        """Returns the sampled shards that a node holds, as far as it is known."""
        worker = self.registry.worker_of(node)
        return set() if worker is None else {*self._turns.get(worker, ())}

    def _lacks_votes(self, able: Sequence[int], strangers: int) -> bool:
        """Returns whether some shard cannot get enough equal copies any more."""
        left = Counter(shard for node in able for shard in self._shards_of(node) - self._sent.get(node, set()))
        left.update(self._unread.values())
        all_ballots = [group.ballots for group in self.replies.groups.values()] or [None]
        return all(  # a wrong reply may have opened a group of its own, and been the first
            any(
                (0 if ballots is None else ballots.most_equal(row)) + left[shard] + strangers <= self.votes
                for shard, row in self._row.items()
            )
            for ballots in all_ballots
        )


class _AnyOf(Container[int]):
    """The union of three sets, which is not made."""

    __slots__ = ("_one", "_other", "_third")

    def __init__(self, one: Container[int], other: Container[int], third: Container[int]) -> None:
        self._one, self._other, self._third = one, other, third

    def __contains__(self, item: object) -> bool:
        return item in self._one or item in self._other or item in self._third


class _AllBut(Container[int]):
    """All numbers but those that are wanted, and those nevertheless that are in another set."""

    def __init__(self, wanted: Container[int], others: Container[int]) -> None:
        self._wanted, self._others = wanted, others

    def __contains__(self, item: object) -> bool:
        return item not in self._wanted or item in self._others


@lru_cache(maxsize=2)  # the numbers of shards that training and evaluation sample
def _own_shards(k: int) -> GradientCode:
    """Returns the code in which each reply is one shard's."""
    return uncoded(k)


def _coded_row(plan: Plan) -> Callable[[Reply], int | Rejection]:
    """Returns a function that maps a coded reply to its row of the code, which is its worker's."""

    def row_of(reply: Reply) -> int | Rejection:
        asked = plan.rows[reply.worker].shards
        if reply.shards != asked:
            wrong = f"it combines shards {list(reply.shards)}, asked were {list(asked)}"
            return Rejection("wrong-shards", wrong)
        return reply.worker

    return row_of


def shard_row(plan: Plan, shards: Sequence[int]) -> Callable[[Reply], int | Rejection]:
    """Returns a function that maps a reply for one shard to its row, the shard's place among the sampled ones."""
    row = {shard: place for place, shard in enumerate(shards)}

    def row_of(reply: Reply) -> int | Rejection:
        mine = plan.rows[reply.worker].shards
        if len(reply.shards) != 1 or reply.shards[0] not in mine:
            wrong = f"it combines shards {list(reply.shards)}, asked was one of {list(mine)}"
            return Rejection("wrong-shards", wrong)
        return row[reply.shards[0]]

    return row_of


def known_of(nodes: Iterable[int], registry: WorkerRegistry) -> tuple[set[int], int]:
    """Returns the workers that the nodes are known to be, and how many further workers may be among them.

    A node may be a further worker if it is not known.
    """
    workers = [registry.worker_of(node) for node in nodes]
    return {i for i in workers if i is not None}, workers.count(None)


def _first(workers: Sequence[int], groups: Sequence[Sequence[int]], m: int) -> list[int]:
    """Returns the first m workers of each group."""
    group_of = {i: q for q, group in enumerate(groups) for i in group}
    seen: dict[int, list[int]] = {}
    for worker in workers:
        inside = seen.setdefault(group_of.get(worker, -1), [])
        if len(inside) < m:
            inside.append(worker)
    return [i for q, inside in seen.items() if q >= 0 for i in inside]
