"""One coded phase, training or evaluation, as the server sees it: which replies count, and the decoded mean.

Bad replies are kept out here: each counts as a straggler, with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message

from .bucket import Bucket, Decoded
from .gradient_code import GradientCode
from .roster import Roster
from .stop import Wait
from .unpack import vectors_of
from .wire import Plan, Reply, error_text, last_line

__all__ = ["Phase", "Rejection"]

NO_MOD = "no fl-gradcode reply: is gradient_coding_mod among the client's mods?"
FIXED_DATA = "train() never read partition-id"

#: Relative difference between two holders of a shard above which the ledger and a warning say so: float
#: arithmetic on different machines stays below.
DISAGREEMENT = 1e-5
#: Above this, a decoder that mixes the copies would return garbage: such a phase counts as undecodable.
_GARBAGE = 1e-2


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count. `worker` is None while the node has never said who it is."""

    node: int
    worker: int | None
    reason: str


class Phase:
    """Collects the replies to one plan; a `StopRule` for `EarlyStopGrid`.

    Args:
        plan: What was asked; `plan.rows` holds every worker's row.
        code: The code over the sampled shards.
        shards: The sampled shards, ascending: columns of `code`.
        before: The arrays that were sent; None when evaluating.
        roster: Who is who; learns from the replies.
    """

    def __init__(
        self,
        plan: Plan,
        code: GradientCode,
        shards: Sequence[int],
        before: ArrayRecord | None,
        roster: Roster,
    ) -> None:
        self.plan, self.code, self.shards, self.before, self.roster = plan, code, list(shards), before, roster
        self.label = plan.label
        self.collected = False
        self.wait = Wait()
        self.answered: list[int] = []
        self.rejections: list[Rejection] = []
        self.stateful = False
        self.disagreement = 0.0
        #: Shard -> two of its holders that disagree.
        self.disagreeing: dict[int, tuple[int, int]] = {}
        self.failure = ""
        self.fixed_data = False
        self.decodable_after: tuple[int, float] | None = None
        self._participants = {i for i, row in plan.rows.items() if row.shards}
        self._buckets: dict[object, Bucket] = {}
        self._accepted: dict[int, int] = {}  # worker -> node
        self._sketches: dict[int, tuple[int, tuple[float, ...]]] = {}

    # The stop rule

    @property
    def decided(self) -> bool:
        """Whether the replies that count determine the sum."""
        return self._best is not None and self._best.decoder.decodable

    def choose(self, nodes: Sequence[int], *, final: bool) -> list[int]:
        """Those of `nodes`, in order of arrival, that complete the sum; see `StopRule`."""
        workers = {node: self.roster.worker_of(node) for node in nodes}
        if None in workers.values():
            return list(nodes)  # it cannot be told without reading
        best = self._best
        survivors = best.decoder.survivors if best else []
        if not final and self.code.groups and len(survivors) + len(nodes) < len(self.code.groups):
            return []
        decoder = self.code.incremental()
        decoder.update([*survivors, *(i for i in workers.values() if i is not None and i not in self._accepted)])
        if self.code.groups is not None:  # the first reply of a group is enough, the others need not be computed
            first = {next((i for i in decoder.survivors if i in group), -1) for group in self.code.groups}
        else:
            first = set(decoder.survivors)
        return [node for node in nodes if workers[node] in first] if final or decoder.decodable else []

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Whether they would not even with those of `nodes`. A node that is not known may be any missing worker."""
        workers = [self.roster.worker_of(node) for node in nodes]
        outstanding = {i for i in workers if i is not None}
        if None in workers or len(outstanding) < len(workers):  # two that claim one number: hear both
            outstanding.update(self.roster.missing(self._participants))
        outstanding &= self._participants
        outstanding -= self._accepted.keys()
        decoders = [bucket.decoder for bucket in self._buckets.values()] or [self.code.incremental()]
        for decoder in decoders:
            if len(self._participants - outstanding - set(decoder.survivors)) <= self.code.s:
                return False  # what the code guarantees
        return all(decoder.hopeless(outstanding) for decoder in decoders)

    def offer(self, node: int, reply: Message | None, failure: str, at: float) -> None:
        """Read one reply: it counts, or is rejected with a reason."""
        reason = (failure or "no reply came") if reply is None else self._examine(node, reply)
        if reason is not None:
            worker = self.roster.worker_of(node)
            self.rejections.append(Rejection(node, worker, reason))
            if reply is None or reply.has_error():
                self.roster.forget(node)
        if self.decided and self.decodable_after is None:
            self.decodable_after = (len(self.answered), at)

    def finish(self, wait: Wait) -> list[Message]:
        """Waiting is over. The replies stay here: Flower's loop would keep its list of them for a whole round."""
        self.wait = wait
        self.collected = True
        return []

    def release(self) -> None:
        """Let go of the replies: a node that still owes one keeps this phase in mind for rounds."""
        self._buckets.clear()
        self.before = None

    # Results

    def decode(self, *, approximate: bool) -> Decoded | None:
        """The decoded mean, or an estimate of it if wanted; None leaves the reason in `failure`."""
        best = self._best
        if best is None:
            return None
        if self.mixes_garbage:
            pairs = "; ".join(f"{a} and {b} of shard {j}" for j, (a, b) in sorted(self.disagreeing.items())[:3])
            self.failure = f"holders {pairs} disagree by up to {self.disagreement:.1e} (relative)"
            return None
        vector = best.decoder.vector()
        if vector is None:
            if not approximate:
                return None
            vector = self.code.least_squares_vector(best.decoder.survivors)
        decoded = best.decode(self.code, vector, self.before)
        if isinstance(decoded, str):
            self.failure = decoded
            return None
        return decoded

    @property
    def mixes_garbage(self) -> bool:
        """Whether holders of a shard are so far apart that combining their replies would mean nothing."""
        return self.code.groups is None and self.disagreement > _GARBAGE

    @property
    def survivors(self) -> list[int]:
        """Workers whose replies count, in order of arrival."""
        return list(self._best.decoder.survivors) if self._best else []

    @property
    def participants(self) -> list[int]:
        """Workers with at least one sampled shard."""
        return sorted(self._participants)

    def outvoted(self) -> list[Rejection]:
        """Replies that were left out because others agree on other names, dtypes or shapes."""
        best = self._best
        return [
            Rejection(
                self._accepted[i], i, "its arrays or metrics differ in name, dtype or shape from the other replies'"
            )
            for bucket in self._buckets.values()
            if bucket is not best
            for i in bucket.decoder.survivors
        ]

    # Reading one reply

    @property
    def _best(self) -> Bucket | None:
        """The bucket that decodes, else the largest."""
        buckets = self._buckets.values()
        return max(buckets, key=lambda b: (b.decoder.decodable, len(b.decoder.survivors)), default=None)

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
        if reply.worker not in self.plan.rows:
            return f"worker {reply.worker} is not in the code (workers 0..{self.plan.n - 1})"
        self.roster.answered(node, reply.worker, self.plan.round)
        self.stateful |= reply.stateful
        self.fixed_data |= reply.fixed_data
        if reply.outcome == "idle":
            return None
        if reply.outcome == "gave-up":
            return f"gave up after {sum(reply.seconds):.1f} s with {len(reply.seconds)} shards done"
        if reply.outcome == "fixed-data":
            return FIXED_DATA
        if reply.worker in self._accepted:
            other = self._accepted[reply.worker]
            return "duplicate" if other == node else f"duplicate: node {other} answered as worker {reply.worker}"
        return self._accept(node, reply, message)

    def _accept(self, node: int, reply: Reply, message: Message) -> str | None:
        if reply.shards != self.plan.rows[reply.worker].shards:
            return f"it combines shards {list(reply.shards)}, asked were {list(self.plan.rows[reply.worker].shards)}"
        if not reply.metrics_layout or reply.metrics_layout[0][0] != self.plan.weight_key:
            return f"its metrics do not begin with {self.plan.weight_key!r}"
        if reply.metrics_layout[0][1] != -1:
            return f"its {self.plan.weight_key!r} is not one number"
        if not reply.metrics_name or (self.before is not None and reply.arrays_name in ("", reply.metrics_name)):
            return f"its records are named {reply.arrays_name!r} and {reply.metrics_name!r}"
        try:
            update, metrics = vectors_of(reply, message, self.before, self.code.m)
        except Exception as error:  # a reply holds whatever somebody put there: it must not end the run
            return f"unusable vectors: {last_line(str(error))}"
        key = (reply.layout, tuple((name, length) for name, length, _ in reply.metrics_layout))
        if key not in self._buckets:
            self._buckets[key] = Bucket(self.code.incremental(), reply)
        self._compare(reply)
        self._accepted[reply.worker] = node
        self.answered.append(reply.worker)
        self._buckets[key].add(reply, update, metrics)
        return None

    def _compare(self, reply: Reply) -> None:
        """Remember how far holders of one shard are apart."""
        for shard, sketch in zip(reply.shards, reply.sketches, strict=False):
            holder, first = self._sketches.setdefault(shard, (reply.worker, sketch))
            scale = max(abs(first[0]), abs(sketch[0]), 1e-30)
            apart = max((abs(x - y) / scale for x, y in zip(first, sketch, strict=False)), default=0.0)
            if apart > DISAGREEMENT:
                self.disagreeing[shard] = (holder, reply.worker)
            self.disagreement = min(max(self.disagreement, apart), 1e300)  # a ledger row holds finite numbers
