"""Which nodes are there, and which is which worker: learnt from replies, never from node ids, which change."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from .errors import RoundFailed
from .gradient_code import GradientCode
from .wire import Reply

__all__ = ["Roster", "nodes_of_a_phase", "poll_nodes", "wait_for_nodes"]

_log = logging.getLogger(__name__)


class Roster:
    """Node -> worker, as far as known."""

    def __init__(self) -> None:
        #: Worker -> shard -> SHA-256 of its data, as last told under an open plan or by a probe.
        self.holdings: dict[int, dict[int, str]] = {}
        self._worker: dict[int, int] = {}
        self._answered: dict[int, dict[int, set[int]]] = {}  # worker -> round -> nodes

    def worker_of(self, node: int) -> int | None:
        """The worker that this node said it is, or None."""
        return self._worker.get(node)

    @property
    def contested(self) -> bool:
        """Whether two of the nodes that are listed say that they are the same worker: hear both, to name them."""
        return len(set(self._worker.values())) < len(self._worker)

    def learn(self, node: int, worker: int) -> None:
        """A node reported its worker number."""
        self._worker[node] = worker

    def forget(self, node: int) -> None:
        """The node failed: it may be another worker next time, so it gets the whole plan again."""
        self._worker.pop(node, None)

    def answered(self, node: int, worker: int, server_round: int) -> None:
        """A node answered as `worker`.

        Raises:
            RoundFailed: In this round and the one before, the same two nodes answered as the same worker. Once
                is normal (a restarted node has a new id); twice means that two nodes were given one number.
        """
        self.learn(node, worker)
        rounds = self._answered.setdefault(worker, {})
        rounds.setdefault(server_round, set()).add(node)
        both = rounds[server_round] & rounds.get(server_round - 1, set())
        for old in [r for r in rounds if r < server_round - 1]:
            del rounds[old]
        if len(both) > 1:
            named = " and ".join(map(str, sorted(both)[:2]))
            raise RoundFailed(
                f"Nodes {named} both answer as worker {worker}, in rounds {server_round - 1} and {server_round}. "
                "Give each node its own partition-id."
            )

    def keep(self, nodes: Iterable[int]) -> None:
        """Forget nodes that are gone: whoever was one of them may come back as another node."""
        listed = set(nodes)
        self._worker = {node: worker for node, worker in self._worker.items() if node in listed}

    def learn_from(self, node: int, message: Message | None, *, run: str) -> None:
        """Read who a node is off a reply that is not used; an error says only that it may have changed."""
        if message is None:
            return
        if message.has_error():
            self.forget(node)
            return
        with contextlib.suppress(ValueError):
            reply = Reply.find_in(message.content)
            if reply is not None and reply.kind == "probe":
                self.learn(node, reply.worker)
                self.holdings[reply.worker] = dict(reply.holds)
            elif reply is not None and reply.run == run:
                self.answered(node, reply.worker, reply.round)
                if reply.holds:
                    self.holdings[reply.worker] = dict(reply.holds)

    def missing(self, workers: Iterable[int]) -> list[int]:
        """Those of `workers` whose node is not known."""
        known = set(self._worker.values())
        return [i for i in workers if i not in known]


def wait_for_nodes(grid: Grid, code: GradientCode, timeout: float, *, surplus: bool = False) -> None:
    """Wait up to `timeout` seconds for n nodes (0: look once); fewer are enough if the code tolerates it.

    With `surplus` more are fine: after a breakdown nodes that were started again are listed twice for a while.

    Raises:
        RoundFailed: More than n nodes, or fewer than n - s.
    """
    n, s = len(code.active), code.s
    online = len(poll_nodes(grid, timeout, f"{n} nodes", lambda nodes: len(nodes) == n))
    if online > n and not surplus:
        raise RoundFailed(
            f"{online} nodes are online, but the code has n={n} workers. Build the code for {online}, or stop "
            f"{online - n} of them (a node that was just restarted is listed twice for a minute)."
        )
    if online < n - s:
        raise RoundFailed(
            f"{online} nodes are online after {timeout:g} s; the code has n={n} workers and needs at "
            f"least n - s = {n - s}. Start more nodes, or build the code for fewer."
        )
    if online < n:
        _log.warning("Starting with %d of %d nodes; the others count as stragglers.", online, n)


def nodes_of_a_phase(
    grid: Grid, code: GradientCode, timeout: float, hopeless: Callable[[list[int]], bool]
) -> list[int]:
    """The nodes that are online; waits up to `timeout` seconds while they are fewer than n - s and cannot decode.

    An outage would otherwise burn one round after another in no time.
    """
    n = len(code.active)
    least = n - code.s
    wanted = f"at least {least} of {n} nodes"
    return poll_nodes(grid, timeout, wanted, lambda nodes: len(nodes) >= least or not hopeless(nodes))


def poll_nodes(grid: Grid, timeout: float, wanted: str, enough: Callable[[list[int]], bool]) -> list[int]:
    """The nodes that are online; waits up to `timeout` seconds for `enough` of them, and says once what is `wanted`."""
    deadline = time.monotonic() + timeout
    told = False
    while not enough(nodes := list(grid.get_node_ids())) and time.monotonic() < deadline:
        if not told:
            _log.info("Waiting up to %g s for %s; %d are online.", timeout, wanted, len(nodes))
            told = True
        time.sleep(0.5)
    return nodes
