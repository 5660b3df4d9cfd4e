"""The stop rule by which the server asks nodes one message of a set-up, and waits for their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flwr.app import Message

from ..errors import VersionMismatch
from ..grid import Arrival, EarlyStopGrid, StopRule, Wait
from ..protocol import rejection_of
from .exchange import Answer, Request

__all__ = ["Asked", "Take"]

#: Takes a node's answer; returns what is wrong with it, or an empty string.
Take = Callable[[int, Answer], str]

_GRACE = 10.0  # seconds to wait for further answers once there are enough
_LEAST_TTL = 600.0


class Asked(StopRule):
    """One message of a set-up: asks nodes, and hands on their answers.

    Args:
        take: Takes an answer.
        label: Name of the phase.
        requests: Node -> what it is asked.
        enough: Number of good answers after which the others have a time of grace; None to wait for all.
        most: Number of good answers after which nobody is waited for; None to wait for all.
        joining: What a node is asked that connects during the wait; None for nothing.
    """

    def __init__(
        self,
        take: Take,
        label: str,
        requests: Mapping[int, Request],
        enough: int | None = None,
        most: int | None = None,
        *,
        joining: Request | None = None,
    ) -> None:
        self.label = label
        self._take, self._requests, self._enough, self._most, self._joining = take, requests, enough, most, joining
        self._good = 0
        self._now: Callable[[], float] = lambda: 0.0
        #: Nodes that have answered, well or not.
        self.answered: list[int] = []
        #: Seconds that the slowest good answer took.
        self.slowest = 0.0
        #: What was wrong with answers, each once.
        self.wrong: list[str] = []

    def run(self, grid: EarlyStopGrid, timeout: float | None) -> None:
        """Ask the nodes, and wait for their answers, for at most `timeout` seconds."""
        if self._requests:
            self._now = grid.source.now
            grid.expect(self)
            messages = [self._message(node, request) for node, request in self._requests.items()]
            grid.send_and_receive(messages, timeout=timeout)

    @property
    def decided(self) -> bool:
        """Whether all are in, or enough are and the time of grace is over."""
        if self._most is not None and self._good >= self._most:
            return True
        return self.wake_at is not None and self._now() >= self.wake_at

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Hand on an answer, or note why there is none."""
        wrong = self._read(arrival, reply)
        self.answered.append(arrival.node)
        if wrong:
            self.wrong = [*dict.fromkeys([*self.wrong, wrong])]
            return
        self._good, self.slowest = self._good + 1, max(self.slowest, at)
        if self.wake_at is None and self._enough is not None and self._good >= self._enough:
            self.wake_at = self._now() + max(_GRACE, 2 * at)

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Returns whether there cannot be enough good answers any more."""
        return self._joining is None and self._enough is not None and self._good + len(nodes) < self._enough

    def finish(self, wait: Wait) -> list[Message]:
        """Returns no messages, because `offer` has handed on everything."""
        return []

    def join(self, node: int) -> Message | None:
        """Returns the message for a node that connected during the wait."""
        return None if self._joining is None else self._message(node, self._joining)

    def _message(self, node: int, request: Request) -> Message:
        return Message(request.content(), dst_node_id=node, message_type="train", ttl=_LEAST_TTL, group_id="0")

    def _read(self, arrival: Arrival, reply: Message | None) -> str:
        if reply is None or reply.has_error():
            return arrival.failure if reply is None else rejection_of(reply).reason
        try:
            return self._take(arrival.node, Answer.find_in(reply.content))
        except (ValueError, VersionMismatch) as error:
            return f"node {arrival.node}: {error}"
