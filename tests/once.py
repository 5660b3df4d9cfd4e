"""An app that works out an answer once, for tests in which only those who answer differ."""

from __future__ import annotations

from typing import Any

from flwr.app import Array, Context, Message, RecordDict

__all__ = ["Once", "everything_of"]


def everything_of(content: RecordDict) -> tuple[Any, ...]:
    """All names and values of a message, arrays with their bytes."""
    return tuple(
        (
            name,
            tuple(
                (key, (value.dtype, (*value.shape,), value.data) if isinstance(value, Array) else repr(value))
                for key, value in record.items()
            ),
        )
        for name, record in content.items()
    )


class Once:
    """A client app that answers a message that it has answered before, to the byte, without training again."""

    def __init__(self, app: Any) -> None:
        self.app = app
        #: Message type, partition and content of each message -> its answer.
        self.known: dict[tuple[Any, ...], RecordDict] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        key = message.metadata.message_type, context.node_config["partition-id"], everything_of(message.content)
        if key not in self.known:
            self.known[key] = self.app(message, context).content
        return Message(self.known[key], reply_to=message)
