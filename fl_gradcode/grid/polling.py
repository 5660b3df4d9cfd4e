"""Pulls the replies of a real grid in daemon threads, so that a slow upload does not delay other replies."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from ..protocol import without_arrays
from .arrivals import Arrival, ArrivalSource

__all__ = ["PollingArrivals"]

_log = logging.getLogger(__name__)
_MAX_FAILED_PULLS = 10
_SLOWEST_RETRY = 10.0  # most seconds between two pulls after failed ones
#: Rests after a pull for all messages, in times that it took: thousands of messages would keep a core busy otherwise.
_RESTS = 4
_SLOWEST_POLL = 2.0  # most seconds between two pulls for a message that was sent long ago


class PollingArrivals(ArrivalSource):
    """The arrivals of a real grid, pulled by daemon threads.

    `pull_messages` of a deployed grid blocks while a requested reply is still uploading. Each outstanding message
    therefore gets its own thread. A grid with a `pull_interval`, such as the in-memory grid of Flower's simulation,
    never blocks, so one thread pulls for all messages.

    A thread pulls less often the longer its message has been outstanding and the more messages there are. Polling adds
    at most 2 % to the duration of a round. The thread that pulls for all rests four times as long as a pull takes, so
    that it takes a fifth of a core at most.

    Args:
        grid: The engine's grid.
        poll_interval: Seconds between the first pulls for one message.
        clock: Function that returns the time in seconds, used for deadlines.
    """

    immediate = True

    def __init__(self, grid: Grid, *, poll_interval: float = 0.25, clock: Callable[[], float] = time.monotonic) -> None:
        self._grid = grid
        self._interval = poll_interval
        self._clock = clock
        self._arrived: queue.Queue[Arrival] = queue.Queue()
        self._watched: dict[str, int] = {}  # token -> node
        self._abandoned: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._one_thread: threading.Thread | None = None
        self._listed: dict[int, str] = {}
        self._looks = 0  # number of calls of look_anew, to discard looks that began before the last one
        self._looking = False
        self._together = getattr(grid, "pull_interval", None)
        self.fixed_nodes = self._together is not None

    def now(self) -> float:
        """Returns the clock's time in seconds."""
        return self._clock()

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Send messages through the grid and watch for their replies; returns a token for each, None if refused."""
        if not messages:
            return []
        ids = list(self._grid.push_messages(list(messages)))
        if len(ids) != len(messages):  # the in-memory grid omits refused messages, but sets ids in place
            accepted = set(ids)
            ids = [m.metadata.message_id if m.metadata.message_id in accepted else "" for m in messages]
        tokens = [token or None for token in ids]
        for token, message in zip(tokens, messages, strict=True):
            if token is not None:
                self._watch(token, message.metadata.dst_node_id)
        return tokens

    def next_arrival(self, deadline: float | None) -> Arrival | None:
        """Wait for the queue that the threads fill; returns None at the deadline, even if a thread is stuck."""
        while True:
            try:
                return self._arrived.get_nowait()
            except queue.Empty:
                pass
            remaining = None if deadline is None else deadline - self._clock()
            if remaining is not None and remaining <= 0:
                return None
            # Short waits let an injected clock move in between.
            pause = 0.05 if remaining is None else min(remaining, 0.05)
            try:
                return self._arrived.get(timeout=pause)
            except queue.Empty:
                continue

    def fetch(self, arrivals: Sequence[Arrival]) -> list[Message | None]:
        """Returns the replies that the arrivals contain."""
        return [arrival.reply for arrival in arrivals]

    def abandon(self, tokens: Iterable[str]) -> None:
        """Drop the arrays of these replies as they arrive, because the replies stay in memory until the next phase."""
        with self._lock:
            self._abandoned.update(token for token in tokens if token in self._watched)

    def forget(self, token: str) -> None:
        """Stop watching for this reply; its thread ends at its next poll."""
        with self._lock:
            self._watched.pop(token, None)
            self._abandoned.discard(token)

    def look_anew(self) -> None:
        """Forget the listed nodes, including the result of a look that is still running."""
        with self._lock:
            self._listed = {}
            self._looks += 1

    def listed(self) -> dict[int, str]:
        """Returns node -> since when it is active, as of the last look, and starts another look.

        The look runs in a thread, because the underlying call blocks while the SuperLink is down.
        """
        if self.fixed_nodes:
            return {}
        with self._lock:
            begin, self._looking = not self._looking, True
            seen, looks = dict(self._listed), self._looks
        if begin:
            threading.Thread(target=self._look, args=(looks,), daemon=True).start()
        return seen

    def close(self) -> None:
        """Ask all threads to end; a thread that is stuck in a pull ends with the process."""
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

    def _look(self, looks: int) -> None:
        try:
            nodes = {int(n.node_id): str(getattr(n, "last_activated_at", "")) for n in self._grid.get_nodes()}
        except Exception as error:
            _log.debug("Getting the list of nodes failed: %s", error)
            nodes = {}
        with self._lock:
            if nodes and looks == self._looks:
                self._listed = nodes
            self._looking = False

    def _pull_alone(self, token: str) -> None:
        failures, began = 0, time.monotonic()
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
            except BaseException as error:  # Flower's exception for a stopped run is not an Exception
                self._arrive(token, None, f"pulling its reply ended: {type(error).__name__} {error}".strip())
                return
            if replies:
                self._arrive(token, replies[0])
                return
            crowd, old = 0.02 * len(self._watched), min(0.02 * (time.monotonic() - began), _SLOWEST_POLL)
            again = min(self._interval * 2**failures, _SLOWEST_RETRY) if failures else self._interval
            self._closed.wait(max(again, crowd, old))

    def _pull_together(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                tokens = list(self._watched)
                if not tokens:
                    self._one_thread = None
                    return
            began = time.monotonic()
            try:
                for reply in self._grid.pull_messages(tokens):
                    self._arrive(reply.metadata.reply_to_message_id, reply)
            except Exception as error:
                if self._closed.is_set():
                    return
                _log.warning("Pulling replies failed: %s", error)
            shortest = min(self._interval, float(self._together or self._interval))
            self._closed.wait(max(shortest, _RESTS * (time.monotonic() - began)))

    def _arrive(self, token: str, reply: Message | None, failure: str = "") -> None:
        with self._lock:
            node, unwanted = self._watched.pop(token, None), token in self._abandoned
            self._abandoned.discard(token)
        if unwanted and reply is not None and reply.has_content():
            reply.content = without_arrays(reply.content)
        if node is not None:
            self._arrived.put(Arrival(token, node, self._clock(), reply, failure))
