"""When to stop waiting: stop rules, and the record of what happened meanwhile.

A rule of your own is a subclass of `StopRule` that says when it is satisfied and what `send_and_receive` returns. This
one stops at the first reply without an error:

    class FirstGood(StopRule):
        def __init__(self) -> None:
            self.reply: Message | None = None

        @property
        def decided(self) -> bool:
            return self.reply is not None

        def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
            if self.reply is None and reply is not None and not reply.has_error():
                self.reply = reply

        def finish(self, wait: Wait) -> list[Message]:
            return [] if self.reply is None else [self.reply]

    grid = EarlyStopGrid(grid)
    grid.expect(FirstGood())
    replies = grid.send_and_receive(messages)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from ..protocol import Rejection
from .arrivals import Arrival

__all__ = ["CountRule", "JobTime", "Late", "StopRule", "Wait"]


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


@dataclass(frozen=True)
class Late:
    """A reply that came after its phase had ended.

    Attributes:
        node: Who sent it.
        label: Of the phase that it answers: "train 3".
        rejection: What went wrong, if it is an error; None: it would have been a good reply.
    """

    node: int
    label: str
    rejection: Rejection | None = None


@dataclass
class Wait:
    """What happened while replies were waited for. Seconds are the arrival source's.

    Attributes:
        asked: Nodes that were sent a message, in order; those held back first are among them once sent.
        held_back: Nodes that still owed a reply when the phase began.
        never_sent: Nodes that were held back to the end.
        unread: Nodes whose reply was in, but was not needed. Real engines bring replies with their arrival:
            there everything is read.
        late: Replies to earlier phases that came in meanwhile.
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
    late: list[Late] = field(default_factory=list)
    lapsed: list[int] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)
    restarted: list[int] = field(default_factory=list)
    times: list[JobTime] = field(default_factory=list)
    owing: list[JobTime] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    ended: str = "answered"


class StopRule(ABC):
    """Decides when a phase has what it needs.

    Only `decided`, `offer` and `finish` have to be written. The rest has defaults that fit a rule which asks every node
    once and reads every reply.

    Attributes:
        label: Name of the phase, for the ledger: "train 3".
        wake_at: When, in the source's seconds, to offer idle nodes work again though nothing has come in; None: never.
    """

    label: str = ""
    wake_at: float | None = None

    @property
    @abstractmethod
    def decided(self) -> bool:
        """Whether the replies read so far suffice."""

    @abstractmethod
    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Read a reply, `at` seconds after the phase began; None: there is none, because of `arrival.failure`."""

    @abstractmethod
    def finish(self, wait: Wait) -> list[Message]:
        """Waiting is over: returns what `send_and_receive` returns."""

    def sent(self, node: int) -> None:
        """A message is on its way to the node, or was refused; called once for each entry of `Wait.asked`."""

    def arrived(self, arrival: Arrival) -> None:
        """A reply of this phase is in, not read yet."""

    def arrived_late(self, late: Late, reply: Message | None) -> None:
        """A reply to an earlier phase is in: it does not count, and may tell something."""

    def next_message(self, node: int, held: Message | None, now: float) -> Message | None:
        """Returns what to send a node that is free; None: nothing.

        `held` is what was to be sent to it when the phase began, the first time that it is free in this phase.
        """
        return held

    def join(self, node: int) -> Message | None:
        """Returns what to send a node that has come since the phase began; None: nothing."""
        return None

    def restarted(self, node: int) -> None:
        """The node was started again: what it was working on in this phase, or before, is lost."""

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns which of the replies that are in, but not read yet, to read now.

        None of them while they do not suffice; those that are needed once they do. At the end of waiting
        (`final`) those that are of use although they do not suffice.
        """
        return list(arrivals)

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Whether they would not suffice even with those of `nodes`, all that may still come."""
        return False


class CountRule(StopRule):
    """Stops after a number of good replies: what dropping the slowest clients means.

    Args:
        enough: So many good replies; None: all.
        label: Name of the phase.
    """

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

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns the first that are enough, if all are good."""
        missing = len(arrivals) if self._enough is None else self._enough - self._good
        return list(arrivals[:missing]) if final or len(arrivals) >= missing else []

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Keep the reply; errors do not count."""
        if reply is not None:
            self._replies.append(reply)
            self._good += not reply.has_error()

    def finish(self, wait: Wait) -> list[Message]:
        """Returns all replies that were read, errors too, as Flower's grids do."""
        self.wait = wait
        return self._replies
