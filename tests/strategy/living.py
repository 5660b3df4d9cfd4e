"""A grid as a SuperLink gives it: nodes come, die and are started again while a round is under way."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_gradcode.grid.arrivals import ForwardingGrid
from fl_gradcode.testing import inside_a_run


@dataclass
class Node:
    """One SuperNode process; what it was asked dies with it."""

    worker: int
    mark: str
    #: Does not answer while it is set.
    silent: bool = False
    #: Its process crashes with each message.
    crashes: bool = False
    inbox: dict[str, Message] = field(default_factory=dict)


class LivingGrid(Grid):
    """Nodes are lent numbers from 100 on; `look` is called at each question for the nodes, and may change them."""

    def __init__(
        self,
        app: ClientApp,
        workers: int,
        *,
        node_config: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self._app, self._n = app, workers
        self._config = node_config or (lambda worker: {"partition-id": worker, "num-partitions": workers})
        self._lock = threading.RLock()
        self._ids, self._starts = itertools.count(100), itertools.count()
        self._messages = itertools.count()
        self.nodes: dict[int, Node] = {}
        #: (node, worker) of each message that was worked off.
        self.done: list[tuple[int, int]] = []
        self.pushed: list[int] = []
        self.look: Callable[[], None] = lambda: None
        for worker in range(workers):
            self.start(worker)

    def start(self, worker: int, node: int | None = None) -> int:
        """A SuperNode starts, under a new id unless one is given (as authentication does)."""
        with self._lock:
            node = next(self._ids) if node is None else node
            self.nodes[node] = Node(worker, f"start {next(self._starts)}")
            return node

    def kill(self, worker: int) -> int:
        """It is no longer listed, and never answers what it was asked."""
        with self._lock:
            (node,) = [node for node, one in self.nodes.items() if one.worker == worker]
            del self.nodes[node]
            return node

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[Any]:
        with self._lock:
            self.look()
            return [SimpleNamespace(node_id=node, last_activated_at=one.mark) for node, one in self.nodes.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        with self._lock:
            ids = []
            for message in messages:
                message_id = f"message-{next(self._messages)}"
                message.metadata.__dict__["_message_id"] = message_id
                node = message.metadata.dst_node_id
                self.pushed.append(node)
                if node in self.nodes:
                    self.nodes[node].inbox[message_id] = message
                ids.append(message_id)
            return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        with self._lock, inside_a_run():
            for message_id in message_ids:
                for node, one in self.nodes.items():
                    if message_id in one.inbox and not one.silent:
                        message = one.inbox.pop(message_id)
                        if one.crashes:
                            replies.append(Message(Error(8, "crashed"), reply_to=message))
                            continue
                        self.done.append((node, one.worker))
                        context = Context(1, node, self._config(one.worker), RecordDict(), {})
                        replies.append(self._app(message, context))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise AssertionError("the coded strategy waits by itself")

    def set_run(self, run: object) -> None:
        """One run only."""

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)

    create_message = ForwardingGrid.create_message
