"""The replies to one plan: which of them count, and what they add up to.

Bad replies are kept out here: each has its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message

from .bucket import Bucket
from .carry import carrier_of
from .gradient_code import GradientCode
from .messages import error_text, last_line
from .roster import Roster
from .unpack import vectors_of
from .wire import Plan, Reply

__all__ = ["DISAGREEMENT", "FIXED_DATA", "NO_MOD", "Inbox", "Rejection"]

NO_MOD = "no fl-gradcode reply: is gradient_coding_mod among the client's mods?"
FIXED_DATA = "train() never read partition-id"

#: Relative difference between two holders of a shard above which the ledger and a warning say so: float
#: arithmetic on different machines stays below.
DISAGREEMENT = 1e-5


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count. `worker` is None while the node has never said who it is."""

    node: int
    worker: int | None
    reason: str


class Inbox:
    """Collects replies.

    Args:
        plan: What was asked; `plan.rows` holds every worker's row.
        code: How replies add up: one reply for each of its rows.
        before: The arrays that were sent; None when evaluating.
        roster: Who is who; learns from the replies.
        row_of: Which of the code's rows a reply stands for; a text says why none.
        spare: Whether a second copy of a row is welcome, and merely not needed.
    """

    def __init__(
        self,
        plan: Plan,
        code: GradientCode,
        before: ArrayRecord | None,
        roster: Roster,
        row_of: Callable[[Reply], int | str],
        *,
        spare: bool = False,
    ) -> None:
        self.plan, self.code, self.before, self.roster = plan, code, before, roster
        self._row_of, self._spare = row_of, spare
        self._carrier = carrier_of(plan.fraction_bits, plan.k)
        #: Workers whose replies count, in order of arrival; under `spare`, each as often as it answered.
        self.answered: list[int] = []
        #: Workers with a good reply for which there was one before.
        self.spare_from: set[int] = set()
        self.rejections: list[Rejection] = []
        self.stateful = False
        self.fixed_data = False
        self.disagreement = 0.0
        #: Shard -> two of its holders that disagree.
        self.disagreeing: dict[int, tuple[int, int]] = {}
        #: Largest epsilon that a holder tells, of this run and of all runs; None without privacy.
        self.spent: tuple[float, float] | None = None
        #: Shard -> two of its holders whose keys were bound to different requests.
        self.other_requests: dict[int, tuple[int, int]] = {}
        self.buckets: dict[object, Bucket] = {}
        self._contexts: dict[int, tuple[int, str]] = {}
        self._sketches: dict[int, tuple[int, tuple[float, ...]]] = {}

    @property
    def best(self) -> Bucket | None:
        """The bucket that decodes, else the largest."""
        buckets = self.buckets.values()
        return max(buckets, key=lambda b: (b.decoder.decodable, len(b.decoder.survivors)), default=None)

    def read(self, node: int, reply: Message | None, failure: str) -> str | None:
        """Read one reply: it counts (None), or is rejected with a reason."""
        reason = (failure or "no reply came") if reply is None else self._examine(node, reply)
        if reason is not None:
            self.rejections.append(Rejection(node, self.roster.worker_of(node), reason))
            if reply is None or reply.has_error():
                self.roster.forget(node)
        return reason

    def outvoted(self) -> list[Rejection]:
        """Replies that were left out because others agree on other names, dtypes or shapes."""
        best = self.best
        reason = "its arrays or metrics differ in name, dtype or shape from the other replies'"
        return [
            Rejection(*sender, reason)
            for bucket in self.buckets.values()
            if bucket is not best
            for sender in bucket.senders.values()
        ]

    def sender_of(self, row: int) -> tuple[int, int] | None:
        """(node, worker) of a reply for this row that counts, or None."""
        return next((b.senders[row] for b in self.buckets.values() if row in b.senders), None)

    def _examine(self, node: int, message: Message) -> str | None:
        if message.has_error():
            return error_text(message)
        try:
            reply = Reply.find_in(message.content)
        except ValueError as error:
            return str(error)
        if reply is None:
            return NO_MOD
        if (reply.run, reply.kind, reply.round) != (self.plan.run, self.plan.kind, self.plan.round):
            wrong = f"run {reply.run!r}, " if reply.run != self.plan.run else ""
            return f"wrong round: it answers {wrong}{reply.kind} {reply.round}"
        if self.plan.open:
            self.roster.holdings[reply.worker] = dict(reply.holds)
        if reply.worker not in self.plan.rows and self.plan.open:
            self.roster.answered(node, reply.worker, self.plan.round)
            return None  # it is new: the next round's code has a row for it
        if reply.worker not in self.plan.rows:
            return f"worker {reply.worker} is not in the code (workers 0..{self.plan.n - 1})"
        self.roster.answered(node, reply.worker, self.plan.round)
        self.stateful |= reply.stateful
        self.fixed_data |= reply.fixed_data
        if reply.outcome == "idle":
            asked = self.plan.rows[reply.worker].shards
            return f"it does not hold all of the shards {list(asked)} any more" if asked else None
        if reply.outcome == "gave-up":
            return f"gave up after {sum(reply.seconds):.1f} s with {len(reply.seconds)} shards done"
        if reply.outcome == "fixed-data":
            return FIXED_DATA
        return self._accept(node, reply, message)

    def _accept(self, node: int, reply: Reply, message: Message) -> str | None:
        row = self._row_of(reply)
        if isinstance(row, str):
            return row
        sender = self.sender_of(row)
        if sender is not None and not self._spare:
            other = sender[0]
            return "duplicate" if other == node else f"duplicate: node {other} answered as worker {reply.worker}"
        if not reply.metrics_layout or reply.metrics_layout[0][0] != self.plan.weight_key:
            return f"its metrics do not begin with {self.plan.weight_key!r}"
        if reply.metrics_layout[0][1] != -1:
            return f"its {self.plan.weight_key!r} is not one number"
        if not reply.metrics_name or (self.before is not None and reply.arrays_name in ("", reply.metrics_name)):
            return f"its records are named {reply.arrays_name!r} and {reply.metrics_name!r}"
        try:
            update, metrics = vectors_of(reply, message, self.before, self.code.m, self._carrier)
        except Exception as error:  # a reply holds whatever somebody put there: it must not end the run
            return f"unusable vectors: {last_line(str(error))}"
        self._compare(reply)
        self._note_spent(reply)
        self.answered.append(reply.worker)
        key = (reply.layout, tuple((name, length) for name, length, _ in reply.metrics_layout))
        if key not in self.buckets:
            self.buckets[key] = Bucket(self.code.incremental(), reply, key, self._carrier)
        if not self.buckets[key].add(row, (node, reply.worker), reply, update, metrics):
            self.spare_from.add(reply.worker)
        return None

    def _note_spent(self, reply: Reply) -> None:
        """Remember what privacy cost, and whether holders of a shard were asked the same."""
        for shard, bound, epsilon, total in reply.spent:
            most, most_total = self.spent or (0.0, 0.0)
            self.spent = (max(most, epsilon), max(most_total, total))
            holder, first = self._contexts.setdefault(shard, (reply.worker, bound))
            if first != bound:
                self.other_requests[shard] = (holder, reply.worker)

    def _compare(self, reply: Reply) -> None:
        """Remember how far holders of one shard are apart."""
        for shard, sketch in zip(reply.shards, reply.sketches, strict=False):
            holder, first = self._sketches.setdefault(shard, (reply.worker, sketch))
            scale = max(abs(first[0]), abs(sketch[0]), 1e-30)
            apart = max((abs(x - y) / scale for x, y in zip(first, sketch, strict=False)), default=0.0)
            if apart > DISAGREEMENT:
                self.disagreeing[shard] = (holder, reply.worker)
            self.disagreement = min(max(self.disagreement, apart), 1e300)  # a ledger row holds finite numbers
