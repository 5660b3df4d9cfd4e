"""Partial work: one shard a message. Whenever a node is free it gets an uncovered shard; the first copy of each wins.

From an idle start with equal speeds everybody does one shard, and the round lasts no longer than without a code; a
worker that is fast does some of what a slow one would have done. Over a run, second copies that nobody needs any more
keep nodes busy: `patience` begins them later. The price: a message for each shard, and the server sees single shards'
updates.

References:
    Related: several messages a worker (arXiv 1901.03974), and the order of chunks for partial stragglers (arXiv
    2405.19509). Handing out the shard that fewest are working on is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from flwr.app import Message

from .arrivals import Arrival
from .asking import Asking, whole_shard
from .codes import uncoded
from .gradient_code import GradientCode
from .inbox import Inbox
from .incremental import IncrementalDecoder
from .roster import Roster
from .schemes import first_shards
from .sending import CodedSending, known_of, may_cover
from .ways import Way
from .wire import Plan, Reply, Row

__all__ = ["ShardSending", "first_rows", "sending_of"]


def sending_of(
    way: Way, asking: Asking, code: GradientCode, shards: Sequence[int], roster: Roster, *, kappa_max: float
) -> CodedSending | ShardSending:
    """How the phase sends; `code` is the way's, over the sampled shards."""
    if way.send == "shards":
        return ShardSending(asking.plan, roster, shards, asking.one_shard, way.patience)
    return CodedSending(asking.plan, code, roster, kappa_max=kappa_max)


def first_rows(plan: Plan) -> dict[int, Row]:
    """For each worker the shard that it starts with; see `first_shards`."""
    rows = dict.fromkeys(plan.rows, Row((), ()))
    first = first_shards({worker: row.shards for worker, row in plan.rows.items()})
    return {**rows, **{worker: whole_shard(shard) for worker, shard in first.items()}}


class ShardSending:
    """One shard a message, one message outstanding a node.

    Args:
        plan: `plan.rows` holds every worker's shards.
        roster: Who is who.
        shards: The sampled shards.
        compose: (node, worker, shard) -> the message that asks for this shard.
        patience: A shard that somebody works on is begun a second time only when that has taken so many times as long
            as the free node took for its last shard in this phase; 0: at once.
    """

    spare = True

    def __init__(
        self,
        plan: Plan,
        roster: Roster,
        shards: Sequence[int],
        compose: Callable[[int, int, int], Message],
        patience: float = 0.0,
    ) -> None:
        self.plan, self.roster, self._patience = plan, roster, patience
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

    def next_message(self, node: int, held: Message | None, inbox: Inbox, now: float) -> Message | None:
        """The uncovered shard of its own with the fewest workers on it; where that is the same, round from its first.
        No node is asked twice for one.

        A node that is not known yet gets what was made for all: each client finds its first shard in it.
        """
        worker = self.roster.worker_of(node)
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

    def choose(self, arrivals: Sequence[Arrival], inbox: Inbox, *, final: bool) -> list[Arrival]:
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

    def hopeless(self, nodes: Sequence[int], inbox: Inbox) -> bool:
        """Whether some shard has no copy and no holder among `nodes`."""
        able = [node for node in nodes if node not in self._failed]
        _, strangers = known_of(able, self.roster)
        possible = self._covered(inbox)
        for node in able:
            worker = self.roster.worker_of(node)
            mine = () if worker is None else self._shards.get(worker, ())
            possible.update(set(mine) - self._sent.get(node, set()))
        missing = [set(self._shards[i]) for i in self.roster.missing(self._shards)]
        return not may_cover(set(self._row) - possible, missing, min(strangers, len(missing)))

    def offered(self, arrival: Arrival, *, good: bool) -> None:
        """A node that failed gets no more work in this phase."""
        worker = self.roster.worker_of(arrival.node)
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

    def _done(self, inbox: Inbox) -> set[int]:
        """Shards whose update is in the bucket that counts."""
        best = inbox.best
        rows = best.senders if best else {}
        return {shard for shard, row in self._row.items() if row in rows}

    def _covered(self, inbox: Inbox) -> set[int]:
        return self._done(inbox).union(self._unread.values())
