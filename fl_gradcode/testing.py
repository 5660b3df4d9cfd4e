"""Tools for tests: a check of an app, a grid that runs a ClientApp in this process, and a clock that is set by hand.

    with InProcessGrid(app, num_nodes=6) as grid:
        result = FedAvg().start(grid, arrays, num_rounds=3)

`check_app` tells whether an app keeps the contract of coding. `inside_a_run` allows a `Message` to be built outside of
Flower's engines. The grid enters it by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from ._flower_internals import inside_a_run, number_message
from .appcheck import check_app
from .grid import Arrival, ArrivalSource, ForwardingGrid

__all__ = ["InProcessGrid", "ManualClock", "check_app", "inside_a_run"]

_RAISED = 2  # Flower's error code for an exception in the ClientApp


class ManualClock:
    """A clock that stands still until it is advanced."""

    def __init__(self, start: float = 0.0) -> None:
        self._seconds = start

    def __call__(self) -> float:
        """Returns the time in seconds."""
        return self._seconds

    def advance(self, seconds: float) -> None:
        """Advance the clock by a number of seconds."""
        self._seconds += seconds


class InProcessGrid(Grid, ArrivalSource):
    """A Flower grid whose nodes run in this process, one after another, when their replies are pulled.

    Its clock always shows 0, and replies arrive in the order of the messages. Use the grid as a context manager. Each
    node keeps its own `Context`, so `context.state` lasts over rounds.

    Args:
        app: The ClientApp that all nodes run.
        num_nodes: Number of nodes. Node ids are large numbers in random order, as in the real engines.
        run_config: Contents of `context.run_config`.
        node_config: Function partition-id -> `context.node_config`; by default partition-id and num-partitions.
        tamper: Function (worker, message, reply) -> the reply that the server gets, for tests of bad replies.
        seed: Seed of the node ids.
    """

    immediate = False
    fixed_nodes = True
    late_nodes = False

    def __init__(
        self,
        app: ClientApp,
        num_nodes: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        node_config: Callable[[int], dict[str, Any]] | None = None,
        tamper: Callable[[int, Message, Message], Message] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.app = app
        self.tamper = tamper
        #: Number of messages that each worker has handled.
        self.calls = [0] * num_nodes
        config = node_config or (lambda i: {"partition-id": i, "num-partitions": num_nodes})
        ids = np.random.default_rng(seed).choice(2**31, size=num_nodes, replace=False) + 2**32
        self._worker = {int(node): worker for worker, node in enumerate(ids)}
        self._contexts = {
            node: Context(1, node, config(worker), RecordDict(), dict(run_config or {}))
            for node, worker in self._worker.items()
        }
        self._pending: dict[str, Message] = {}
        self._reported: set[str] = set()
        self._ids = itertools.count()
        self._stack = ExitStack()

    def __enter__(self) -> InProcessGrid:
        """Enter the pretended Flower run in which messages can be built; returns the grid."""
        self._stack.enter_context(inside_a_run())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the pretended run."""
        self._stack.close()

    def known_workers(self) -> dict[int, int]:
        """Returns node -> worker of all nodes."""
        return dict(self._worker)

    def set_run(self, run: object) -> None:
        """Do nothing, because the grid has one run only."""

    @property
    def run(self) -> Any:
        """A stand-in for Flower's run, with a `run_id`."""
        return SimpleNamespace(run_id=1)

    create_message = ForwardingGrid.create_message  # uses nothing of `self`

    def get_node_ids(self) -> Iterable[int]:
        """Returns all nodes, sorted by id, which says nothing about their worker numbers."""
        return sorted(self._worker)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages without running anything; returns their ids."""
        ids = []
        for message in messages:
            message_id = f"message-{next(self._ids)}"
            number_message(message, message_id)
            self._pending[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the nodes that these messages were sent to, and return their replies."""
        messages = [self._pending.pop(i, None) for i in message_ids]
        return [self._answer(message) for message in messages if message is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Run all nodes at once and return their replies; the timeout is ignored, because nothing waits."""
        return list(self.pull_messages(self.push_messages(list(messages))))

    def now(self) -> float:
        """Returns 0.0, because no time passes in this grid."""
        return 0.0

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Store messages without running anything; returns their ids as tokens."""
        return [*self.push_messages(messages)]

    def next_arrival(self, deadline: float | None) -> Arrival | None:
        """Returns an arrival for the oldest message that was not reported yet, or None if there is none."""
        for token, message in self._pending.items():
            if token not in self._reported:
                self._reported.add(token)
                return Arrival(token, message.metadata.dst_node_id, 0.0)
        return None

    def fetch(self, arrivals: Sequence[Arrival]) -> list[Message | None]:
        """Run the nodes behind these arrivals, and return their replies."""
        return list(self.pull_messages([arrival.token for arrival in arrivals]))

    def forget(self, token: str) -> None:
        """Drop the message, so that it never runs."""
        self._pending.pop(token, None)

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        worker = self._worker[node]
        self.calls[worker] += 1
        try:
            reply = self.app(message, self._contexts[node])
        except Exception as error:  # Flower's engines also turn an exception into an error reply
            reply = Message(Error(_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        return reply if self.tamper is None else self.tamper(worker, message, reply)
