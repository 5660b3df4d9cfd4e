"""One phase, training or evaluation, as the server sees it: a stop rule while replies come in, then the decoded mean.

`Phase` has what both ways of sending share. `dispatch` has the two ways: what a free node is asked, which replies are
read, and when all is lost.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from ..codes import GradientCode, IncrementalDecoder, PrimeField, whole_groups
from ..grid import Arrival, Late, StopRule, Wait
from ..protocol import Plan, Rejection, Reply, Row
from .options import Approximation
from .plan_messages import MessageFactory
from .replies import Decoded, Noise, ReplyCollector, StaleUpdate, StaleUpdates
from .workers import WorkerRegistry

__all__ = ["Phase"]

#: Relative difference of two holders of a shard, times kappa, above which a decoder that mixes the copies would return
#: garbage: such a phase counts as undecodable.
_GARBAGE = 1e-2


class Phase(StopRule):
    """Collects the replies to one plan; a `StopRule` for `EarlyStopGrid`.

    Args:
        factory: Makes the messages; its plan holds every worker's row.
        code: How replies add up: one reply for each of its rows.
        shards: The sampled shards, ascending.
        before: The arrays that were sent; None when evaluating.
        registry: Which node is which worker; the phase learns from replies in it.
        row_of: Returns which row of the code a reply stands for, or why none.
        first_rows: Worker -> what it is asked for first.
        spare: Whether several replies for one row are normal.

    Attributes:
        replies: What came in.
        collected: Whether waiting is over.
        wait: What happened while replies were waited for.
        asked: Worker of each entry of `wait.asked`, as it was known when the message was sent; None: not known.
        failure: Why nothing could be decoded, if there is more to say than that too little came.
        decodable_after: Number of good replies, and seconds, after which the phase was decodable; None: never.
    """

    def __init__(
        self,
        factory: MessageFactory,
        code: GradientCode,
        shards: Sequence[int],
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        *,
        row_of: Callable[[Reply], int | Rejection],
        first_rows: Mapping[int, Row],
        spare: bool,
    ) -> None:
        self.factory = factory
        self.plan: Plan = factory.plan
        self.label = self.plan.label
        self.code, self.shards, self.registry = code, list(shards), registry
        self.replies = ReplyCollector(self.plan, code, before, registry, row_of, spare=spare)
        self.collected = False
        self.wait = Wait()
        self.asked: list[tuple[int, int | None]] = []
        self.failure = ""
        self.decodable_after: tuple[int, float] | None = None
        self._first_rows = first_rows

    # What a way of sending decides

    @abstractmethod
    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Whether nothing more is to be waited for."""

    @abstractmethod
    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns the replies to read now; see `StopRule`."""

    @abstractmethod
    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Whether it stays undecodable with replies of all these nodes.

        Each node that is not known may be any one of the missing workers.
        """

    def was_read(self, arrival: Arrival, *, good: bool) -> None:
        """A reply was read, and counts or does not."""

    # The stop rule

    @property
    def decided(self) -> bool:
        """Whether the replies that count are enough."""
        best = self.replies.best
        return best is not None and self.enough(best.decoder)

    def messages(self, nodes: Iterable[int]) -> list[Message]:
        """Returns what each node is asked first."""
        return self.factory.messages(nodes, self.registry, self._first_rows)

    def sent(self, node: int) -> None:
        """Note who the node is, as far as known."""
        self.asked.append((node, self.registry.worker_of(node)))

    def join(self, node: int) -> Message | None:
        """Returns what a node gets that has come since the phase began: the whole plan, if it is not known."""
        return next(iter(self.messages([node])), None)

    def restarted(self, node: int) -> None:
        """Ask the node who it is again."""
        self.registry.forget(node)

    def arrived_late(self, late: Late, reply: Message | None) -> None:
        """Learn from a reply to an earlier phase who its node is."""
        self.registry.learn_from(late.node, reply, run=self.plan.run)

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Read one reply: it counts, or is rejected with a reason."""
        good = self.replies.read(arrival.node, reply, arrival.failure) is None
        self.was_read(arrival, good=good)
        best = self.replies.best
        if best is not None and best.decoder.decodable and self.decodable_after is None:
            self.decodable_after = (len(self.replies.answered), at)

    def finish(self, wait: Wait) -> list[Message]:
        """Waiting is over. The replies stay here: Flower's loop would keep its list of them for a whole round."""
        self.wait = wait
        self.collected = True
        return []

    # Results

    def decode(
        self,
        approximation: Approximation | None = None,
        stale_updates: StaleUpdates | None = None,
        noise: Noise | None = None,
    ) -> Decoded | None:
        """Returns the decoded mean, or an estimate of it if wanted; None leaves the reason in `failure`.

        Args:
            approximation: How to estimate what cannot be decoded; None: not at all.
            stale_updates: What single groups or shards sent last, which fills in for those that are missing.
            noise: What is added to the sum before anybody sees it.
        """
        best = self.replies.best
        if best is None:
            return None
        vector = best.decoder.vector()
        if self.mixes_garbage(vector):
            disagreeing = sorted(self.replies.disagreeing.items())[:3]
            pairs = "; ".join(f"{a} and {b} of shard {j}" for j, (a, b) in disagreeing)
            self.failure = f"holders {pairs} disagree by up to {self.replies.disagreement:.1e} (relative)"
            return None
        stale: tuple[StaleUpdate, ...] = ()
        if vector is None:
            if approximation is None:
                return None
            survivors = whole_groups(self.code, best.decoder.survivors)
            vector = self.code.least_squares_vector(survivors, ridge=approximation.ridge)
            if stale_updates is not None:
                stale = stale_updates.for_missing(self.code, self.shards, survivors, best.key)
        decoded = best.decode(self.code, vector, self.replies.before, stale, noise)
        if isinstance(decoded, str):
            self.failure = decoded
            return None
        if stale_updates is not None:
            stale_updates.keep(self.code, self.shards, self.plan.round, best, vector)
        return decoded

    def mixes_garbage(self, vector: NDArray[Any] | None) -> bool:
        """Whether holders of a shard are so far apart that combining their replies would mean nothing.

        Over a field one bit is; over the reals decoding amplifies the difference by kappa.
        """
        if self.code.groups is not None and self.code.m == 1:
            return False
        if isinstance(self.code.numbers, PrimeField):
            return self.replies.disagreement > 0
        kappa = 1.0 if vector is None else max(1.0, self.code.kappa_of(vector))
        return self.replies.disagreement * kappa > _GARBAGE

    @property
    def survivors(self) -> list[int]:
        """Workers with good replies, whether or not somebody else's was first."""
        best = self.replies.best
        senders = best.senders.values() if best else ()
        return list(dict.fromkeys([*(worker for _, worker in senders), *sorted(self.replies.spare_from)]))

    @property
    def participants(self) -> list[int]:
        """Workers with at least one sampled shard, ascending."""
        return sorted(i for i, row in self.plan.rows.items() if row.shards)
