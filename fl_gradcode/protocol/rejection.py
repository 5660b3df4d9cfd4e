"""Rejections, which say why a reply does not count: a kind that code can compare, and a sentence for people.

A node's refusal reaches the server as the text of an exception, because Flower carries nothing else. `with_kind` writes
the kind in front of that text on the node, and `rejection_of` reads it on the server. No other code looks for kinds in
sentences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message

from .._text import printable
from ..errors import FlGradcodeError

__all__ = ["Rejection", "RejectionKind", "last_line", "rejection_of", "with_kind"]

RejectionKind = Literal[
    "error",  # the app or the engine failed
    "no-reply",  # no reply came, and none will
    "no-mod",  # the client answered without gradient_coding_mod
    "clipping-mod",  # one of Flower's privacy mods met a coded reply
    "unsuitable-app",  # the app breaks the contract of coding
    "fixed-data",  # train() does not choose its data by partition-id
    "invalid-setting",  # an option of the node cannot be used
    "version",  # server and node speak different versions of the protocol
    "shard-mismatch",  # the node's data differ from what it was asked for
    "shards-gone",  # the node no longer holds all shards that it was asked for, and reports those that it holds
    "privacy-refused",  # the node's privacy rules forbid the answer
    "secure-refused",  # the node's rules of secure aggregation forbid the answer
    "overflow",  # the update does not fit the fixed point of a prime field
    "gave-up",  # the node stopped after `give_up_after` seconds
    "unreadable",  # the reply's own record cannot be read
    "wrong-round",  # it answers another round, phase or run
    "wrong-worker",  # its worker is not in the code
    "wrong-shards",  # it combines other shards than it was asked for
    "duplicate",  # the node has already answered for this row
    "duplicate-worker",  # another node is that worker
    "contradiction",  # the node was another worker before
    "quarantined",  # the node was caught before, and its replies count no more in this run
    "layout",  # records, names, shapes or types that cannot be added up
    "wrong-figures",  # the numbers that describe its shards do not add up to its vector
    "wrong-weight",  # a number of examples below zero
    "wrong-value",  # other holders of its shards agree on another update
    "not-finite",  # NaN or infinity in its update or weight
    "outvoted",  # most other replies have different names, dtypes or shapes
]

_KINDS: frozenset[str] = frozenset(RejectionKind.__args__)  # type: ignore[attr-defined]
_MARK = "fl-gradcode"
_CODED = re.compile(rf"{_MARK}/([a-z-]+): (.*)", re.DOTALL)
#: Form in which Flower reports an exception in a ClientApp.
_EXCEPTION = re.compile(r"<class '(?:.*\.)?(\w+)'>:<'(.*)'>")
_LONGEST = 500
_LOOKED_AT = 10_000  # characters at the end of an exception's text


@dataclass(frozen=True)
class Rejection:
    """The reason why a reply does not count.

    Attributes:
        kind: Kind of the rejection, for use in code.
        reason: Sentence for people, without its full stop. Part of it may be a client's text, so it is cut to 500
            characters, and signs that a terminal would act on are escaped.
    """

    kind: RejectionKind
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", printable(self.reason, _LONGEST))


def with_kind(error: FlGradcodeError, text: str | None = None) -> FlGradcodeError:
    """Returns the error to raise on a node, with its kind written in front of its text.

    Args:
        error: The error.
        text: Text that replaces the error's own text.
    """
    said = str(error) if text is None else text
    coded = said if _CODED.fullmatch(said) else f"{_MARK}/{error.kind}: {said}"
    return type(error)(coded)


def rejection_of(message: Message) -> Rejection:
    """Returns the rejection that an error reply stands for.

    The reason is one line. It consists of Flower's error code, the name of the exception, and the last line of its
    text, where Python says what went wrong.
    """
    reason = last_line(message.error.reason or "")
    kind: RejectionKind = "error"
    name = ""
    flower = _EXCEPTION.fullmatch(reason)
    if flower:
        name, reason = f"{flower[1]}: ", flower[2]
    elif ": " in reason and not reason.startswith(_MARK):
        before, _, after = reason.partition(": ")
        if after.startswith(_MARK):
            name, reason = f"{before}: ", after
    coded = _CODED.fullmatch(reason)
    if coded and coded[1] in _KINDS:
        kind, reason = coded[1], coded[2]  # type: ignore[assignment]
    return Rejection(kind, f"error {message.error.code}: {name}{reason}")


def last_line(text: str) -> str:
    """Returns the last non-empty line of a text, cut to 500 characters, without signs that a terminal acts on."""
    lines = [line.strip() for line in text[-_LOOKED_AT:].splitlines() if line.strip()]
    return printable(lines[-1], _LONGEST) if lines else "no reason given"
