"""Reads, checks and groups the replies of one phase.

With one shard a message there may be nothing to add up: each shard's records are kept as the function returned them,
and the wrapped strategy gets one reply for each sampled shard, as from k clients in plain Flower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from ..codes import GradientCode, P
from ..copies import DISAGREEMENT, Ballots, Copies, records_agree, vectors_agree
from ..errors import VersionMismatch
from ..privacy import clipping_mod_named_in
from ..protocol import (
    ARRAYS,
    MASKED,
    METRICS,
    UPDATE,
    NotFiniteRecord,
    PayloadEncoding,
    Plan,
    Rejection,
    RejectionKind,
    Reply,
    all_finite,
    difference_between,
    difference_of_names,
    last_line,
    names_of,
    payload_encoding,
    rejection_of,
    rounding_of,
    size_of,
    sum_of_squares,
    view,
)
from ..roster import WorkerRegistry
from .layouts import AgreedLayouts, check_layout, check_records, unlike_plain, unlike_sent
from .reply_groups import MaskedReplies, ReplyGroup, ReturnedReplies, same_words

if TYPE_CHECKING:
    from ..secagg import Manifest

__all__ = ["NO_MOD", "Group", "NotFinite", "Rejected", "ReplyCollector", "vectors_of"]

Group = ReplyGroup | ReturnedReplies | MaskedReplies


def vectors_of(
    reply: Reply, message: Message, before: ArrayRecord | None, m: int, encoding: PayloadEncoding
) -> tuple[NDArray[Any], NDArray[Any], float | None]:
    """Returns the coded update and metrics of a reply, checked against the arrays that were sent.

    Also returns the update's sum of squares, which is None over a prime field.

    Raises:
        ValueError: Something is missing, not finite, or has the wrong shape or dtype. The message says what.
    """
    record = message.content.get(UPDATE)
    if not isinstance(record, ArrayRecord) or METRICS not in record:
        raise ValueError(f"the record {UPDATE!r} is missing")
    update_dtype, metrics_dtype = encoding.dtypes(reply.layout)
    numbers = sum(max(length, 1) if length else 0 for _, length, _ in reply.metrics_layout)
    metrics = _vector(record, METRICS, encoding.entries(numbers), metrics_dtype, 1)
    if before is None:
        update = np.zeros(0, update_dtype)
    else:
        check_layout(reply.layout, before)
        update = _vector(record, ARRAYS, size_of(reply.layout), update_dtype, m)
    square = None
    if update_dtype.kind == "f":
        square = _check_finite(update, metrics)
    elif max(update.max(initial=0), metrics.max(initial=0)) >= P:
        raise ValueError(f"an entry is outside the field 0..{P - 1}")
    return update, metrics, square


def _vector(record: ArrayRecord, name: str, entries: int, dtype: np.dtype[Any], m: int) -> NDArray[Any]:
    if name not in record:
        raise ValueError(f"{name!r} is missing")
    values = view(record[name])
    length = -(-entries // m)
    if values.dtype != dtype:
        raise ValueError(f"{name!r} has dtype {values.dtype}, expected {dtype}")
    if values.shape != (length,):
        raise ValueError(f"{name!r} has shape {values.shape}, expected ({length},)")
    return np.asarray(values)


class NotFinite(ValueError):
    """An update or its weight is NaN or infinite."""


def _check_finite(update: NDArray[np.floating], metrics: NDArray[np.floating]) -> float:
    """Returns the sum of squares, which is finite if all entries are, unless it overflows."""
    # A metric may be NaN, as in plain Flower (an accuracy over no examples). The weight may not.
    square = sum_of_squares(update)
    if not math.isfinite(square) and not all_finite(update):
        raise NotFinite("its weighted update is not finite (NaN or infinity)")
    if not math.isfinite(float(metrics[0])):
        raise NotFinite("its number of examples is not finite (NaN or infinity)")
    return square


NO_MOD = Rejection("no-mod", "not a reply of fl-gradcode: is gradient_coding_mod among the client's mods?")


def _explained(rejection: Rejection) -> Rejection:
    """Returns the rejection with kind "clipping-mod" if one of Flower's privacy mods caused it, else unchanged."""
    clipping = clipping_mod_named_in(rejection.reason) if rejection.kind == "error" else None
    return rejection if clipping is None else Rejection("clipping-mod", rejection.reason)


