"""Checks what leaves a client under privacy: no update without noise, no metric but the weight, no exception text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict

from ..errors import PrivacyRefused, UnsuitableApp
from .attempts import call_privately
from .records import BUDGET, Asked, Spent, budget_of
from .settings import DPSGD, Privacy

__all__ = ["guarded_reply", "refuse_unprotected", "spent_by"]

_Call = Callable[[Message, Context], Message]


def refuse_unprotected(message: Message, context: Context, privacy: Privacy | None) -> None:
    """Refuse to train without noise on a node that has a budget, whatever the server asks for.

    Args:
        message: Of any type; only training is refused.
        context: The node's.
        privacy: What the message asks for.

    Raises:
        PrivacyRefused: The node has a budget, and the message asks for an update without noise from the client.
    """
    training = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
    if training and BUDGET in context.node_config and not isinstance(privacy, DPSGD):
        raise PrivacyRefused(
            f"This node has {BUDGET}={budget_of(context):g}: it trains with noise only, and the server asks for an "
            "update in the clear. Say GradientCoding(..., privacy=DPSGD(...)), or take it out of the node config."
        )


def spent_by(content: RecordDict, shard: int, server_round: int, weight_key: str) -> Spent:
    """Returns the record of private training that belongs to the update in `content`.

    Args:
        content: A shard's reply.
        shard: The shard that was asked for.
        server_round: The round that was asked for.
        weight_key: Name of the metric that weighs the update.

    Raises:
        ValueError: There is none, or it is of another shard or round, or the weight is not the number of records that
            it names.
    """
    try:
        spent = Spent.find_in(content)
    except (ValueError, TypeError):  # whatever an app may have put there
        spent = None
    if spent is None or (spent.shard, spent.round) != (shard, server_round):
        raise ValueError(
            "the server asks for differential privacy, and train() answered without the record of "
            "private_training for this shard and round: nothing is sent"
        )
    for record in content.values():
        if isinstance(record, MetricRecord) and record.get(weight_key) != spent.weight:
            raise ValueError(
                f"under differential privacy {weight_key!r} has to be the number of records that private_training was "
                "given (examples=, or weight=), which is public: nothing is sent"
            )
    return spent


def guarded_reply(asked: Asked | None, message: Message, context: Context, call: _Call) -> Message:
    """Returns the reply to a message of a plain strategy; under privacy it is checked and filtered as a coded one is.

    Args:
        asked: What the message asks for; None: no privacy.
        message: The message.
        context: The node's.
        call: The app's function.

    Raises:
        UnsuitableApp: The reply lacks the record of private training.
    """
    private = asked is not None and isinstance(asked.privacy, DPSGD)
    if asked is None or not private or message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
        return call(message, context)

    def records() -> RecordDict:
        return RecordDict({key: _copy_of(record) for key, record in message.content.items()})

    reply = call_privately(call, message, context, asked, records=records)
    weight_key = "num-examples"
    try:
        spent_by(reply.content, asked.shard, asked.round, weight_key)
    except ValueError as error:
        raise UnsuitableApp(f"Shard {asked.shard}, train {asked.round}: {error}.") from error
    for name, record in list(reply.content.items()):
        if isinstance(record, MetricRecord):
            reply.content[name] = MetricRecord({weight_key: record[weight_key]})
        elif isinstance(record, ConfigRecord) and Spent.find_in(RecordDict({name: record})) is None:
            del reply.content[name]
    return Message(reply.content, reply_to=message)


def _copy_of(record: Any) -> Any:
    """Returns a record that a function may change without changing the one that came."""
    if isinstance(record, ArrayRecord):
        return ArrayRecord(dict(record))
    return type(record)({name: list(value) if isinstance(value, list) else value for name, value in record.items()})
