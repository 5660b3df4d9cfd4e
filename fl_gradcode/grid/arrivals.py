"""The interface through which replies arrive, in real or virtual time.

`ArrivalSource` has two main implementations: `polling.PollingArrivals`, whose threads pull from a real grid, and
`virtual.VirtualGrid`, which keeps an event heap on a virtual clock.
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
    """The arrival of a reply, or the news that none will come.

    Attributes:
        token: Token that `push` returned for the message.
        node: The node that was asked.
        at: Time of the arrival in seconds on the source's clock.
        reply: The reply if the source already has it; None if `fetch` computes it.
        failure: Reason why no reply will come; empty if there is a reply.
        computing: Seconds that the node spent on its shards; None if the source does not know.
    """

    token: str
    node: int
    at: float
    reply: Message | None = None
    failure: str = ""
    computing: float | None = None


class ArrivalSource(ABC):
    """Sends messages and reports when each is answered."""

    #: Whether an arrival contains its reply. If not, the stop rule chooses the replies that `fetch` computes.
    immediate: bool = True
    #: Whether the set of nodes never changes, as in a simulation. Deployed nodes connect and disconnect.
    fixed_nodes: bool = False
    #: Whether nodes may still be missing when the strategy starts. Even a simulation may register them afterwards.
    late_nodes: bool = True

    @abstractmethod
    def now(self) -> float:
        """Returns the time in seconds."""

    @abstractmethod
    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Send messages; returns a token for each, in order, or None for a message that was refused."""

    @abstractmethod
    def next_arrival(self, deadline: float | None) -> Arrival | None:
        """Wait for the next reply to any message; returns None once `deadline` has passed.

        The deadline is in seconds on the source's clock; None means no deadline.
        """

    @abstractmethod
    def fetch(self, arrivals: Sequence[Arrival]) -> list[Message | None]:
        """Returns the replies of these arrivals, computed as one batch if the source does not have them yet."""

    def abandon(self, tokens: Iterable[str]) -> None:
        """Declare that these replies will not be read; their arrival is still reported, because it frees the node."""

    def forget(self, token: str) -> None:
        """Stop watching for this reply, so that its arrival is not reported."""

    def look_anew(self) -> None:
        """Forget the nodes that `listed` knew, because they may be out of date."""

    def listed(self) -> dict[int, str]:
        """Returns node -> text that says since when it is active, for the nodes known to be online.

        The method does not block. The result is empty until the first look after `look_anew` is complete, and always
        empty if `fixed_nodes` is True.
        """
        return {}

    def known_workers(self) -> dict[int, int]:
        """Returns node -> worker if the source knows it; empty if the clients have to report it."""
        return {}

    def close(self) -> None:
        """End the source's threads, if it has any."""


class ForwardingGrid(Grid):
    """A grid that wraps another one, and forwards everything to it except `send_and_receive`."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.inner = grid

    def set_run(self, run: object) -> None:
        """Set the run of the wrapped grid."""
        self.inner.set_run(run)  # type: ignore[arg-type]  # flwr's Run is not a public name

    @property
    def run(self) -> object:  # type: ignore[override]
        """The run of the wrapped grid."""
        return self.inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Returns a new message (deprecated in Flower: use `Message`)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Returns the ids of the online nodes."""
        return self.inner.get_node_ids()

    def get_nodes(self) -> Iterable[object]:  # type: ignore[override]
        """Returns Flower's records of the online nodes."""
        return self.inner.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages through the wrapped grid; returns their ids."""
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies to these messages that the wrapped grid has."""
        return self.inner.pull_messages(message_ids)