def _difference(one: Group, other: Group) -> str:
    """Returns in what the replies of a group differ from those of another."""
    if isinstance(one, MaskedReplies) or isinstance(other, MaskedReplies):
        return f"it answered another request, {str(one.key)[:12]}..., than most, {str(other.key)[:12]}..."
    whose = "most other replies'"
    if isinstance(one, ReplyGroup) and isinstance(other, ReplyGroup):
        mine, theirs = one.reply, other.reply
        names, its_names = (mine.arrays_name, mine.metrics_name), (theirs.arrays_name, theirs.metrics_name)
        return (
            difference_between(mine.layout, mine.metrics_layout, theirs.layout, theirs.metrics_layout, whose)
            or f"its records are named {names}, and {whose} {its_names}"
        )
    return difference_of_names(one.key, other.key, whose)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rejected:
    """A reply that does not count.

    Attributes:
        node: Node that sent it.
        worker: Worker that the node is; None if the node has never reported it.
        rejection: Why the reply does not count.
    """

    node: int
    worker: int | None
    rejection: Rejection


class _Agreement:
    """Whether two copies of a phase's shards agree. It knows no replies, which are to go when the phase does."""

    def __init__(self, plan: Plan, before: ArrayRecord | None) -> None:
        self._plan, self._before = plan, before
        self._encoding = payload_encoding(plan.fraction_bits, plan.k)
        self._rounding: float | None = None

    def vectors(self, one: tuple[NDArray[Any], NDArray[Any]], other: tuple[NDArray[Any], NDArray[Any]]) -> bool:
        """Returns whether two coded updates agree, and the weights in the coded metrics."""
        mine, its = self._weight(one[1]), self._weight(other[1])
        return math.isclose(mine, its, rel_tol=DISAGREEMENT) and vectors_agree(one[0], other[0], self._slack(mine))

    def records(self, one: RecordDict, other: RecordDict) -> bool:
        """Returns whether two shards' records agree."""
        return records_agree(one, other, self._plan.weight_key, self._before, self._slack(1.0))

    def _weight(self, metrics: NDArray[Any]) -> float:
        bits = self._plan.fraction_bits
        return float(self._encoding.restored(metrics if bits is None else metrics / 2.0**bits)[0])

    def _slack(self, weight: float) -> float:
        """Returns the norm of what rounding the model may change in an update of this weight."""
        if self._rounding is None:
            self._rounding = 0.0 if self._before is None else rounding_of(self._before)
        return abs(weight) * self._rounding


