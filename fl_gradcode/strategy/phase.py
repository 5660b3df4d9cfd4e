"""One phase, training or evaluation, as the server sees it: a stop rule while replies come in, then the decoded
mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from ..codes import GradientCode, PrimeField, whole_groups
from ..grid import Arrival, Wait
from ..privacy import CentralGaussian
from ..protocol import Plan
from .dispatch import Dispatch
from .options import Approximation
from .plan_messages import MessageFactory
from .replies import Decoded, ReplyCollector, StaleUpdate, StaleUpdates
from .workers import WorkerRegistry

__all__ = ["Phase"]

#: Relative difference of two holders of a shard, times kappa, above which a decoder that mixes the copies would return
#: garbage: such a phase counts as undecodable.
_GARBAGE = 1e-2


class Phase:
    """Collects the replies to one plan; a `StopRule` for `EarlyStopGrid`.

    Args:
        plan: What was asked; `plan.rows` holds every worker's row.
        shards: The sampled shards, ascending.
        before: The arrays that were sent; None when evaluating.
        registry: Who is who; learns from the replies.
        sending: How replies add up, and who gets what when.
        asking: Makes the messages.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[int],
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        sending: Dispatch,
        asking: MessageFactory,
    ) -> None:
        self.plan, self.shards, self.registry, self.sending = plan, list(shards), registry, sending
        self._asking: MessageFactory | None = asking
        self.label = plan.label
        self.inbox = ReplyCollector(plan, sending.code, before, registry, sending.row_of, spare=sending.spare)
        self.collected = False
        self.wait = Wait()
        self.failure = ""
        self.decodable_after: tuple[int, float] | None = None
        #: What is done to the decoded sum before anybody sees it.
        self.release_by: CentralGaussian | None = None

    @property
    def code(self) -> GradientCode:
        """How replies add up: one row each."""
        return self.sending.code

    # The stop rule

    @property
    def decided(self) -> bool:
        """Whether the replies that count are enough."""
        best = self.inbox.best
        return best is not None and self.sending.enough(best.decoder)

    def arrived(self, arrival: Arrival) -> None:
        """A reply is in, not read yet."""
        self.sending.arrived(arrival)

    @property
    def wake_at(self) -> float | None:
        """When to offer idle nodes work again."""
        return self.sending.wake_at

    def next_message(self, node: int, held: Message | None, now: float) -> Message | None:
        """What a free node gets."""
        return self.sending.next_message(node, held, self.inbox, now)

    def messages(self, nodes: Sequence[int]) -> list[Message]:
        """What each node is asked first."""
        return [] if self._asking is None else self._asking.messages(nodes, self.registry, self.sending.first_rows())

    def join(self, node: int) -> Message | None:
        """What a node gets that has come since the phase began: the whole plan, if it is not known."""
        return next(iter(self.messages([node])), None)

    def restarted(self, node: int) -> None:
        """What it was working on is lost."""
        self.registry.forget(node)
        self.sending.restarted(node)

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Those that are needed, in order of arrival; see `StopRule`."""
        return self.sending.choose(arrivals, self.inbox, final=final)

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Whether they would not suffice even with those of `nodes`."""
        return self.sending.hopeless(nodes, self.inbox)

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Read one reply: it counts, or is rejected with a reason."""
        good = self.inbox.read(arrival.node, reply, arrival.failure) is None
        self.sending.offered(arrival, good=good)
        best = self.inbox.best
        if best is not None and best.decoder.decodable and self.decodable_after is None:
            self.decodable_after = (len(self.inbox.answered), at)

    def finish(self, wait: Wait) -> list[Message]:
        """Waiting is over. The replies stay here: Flower's loop would keep its list of them for a whole round."""
        self.wait = wait
        self.collected = True
        return []

    def release(self) -> None:
        """Let go of the replies: a node that still owes one keeps this phase in mind for rounds."""
        self.inbox.buckets.clear()
        self.inbox.before = None
        self._asking = None
        self.sending.release()

    # Results

    def decode(self, approximation: Approximation | None = None, memory: StaleUpdates | None = None) -> Decoded | None:
        """The decoded mean, or an estimate of it if wanted; None leaves the reason in `failure`.

        What single groups or shards sent is put into `memory`, and filled in from there.
        """
        best = self.inbox.best
        if best is None:
            return None
        vector = best.decoder.vector()
        if self.mixes_garbage(vector):
            pairs = "; ".join(f"{a} and {b} of shard {j}" for j, (a, b) in sorted(self.inbox.disagreeing.items())[:3])
            self.failure = f"holders {pairs} disagree by up to {self.inbox.disagreement:.1e} (relative)"
            return None
        stale: tuple[StaleUpdate, ...] = ()
        if vector is None:
            if approximation is None:
                return None
            survivors = whole_groups(self.code, best.decoder.survivors)
            vector = self.code.least_squares_vector(survivors, ridge=approximation.ridge)
            if memory is not None:
                stale = memory.for_missing(self.code, self.shards, survivors, best.key)
        decoded = best.decode(self.code, vector, self.inbox.before, stale, self.release_by)
        if isinstance(decoded, str):
            self.failure = decoded
            return None
        if memory is not None:
            memory.keep(self.code, self.shards, self.plan.round, best, vector)
        return decoded

    def mixes_garbage(self, vector: NDArray[Any] | None) -> bool:
        """Whether holders of a shard are so far apart that combining their replies would mean nothing.

        Over a field one bit is; over the reals decoding amplifies the difference by kappa.
        """
        if self.code.groups is not None and self.code.m == 1:
            return False
        if isinstance(self.code.numbers, PrimeField):
            return self.inbox.disagreement > 0
        kappa = 1.0 if vector is None else max(1.0, self.code.kappa_of(vector))
        return self.inbox.disagreement * kappa > _GARBAGE

    @property
    def survivors(self) -> list[int]:
        """Workers with good replies, whether or not somebody else's was first."""
        senders = self.inbox.best.senders.values() if self.inbox.best else ()
        return list(dict.fromkeys([*(worker for _, worker in senders), *sorted(self.inbox.spare_from)]))

    @property
    def participants(self) -> list[int]:
        """Workers with at least one sampled shard."""
        return sorted(i for i, row in self.plan.rows.items() if row.shards)
