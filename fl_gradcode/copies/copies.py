"""The copies of one phase: what two holders of a shard sent for it, in one round or late.

A round needs one copy of each shard. That the copies agree is the contract of coding, so whatever second copies come in
are compared with the first.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from ..protocol import ARRAYS, METRICS, UPDATE, Plan, Reply, Sketch, Sketcher, payload_encoding, sum_of_squares, view
from .blame import to_blame
from .disagreement import DISAGREEMENT, Alike, Disagreement

__all__ = ["MOST_APART", "Copies"]

#: A ledger row holds finite numbers, so this stands for an infinite difference.
MOST_APART = 1e300
_MOST_BLAMED = 3  # workers that are told apart by what others sent
_MOST_ROUNDING = 1e-2  # relative to the norm: what a client may claim that rounding changes


@dataclass(slots=True)
class _Kind:
    """Copies of the same shards that agree: the sketch of the first, and who sent them."""

    sketch: Sketch
    workers: tuple[int, ...]


class Copies:
    """The copies that came of the shards of one phase, by their sketches.

    Args:
        plan: Plan of the phase; `plan.rows` holds every worker's row.
        before: The arrays that training starts from; None when evaluating.
        compares: Whether copies of a shard should agree at all.

    Attributes:
        used: Whether the phase was decoded.
        compared: Shards of which two holders' copies were compared.
        lately: The same shards in the order in which they were, some of them several times.
        apart: Largest relative difference between two copies; None if none were compared.
        disagreements: Shards -> the first disagreement about them.
        alike: A worker that sent the same update for two shards; None if none did.
        noted: Number of copies so far.

    Sketching takes as long as all else that is done with a shard's records. So the first copy of a shard is sketched
    when there is something to compare it with: another copy of the shard, or another shard of the same worker.
    """

    def __init__(self, plan: Plan, before: ArrayRecord | None, *, compares: bool) -> None:
        self.plan = plan
        self.used = False
        self.compared: set[int] = set()
        self.lately: list[int] = []
        self.apart: float | None = None
        self.disagreements: dict[tuple[int, ...], Disagreement] = {}
        self.alike: Alike | None = None
        self.noted = 0
        self._encoding = payload_encoding(plan.fraction_bits, plan.k)
        self._sketcher = Sketcher(before) if compares and not plan.figures and before is not None else None
        self._figures = compares and plan.figures
        self._kinds: dict[tuple[int, ...], list[_Kind]] = {}
        self._holders = Counter(shard for row in plan.rows.values() for shard in row.shards)
        self._by_worker: dict[int, dict[object, tuple[int, ...]]] = {}
        #: Shard -> the worker and the records of its first copy, which is not sketched yet.
        self._unsketched: dict[tuple[int, ...], tuple[int, RecordDict]] = {}
        self._only: dict[int, tuple[int, ...]] = {}  # worker -> the first shard that it sent
        self._dropped: frozenset[tuple[int, ...]] = frozenset()  # shards whose copy nobody can be compared with

    def close(self, *, used: bool, owing: Collection[int] = ()) -> None:
        """Note whether the phase was decoded, and let go of the replies and of the model that it started from.

        Args:
            used: Whether the phase was decoded.
            owing: Workers whose replies to this phase may still come. They are compared with what they hold.
        """
        self.used = used
        held = {shard for worker in owing for shard in self.plan.rows[worker].shards}
        for shards, (worker, _) in [*self._unsketched.items()]:
            if worker in owing or not held.isdisjoint(shards):
                self._sketch(shards)
        self._dropped = frozenset(self._unsketched)
        self._unsketched.clear()
        if self._sketcher is not None:
            self._sketcher.close()

    def wrong_figures(
        self, reply: Reply, update: NDArray[Any], metrics: NDArray[Any], square: float | None = None
    ) -> str:
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
        if not self._encoding.weighs(metrics, coefficients, reply.figures):
            return f"the weights of its shards do not add up to its {self.plan.weight_key!r}"
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
        if self.plan.fraction_bits is not None or not self.plan.arrays_key or len(figures) < 3:
            return Sketch(None, figures)  # every bit has to agree
        norm, rounding, *sums, weight = figures
        return Sketch(norm, tuple(sums), weight, rounding=min(abs(rounding), _MOST_ROUNDING * abs(norm)))

    def add_records(self, reply: Reply, content: RecordDict) -> float | None:
        """Compare the records of a shard with another holder's; returns the difference, or None without another."""
        if self._sketcher is None or not self.plan.arrays_key or reply.shards in self._dropped:
            return None
        shards, worker = reply.shards, reply.worker
        first = self._only.setdefault(worker, shards)
        self._sketch(first)
        self._sketch(shards)
        if first == shards and shards not in self._kinds:
            self.noted += 1
            self._unsketched[shards] = worker, content
            return None
        return self._note(shards, worker, self._sketcher.of_records(content, self.plan.weight_key))

    def _sketch(self, shards: tuple[int, ...]) -> None:
        """Sketch the first copy of these shards, if it was put off."""
        if shards in self._unsketched:
            worker, content = self._unsketched.pop(shards)
            assert self._sketcher is not None
            self.noted -= 1  # it was counted when it came
            self._note(shards, worker, self._sketcher.of_records(content, self.plan.weight_key))

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
            metrics = view(record[METRICS]).reshape(-1)
            if self.wrong_figures(reply, update, metrics):
                return None
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
        self.noted += 1
        if any(sketch.sums) and self.alike is None and self.plan.kind == "train":
            key = (sketch.norm, sketch.sums, sketch.weight, sketch.form)
            other = self._by_worker.setdefault(worker, {}).setdefault(key, shards)
            if other != shards:
                self.alike = Alike(worker, (other[0], shards[0]))
        kinds = self._kinds.setdefault(shards, [])
        if any(worker in kind.workers for kind in kinds):
            return None
        mine = next((kind for kind in kinds if kind.sketch.apart(sketch) <= DISAGREEMENT), None)
        if mine is None:
            kinds.append(_Kind(sketch, (worker,)))
        else:
            mine.workers += (worker,)
        first = kinds[0]
        if first.workers[0] == worker:
            return None
        apart = first.sketch.apart(sketch)
        self.compared.update(shards)
        self.lately += shards
        self.apart = min(max(self.apart or 0.0, apart), MOST_APART)
        if apart > DISAGREEMENT and shards not in self.disagreements:
            weights = (first.sketch.weight, sketch.weight)
            pair = (first.workers[0], worker)
            self.disagreements[shards] = Disagreement(self.plan.round, shards, pair, apart, weights, self.used)
        return apart

    def to_blame(self) -> frozenset[int]:
        """Returns the workers that are known to have sent wrong copies, because all others agree; see `to_blame`."""
        if not self.disagreements:
            return frozenset()
        pairs = {
            (one, other)
            for kinds in self._kinds.values()
            for mine, its in itertools.combinations(kinds, 2)
            for one in mine.workers
            for other in its.workers
        }
        return to_blame(pairs, _MOST_BLAMED)

    def left_by(self, blamed: Collection[int]) -> list[Disagreement]:
        """Returns the disagreements in which nobody to blame takes part."""
        return [one for one in self.disagreements.values() if not blamed or not {*one.holders} & {*blamed}]

    @property
    def unsettled(self) -> frozenset[int]:
        """Shards whose copies disagree, without being known who is wrong, and of which more copies may come."""
        if not self.disagreements or self.to_blame():
            return frozenset()
        return frozenset(
            shard
            for shards, kinds in self._kinds.items()
            if len(kinds) > 1
            for shard in shards
            if sum(len(kind.workers) for kind in kinds) < self._holders[shard]
        )
