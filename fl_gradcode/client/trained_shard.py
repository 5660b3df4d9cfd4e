"""Reads what the app's function returned for one shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..errors import UnsuitableApp
from ..privacy import DPSGD, Privacy, Spent, spent_by
from ..protocol import Layout, Plan, flatten_update

__all__ = ["TrainedShard", "check_answer", "read_reply"]


@dataclass(frozen=True)
class TrainedShard:
    """The result of `train()` or `evaluate()` for one shard.

    Attributes:
        shard: Number of the shard.
        names: The user's names of the ArrayRecord (empty when evaluating) and the MetricRecord.
        layout: Names, dtypes and shapes of the arrays.
        update: Difference of the arrays after and before training, shape (d,); empty when evaluating.
        metrics: All metrics, as returned.
        spent: Privacy that training has spent; None without private training.
    """

    shard: int
    names: tuple[str, str]
    layout: Layout
    update: NDArray[np.floating]
    metrics: MetricRecord
    spent: Spent | None


def check_answer(answer: object, kind: str, shard: int) -> None:
    """Check that the app's function returned a message.

    Args:
        answer: What it returned.
        kind: "train" or "evaluate".
        shard: Number of the shard.

    Raises:
        UnsuitableApp: It returned something else.
    """
    if not isinstance(answer, Message):
        what = "None" if answer is None else f"a {type(answer).__name__}"
        raise UnsuitableApp(
            f"{kind}() returned {what} for shard {shard}; it must return a Message, such as "
            "Message(RecordDict({...}), reply_to=message)."
        )


def read_reply(
    content: RecordDict, plan: Plan, shard: int, before: dict[str, Array] | None, privacy: Privacy | None
) -> TrainedShard:
    """Returns the result in the app's reply, and removes its arrays from `content` to save memory.

    Args:
        content: Content of the reply.
        plan: Plan of the phase.
        shard: Number of the shard.
        before: The arrays that training started from; None when evaluating.
        privacy: The privacy promise that training has to keep. Under `DPSGD`, a reply without the record of private
            training is refused.

    Raises:
        ValueError: The reply cannot be coded.
    """
    spent = spent_by(content, shard, plan.round, plan.weight_key) if isinstance(privacy, DPSGD) else None
    array_records = [name for name, record in content.items() if isinstance(record, ArrayRecord)]
    metric_records = [(name, r) for name, r in content.items() if isinstance(r, MetricRecord)]
    if len(metric_records) != 1:
        raise ValueError(f"a reply needs exactly one MetricRecord, not {len(metric_records)}")
    dropped = [name for name, record in content.items() if isinstance(record, ConfigRecord)]
    if dropped and spent is None:  # private training brings a record of its own, and nothing else leaves the node
        raise ValueError(
            f"the reply holds the ConfigRecord {dropped[0]!r}, which coded vectors cannot carry; leave it out, or let "
            "the server pass send='shards', under which every record arrives as it was returned"
        )
    metrics_name, metrics = metric_records[0]
    if before is None:
        return TrainedShard(shard, ("", metrics_name), (), np.zeros(0, np.float32), metrics, spent)
    if len(array_records) != 1:
        raise ValueError(f"a reply needs exactly one ArrayRecord, not {len(array_records)}")
    returned: Any = content.pop(array_records[0])
    arrays = {**returned}
    del returned
    layout, update = flatten_update(before, arrays)
    return TrainedShard(shard, (array_records[0], metrics_name), layout, update, metrics, spent)
