"""What the nodes are asked: the plan of a phase, and the messages that carry it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message, RecordDict

from ..codes import GradientCode, PrimeField
from ..privacy import RunAccount
from ..protocol import Plan, Row, without_arrays
from .options import Options
from .workers import WorkerRegistry

__all__ = ["MessageFactory", "make_plan", "time_to_live", "whole_shard"]

_OBSERVED = 20.0  # times the slowest reply so far that a message stays valid
_LEAST_TTL = 600.0  # seconds
_LEAST_TTL_UNBOUNDED = 3600.0  # where rounds have no timeout


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
    privacy: RunAccount | None = None,
    digests: Mapping[int, str] | None = None,
    is_open: bool = False,
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
        digests={shard: digest for shard, digest in (digests or {}).items() if shard in set(shards)},
        open=is_open,
    )


class MessageFactory:
    """Makes the messages of one phase.

    Args:
        plan: With every worker's row.
        content: The inner strategy's records, which all messages share.
        message_type: As the inner strategy chose it.
        ttl: Seconds for which the messages and their replies are valid; None: Flower's 12 hours.
    """

    def __init__(self, plan: Plan, content: RecordDict, *, message_type: str, ttl: float | None) -> None:
        self.plan, self._content, self._type, self._ttl = plan, content, message_type, ttl

    def messages(self, nodes: Iterable[int], registry: WorkerRegistry, rows: Mapping[int, Row]) -> list[Message]:
        """One message for each node whose worker has shards to work on, or is not known yet.

        A known node gets its own row, an unknown one the whole plan: only its client can tell who it is. `rows`
        replaces the plan's.
        """
        plan = replace(self.plan, rows=dict(rows))
        whole = plan.add_to(self._content)
        messages = []
        for node in nodes:
            worker = registry.worker_of(node)
            if worker is None or worker not in plan.rows:
                messages.append(self._message(RecordDict(dict(whole.items())), node))
            elif plan.rows[worker].shards:
                messages.append(self._message(plan.for_worker(worker).add_to(self._content), node))
            elif plan.open:  # it tells what it holds by now, and needs no model for that
                messages.append(self._message(plan.for_worker(worker).add_to(without_arrays(self._content)), node))
        return messages

    def one_shard(self, node: int, worker: int, shard: int) -> Message:
        """Ask a node for one shard, as it is."""
        plan = replace(self.plan, rows={worker: whole_shard(shard)}).for_worker(worker)
        return self._message(plan.add_to(self._content), node)

    def _message(self, content: RecordDict, node: int) -> Message:
        group = str(self.plan.round)
        return Message(content, dst_node_id=node, message_type=self._type, ttl=self._ttl, group_id=group)


def time_to_live(timeout: float | None, slowest: float | None) -> float | None:
    """How long a message is to be valid, in seconds.

    It bounds how long the SuperLink stores what nobody fetches, and spares a node that comes back work that is out of
    date. A message must never expire while its round may still use the reply, so it lasts longer than the timeout,
    whatever has been seen.

    Args:
        timeout: Of the phase; None: there is none.
        slowest: The longest that a reply has taken so far; None: none has come.
    """
    if timeout is None:
        return None if slowest is None else max(_LEAST_TTL_UNBOUNDED, _OBSERVED * slowest)
    most = 4 * timeout
    wanted = most if slowest is None else min(most, _OBSERVED * slowest)
    return max(_LEAST_TTL, 1.25 * timeout + 60, wanted)


def whole_shard(shard: int) -> Row:
    """A row that asks for one shard's update with coefficient 1."""
    return Row((shard,), ((1.0,),))


def _row(code: GradientCode, worker: int, shards: Sequence[int]) -> Row:
    columns = code.shards_of(worker)
    coefficients = code.B[worker, list(columns)].reshape(len(columns), code.m)
    return Row(tuple(shards[j] for j in columns), tuple(tuple(row) for row in coefficients.tolist()))
