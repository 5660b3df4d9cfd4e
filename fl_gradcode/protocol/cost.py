"""The cost that a message has for its node, stated by the sender and charged by virtual time."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

__all__ = ["Cost"]

_RECORD = "fl-gradcode.cost"
_WORK, _ANSWER_BYTES, _MUST_RUN = "work", "answer-bytes", "must-run"


@dataclass(frozen=True)
class Cost:
    """The cost of a message that is not training or evaluation.

    Attributes:
        work: Computation on the node, in units of one shard's training.
        answer_bytes: Size of the answer in bytes.
        must_run: Whether the message changes what the node holds, so that it has to be carried out even if its answer
            is not read.
    """

    work: float
    answer_bytes: int
    must_run: bool

    def add_to(self, content: RecordDict) -> RecordDict:
        """Returns a new RecordDict with the same records and this cost."""
        record = ConfigRecord(
            {_WORK: float(self.work), _ANSWER_BYTES: int(self.answer_bytes), _MUST_RUN: bool(self.must_run)}
        )
        return RecordDict({**content, _RECORD: record})

    @classmethod
    def find_in(cls, content: RecordDict) -> Cost | None:
        """Returns the cost stated in a message, or None."""
        record = content.get(_RECORD)
        if not isinstance(record, ConfigRecord):
            return None
        return cls(float(record[_WORK]), int(record[_ANSWER_BYTES]), bool(record[_MUST_RUN]))  # type: ignore[arg-type]
