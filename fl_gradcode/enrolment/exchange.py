"""The three messages of a set-up and their answers, as records that travel.

1. "hello": a node draws an ephemeral key, and answers with its hello.
2. "lead": the lead holder of a class is shown all hellos, draws the class's seed, and answers with its public key and a
   wrap of the seed for each other holder.
3. "confirm": a node is shown all hellos and public keys and the wraps for it, and answers with the manifest's digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flwr.app import ConfigRecord, RecordDict

from ..errors import SecureRefused, VersionMismatch
from ..protocol import SETUP, Cost, read_json, record_of
from .statements import ClassKey, Confirmation, Hello, Setup
from .wraps import WRAP_BYTES

__all__ = ["Answer", "Request", "Step"]

Step = Literal["hello", "lead", "confirm"]
_STEPS: tuple[Step, ...] = ("hello", "lead", "confirm")
# What an answer is charged for in virtual time.
_ANSWER_BYTES = 1_000


@dataclass(frozen=True)
class Request:
    """What a node is asked in a set-up.

    Attributes:
        setup: The set-up.
        step: Which of the three messages this is.
        hellos: All hellos; empty in the first message.
        classes: All public keys of classes; only in the third message.
        wraps: Class -> its seed as wrapped for this node; only in the third message.
    """

    setup: Setup
    step: Step
    hellos: tuple[Hello, ...] = ()
    classes: tuple[ClassKey, ...] = ()
    wraps: Mapping[int, bytes] = field(default_factory=dict)

    def content(self) -> RecordDict:
        """Returns the content of the message."""
        values = {
            **vars(self.setup),
            "step": self.step,
            "hellos": [hello.to_list() for hello in self.hellos],
            "classes": [key.to_list() for key in self.classes],
            "wraps": [[number, box.hex()] for number, box in sorted(self.wraps.items())],
        }
        return Cost(0.0, _ANSWER_BYTES, must_run=True).add_to(RecordDict({SETUP: record_of(values)}))

    @classmethod
    def find_in(cls, content: RecordDict) -> Request:
        """Returns the request in a message.

        Raises:
            SecureRefused: It cannot be read.
            VersionMismatch: It has another protocol version.
        """
        record = content[SETUP]
        assert isinstance(record, ConfigRecord)
        text = read_json(record, "server")
        try:
            values = json.loads(text)
            step, hellos, classes, wraps = (values.pop(name) for name in ("step", "hellos", "classes", "wraps"))
            if step not in _STEPS or type(values["run"]) is not str:
                raise ValueError("a step of a run")
            return cls(
                Setup(**values),
                step,
                tuple(map(Hello.from_list, hellos)),
                tuple(map(ClassKey.from_list, classes)),
                _boxes(wraps),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise SecureRefused("The server's set-up message cannot be read.") from None


@dataclass(frozen=True)
class Answer:
    """What a node answers in a set-up.

    Attributes:
        worker: Number of the worker.
        step: The step that it answers.
        hello: Its hello, in the first step.
        classes: In the second step, the public keys of the classes that it leads.
        wraps: In the second step, (class, holder) -> the class's seed as wrapped for this holder.
        confirmation: Its confirmation, in the third step; and with a repeated hello, once the set-up has ended.
    """

    worker: int
    step: Step
    hello: Hello | None = None
    classes: tuple[ClassKey, ...] = ()
    wraps: Mapping[tuple[int, int], bytes] = field(default_factory=dict)
    confirmation: Confirmation | None = None

    def to_json(self) -> str:
        """Returns the answer as JSON."""
        return json.dumps(
            {
                "worker": self.worker,
                "step": self.step,
                "hello": None if self.hello is None else self.hello.to_list(),
                "classes": [key.to_list() for key in self.classes],
                "wraps": [[number, worker, box.hex()] for (number, worker), box in sorted(self.wraps.items())],
                "confirmation": None if self.confirmation is None else self.confirmation.to_list(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Answer:
        """Returns the answer in a JSON text.

        Raises:
            ValueError: It is none.
        """
        try:
            values = json.loads(text)
            hello, confirmation = values["hello"], values["confirmation"]
            answer = cls(
                values["worker"],
                values["step"],
                None if hello is None else Hello.from_list(hello),
                tuple(map(ClassKey.from_list, values["classes"])),
                {(_whole(number), _whole(worker)): _box(box) for number, worker, box in values["wraps"]},
                None if confirmation is None else Confirmation.from_list(confirmation),
            )
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"an unreadable answer to a set-up ({type(error).__name__})") from None
        if type(answer.worker) is not int or answer.step not in _STEPS:
            raise ValueError("an answer to a set-up without worker or step")
        return answer

    def content(self) -> RecordDict:
        """Returns the content of the reply."""
        return RecordDict({SETUP: record_of({"answer": self.to_json()})})

    @classmethod
    def find_in(cls, content: RecordDict) -> Answer:
        """Returns the answer in a reply.

        Raises:
            ValueError: There is none, or it cannot be read.
            VersionMismatch: It has another protocol version.
        """
        record = content.get(SETUP)
        if not isinstance(record, ConfigRecord):
            raise ValueError("no answer to a set-up: is gradient_coding_mod among the client's mods?")
        try:
            return cls.from_json(json.loads(read_json(record, "node"))["answer"])
        except VersionMismatch:
            raise
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"an unreadable answer to a set-up ({type(error).__name__})") from None


def _boxes(values: Any) -> dict[int, bytes]:
    boxes: dict[int, bytes] = {}
    for number, box in values:
        if number in boxes:
            raise ValueError("a class twice")
        boxes[_whole(number)] = _box(box)
    return boxes


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("the number of a class or a worker")
    return value


def _box(value: str) -> bytes:
    box = bytes.fromhex(value)
    if len(box) != WRAP_BYTES:
        raise ValueError("a wrap")
    return box
