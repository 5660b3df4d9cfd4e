"""Replies as they come in: the one seam between waiting and time.

`ArrivalSource.next_arrival(deadline)` has two implementations: `polling.PollingArrivals` (threads that pull from a
real grid) and `fl_gradcode.virtual.VirtualGrid` (an event heap on a virtual clock).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

__all__ = ["Arrival", "ArrivalSource", "ForwardingGrid"]


@dataclass(frozen=True)
class Arrival:
    """A reply is in.

    Attributes:
        token: What `push` returned for the message that it answers.
        node: The node that was asked.
        at: When, in the source's seconds.
        reply: The reply where the source has it at hand; None: `fetch` computes it.
        failure: Why there is no reply, and none will come.
        computing: Seconds that the node spent on its shards, where the source knows; else the reply may say.
    """

    token: str
    node: int
    at: float
    reply: Message | None = None
    failure: str = ""
    computing: float | None = None


class ArrivalSource(ABC):
    """Sends messages and reports when each is answered."""

    #: Whether an arrival brings its reply; if not, whoever waits decides which replies are computed.
    immediate: bool = True
    #: Whether the set of nodes is given from the start, as in a simulation; deployed nodes come and go.
    fixed_nodes: bool = False

    @abstractmethod
    def now(self) -> float:
        """The time, in seconds."""

    @abstractmethod
    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Send messages; a token for each, in order, None for one that was refused."""

    @abstractmethod
    def next_arrival(self, deadline: float | None) -> Arrival | None:
        """The next reply to any message, or None at `deadline` (in the source's seconds; None: never)."""

    @abstractmethod
    def fetch(self, arrivals: Sequence[Arrival]) -> list[Message | None]:
        """The replies behind these arrivals, computed as one batch where they are not at hand."""

    def abandon(self, tokens: Iterable[str]) -> None:
        """Nobody will read these replies; their arrival still matters, since it frees the node."""

    def forget(self, token: str) -> None:
        """Stop watching for this reply altogether."""

    def look_anew(self) -> None:
        """Forget what was listed before."""

    def listed(self) -> dict[int, str]:
        """The nodes that are online, as far as looked since `look_anew`, and since when each is active, as text.

        Does not block; empty until it is known, and where nodes are given from the start.
        """
        return {}

    def known_workers(self) -> dict[int, int]:
        """Node -> worker, where the source knows it; empty if the clients have to tell."""
        return {}

    def close(self) -> None:
        """Release threads."""


class ForwardingGrid(Grid):
    """A grid around a grid: everything but sending is passed on."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.inner = grid

    def set_run(self, run: object) -> None:
        """Pass on."""
        self.inner.set_run(run)  # type: ignore[arg-type]  # flwr's Run is not a public name

    @property
    def run(self) -> object:  # type: ignore[override]
        """The inner grid's run."""
        return self.inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message (deprecated in Flower: use `Message`)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Online nodes."""
        return self.inner.get_node_ids()

    def get_nodes(self) -> Iterable[object]:  # type: ignore[override]
        """Online nodes, with what Flower knows of them."""
        return self.inner.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self.inner.pull_messages(message_ids)
