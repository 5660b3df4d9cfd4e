"""What the nodes are asked: the plan of a phase, and one message for each node that has something to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict

from .gradient_code import GradientCode
from .roster import Roster
from .wire import Plan, Row

__all__ = ["make_plan", "messages_for"]


def make_plan(
    code: GradientCode,
    shards: Sequence[int],
    *,
    k: int,
    run: str,
    seed: int,
    server_round: int,
    kind: str,
    weight_key: str,
    arrays_key: str,
    give_up_after: float,
    allow_fixed_data: bool,
) -> Plan:
    """The plan with every worker's row; `code` covers the sampled `shards`, its columns, out of k."""
    return Plan(
        run=run,
        seed=seed,
        round=server_round,
        kind=kind,
        n=code.n,
        k=k,
        weight_key=weight_key,
        arrays_key=arrays_key,
        rows={worker: _row(code, worker, shards) for worker in range(code.n)},
        give_up_after=give_up_after,
        allow_fixed_data=allow_fixed_data,
    )


def messages_for(
    plan: Plan,
    content: RecordDict,
    nodes: Iterable[int],
    roster: Roster,
    *,
    message_type: str,
    ttl: float | None,
) -> list[Message]:
    """One message for each node whose worker has shards to work on, or is not known yet.

    A known node gets its own row, an unknown one the whole plan: only its client can tell who it is.
    """
    whole = plan.add_to(content)
    messages = []
    for node in nodes:
        worker = roster.worker_of(node)
        if worker is None or worker not in plan.rows:
            mine = RecordDict(dict(whole.items()))
        elif not plan.rows[worker].shards:
            continue
        else:
            mine = plan.for_worker(worker).add_to(content)
        group = str(plan.round)
        messages.append(Message(mine, dst_node_id=node, message_type=message_type, ttl=ttl, group_id=group))
    return messages


def _row(code: GradientCode, worker: int, shards: Sequence[int]) -> Row:
    columns = code.shards_of(worker)
    coefficients = code.B[worker, list(columns)].reshape(len(columns), code.m)
    return Row(tuple(shards[j] for j in columns), tuple(tuple(float(x) for x in row) for row in coefficients))
