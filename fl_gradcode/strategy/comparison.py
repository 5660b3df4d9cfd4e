"""Compares copies: what two holders of a shard sent for it, in one round or late.

A round needs one copy of each shard. That the copies agree is the contract of coding, so whatever second copies come in
are compared with the first, and the first rounds of a run wait a little for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from .._text import numbered
from ..protocol import ARRAYS, METRICS, UPDATE, Plan, Reply, Sketch, Sketcher, payload_encoding, sum_of_squares, view
from ..runlog import PhaseRow

__all__ = ["DISAGREEMENT", "Comparisons", "Copies", "Disagreement", "Verification", "not_compared", "shards_of_several"]

#: Relative difference between two holders of a shard above which they disagree. Differences between the float
#: arithmetic of two machines stay below.
DISAGREEMENT = 1e-5
_MOST = 1e300  # a ledger row holds finite numbers
_REMEMBERED = 8  # phases whose late replies are compared
_MOST_ROUNDING = 1e-2  # relative to the norm: what a client may claim that rounding changes
_MOST_IN_VAIN = 3  # rounds in succession that wait in vain for second copies of shards whose holders disagreed


@dataclass(frozen=True)
class Disagreement:
    """Two holders of the same shards that sent different updates for them.

    Attributes:
        round: The round that asked for them.
        shards: The shards whose update, or sum of updates, differs.
        holders: The two workers, the one whose copy came first in front.
        apart: Relative difference; infinity if names, shapes or counters differ.
        weights: The numbers of examples that they counted.
        used: Whether the round was decoded, if it was over by then.
    """

    round: int
    shards: tuple[int, ...]
    holders: tuple[int, int]
    apart: float
    weights: tuple[float, float]
    used: bool = False

    def sentences(self, *, stateful: bool, alike: Alike | None) -> str:
        """Returns who disagrees about what, and the rule that the app most likely breaks.

        Args:
            stateful: Whether the function keeps something in `context.state`.
            alike: A worker that sent the same update for two shards.
        """
        one, other = self.holders
        what = "the names, shapes or counters of their arrays differ"
        if math.isfinite(self.apart):
            what = f"relative difference {self.apart:.1e}"
        who = f"Workers {one} and {other} both hold {numbered('shard', self.shards)} and sent different updates"
        if not math.isclose(*self.weights, rel_tol=DISAGREEMENT):
            counted = " and ".join(f"{weight:g}" for weight in self.weights)
            why = (
                f"They counted {counted} examples, so they trained on different data: choose it by "
                "context.node_config['partition-id'] alone, and store the same data for a shard at all its holders."
            )
        elif alike is not None:
            why = (
                f"{alike.sentence} Is data or a model kept from one call to the next, in a variable of the module? "
                "Load what a shard needs at each call, or keep it by partition-id."
            )
        elif stateful:
            why = (
                "train() keeps something in context.state, and a holder that missed a round, or computed the shard in "
                "another one, has kept something else."
            )
        else:
            why = (
                "The update of a shard may depend only on the message, the shard and the seeded generators: is there a "
                "generator of the app's own, a counter or cache in a variable, a file, or a clock?"
            )
        return f"{who} in round {self.round} ({what}). {why}"


@dataclass(frozen=True)
class Alike:
    """A worker that sent the same update for two shards.

    Attributes:
        worker: The worker.
        shards: The two shards.
    """

    worker: int
    shards: tuple[int, int]

    @property
    def sentence(self) -> str:
        """The observation in one sentence."""
        return f"Worker {self.worker} sent the same update for shards {self.shards[0]} and {self.shards[1]}."


@dataclass(frozen=True)
class Verification:
    """What a phase waits for after it could be decoded.

    Attributes:
        wanted: Shards of which a second copy is wanted.
        seconds: Longest time to wait on; a phase never waits longer than it took until then.
    """

    wanted: frozenset[int]
    seconds: float


class Copies:
    """The copies that came of the shards of one phase, by their sketches.

    Args:
        plan: Plan of the phase; `plan.rows` holds every worker's row.
        before: The arrays that training starts from; None when evaluating.
        compares: Whether copies of a shard should agree at all.

    Attributes:
        used: Whether the phase was decoded.
        compared: Shards of which two holders' copies were compared.
        apart: Largest relative difference between two copies; None if none were compared.
        disagreements: Shards -> the first disagreement about them.
        alike: A worker that sent the same update for two shards; None if none did.
    """

    def __init__(self, plan: Plan, before: ArrayRecord | None, *, compares: bool) -> None:
        self.plan = plan
        self.used = False
        self.compared: set[int] = set()
        self.apart: float | None = None
        self.disagreements: dict[tuple[int, ...], Disagreement] = {}
        self.alike: Alike | None = None
        self._encoding = payload_encoding(plan.fraction_bits, plan.k)
        self._sketcher = Sketcher(before) if compares and not plan.figures and before is not None else None
        self._figures = compares and plan.figures
        self._first: dict[tuple[int, ...], tuple[int, Sketch]] = {}
        self._by_worker: dict[int, dict[object, tuple[int, ...]]] = {}

    def close(self, *, used: bool) -> None:
        """Note whether the phase was decoded, and let go of the model that it started from."""
        self.used = used
        if self._sketcher is not None:
            self._sketcher.close()

    def wrong_figures(self, reply: Reply, update: NDArray[Any], square: float | None = None) -> str:
        """Returns what is wrong with the figures by which a reply describes its shards, or an empty string."""
        if not self.plan.figures or not self.plan.arrays_key:
            return ""
        if square is not None and not math.isfinite(square):
            return ""  # numbers so large that their squares overflow have figures of zeros
        if len(reply.figures) != len(reply.shards):
            return f"it describes {len(reply.figures)} of its {len(reply.shards)} shards"
        coefficients = self.plan.rows[reply.worker].coefficients
        if not self._encoding.add_up(update, coefficients, reply.figures):
            return "the figures by which it describes its shards do not add up to its vector"
        return ""

    def add(
        self, reply: Reply, update: NDArray[Any], metrics: NDArray[Any], square: float | None = None
    ) -> float | None:
        """Compare a coded reply with earlier ones; returns the largest difference, or None if there was no other copy.

        Args:
            reply: The reply.
            update: Its coded update, shape (ceil(d / m),).
            metrics: Its coded metrics.
            square: The update's sum of squares, if it is known.
        """
        if self._figures:
            found = [
                self._note((shard,), reply.worker, self._sketch_in(figures))
                for shard, figures in zip(reply.shards, reply.figures, strict=False)
            ]
            return max((apart for apart in found if apart is not None), default=None)
        if self._sketcher is None or not self.plan.arrays_key:
            return None
        weight = float(self._encoding.restored(self._numbers(metrics))[0])
        form = (reply.layout, tuple((name, length) for name, length, _ in reply.metrics_layout))
        sketch = self._sketcher.of_vector(update, weight, form, square=square)
        return self._note(tuple(sorted(reply.shards)), reply.worker, sketch)

    def _sketch_in(self, figures: tuple[float, ...]) -> Sketch:
        """Returns the sketch that a client's figures stand for."""
        if self.plan.fraction_bits is not None or not self.plan.arrays_key or len(figures) < 2:
            return Sketch(None, figures)  # every bit has to agree
        norm, rounding, *sums = figures
        return Sketch(norm, tuple(sums), rounding=min(abs(rounding), _MOST_ROUNDING * abs(norm)))

    def add_records(self, reply: Reply, content: RecordDict) -> float | None:
        """Compare the records of a shard with another holder's; returns the difference, or None without another."""
        if self._sketcher is None or not self.plan.arrays_key:
            return None
        return self._note(reply.shards, reply.worker, self._sketcher.of_records(content, self.plan.weight_key))

    def add_late(self, reply: Reply, message: Message) -> float | None:
        """Compare a reply that came after the phase had ended, which is untrusted and was not checked.

        Returns the largest difference to what was used, or None if nothing could be compared.
        """
        plan = self.plan
        known = plan.rows.get(reply.worker)
        if (reply.run, reply.kind, reply.round) != (plan.run, plan.kind, plan.round) or known is None:
            return None
        try:
            if plan.as_returned and reply.outcome == "returned" and len(reply.shards) == 1:
                content = Reply.remove_from(message.content)
                return self.add_records(reply, content) if reply.shards[0] in known.shards else None
            record = message.content.array_records.get(UPDATE)
            if plan.as_returned or reply.outcome != "coded" or record is None:
                return None
            if reply.shards != known.shards and not (len(reply.shards) == 1 and reply.shards[0] in known.shards):
                return None
            update: NDArray[Any] = view(record[ARRAYS]).reshape(-1) if ARRAYS in record else view(record[METRICS])[:0]
            if self.wrong_figures(reply, update):
                return None
            metrics = view(record[METRICS]).reshape(-1)
            if update.dtype.kind == "f" and not math.isfinite(sum_of_squares(update) + float(metrics[0])):
                return None  # not a number: it would not have been used
            return self.add(reply, update, metrics)
        except Exception:  # a reply is untrusted input, and this one is not needed
            return None

    def _numbers(self, metrics: NDArray[Any]) -> NDArray[Any]:
        bits = self.plan.fraction_bits
        return metrics if bits is None else metrics / 2.0**bits

    def _note(self, shards: tuple[int, ...], worker: int, sketch: Sketch) -> float | None:
        """Compare a copy with the first one of the same shards; returns the difference, or None for the first one."""
        holder, first = self._first.setdefault(shards, (worker, sketch))
        if any(sketch.sums) and self.alike is None and self.plan.kind == "train":
            key = (sketch.norm, sketch.sums, sketch.weight, sketch.form)
            other = self._by_worker.setdefault(worker, {}).setdefault(key, shards)
            if other != shards:
                self.alike = Alike(worker, (other[0], shards[0]))
        if holder == worker:
            return None
        apart = first.apart(sketch)
        self.compared.update(shards)
        self.apart = min(max(self.apart or 0.0, apart), _MOST)
        if apart > DISAGREEMENT and shards not in self.disagreements:
            weights = (first.weight, sketch.weight)
            self.disagreements[shards] = Disagreement(
                self.plan.round, shards, (holder, worker), apart, weights, self.used
            )
        return apart


