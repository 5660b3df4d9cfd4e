"""The client half of a set-up through the server: the messages that the mod answers without calling the app."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message

from ..enrolment import EnrolledNode, Request, is_enrolled
from ..errors import SecureRefused
from .held_shards import SECAGG_DIR, SHARDS_DIR, held_by
from .masked_call import allowed_by, check_body

__all__ = ["setup_answer"]


def setup_answer(message: Message, context: Context, *, folder: Path, worker: int) -> Message:
    """Returns the answer to a message of a set-up.

    Args:
        message: The message.
        context: The node's context.
        folder: The node's own folder, with its identity and the body that its owner agreed to.
        worker: Number of the worker.

    Raises:
        SecureRefused: The rules of the node's owner or of the set-up forbid the answer.
        InvalidSetting: A setting or a file of the node cannot be used.
    """
    if not is_enrolled(folder):
        raise SecureRefused(f"A dealer made the keys in this node's {SECAGG_DIR}, and the server asks for a set-up.")
    owner = context.node_config
    request = Request.find_in(message.content)
    node = EnrolledNode(folder, worker, allowed_by(owner))
    check_body(folder, node.body, owner)
    data = held_by(owner) if owner.get(SHARDS_DIR) else None
    return Message(node.answer(request, data or {}).content(), reply_to=message)
