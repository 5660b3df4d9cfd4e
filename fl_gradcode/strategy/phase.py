"""One phase, training or evaluation, on the server: it collects replies as a stop rule, and then decodes their mean.

`Phase` contains what both kinds of phase share. The module `stop_rules` contains the two kinds. They decide what a
free node is asked, which replies are read, and when a phase is hopeless.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from .._text import numbered
from ..codes import GradientCode, IncrementalDecoder, P, PrimeField, locate_wrong_replies, whole_groups
from ..copies import Comparisons, Disagreement
from ..grid import Arrival, Late, StopRule, Wait
from ..protocol import Plan, Rejection, Reply, Row
from ..roster import WorkerRegistry
from .layouts import AgreedLayouts
from .options import Approximation
from .plan_messages import MessageFactory
from .replies import Group, Rejected, ReplyCollector
from .reply_groups import (
    Decoded,
    MaskedReplies,
    Noise,
    ReplyGroup,
    Returned,
    ReturnedReplies,
    StaleUpdate,
    StaleUpdates,
)

if TYPE_CHECKING:
    from ..secagg import Manifest

__all__ = ["LateReader", "Phase", "Scrutiny"]

#: Largest relative difference between two holders of a shard, times kappa, at which mixing their copies makes sense. A
#: phase above it counts as undecodable.
_GARBAGE = 1e-2
_ALONE = "its update differs from the one on which the other holders of its shards agree"


@dataclass(frozen=True)
class Scrutiny:
    """What the replies of a phase are held against.

    Attributes:
        comparisons: Compares the copies of the run's shards.
        compares: Whether the copies of a shard should agree in this phase.
        agreed: Layouts with which earlier rounds of the run were decoded.
        votes: Number of wrong replies that may be among the holders of each shard, which are then located.
        masks: The manifest by which replies are masked; None if they are not.
        adds_up: What of the records of several replies the strategy adds up, if it gets them: "arrays", "metrics".
    """

    comparisons: Comparisons
    compares: bool = True
    agreed: AgreedLayouts = field(default_factory=AgreedLayouts)
    votes: int = 0
    masks: Manifest | None = None
    adds_up: frozenset[str] = frozenset()


class LateReader(Protocol):
    """Reads replies to earlier rounds whose updates are still of use; see `stale_phase`."""

    def wants(self, late: Late) -> bool:
        """Returns whether a late reply is to be fetched."""

    def read(self, late: Late, message: Message | None, registry: WorkerRegistry) -> Rejection | None:
        """Take what a late reply has; returns why it is not fit to be used, or None."""


class Phase(StopRule):
    """Collects and decodes the replies to one plan; the stop rule that `EarlyStopGrid` waits with.

    Args:
        factory: Makes the messages; its plan holds every worker's row.
        code: The code by which replies add up, with one reply for each of its rows.
        shards: The sampled shards, ascending.
        before: The arrays that were sent; None when evaluating.
        registry: Which node is which worker; the phase updates it from the replies.
        scrutiny: What the replies are held against.
        row_of: Returns the row of the code that a reply stands for, or a rejection.
        first_rows: Worker -> the row that it is asked for first.
        spare: Whether several replies for one row are normal.

    Attributes:
        replies: The collected replies.
        collected: Whether the wait is over.
        wait: Record of the wait for replies.
        compared: Record of the wait for tags, if holders compare what they compute before they send it; else None.
        asked: (node, worker) of each message, in the order of sending; the worker is None if it was not known then.
        failure: Reason why nothing could be decoded, or empty if there were simply too few replies.
        decodable_after: Number of good replies and seconds after which the phase was decodable; None if it never was.
        decided_after: Seconds after which the replies were enough; None if they never were.
        copies: Compares what two holders of a shard sent in this phase.
        verification: The second copies that this phase waits for; None if it waits for none.
        most_verifying: Longest time that it waits on for them, in seconds, once the replies are enough.
        late: Node -> difference of its late reply to what was used in an earlier phase.
        late_disagreements: What late replies disagree about.
        left_out: Workers whose copies are not used because all others agree on other ones.
        late_updates: Reads late updates, with bounded staleness; else None.
        ages: Number of shards with an update of each age, from 0, with bounded staleness; else empty.
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
        row_of: Callable[[Reply], int | Rejection],
        first_rows: Mapping[int, Row],
        spare: bool,
    ) -> None:
        self.factory = factory
        self.plan: Plan = factory.plan
        self.label = self.plan.label
        self.code, self.shards, self.registry = code, list(shards), registry
        self.scrutiny, self.votes = scrutiny, scrutiny.votes
        compares, self.comparisons, self.agreed = scrutiny.compares, scrutiny.comparisons, scrutiny.agreed
        self.copies = self.comparisons.open(self.plan, before, compares=compares)
        self.verification = self.comparisons.wanted(self.plan) if compares and self.plan.kind == "train" else None
        self.replies = ReplyCollector(
            self.plan,
            code,
            before,
            registry,
            self.copies,
            row_of,
            spare=spare,
            agreed=self.agreed,
            votes=self.votes,
            masks=scrutiny.masks,
            adds_up=scrutiny.adds_up,
        )
        self.collected = False
        self.wait = Wait()
        self.compared: Wait | None = None
        self.asked: list[tuple[int, int | None]] = []
        self.failure = ""
        self.decodable_after: tuple[int, float] | None = None
        self.decided_after: float | None = None
        self.late: dict[int, float] = {}
        self.late_disagreements: list[Disagreement] = []
        self.most_verifying = 0.0
        self.left_out: frozenset[int] = frozenset()
        self.late_updates: LateReader | None = None
        self.ages: tuple[int, ...] = ()
        self._unverified = set() if self.verification is None else {*self.verification.wanted}
        self._noticed = 0  # comparisons
        self._unsettled: Set[int] = frozenset()
        self._unsettled_as_of = -1
        self._loses = False  # whether a reply that was read since the last question may have lost the phase
        self._lingers: float | None = None
        self._first_rows = first_rows

    # Decisions of the mode of dispatch

    @abstractmethod
    def enough(self, decoder: IncrementalDecoder) -> bool:
        """Returns whether the replies in `decoder` suffice, so that waiting can end."""

    @abstractmethod
    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns the replies to read now; see `StopRule`."""

    @abstractmethod
    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Returns whether the phase stays undecodable even if all these nodes answer.

        A node that is not known may be any one of the missing workers.
        """

    def longest_linger(self, seconds: float) -> float:
        """Returns how long to wait on for second copies after the replies sufficed, which took so many seconds."""
        return seconds

    def was_read(self, arrival: Arrival, *, good: bool) -> None:
        """Note that a reply was read, and whether it counts; does nothing by default."""

    # The stop rule

    @property
    def decided(self) -> bool:
        """Whether the replies that count are enough; once they were, they stay it."""
        if self.decided_after is not None:
            return True
        best = self.replies.best
        if best is None or not self.enough(best.decoder) or self.replies.distrusts(best):
            return False
        if not self.copies.disagreements:
            return True
        if not self.votes and (wrong := self.copies.to_blame()):
            return self.suffices_without(best, wrong)
        return not self.mixes_garbage(best.decoder.vector())

    @property
    def distrusted(self) -> bool:
        """Whether the replies decode, with a layout that does not count yet: then all further replies are wanted."""
        best = self.replies.best
        return best is not None and best.decoder.decodable and bool(self.replies.distrusts(best))

    def suffices_without(self, group: Group, workers: Collection[int]) -> bool:
        """Returns whether a group of replies suffices without what these workers sent."""
        return group.decodes_without(workers)

    @property
    def verifies_until(self) -> float | None:
        """Time until which to wait on for second copies, in seconds on the grid's clock; None for not at all."""
        return None if self._lingers is None or not self.unverified else self._lingers

    @property
    def linger_until(self) -> float | None:  # type: ignore[override]
        """Time until which to wait on after the replies sufficed; here, for second copies."""
        return self.verifies_until

    @property
    def unverified(self) -> Set[int]:
        """Shards of which a second copy is wanted and has not come, or a third one that says which of two is right.

        The set is not to be changed.
        """
        if self.verification is None:
            return frozenset()
        lately = self.copies.lately
        if self._noticed < len(lately):  # asked for each free node at each arrival
            self._unverified.difference_update(lately[self._noticed :])
            self._noticed = len(lately)
        if not self.copies.disagreements:
            return self._unverified
        if self._unsettled_as_of != self.copies.noted:
            self._unsettled = self._unverified | (self.verification.wanted & self.copies.unsettled)
            self._unsettled_as_of = self.copies.noted
        return self._unsettled

    def wants(self, late: Late) -> bool:
        """Returns whether a late reply is to be fetched, to be compared or to renew a last update."""
        return self.late_updates is None or self.verification is not None or self.late_updates.wants(late)

    @property
    def keeps_late(self) -> bool:  # type: ignore[override]
        """Whether replies that come after the phase are wanted, to be compared."""
        return bool(self.unverified)

    @property
    def owing(self) -> Collection[int]:
        """Workers whose replies to this phase are wanted even now; all of them if one that owes some is not known."""
        workers = {self.registry.worker_of(node) for node in self.wait.kept}
        return self.plan.rows if None in workers else [i for i in workers if i in self.plan.rows]

    @property
    def verifying(self) -> float:
        """Seconds of waiting after the replies sufficed, for second copies."""
        return 0.0 if self._lingers is None or self.decided_after is None else self.wait.seconds - self.decided_after

    def messages(self, nodes: Iterable[int]) -> list[Message]:
        """Returns the first message for each node."""
        nodes = [*nodes]
        self.replies.asked.update(nodes)
        return self.factory.messages(nodes, self.registry, self._first_rows)

    def sent(self, node: int) -> None:
        """Note which worker the node is, as far as known."""
        self.asked.append((node, self.registry.worker_of(node)))

    def join(self, node: int) -> Message | None:
        """Returns the message for a node that connected during the phase; it holds the whole plan if needed."""
        if node in self.registry.quarantined:
            return None
        return next(iter(self.messages([node])), None)

    def restarted(self, node: int) -> None:
        """Forget which worker a restarted node was, so that its next message asks again."""
        self.registry.forget(node)

    def arrived_late(self, late: Late, reply: Message | None) -> None:
        """Learn from a reply to an earlier phase which worker its node is, and compare it with what was used."""
        _, _, asked = late.label.partition(" ")
        asked_in = int(asked) if asked.isdecimal() else 0
        self.registry.learn_from(late.node, reply, run=self.plan.run, server_round=asked_in)
        if self.late_updates is not None:
            rejection = self.late_updates.read(late, reply, self.registry)
            if rejection is not None:
                told = Rejection(rejection.kind, f"late: {rejection.reason}")
                self.replies.rejected.append(Rejected(late.node, self.registry.named(late.node), told))
        found = self.comparisons.late(late.label, reply, self.registry.worker_of(late.node))
        if found is not None:
            self.late[late.node], disagreement, blamed = found
            self.late_disagreements += [] if disagreement is None else [disagreement]
            if blamed and self.can_do_without(blamed):
                self.replies.leave_out(blamed, _ALONE)
                self.copies_lost()

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Read one reply, which either counts or is rejected with a reason."""
        before, stranger = len(self.replies.answered), self.registry.worker_of(arrival.node) is None
        good = self.replies.read(arrival.node, reply, arrival.failure) is None
        # A stranger might have been any missing worker until it said who it is.
        self._loses |= (
            len(self.replies.answered) == before or stranger or self.votes > 0 or len(self.replies.groups) > 1
        )
        self.was_read(arrival, good=good)
        best = self.replies.best
        if self.decodable_after is None and best is not None and best.decoder.decodable and not self.distrusted:
            self.decodable_after = (len(self.replies.answered), at)
        if self.decided_after is None and self.decided:
            self.decided_after = at
            if self.verification is not None:
                self.most_verifying = min(self.longest_linger(at), self.verification.seconds)
                self._lingers = arrival.at + self.most_verifying

    def copies_lost(self) -> None:
        """Note that copies count no more which counted before: there is work to do again, or none that helps."""
        self._loses = True
        best = self.replies.best
        if best is None or not self.enough(best.decoder):
            self.decided_after = None

    def lost_any(self) -> bool:
        """Returns whether a reply was read that does not count, or not beside the others."""
        loses, self._loses = self._loses, False
        return loses

    def finish(self, wait: Wait) -> list[Message]:
        """End the wait and return no messages, because Flower's loop would hold them in memory for a whole round."""
        self.wait = wait
        self.collected = True
        return []

    # Results

    def settle(self) -> None:
        """Find out who sent wrong values, before the phase is decoded; sets `failure` if that cannot be known."""
        best = self.replies.best
        if best is None:
            return
        if not self.votes:
            wrong = self.copies.to_blame()
            if wrong and self.suffices_without(best, wrong):
                self.left_out = wrong
                self.replies.leave_out(wrong, _ALONE)
            return
        if best.ballots is not None:
            self.replies.leave_out({worker for worker, _ in best.ballots.wrong().values()}, _ALONE)
            return
        if isinstance(best, ReturnedReplies) or not best.decoder.decodable:
            return
        astray = self.replies.astray & {*self.code.active}
        missing = len(self.code.active) - len(best.decoder.survivors) - len(astray)
        if missing > self.tolerance:
            self.failure = (
                f"{missing} of {len(self.code.active)} replies are missing, and votes={self.votes} leaves room for "
                f"{self.tolerance}"
            )
            return
        located = self.located_in(best)
        if located is None:
            self.failure = f"more than votes={self.votes} replies are wrong, so it cannot be known which are right"
            return
        self.replies.leave_out(located, "its reply contradicts all others")
        there = [*best.decoder.survivors]
        self.copies.compared |= {j for j in self.shards if self._holders_among(j, there) > 1}
        self.copies.apart = 0.0 if self.copies.compared else None

    def located_in(self, group: ReplyGroup | MaskedReplies) -> tuple[int, ...] | None:
        """Returns the workers of a group whose replies are wrong, or None if that cannot be known.

        Replies that are of no use at first sight come from liars, or from nodes that might as well be missing. Of the
        latter there are no more than may be missing, so the rest were liars, and so many fewer are left.
        """
        there = sorted(group.decoder.survivors)
        missing = {*self.code.active} - {*there}
        if len(missing) > self.code.s:
            return None
        astray = len(self.replies.astray & missing)
        liars = max(0, astray - max(0, self.tolerance - (len(missing) - astray)))
        random = np.random.default_rng()  # drawn once all replies are fixed
        return locate_wrong_replies(
            self.code,
            group.vectors_of(there),
            there,
            max(0, self.liars_left - liars),
            lambda size: random.integers(0, P, size),
        )

    def can_do_without(self, workers: Collection[int]) -> bool:
        """Returns whether each shard has another holder that is heard."""
        others = self.plan.rows.keys() - {*workers} - self.registry.silenced
        return all(self._holders_among(shard, others) for shard in self.shards)

    def _holders_among(self, shard: int, workers: Collection[int]) -> int:
        return sum(shard in self.plan.rows[worker].shards for worker in workers)

    @property
    def tolerance(self) -> int:
        """Number of workers that may be missing: s, less two for each wrong reply that must be located."""
        return self.code.s - 2 * self.liars_left

    @property
    def liars_left(self) -> int:
        """Number of wrong replies that may still be among the holders of a shard, besides those that are known."""
        known = sum(bool(self.plan.rows[worker].shards) for worker in self.registry.silenced & self.plan.rows.keys())
        return max(0, self.votes - known)

    def decode(
        self,
        approximation: Approximation | None = None,
        stale_updates: StaleUpdates | None = None,
        noise: Noise | None = None,
    ) -> Decoded | Returned | None:
        """Returns the decoded mean, an estimate of it, or the records of all shards if they come as returned.

        Returns None and may set `failure` if there is none of them.

        Args:
            approximation: Settings of the estimate for an undecodable phase; None for no estimate.
            stale_updates: Last updates of single groups or shards, which fill in for missing ones.
            noise: Noise that is added to the sum before it is used.
        """
        best = self.replies.best
        if best is None or self.failure:
            return None
        if wrong := self.replies.distrusts(best):
            self.failure = wrong
            return None
        if isinstance(best, ReturnedReplies):
            returned = best.gather(self.shards)
            if returned is None:
                return None
            if "metrics" in self.scrutiny.adds_up and (wrong := returned.no_mean(self.plan.weight_key)):
                self.failure = wrong
                return None
            self.agreed.add(best.key)
            return returned
        vector = best.decoder.vector()
        if self.mixes_garbage(vector):
            disagreeing = sorted(self.copies.disagreements.items())[:3]
            pairs = "; ".join(
                f"{one.holders[0]} and {one.holders[1]} of {numbered('shard', shards)}" for shards, one in disagreeing
            )
            self.failure = f"holders {pairs} disagree by up to {self.copies.apart or 0.0:.1e} (relative)"
            return None
        stale: tuple[StaleUpdate, ...] = ()
        if vector is None:
            estimate = self.estimate(best, approximation, stale_updates)
            if estimate is None:
                self.remember(best, used=False)
                return None
            vector, stale = estimate
        decoded = best.decode(self.code, vector, self.replies.before, stale, noise)
        if isinstance(decoded, str):
            self.failure = decoded
            return None
        if self.replies.before is not None:
            self.agreed.add(best.key)
        if stale_updates is not None and isinstance(best, ReplyGroup):
            stale_updates.keep(self.code, self.shards, self.plan.round, best, vector)
        self.remember(best, used=True)
        return decoded

    def estimate(
        self, group: Group, approximation: Approximation | None, stale_updates: StaleUpdates | None
    ) -> tuple[NDArray[Any], tuple[StaleUpdate, ...]] | None:
        """Returns a decoding vector for replies that do not decode, and the earlier updates that fill in.

        Returns None if there is to be no estimate. See `decode` for the arguments.
        """
        if approximation is None:
            return None
        survivors = whole_groups(self.code, group.decoder.survivors)
        vector = self.code.least_squares_vector(survivors, ridge=approximation.ridge)
        known = () if stale_updates is None else stale_updates.for_missing(self.code, self.shards, survivors, group.key)
        return vector, known

    def remember(self, group: Group, *, used: bool) -> None:
        """Note the replies of a group, which were used or were too few; does nothing by default."""

    def mixes_garbage(self, vector: NDArray[Any] | None) -> bool:
        """Returns whether holders of a shard disagree so much that combining their replies makes no sense.

        Over a prime field, a difference of one bit is too much. Over the reals, decoding amplifies it by kappa.
        """
        if self.code.groups is not None and self.code.m == 1:
            return False
        apart = 0.0 if self.left_out else self.copies.apart or 0.0
        if isinstance(self.code.numbers, PrimeField):
            return apart > 0
        kappa = 1.0 if vector is None else max(1.0, self.code.kappa_of(vector))
        return apart * kappa > _GARBAGE

    @property
    def survivors(self) -> list[int]:
        """Workers with good replies, including replies that repeat another worker's row."""
        best = self.replies.best
        senders = best.senders.values() if best else ()
        return list(dict.fromkeys([*(worker for _, worker in senders), *sorted(self.replies.spare_from)]))

    @property
    def participants(self) -> list[int]:
        """Workers with at least one sampled shard, ascending."""
        return sorted(i for i, row in self.plan.rows.items() if row.shards)
