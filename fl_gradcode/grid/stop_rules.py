"""When to stop waiting: stop rules, and the record of what happened meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message

from .arrivals import Arrival

__all__ = ["CountRule", "JobTime", "StopRule", "Wait"]


@dataclass(frozen=True)
class JobTime:
    """How long a node took for a message.

    Attributes:
        node: Who.
        label: Of the phase that asked: "train 3".
        loads: Worker -> shards, of whatever worker the node may be; empty: the message had no plan.
        seconds: From send to reply, or so far.
        computing: Seconds that the node spent on its shards, if that is known.
    """

    node: int
    label: str
    loads: dict[int, int]
    seconds: float
    computing: float | None = None


@dataclass
class Wait:
    """What happened while replies were waited for. Seconds are the arrival source's.

    Attributes:
        asked: Nodes that were sent a message, in order; those held back first are among them once sent.
        held_back: Nodes that still owed a reply when the phase began.
        never_sent: Nodes that were held back to the end.
        unread: Nodes whose reply was in, but was not needed. Real engines bring replies with their arrival:
            there everything is read.
        late: (node, label of the phase it answers, what went wrong) of replies to earlier phases that came in
            meanwhile; the third is empty unless the reply is an error.
        lapsed: Nodes whose debt was given up on.
        joined: Nodes that came while the phase was under way, and were asked then.
        restarted: Nodes that were started again while they owed a reply, which is lost.
        times: How long each reply took that came in meanwhile, of this phase or an earlier one; not of errors.
        owing: How long each node that still owes a reply has had its message.
        bytes_down, bytes_up: Payload sent, and payload of the replies that were read.
        seconds: From the first message to the end of waiting.
        ended: "decoded", "hopeless", "answered" (nobody is left) or "timed out".
    """

    asked: list[int] = field(default_factory=list)
    held_back: list[int] = field(default_factory=list)
    never_sent: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    late: list[tuple[int, str, str]] = field(default_factory=list)
    lapsed: list[int] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)
    restarted: list[int] = field(default_factory=list)
    times: list[JobTime] = field(default_factory=list)
    owing: list[JobTime] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    ended: str = "answered"


class StopRule(Protocol):
    """Decides when a phase has what it needs."""

    label: str

    @property
    def wake_at(self) -> float | None:
        """When, in the source's seconds, to offer idle nodes work again though nothing has come in; None: never."""

    @property
    def decided(self) -> bool:
        """Whether the replies read so far suffice."""

    def arrived(self, arrival: Arrival) -> None:
        """A reply of this phase is in, not read yet."""

    def next_message(self, node: int, held: Message | None, now: float) -> Message | None:
        """What to send a node that is free; None: nothing.

        `held` is what was to be sent to it when the phase began, the first time that it is free in this phase.
        """

    def join(self, node: int) -> Message | None:
        """What to send a node that has come since the phase began; None: nothing."""

    def restarted(self, node: int) -> None:
        """The node was started again: what it was working on in this phase, or before, is lost."""

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Which of the replies that are in, but not read yet, to read now.

        None of them while they do not suffice; those that are needed once they do. At the end of waiting
        (`final`) those that are of use although they do not suffice.
        """

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Whether they would not suffice even with those of `nodes`, all that may still come."""

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Read a reply, `at` seconds after the phase began; None: there is none, because of `arrival.failure`."""

    def finish(self, wait: Wait) -> list[Message]:
        """Waiting is over: what `send_and_receive` returns."""


class CountRule:
    """Stop after a number of good replies: what dropping the slowest clients means."""

    wake_at = None

    def __init__(self, enough: int | None, *, label: str = "") -> None:
        self.label = label
        self._enough = enough
        self._replies: list[Message] = []
        self._good = 0
        self.wait = Wait()

    @property
    def decided(self) -> bool:
        """Whether enough good replies are in."""
        return self._enough is not None and self._good >= self._enough

    def arrived(self, arrival: Arrival) -> None:
        """Nothing to do."""

    def next_message(self, node: int, held: Message | None, now: float) -> Message | None:
        """Its one message."""
        return held

    def join(self, node: int) -> Message | None:
        """Nothing: the strategy chose whom to ask."""
        return None

    def restarted(self, node: int) -> None:
        """Nothing to do."""

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """The first that are enough, if all are good."""
        missing = len(arrivals) if self._enough is None else self._enough - self._good
        return list(arrivals[:missing]) if final or len(arrivals) >= missing else []

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Never: fewer replies than wished are still worth having."""
        return False

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Keep the reply; errors do not count."""
        if reply is not None:
            self._replies.append(reply)
            self._good += not reply.has_error()

    def finish(self, wait: Wait) -> list[Message]:
        """All replies that were read, errors too, as Flower's grids return them."""
        self.wait = wait
        return self._replies
