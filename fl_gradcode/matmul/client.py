"""The client half of coded products: one function that answers their query messages."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Context, Message

from ..errors import UnsuitableApp
from ..protocol import as_array, view
from .blocks import multiply
from .records import Answer, Task, block

__all__ = ["coded_matmul_worker"]

_KEPT = "fl-gradcode.matrix."


def coded_matmul_worker(message: Message, context: Context) -> Message:
    """Answer a query of `coded_matmul` or `CodedMatrix`: multiply two coded blocks.

    Register it in the ClientApp, beside whatever else the app does:

        app = ClientApp()
        app.query("matmul")(coded_matmul_worker)

    The node sees one combination of blocks of each matrix (which is no protection: whoever knows some of the blocks
    learns about the others). A block that is placed is kept in `context.state` until it is released; a node that was
    restarted has lost it, says so, and is sent it again.

    Raises:
        UnsuitableApp: The message is no such query. Flower sends it to the server as an error reply.
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
        # Under another worker's number it is another block: the node had that place before.
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