class Comparisons:
    """What the copies of a run's shards have shown so far.

    Args:
        verify: Number of rounds at the start of the run that may wait for second copies.
        insists: Whether rounds wait for second copies of shards whose holders disagree as long as they do.

    Attributes:
        twice: Shards whose update was seen from two holders, who agreed.
        compared: Shards whose update was seen from two holders.
    """

    def __init__(self, verify: int, *, insists: bool = False) -> None:
        self.twice: set[int] = set()
        self.compared: set[int] = set()
        self._insists, self._in_vain = insists, 0
        self._apart: set[int] = set()  # shards whose holders disagreed when they were last compared
        self._left = verify
        self._seconds: float | None = None  # that verification may still take; None before the first round
        self._recent: dict[str, Copies] = {}

    @property
    def over(self) -> bool:
        """Whether no further round waits for second copies."""
        return self._left <= 0

    def resume(self, rows: Iterable[PhaseRow]) -> None:
        """Take over what earlier rounds of a resumed run compared."""
        for row in rows:
            self._left -= 1
            self.compared |= {*row.compared}
            if row.replica_disagreement is not None and row.replica_disagreement <= DISAGREEMENT:
                self.twice |= {*row.compared}

    def open(self, plan: Plan, before: ArrayRecord | None, *, compares: bool) -> Copies:
        """Returns where the copies of a new phase are noted; the copies of the last phases are remembered.

        Args:
            plan: Plan of the phase.
            before: The arrays that training starts from; None when evaluating.
            compares: Whether copies of a shard should agree at all.
        """
        copies = Copies(plan, before, compares=compares)
        self._recent.pop(plan.label, None)
        self._recent[plan.label] = copies
        while len(self._recent) > _REMEMBERED:
            del self._recent[next(iter(self._recent))]
        return copies

    def wanted(self, plan: Plan) -> Verification | None:
        """Returns which second copies a phase of training waits for, and how long; None if it waits for none."""
        done = self.over or self._seconds == 0
        insists = self._insists and self._apart and self._in_vain < _MOST_IN_VAIN
        if done and not insists:
            return None
        several = shards_of_several(plan)
        if insists and several & self._apart:
            return Verification(several & self._apart if done else several - self.twice, math.inf)
        if done or not several - self.twice:
            return None
        return Verification(several - self.twice, math.inf if self._seconds is None else self._seconds)

    def close(self, copies: Copies, *, most: float, waited: float) -> None:
        """Take over what a phase of training compared.

        Args:
            copies: The copies of the phase.
            most: Seconds that it might have waited on for second copies.
            waited: Seconds that it waited on for second copies.
        """
        self._learn(copies)
        self._left -= 1
        if self._insists and waited:
            self._in_vain = 0 if copies.compared & self._apart else self._in_vain + 1
        if most:  # in all, verification takes no longer than it might have in the first round
            self._seconds = max(0.0, (most if self._seconds is None else self._seconds) - waited)

    def _learn(self, copies: Copies) -> None:
        if copies.plan.kind == "train":
            apart = {shard for shards in copies.disagreements for shard in shards}
            self._apart = (self._apart - copies.compared) | apart
            self.twice = (self.twice | copies.compared) - apart
            self.compared |= copies.compared

    def late(self, label: str, message: Message | None) -> tuple[float, Disagreement | None] | None:
        """Compare a reply to an earlier phase with what was used.

        Returns how far it is apart, and the disagreement if that is too much; None if nothing could be compared.

        Args:
            label: The phase that asked, such as "train 3".
            message: The reply.
        """
        copies = self._recent.get(label)
        if copies is None or message is None or not message.has_content():
            return None
        try:
            reply = Reply.find_in(message.content)
        except Exception:  # a reply is untrusted input, and this one is not needed
            return None
        apart = None if reply is None else copies.add_late(reply, message)
        if reply is None or apart is None:
            return None
        self._learn(copies)
        about = (one for one in copies.disagreements.values() if reply.worker in one.holders)
        return min(apart, _MOST), next(about, None) if apart > DISAGREEMENT else None


def shards_of_several(plan: Plan) -> frozenset[int]:
    """Returns the shards that several workers hold."""
    holders = Counter(shard for row in plan.rows.values() for shard in row.shards)
    return frozenset(shard for shard, number in holders.items() if number > 1)


def not_compared(shards: Collection[int], rounds: int) -> str:
    """Returns a sentence about shards of which no two copies were seen.

    Args:
        shards: The shards.
        rounds: Number of rounds so far.
    """
    after, which = f"After {rounds} round{'' if rounds == 1 else 's'}", numbered("shard", sorted(shards), 11)
    return (
        f"{after}, no second copy has come of {which}: whether their holders compute the same update was not seen. "
        "Copies are compared when they come."
    )
