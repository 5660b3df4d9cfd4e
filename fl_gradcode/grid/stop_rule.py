"""Stop rules, which decide when to stop waiting, and the record of a wait.

The rules of coded rounds are `CodedPhase` and `ShardPhase` in strategy/stop_rules, that of coded products is
`ProductRule` in matmul/stop_rule.

To write your own rule, subclass `StopRule` and define when the rule is satisfied and what `send_and_receive` returns.
This rule stops at the first reply without an error:

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
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from ..protocol import Rejection
from .arrivals import Arrival

__all__ = ["CountRule", "JobTime", "Late", "StopRule", "Wait"]


@dataclass(frozen=True)
class JobTime:
    """The time that a node took to answer one message.

    Attributes:
        node: The node.
        label: Label of the phase that asked, such as "train 3".
        loads: Worker -> number of shards, for each worker that the node may be; empty if the message had no plan.
        seconds: Seconds from send to reply, or so far.
        computing: Seconds that the node spent on its shards; None if not known.
    """

    node: int
    label: str
    loads: dict[int, int]
    seconds: float
    computing: float | None = None


@dataclass(frozen=True)
class Late:
    """A reply that arrived after its phase had ended.

    Attributes:
        node: Node that sent it.
        label: Label of the phase that it answers, such as "train 3".
        rejection: Rejection that an error stands for; None if the reply is not an error.
    """

    node: int
    label: str
    rejection: Rejection | None = None


@dataclass
class Wait:
    """The record of the wait for one phase; times are in seconds on the arrival source's clock.

    Attributes:
        asked: Nodes that were sent a message, in order; includes nodes that were held back first.
        held_back: Nodes that still owed a reply when the phase began.
        never_sent: Nodes that were held back until the end.
        unread: Nodes whose reply had arrived but was not needed. In real engines, every arrived reply is read.
        kept: Nodes that owe a reply to this phase which is wanted although it comes after the phase.
        late: Replies to earlier phases that arrived during the wait.
        lapsed: Nodes whose overdue reply was given up.
        joined: Nodes that connected and were asked during the phase.
        restarted: Nodes that restarted while they owed a reply, which is lost.
        times: Time that each reply took that arrived during the wait, to this or an earlier phase; without errors.
        owing: Time so far of each message that is still unanswered.
        bytes_down: Bytes of payload that were sent.
        bytes_up: Bytes of payload in the replies that were read.
        seconds: Seconds from the first message to the end of the wait.
        ended: "decoded", "hopeless", "answered" (no reply is outstanding) or "timed out".
    """

    asked: list[int] = field(default_factory=list)
    held_back: list[int] = field(default_factory=list)
    never_sent: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
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
    """Decides when a phase has enough replies.

    A subclass has to define `decided`, `offer` and `finish`. The other methods have defaults that fit a rule which asks
    every node once and reads every reply.

    Attributes:
        label: Name of the phase in the ledger, such as "train 3".
        wake_at: Time at which to offer idle nodes work again even if nothing has arrived, in seconds on the source's
            clock; None for never.
        linger_until: Time until which to wait on for further replies after the rule has decided; None for not at all.
        keeps_late: Whether replies that arrive after the phase are wanted; if not, a source may save computing them.
    """

    label: str = ""
    wake_at: float | None = None
    linger_until: float | None = None
    keeps_late: bool = False

    @property
    @abstractmethod
    def decided(self) -> bool:
        """Whether the replies read so far suffice."""

    @abstractmethod
    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Read a reply that arrived `at` seconds after the phase began.

        The reply is None if there is none, for the reason in `arrival.failure`.
        """

    @abstractmethod
    def finish(self, wait: Wait) -> list[Message]:
        """End the wait; returns the messages that `send_and_receive` returns."""

    def sent(self, node: int) -> None:
        """Note that a message was sent to the node, or was refused; called once for each entry of `Wait.asked`."""

    def arrived(self, arrival: Arrival) -> None:
        """Note that a reply of this phase has arrived and is not read yet."""

    def arrived_late(self, late: Late, reply: Message | None) -> None:
        """Note that a reply to an earlier phase has arrived; it does not count, but may contain information."""

    def wants(self, late: Late) -> bool:
        """Returns whether a late reply to a phase that kept its replies is to be fetched; True by default."""
        return True

    def next_message(self, node: int, held: Message | None, now: float) -> Message | None:
        """Returns the message for a node that is free, or None.

        The first time that the node is free in this phase, `held` is its message from `send_and_receive`. Later `held`
        is None.
        """
        return held

    def reopens(self) -> bool:
        """Returns whether a node for which there was no message may have one, after replies were read."""
        return True

    def awake(self, nodes: Collection[int], now: float) -> Collection[int]:
        """Returns the idle nodes to offer work again at `wake_at`; all by default."""
        return [*nodes]

    def lost_any(self) -> bool:
        """Returns whether a reply that was read since the last call may have brought the phase nearer to `hopeless`.

        If not, `hopeless` is not asked again, which may take as long as there are nodes.
        """
        return True

    def join(self, node: int) -> Message | None:
        """Returns the message for a node that has connected since the phase began, or None."""
        return None

    def restarted(self, node: int) -> None:
        """Note that the node was restarted, so that any work it had in progress is lost."""

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns the unread replies to read now.

        A rule returns none of them until they suffice, and then those that are needed. At the end of the wait
        (`final`), it returns those that are useful even if they do not suffice.
        """
        return list(arrivals)

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Returns whether the replies cannot suffice even if all of `nodes` answer, which are all that still may."""
        return False


class CountRule(StopRule):
    """Stops after a number of good replies, which drops the slowest clients.

    Args:
        enough: Number of good replies to wait for; None waits for all.
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
        """Returns the first arrivals that are enough if all of them are good replies."""
        missing = len(arrivals) if self._enough is None else self._enough - self._good
        return list(arrivals[:missing]) if final or len(arrivals) >= missing else []

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Keep the reply; an error is kept but does not count as good."""
        if reply is not None:
            self._replies.append(reply)
            self._good += not reply.has_error()

    def finish(self, wait: Wait) -> list[Message]:
        """Returns all replies that were read, including errors, as Flower's grids do."""
        self.wait = wait
        return self._replies
