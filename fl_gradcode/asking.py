"""What the nodes are asked: the plan of a phase, and the messages that carry it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message, RecordDict

from .gradient_code import GradientCode
from .options import Options
from .prime_field import PrimeField
from .roster import Roster
from .run_privacy import RunPrivacy
from .wire import Plan, Row

__all__ = ["Asking", "make_plan", "whole_shard"]


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
    privacy: RunPrivacy | None = None,
) -> Plan:
    """The plan with every worker's row; `code` covers the sampled `shards`, its columns, out of k."""
    return Plan(
        run=run,
        seed=options.seed,
        round=server_round,
        kind=kind,
        n=code.n,
        k=k,
        weight_key=weight_key,
        arrays_key=arrays_key,
        rows={worker: _row(code, worker, shards) for worker in range(code.n)},
        give_up_after=options.give_up_after or 0.0,
        allow_fixed_data=options.allow_fixed_data,
        fraction_bits=code.numbers.fraction_bits if isinstance(code.numbers, PrimeField) else None,
        privacy=privacy.text if privacy else "",
        releases=privacy.ask(server_round, shards) if privacy else {},
    )


class Asking:
    """Makes the messages of one phase.

    Args:
        plan: With every worker's row.
        content: The inner strategy's records, which all messages share.
        message_type: As the inner strategy chose it.
        timeout: Seconds of the phase.
    """

    def __init__(self, plan: Plan, content: RecordDict, *, message_type: str, timeout: float | None) -> None:
        self.plan, self._content, self._type = plan, content, message_type
        # Several times the timeout: it only bounds how long the SuperLink stores a message.
        self._ttl = None if timeout is None else max(600.0, 4 * timeout)

    def messages(self, nodes: Iterable[int], roster: Roster, rows: Mapping[int, Row]) -> list[Message]:
        """One message for each node whose worker has shards to work on, or is not known yet.

        A known node gets its own row, an unknown one the whole plan: only its client can tell who it is. `rows`
        replaces the plan's.
        """
        plan = replace(self.plan, rows=dict(rows))
        whole = plan.add_to(self._content)
        messages = []
        for node in nodes:
            worker = roster.worker_of(node)
            if worker is None or worker not in plan.rows:
                messages.append(self._message(RecordDict(dict(whole.items())), node))
            elif plan.rows[worker].shards:
                messages.append(self._message(plan.for_worker(worker).add_to(self._content), node))
        return messages

    def one_shard(self, node: int, worker: int, shard: int) -> Message:
        """Ask a node for one shard, as it is."""
        plan = replace(self.plan, rows={worker: whole_shard(shard)}).for_worker(worker)
        return self._message(plan.add_to(self._content), node)

    def _message(self, content: RecordDict, node: int) -> Message:
        group = str(self.plan.round)
        return Message(content, dst_node_id=node, message_type=self._type, ttl=self._ttl, group_id=group)


def whole_shard(shard: int) -> Row:
    """A row that asks for one shard's update with coefficient 1."""
    return Row((shard,), ((1.0,),))


def _row(code: GradientCode, worker: int, shards: Sequence[int]) -> Row:
    columns = code.shards_of(worker)
    coefficients = code.B[worker, list(columns)].reshape(len(columns), code.m)
    return Row(tuple(shards[j] for j in columns), tuple(tuple(row) for row in coefficients.tolist()))
