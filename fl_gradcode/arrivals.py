"""Replies as they come in: the one seam between waiting and time.

`ArrivalSource.next_arrival(deadline)` has two implementations: `PollingArrivals` here (threads that pull from a
real grid) and `fl_gradcode.virtual.VirtualGrid` (an event heap on a virtual clock).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

__all__ = ["Arrival", "ArrivalSource", "ForwardingGrid", "PollingArrivals"]

_log = logging.getLogger(__name__)
_MAX_FAILED_PULLS = 10


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


class PollingArrivals(ArrivalSource):
    """Arrivals of a real grid, pulled by daemon threads so that no slow upload holds back finished replies.

    `pull_messages` of a deployed grid blocks while a listed reply is still uploading: each outstanding message
    gets a thread of its own. A grid that states a `pull_interval` (Flower's in-memory grid of the simulation)
    never blocks: one thread pulls for all.

    Args:
        grid: The engine's grid.
        poll_interval: Seconds between two pulls for one message.
        clock: Seconds, for deadlines.
    """

    immediate = True

    def __init__(self, grid: Grid, *, poll_interval: float = 0.25, clock: Callable[[], float] = time.monotonic) -> None:
        self._grid = grid
        self._interval = poll_interval
        self._clock = clock
        self._arrived: queue.Queue[Arrival] = queue.Queue()
        self._watched: dict[str, int] = {}  # token -> node
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._one_thread: threading.Thread | None = None
        self._together = getattr(grid, "pull_interval", None)
        self.fixed_nodes = self._together is not None

    def now(self) -> float:
        """The clock's seconds."""
        return self._clock()

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Send through the grid and start to watch."""
        if not messages:
            return []
        ids = list(self._grid.push_messages(list(messages)))
        if len(ids) != len(messages):  # the in-memory grid leaves out what was refused; ids are set in place
            accepted = set(ids)
            ids = [m.metadata.message_id if m.metadata.message_id in accepted else "" for m in messages]
        tokens = [token or None for token in ids]
        for token, message in zip(tokens, messages, strict=True):
            if token is not None:
                self._watch(token, message.metadata.dst_node_id)
        return tokens

    def next_arrival(self, deadline: float | None) -> Arrival | None:
        """Wait for the queue that the threads fill; the deadline holds whatever the threads are stuck in."""
        while True:
            try:
                return self._arrived.get_nowait()
            except queue.Empty:
                pass
            remaining = None if deadline is None else deadline - self._clock()
            if remaining is not None and remaining <= 0:
                return None
            # Waiting in slices lets an injected clock move while we wait.
            pause = 0.05 if remaining is None else min(remaining, 0.05)
            try:
                return self._arrived.get(timeout=pause)
            except queue.Empty:
                continue

    def fetch(self, arrivals: Sequence[Arrival]) -> list[Message | None]:
        """The replies are at hand."""
        return [arrival.reply for arrival in arrivals]

    def forget(self, token: str) -> None:
        """Its thread ends at the next poll."""
        with self._lock:
            self._watched.pop(token, None)

    def close(self) -> None:
        """Ask all threads to end; one that is stuck in a pull ends with the process."""
        self._closed.set()

    def _watch(self, token: str, node: int) -> None:
        with self._lock:
            self._watched[token] = node
            start_common = self._together is not None and self._one_thread is None
            if start_common:
                self._one_thread = threading.Thread(target=self._pull_together, daemon=True)
                self._one_thread.start()
        if self._together is None:
            threading.Thread(target=self._pull_alone, args=(token,), daemon=True).start()

    def _pull_alone(self, token: str) -> None:
        failures = 0
        while not self._closed.is_set() and token in self._watched:
            try:
                replies = list(self._grid.pull_messages([token]))
                failures = 0
            except Exception as error:
                failures += 1
                _log.warning("Pulling the reply to message %s failed: %s", token, error)
                if failures >= _MAX_FAILED_PULLS:
                    self._arrive(token, None, f"pulling its reply failed {failures} times: {error}")
                    return
                replies = []
            if replies:
                self._arrive(token, replies[0])
                return
            self._closed.wait(max(self._interval, 0.02 * len(self._watched)))

    def _pull_together(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                tokens = list(self._watched)
                if not tokens:
                    self._one_thread = None
                    return
            try:
                for reply in self._grid.pull_messages(tokens):
                    self._arrive(reply.metadata.reply_to_message_id, reply)
            except Exception as error:
                if self._closed.is_set():
                    return
                _log.warning("Pulling replies failed: %s", error)
            self._closed.wait(min(self._interval, float(self._together or self._interval)))

    def _arrive(self, token: str, reply: Message | None, failure: str = "") -> None:
        with self._lock:
            node = self._watched.pop(token, None)
        if node is not None:
            self._arrived.put(Arrival(token, node, self._clock(), reply, failure))
