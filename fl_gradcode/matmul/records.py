"""What travels for a coded product: query messages with a task and blocks, and answers.

Server to node: `fl-gradcode.product`, what to do, with the node's blocks of A and of B. Node to server: the same record
with what came of it, and the product of the two blocks. Names are spelled here and nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from ..errors import VersionMismatch
from ..protocol import Cost, read_json, record_of

__all__ = ["QUERY", "Answer", "Task", "block"]

#: Action of the query: `app.query("matmul")(coded_matmul_worker)`.
QUERY = "matmul"

_RECORD = "fl-gradcode.product"
_BLOCK = "fl-gradcode.block."
_ROUND = "server-round"
_OUTCOMES = ("product", "placed", "missing", "released")


@dataclass(frozen=True)
class Task:
    """What a node is asked to do.

    Attributes:
        matrix: Our name of the matrix A whose block is placed, or used.
        worker: Which worker the node is, for this matrix.
        product: Number of the product, from 1; 0: only place.
        keep: Whether the node keeps its block of A for later products.
        release: Whether it forgets that block.
        round: The server round; None: the product's number.
    """

    matrix: str
    worker: int
    product: int
    keep: bool = True
    release: bool = False
    round: int = 0

    def content(self, *, work: float = 0.0, answer_bytes: int = 0, **blocks: Array) -> RecordDict:
        """Returns a RecordDict with this task, its cost, and the blocks `left` and `right` where given.

        Args:
            work: What the node computes, in units of an n-th of the whole product.
            answer_bytes: Size of the answer.
            **blocks: Array of each block.
        """
        record = record_of(vars(self))
        record[_ROUND] = self.round
        # A node is another one after this message if it holds a new block, or has let one go.
        cost = Cost(work, answer_bytes, must_run=self.release or (self.keep and "left" in blocks))
        arrays = {_BLOCK + name: ArrayRecord({name: block}) for name, block in blocks.items()}
        return cost.add_to(RecordDict({_RECORD: record, **arrays}))

    @classmethod
    def find_in(cls, content: RecordDict) -> Task | None:
        """Returns the task of a message, or None.

        Raises:
            VersionMismatch: The server speaks another version of the protocol.
        """
        record = content.get(_RECORD)
        return cls(**json.loads(read_json(record, "server"))) if isinstance(record, ConfigRecord) else None


@dataclass(frozen=True)
class Answer:
    """What a node says about its answer.

    Attributes:
        matrix, worker, product: Copied from the task.
        outcome: "product", "placed", "released", or "missing": the node has no block of this matrix.
        kept: Whether it now holds its block of A.
    """

    matrix: str
    worker: int
    product: int
    outcome: str
    kept: bool

    def content(self, **blocks: Array) -> RecordDict:
        """A RecordDict with this answer and the block `answer`, if there is one."""
        return RecordDict(
            {
                _RECORD: record_of(vars(self)),
                **{_BLOCK + name: ArrayRecord({name: block}) for name, block in blocks.items()},
            }
        )

    @classmethod
    def find_in(cls, content: RecordDict) -> Answer:
        """The answer of a message.

        Raises:
            ValueError: There is none, or it cannot be read.
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
        except Exception as error:  # whatever somebody may have put there
            raise ValueError(f"no readable answer ({type(error).__name__}: {error})") from error


def block(content: RecordDict, name: str) -> Array | None:
    """The block of that name in a message, or None."""
    record = content.get(_BLOCK + name)
    return record.get(name) if isinstance(record, ArrayRecord) else None
