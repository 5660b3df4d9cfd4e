"""The messages of coded products: queries with a task and blocks, and their answers.

The server sends a record `fl-gradcode.product` with the task, and the node's blocks of A and of B. The node sends a
record of the same name with the outcome, and the product of the two blocks. All record names are defined here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from .._files import parse_json
from ..errors import UnsuitableApp, VersionMismatch
from ..protocol import Cost, read_json, record_of

__all__ = ["QUERY", "Answer", "Task", "block"]

#: Name of the query's action, as in `app.query("matmul")(coded_matmul_worker)`.
QUERY = "matmul"

_RECORD = "fl-gradcode.product"
_BLOCK = "fl-gradcode.block."
_ROUND = "server-round"
_OUTCOMES = ("product", "placed", "missing", "released")


@dataclass(frozen=True)
class Task:
    """The task of a node.

    Attributes:
        matrix: Name of the matrix A whose block is placed or used.
        worker: Worker that the node is for this matrix.
        product: Number of the product, from 1; 0 for a task without a product.
        keep: Whether the node keeps its block of A for later products.
        release: Whether the node forgets its block.
        round: The server round.
    """

    matrix: str
    worker: int
    product: int
    keep: bool = True
    release: bool = False
    round: int = 0

    def content(self, *, work: float = 0.0, answer_bytes: int = 0, **blocks: Array) -> RecordDict:
        """Returns a RecordDict with this task, its cost, and the blocks `left` and `right` if given.

        Args:
            work: Computation on the node, in units of 1/n of the whole product.
            answer_bytes: Size of the answer in bytes.
            **blocks: Array of each block, by name.
        """
        record = record_of(vars(self))
        record[_ROUND] = self.round
        # The message must run if it changes the node's state, by storing or releasing a block.
        cost = Cost(work, answer_bytes, must_run=self.release or (self.keep and "left" in blocks))
        arrays = {_BLOCK + name: ArrayRecord({name: block}) for name, block in blocks.items()}
        return cost.add_to(RecordDict({_RECORD: record, **arrays}))

    @classmethod
    def find_in(cls, content: RecordDict) -> Task | None:
        """Returns the task of a message, or None.

        Raises:
            VersionMismatch: The server uses another protocol version.
            UnsuitableApp: The task cannot be read.
        """
        record = content.get(_RECORD)
        if not isinstance(record, ConfigRecord):
            return None
        text = read_json(record, "server")
        try:
            return cls(**parse_json(text.encode()))
        except (TypeError, ValueError) as error:
            raise UnsuitableApp(f"The task of a coded product cannot be read ({type(error).__name__}).") from None


@dataclass(frozen=True)
class Answer:
    """The description of a node's answer.

    Attributes:
        matrix, worker, product: Copied from the task.
        outcome: "product", "placed", "released", or "missing" if the node has no block of this matrix.
        kept: Whether the node now holds its block of A.
    """

    matrix: str
    worker: int
    product: int
    outcome: str
    kept: bool

    def content(self, **blocks: Array) -> RecordDict:
        """Returns a RecordDict with this answer and the block `answer`, if given."""
        return RecordDict(
            {
                _RECORD: record_of(vars(self)),
                **{_BLOCK + name: ArrayRecord({name: block}) for name, block in blocks.items()},
            }
        )

    @classmethod
    def find_in(cls, content: RecordDict) -> Answer:
        """Returns the answer in a message.

        Raises:
            ValueError: There is no answer, or it cannot be read.
        """
        record = content.get(_RECORD)
        try:
            values: dict[str, Any] = json.loads(read_json(record, "node")) if isinstance(record, ConfigRecord) else {}
            answer = cls(
                str(values["matrix"]),
                int(values["worker"]),
                int(values["product"]),
                str(values["outcome"]),
                bool(values["kept"]),
            )
            if answer.outcome not in _OUTCOMES:
                raise ValueError(f"outcome {answer.outcome!r}")
            return answer
        except VersionMismatch as error:
            raise ValueError(str(error)) from error
        except Exception as error:  # an answer is untrusted input
            raise ValueError(f"no readable answer ({type(error).__name__}: {error})") from error


def block(content: RecordDict, name: str) -> Array | None:
    """Returns the block with this name in a message, or None."""
    record = content.get(_BLOCK + name)
    return record.get(name) if isinstance(record, ArrayRecord) else None