class ReplyCollector:
    """Checks the replies of one phase and groups them by layout.

    Args:
        plan: Plan of the phase; `plan.rows` holds every worker's row.
        code: The code by which replies add up, with one reply for each of its rows.
        before: The arrays that were sent; None when evaluating.
        registry: Which node is which worker; updated from the replies.
        copies: Compares what two holders of a shard sent.
        row_of: Returns the row of the code that a reply stands for, or a rejection.
        spare: Whether a second copy of a row is normal, and only not needed; if False, it is rejected.
        agreed: Layouts with which earlier rounds of the run were decoded.
        votes: Number of wrong replies that may be among the holders of each shard.
        masks: The manifest by which replies are masked; None if they are not.
        adds_up: What of the records of several replies is added up, where they come as returned; see `names_of`.

    Attributes:
        asked: Nodes that are to be asked in this phase; some may still owe a reply to an earlier one.
    """

    def __init__(
        self,
        plan: Plan,
        code: GradientCode,
        before: ArrayRecord | None,
        registry: WorkerRegistry,
        copies: Copies,
        row_of: Callable[[Reply], int | Rejection],
        *,
        spare: bool = False,
        agreed: AgreedLayouts | None = None,
        votes: int = 0,
        masks: Manifest | None = None,
        adds_up: Collection[str] = (),
    ) -> None:
        self._masks, self._adds_up = masks, adds_up
        self._votes, self._by_unit = votes, votes > 0 and code.groups is not None and code.m == 1
        self._agreement = _Agreement(plan, before)
        self.asked: set[int] = set()
        self._agreed = AgreedLayouts() if agreed is None else agreed
        self._unlike_sent: dict[object, str] = {}
        self.plan, self.code, self.before, self.registry, self.copies = plan, code, before, registry, copies
        self._row_of, self._spare = row_of, spare
        self._encoding = payload_encoding(plan.fraction_bits, plan.k)
        #: Workers whose replies count, in order of arrival; with `spare`, a worker is listed once for each reply.
        self.answered: list[int] = []
        #: Workers with a good reply for a row that had one already.
        self.spare_from: set[int] = set()
        self.rejected: list[Rejected] = []
        self.stateful = False
        #: A file that some client's training read and rewrote.
        self.kept_file = ""
        self.fixed_data = False
        #: Largest epsilon that a holder reports, for this run and for all runs; None without privacy.
        self.spent: tuple[float, float] | None = None
        #: Shard -> two of its holders whose keys were bound to different requests.
        self.other_requests: dict[int, tuple[int, int]] = {}
        #: Shard -> two of its holders that share noise and compute with other devices or versions: worker, with what.
        self.other_environments: dict[int, tuple[tuple[int, str], tuple[int, str]]] = {}
        self.groups: dict[object, Group] = {}
        #: Whether a masked reply comes from a node of a simulation.
        self.simulated = False
        self._contexts: dict[int, tuple[int, str]] = {}
        self._environments: dict[int, tuple[int, str]] = {}
        #: Worker that shares noise -> what it computes with.
        self.environments: dict[int, str] = {}

    @property
    def best(self) -> Group | None:
        """The group of replies that is decodable, else the largest one; None if there is no reply."""
        groups = self.groups.values()
        if len(groups) < 2:
            return next(iter(groups), None)

        def counts(group: Group) -> tuple[bool, int, int]:
            decodes = group.decoder.decodable and not self.distrusts(group)
            return decodes, len(group.decoder.survivors), len(group.workers)

        return max(groups, key=counts)

    def distrusts(self, group: Group) -> str:
        """Returns why the layout of these replies does not count yet, or an empty string if it does."""
        if isinstance(group, MaskedReplies):  # the manifest has their layout
            return ""
        if group.key in self._agreed or 2 * len(group.workers) > len(self.asked):
            return ""
        if self.before is None and isinstance(group, ReplyGroup):
            return ""
        if group.key not in self._unlike_sent:
            if isinstance(group, ReplyGroup):
                assert self.before is not None
                self._unlike_sent[group.key] = unlike_sent(group.reply.layout, self.before)
            else:
                self._unlike_sent[group.key] = unlike_plain(group.key, self.before, self.plan.weight_key)
        different = self._unlike_sent[group.key]
        few = f"{len(group.workers)} of the {len(self.asked)} nodes that were asked"
        return different and f"{different}, in the replies of {few}: such records count if most nodes return them"

    def read(self, node: int, reply: Message | None, failure: str) -> Rejection | None:
        """Read one reply; returns None if it counts, else the rejection."""
        with np.errstate(all="ignore"):  # the server's app may have set it to raise; what is not finite is looked for
            rejection = (
                Rejection("no-reply", failure or "no reply came") if reply is None else self._examine(node, reply)
            )
        if rejection is not None:
            self.rejected.append(Rejected(node, self.registry.named(node), rejection))
            if reply is None or reply.has_error():
                self.registry.forget(node)
        return rejection

    def outvoted(self) -> list[Rejected]:
        """Returns the replies that are not used because most others have different names, dtypes or shapes."""
        best = self.best
        return [
            Rejected(*sender, Rejection("outvoted", _difference(group, best)))
            for group in self.groups.values()
            if best is not None and group is not best
            for sender in group.senders.values()
        ]

    @property
    def astray(self) -> set[int]:
        """Workers whose masked replies are of no use at first sight: to another request than most, or malformed."""
        best = self.best
        if not isinstance(best, MaskedReplies):
            return set()
        malformed = {one.worker for one in self.rejected if one.rejection.kind == "layout" and one.worker is not None}
        others = {worker for group in self.groups.values() for worker in group.workers}
        return (others | malformed) - best.workers

    def sender_of(self, row: int) -> tuple[int, int] | None:
        """Returns the (node, worker) that sent a reply for this row, or None."""
        return next((group.senders[row] for group in self.groups.values() if row in group.senders), None)

    def _examine(self, node: int, message: Message) -> Rejection | None:
        if message.has_error():
            return _explained(rejection_of(message))
        try:
            reply = Reply.find_in(message.content)
        except VersionMismatch as error:
            return Rejection("version", str(error))
        except ValueError as error:
            return Rejection("unreadable", str(error))
        if reply is None:
            return NO_MOD
        plan = self.plan
        if (reply.run, reply.kind, reply.round) != (plan.run, plan.kind, plan.round):
            wrong = f"run {reply.run!r}, " if reply.run != plan.run else ""
            return Rejection("wrong-round", f"wrong round: it answers {wrong}{reply.kind} {reply.round}")
        if reply.worker not in plan.rows and not plan.open:
            return Rejection("wrong-worker", f"worker {reply.worker} is not in the code (workers 0..{plan.n - 1})")
        if (refused := self.registry.claim(node, reply.worker, plan.round)) is not None:
            return refused
        if plan.open:
            self.registry.holdings[node] = dict(reply.holds)
        if reply.worker not in plan.rows:
            return None  # the worker is new, and the next round's code will have a row for it
        self.stateful |= reply.stateful
        self.kept_file = self.kept_file or reply.kept_file
        self.fixed_data |= reply.fixed_data
        if reply.outcome == "idle":
            asked = plan.rows[reply.worker].shards
            return (
                Rejection("shards-gone", f"it does not hold all of the shards {list(asked)} any more")
                if asked
                else None
            )
        if reply.outcome == "gave-up":
            done, seconds = len(reply.seconds), sum(reply.seconds)
            return Rejection("gave-up", f"gave up after {seconds:.1f} s with {done} shards done")
        if reply.outcome == "fixed-data":
            return Rejection("fixed-data", f"{plan.kind}() never read partition-id")
        return self._accept(node, reply, message)

    def _accept(self, node: int, reply: Reply, message: Message) -> Rejection | None:
        if (reply.outcome == "masked") != (self._masks is not None):
            return Rejection("layout", "it is not masked" if self._masks is not None else "it is masked")
        if (reply.outcome == "returned") != self.plan.as_returned:
            wrong = "coded vectors instead of records" if self.plan.as_returned else "records instead of coded vectors"
            return Rejection("layout", f"it holds {wrong}")
        row = self._row_of(reply)
        if isinstance(row, Rejection):
            return row
        if self.sender_of(row) is not None and not self._spare:
            return Rejection("duplicate", "duplicate")
        if self._masks is not None:
            return self._accept_masked(self._masks, node, row, reply, message)
        if reply.outcome == "returned":
            return self._accept_records(node, row, reply, message)
        if wrong := self._misnamed(reply):
            return Rejection("layout", wrong)
        try:
            update, metrics, square = vectors_of(reply, message, self.before, self.code.m, self._encoding)
        except Exception as error:  # a reply is untrusted input, and must not end the run
            kind: RejectionKind = "not-finite" if isinstance(error, NotFinite) else "layout"
            return Rejection(kind, f"unusable vectors: {last_line(str(error))}")
        if float(metrics[0]) < 0 and min(map(min, self.plan.rows[reply.worker].coefficients), default=0.0) >= 0:
            return Rejection("wrong-weight", f"its {self.plan.weight_key!r} is {float(metrics[0]):g}, below zero")
        if wrong := self.copies.wrong_figures(reply, update, metrics, square):
            return Rejection("wrong-figures", wrong)
        apart = self.copies.add(reply, update, metrics, square)
        self._note_spent(reply)
        self.answered.append(reply.worker)
        metrics_names = tuple((name, length) for name, length, _ in reply.metrics_layout)
        key = (reply.layout, metrics_names, reply.arrays_name, reply.metrics_name)
        group = self.groups.get(key)
        if group is None:
            ballots = Ballots(self._votes + 1, self._agreement.vectors) if self._by_unit else None
            group = self.groups[key] = ReplyGroup(self.code, key, reply, self._encoding, ballots)
        assert isinstance(group, ReplyGroup)
        if group.add(row, (node, reply.worker), (update, metrics), unlike=(apart or 0.0) > DISAGREEMENT):
            group.whole &= reply.metrics_layout[0][2]
        else:
            self.spare_from.add(reply.worker)
        return None

    def _accept_records(self, node: int, row: int, reply: Reply, message: Message) -> Rejection | None:
        """Take the records of a shard as they came; a second copy is only compared."""
        content = Reply.remove_from(message.content)
        try:
            key = names_of(content, self.plan.weight_key, self._adds_up)
            if self.before is not None:
                check_records(content, self.before)
            apart = self.copies.add_records(reply, content)
        except Exception as error:  # a reply is untrusted input, and must not end the run
            kind: RejectionKind = "not-finite" if isinstance(error, NotFiniteRecord) else "layout"
            return Rejection(kind, last_line(str(error)))
        self.answered.append(reply.worker)
        group = self.groups.get(key)
        if group is None:
            ballots = Ballots(self._votes + 1, self._agreement.records) if self._by_unit else None
            group = self.groups[key] = ReturnedReplies(self.code, key, ballots)
        assert isinstance(group, ReturnedReplies)
        if not group.add(row, (node, reply.worker), content, unlike=(apart or 0.0) > DISAGREEMENT):
            self.spare_from.add(reply.worker)
        return None

    def _accept_masked(
        self, manifest: Manifest, node: int, row: int, reply: Reply, message: Message
    ) -> Rejection | None:
        """Take a masked reply; those to different requests never go together."""
        from ..secagg import MaskedReply  # a plain server loads no cryptography

        if reply.manifest != manifest.digest.hex():
            return Rejection("layout", f"its masks are of another manifest, {reply.manifest[:12]}...")
        try:
            record = message.content[UPDATE]
            words = view(record[MASKED]) if isinstance(record, ArrayRecord) else None
            if words is None or words.dtype != np.uint32 or words.ndim != 1:
                raise ValueError("it holds no vector of masked words")
            masked = MaskedReply.from_payload(
                manifest.body,
                np.ascontiguousarray(words).data,
                worker=reply.worker,
                manifest=manifest.digest,
                request=bytes.fromhex(reply.request),
                number=reply.shards[0] if manifest.body.classes.sending == "shardwise" else None,
                kind=self.plan.kind,
            )
            if len(masked.request) != 32:
                raise ValueError("the digest of its request does not have 32 bytes")
        except Exception as error:  # a reply is untrusted input, and must not end the run
            return Rejection("layout", f"unusable vectors: {last_line(str(error))}")
        self.simulated |= reply.simulated
        self.answered.append(reply.worker)
        group = self.groups.get(masked.request.hex())
        if group is None:
            names = (self.plan.arrays_key, "metrics" if self.plan.arrays_key != "metrics" else "numbers")
            ballots = Ballots(self._votes + 1, same_words) if self._by_unit else None
            group = MaskedReplies(self.code, masked.request.hex(), manifest, names, ballots)
            self.groups[masked.request.hex()] = group
        assert isinstance(group, MaskedReplies)
        group.note_tags(masked, reply.tags)
        if not group.add(row, (node, reply.worker), masked):
            self.spare_from.add(reply.worker)
        return None

    def learn_from_late(self, late: ReplyCollector) -> None:
        """Learn what a reply to an earlier round says of its app, device and privacy; what it sent is not taken."""
        self.stateful |= late.stateful
        self.kept_file = self.kept_file or late.kept_file
        self.fixed_data |= late.fixed_data
        for shard, (worker, environment) in late._environments.items():
            self.environments[worker] = environment
            other, known = self._environments.setdefault(shard, (worker, environment))
            if known != environment:
                self.other_environments[shard] = ((other, known), (worker, environment))
        if late.spent is not None:
            mine = self.spent or late.spent
            self.spent = max(mine[0], late.spent[0]), max(mine[1], late.spent[1])

    def leave_out(self, workers: Collection[int], why: str) -> None:
        """Use nothing of what these workers sent, name them among the rejected, and hear them no more in this run.

        Args:
            workers: The workers.
            why: The reason, as a sentence without its full stop.
        """
        nodes = {worker: node for group in self.groups.values() for node, worker in group.senders.values()}
        for group in self.groups.values():
            group.drop(workers)
        for worker in sorted(workers):
            node = nodes.get(worker, self.registry.node_of(worker))
            self.spare_from.discard(worker)
            if node is not None and node not in self.registry.quarantined:
                self.registry.quarantine(node, why)
                self.rejected.append(Rejected(node, worker, Rejection("wrong-value", why)))

    def _misnamed(self, reply: Reply) -> str:
        """Returns what is wrong with the names of a reply's records and metrics, or an empty string."""
        key = self.plan.weight_key
        if not reply.metrics_layout or reply.metrics_layout[0][0] != key:
            return f"its metrics do not begin with {key!r}"
        if reply.metrics_layout[0][1] != -1:
            return f"its {key!r} is not one number"
        if not reply.metrics_name or (self.before is not None and reply.arrays_name in ("", reply.metrics_name)):
            return f"its records are named {reply.arrays_name!r} and {reply.metrics_name!r}"
        return ""

    def _note_spent(self, reply: Reply) -> None:
        """Remember the privacy cost, and whether holders of a shard bound their noise to the same request."""
        for shard, bound, epsilon, total in reply.spent:
            most, most_total = self.spent or (0.0, 0.0)
            self.spent = (max(most, epsilon), max(most_total, total))
            holder, first = self._contexts.setdefault(shard, (reply.worker, bound))
            if first != bound:
                self.other_requests[shard] = (holder, reply.worker)
            if bound:  # shared noise
                self.environments[reply.worker] = reply.environment
                other, known = self._environments.setdefault(shard, (reply.worker, reply.environment))
                if known.partition(";")[0] != reply.environment.partition(";")[0]:
                    self.other_environments[shard] = ((other, known), (reply.worker, reply.environment))
