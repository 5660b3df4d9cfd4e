"""The client half of coded products, a function that answers their query messages."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Context, Message

from ..errors import UnsuitableApp
from ..protocol import as_array, view
from .blocks import multiply
from .records import Answer, Task, block

__all__ = ["coded_matmul_worker"]

_KEPT = "fl-gradcode.matrix."


def coded_matmul_worker(message: Message, context: Context) -> Message:
    """Answers a query of `coded_matmul` or `CodedMatrix` by multiplying two coded blocks.

    Register the function in the ClientApp, which may have other functions too:

        app = ClientApp()
        app.query("matmul")(coded_matmul_worker)

    The node sees one combination of blocks of each matrix. This does not protect the data, because a node that knows
    some of the blocks learns about the others. A placed block is kept in `context.state` until it is released. A node
    that was restarted has lost its block; it reports this, and the server sends the block again.

    Raises:
        UnsuitableApp: The message is not such a query. Flower sends the error to the server as an error reply.
    """
    task = Task.find_in(message.content) if message.has_content() else None
    if task is None:
        raise UnsuitableApp("This message holds no coded product; send it with fl_gradcode.matmul.")
    name = _KEPT + task.matrix
    left = block(message.content, "left")
    if task.release:
        context.state.pop(name, None)
        return _answer(message, task, "released", kept=False)
    if left is not None and task.keep:
        context.state[name] = ArrayRecord({str(task.worker): left})
    right = block(message.content, "right")
    if left is None:
        held = context.state.get(name)
        # A block under another worker number is not the wanted one; the node was that worker before.
        left = held.get(str(task.worker)) if isinstance(held, ArrayRecord) else None
        if left is None:
            return _answer(message, task, "missing", kept=False)
    if right is None:
        return _answer(message, task, "placed", kept=task.keep)
    a, b = view(left), view(right)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise UnsuitableApp(f"Blocks of shapes {a.shape} and {b.shape} cannot be multiplied.")
    return _answer(message, task, "product", kept=task.keep, answer=as_array(multiply(a, b)))


def _answer(message: Message, task: Task, outcome: str, *, kept: bool, **blocks: Array) -> Message:
    answer = Answer(task.matrix, task.worker, task.product, outcome, kept)
    return Message(answer.content(**blocks), reply_to=message)
