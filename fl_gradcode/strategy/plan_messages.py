"""Makes the plan of a phase, which is a value, and the messages that carry it to the nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import ConfigRecord, Message, RecordDict

from .._flower_internals import message_like, with_entry
from ..codes import GradientCode, PrimeField
from ..privacy import Releases
from ..protocol import Plan, PlanWriter, Row, without_arrays
from ..roster import WorkerRegistry
from .options import Coded, Options

__all__ = ["MessageFactory", "make_plan", "time_to_live", "whole_shard"]

_OBSERVED = 20.0  # a message stays valid this many times as long as the slowest reply so far took
_LEAST_TTL = 600.0  # seconds
_LEAST_TTL_UNBOUNDED = 3600.0  # seconds, for rounds without a timeout


def make_plan(
    code: GradientCode,
    shards: Sequence[int],
    options: Options,
    *,
    k: int,
    run: str,
    server_round: int,
    kind: str,
    weight_key: str,
    arrays_key: str,
    privacy: str = "",
    releases: Releases | None = None,
    is_open: bool = False,
    as_returned: bool = False,
    figures: bool = False,
    secure: str = "",
) -> Plan:
    """Returns the plan of a phase, with every worker's row; making a plan changes and charges nothing.

    Args:
        code: The code over the sampled shards, which are its columns.
        shards: The sampled shards, ascending, out of k.
        options: Settings of the run.
        k: Number of shards of the whole code.
        run: Name of the run.
        server_round: The round, from 1.
        kind: "train" or "evaluate".
        weight_key: The metric that holds the number of examples.
        arrays_key: The ArrayRecord that training starts from; empty when evaluating.
        privacy: The privacy promise that training has to keep, as JSON; empty for none.
        releases: For each shard, its number of holders and the earlier rounds in which they were asked.
        is_open: Whether the code is built for the shards that nodes report to hold.
        as_returned: Whether replies hold a shard's records as the function returned them.
        figures: Whether coded replies describe the update of each shard.
        secure: Digest of the manifest under which replies are masked; empty for plain replies.
    """
    sampled = set(shards)
    return Plan(
        run=run,
        seed=options.seed,
        round=server_round,
        kind=kind,
        n=code.n,
        k=k,
        weight_key=weight_key,
        arrays_key=arrays_key,
        rows=code.once(_all_rows) if len(shards) == k else _rows(code, shards),
        give_up_after=(options.send.give_up_after or 0.0) if isinstance(options.send, Coded) else 0.0,
        allow_fixed_data=options.allow_fixed_data,
        fraction_bits=code.numbers.fraction_bits if isinstance(code.numbers, PrimeField) else None,
        privacy=privacy,
        releases=releases or {},
        digests={shard: digest for shard, digest in (options.digests or {}).items() if shard in sampled},
        open=is_open,
        as_returned=as_returned,
        figures=figures,
        secure=secure,
    )


class MessageFactory:
    """Makes the messages of one phase.

    Args:
        plan: The plan of the phase, with every worker's row.
        content: The wrapped strategy's records, which all messages share.
        message_type: Message type that the wrapped strategy chose.
        ttl: Seconds for which the messages and their replies are valid; None for Flower's 12 hours.
    """

    def __init__(self, plan: Plan, content: RecordDict, *, message_type: str, ttl: float | None) -> None:
        self.plan, self._type, self._ttl = plan, message_type, ttl
        self._writer = PlanWriter(plan, with_entry)
        self._first: Message | None = None  # the one that Flower checks
        # Flower's loop writes the next round into the same config, and an in-memory message is computed later.
        self._content = RecordDict(
            {
                name: ConfigRecord(dict(record)) if isinstance(record, ConfigRecord) else record
                for name, record in content.items()
            }
        )

    def messages(self, nodes: Iterable[int], registry: WorkerRegistry, rows: Mapping[int, Row]) -> list[Message]:
        """Returns one message for each node that has shards to work on or whose worker is not known yet.

        A known node gets its own row. An unknown one gets the whole plan, because only its client knows which worker it
        is. `rows` replaces the rows of the plan.
        """
        whole: RecordDict | None = None
        messages = []
        for node in nodes:
            worker = registry.worker_of(node)
            if worker is None or worker not in rows:
                if whole is None:
                    plan = self.plan
                    whole = self._writer.add_to(self._content, dict(rows), plan.releases, plan.digests)
                messages.append(self._message(RecordDict(dict(whole.items())), node))
            elif rows[worker].shards:
                messages.append(self._own_message(self._content, node, worker, rows[worker]))
            elif self.plan.open:  # the node reports which shards it holds by now, and needs no model for that
                messages.append(self._own_message(without_arrays(self._content), node, worker, rows[worker]))
        return messages

    def for_plan(self, plan: Plan, *, with_arrays: bool) -> MessageFactory:
        """Returns a factory of messages with the same records, or without arrays, and another plan."""
        content = self._content if with_arrays else without_arrays(self._content)
        return MessageFactory(plan, content, message_type=self._type, ttl=self._ttl)

    def one_shard(self, node: int, worker: int, shard: int) -> Message:
        """Returns a message that asks a node for the update of one shard, without coding."""
        return self._own_message(self._content, node, worker, whole_shard(shard))

    def _own_message(self, content: RecordDict, node: int, worker: int, row: Row) -> Message:
        return self._message(self._writer.add_to(content, {worker: row}), node)

    def _message(self, content: RecordDict, node: int) -> Message:
        if self._first is None:
            group = str(self.plan.round)
            self._first = Message(
                RecordDict(), dst_node_id=node, message_type=self._type, ttl=self._ttl, group_id=group
            )
        return message_like(self._first, content, node)


def time_to_live(timeout: float | None, slowest: float | None) -> float | None:
    """Returns how long a message is valid, in seconds, or None for Flower's default.

    The limit bounds how long the SuperLink stores messages that nobody fetches. It also spares a returning node work
    that is out of date. A message must not expire while its round can still use the reply, so it always lasts longer
    than the timeout.

    Args:
        timeout: Timeout of the phase in seconds; None if there is none.
        slowest: Longest latency of a reply so far, in seconds; None if there was no reply.
    """
    if timeout is None:
        return None if slowest is None else max(_LEAST_TTL_UNBOUNDED, _OBSERVED * slowest)
    most = 4 * timeout
    wanted = most if slowest is None else min(most, _OBSERVED * slowest)
    return max(_LEAST_TTL, 1.25 * timeout + 60, wanted)


def whole_shard(shard: int) -> Row:
    """Returns a row that asks for one shard's update with coefficient 1."""
    return Row((shard,), ((1.0,),))


def _all_rows(code: GradientCode) -> dict[int, Row]:
    """Returns every worker's row if all shards are sampled, which is the same in each round."""
    return _rows(code, range(code.k))


def _rows(code: GradientCode, shards: Sequence[int]) -> dict[int, Row]:
    """Returns every worker's row.

    Holders of the same shards begin with different ones, so that whatever a client keeps from one call to the next
    makes their updates differ, and shows.
    """
    rows = {}
    before: Counter[int] = Counter()  # first shard -> workers so far that have it
    for worker in range(code.n):
        columns = code.shards_of(worker)
        if columns:
            start = before[columns[0]] % len(columns)
            before[columns[0]] += 1
            columns = (*columns[start:], *columns[:start])
        coefficients = code.B[worker, list(columns)].reshape(len(columns), code.m)
        rows[worker] = Row(tuple(shards[j] for j in columns), tuple(tuple(row) for row in coefficients.tolist()))
    return rows
