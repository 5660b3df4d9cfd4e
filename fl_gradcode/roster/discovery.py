"""Asks the nodes which shards they hold."""

from __future__ import annotations

import logging
import time

from flwr.app import Message

from .._text import listed, numbered, printable
from ..errors import RoundFailed, UnsuitableApp, VersionMismatch
from ..grid import SETTLED, Arrival, EarlyStopGrid, StopRule, Wait
from ..protocol import Reply, probe_content, rejection_of
from .holdings import Holdings
from .worker_registry import WorkerRegistry

__all__ = ["discover"]

_log = logging.getLogger(__name__)
_GRACE = 3.0  # seconds to wait for further answers once every shard has enough holders
_LEAST_TTL = 600.0
_MOST_OF_A_LIST = 200  # characters of the shards that a node reports, which may be many and large numbers


def discover(grid: EarlyStopGrid, holdings: Holdings, registry: WorkerRegistry, timeout: float) -> None:
    """Ask all nodes for their shards until every shard has enough holders, for at most `timeout` seconds.

    Nodes that connect in the meantime are asked too.

    Raises:
        UnsuitableApp: No node can take part. The message says why.
        RoundFailed: Some shard has no holder.
    """
    deadline = grid.source.now() + timeout
    rule = _ProbeRule(holdings, registry, grid)
    asked: set[int] = set()
    newest = time.monotonic()  # a virtual clock stands still here
    while True:
        nodes = [node for node in grid.get_node_ids() if node not in asked | rule.joined]
        asked.update(nodes)
        if nodes:
            grid.expect(rule)
            left = max(1.0, deadline - grid.source.now())
            grid.send_and_receive([rule.probe(node) for node in nodes], timeout=left)
            newest = time.monotonic()
        source, silent = grid.source, time.monotonic() - newest
        settled = source.fixed_nodes and silent >= (SETTLED if asked else timeout)
        if not holdings.lacking() or not source.late_nodes or settled or source.now() >= deadline:
            break
        time.sleep(0.5)
    holdings.begin()
    wrong = holdings.wrong()
    if wrong:
        worker, shards = next(iter(wrong.items()))
        _log.warning(
            "Worker %d's shards [%s] do not count: they do not exist, %s.%s",
            worker,
            printable(listed(shards), _MOST_OF_A_LIST),
            "or their data differ from the other holders'"
            if holdings.required is None
            else "or their data differ from the manifest, or the node reports only numbers (use shards-dir)",
            f" The same applies to {numbered('worker', [*wrong][1:])}." if len(wrong) > 1 else "",
        )
    if holdings.code() is None:
        reasons = "; ".join(sorted(set(rule.reasons))[:3])
        if not holdings.told and reasons:
            raise UnsuitableApp(f"No client can take part: {reasons}")
        orphans = [shard for shard, who in holdings.holders().items() if not who]
        without = numbered("shard", orphans, 11)
        raise RoundFailed(
            f"No node holds {without}: {len(holdings.told)} nodes reported their shards within {timeout:g} s. Start "
            f"the nodes that hold them, or lower k={holdings.wish.k}.{' ' + reasons if reasons else ''}"
        )


class _ProbeRule(StopRule):
    """Waits for the nodes' reports of the shards that they hold."""

    label = "probe 0"

    def __init__(self, holdings: Holdings, registry: WorkerRegistry, grid: EarlyStopGrid) -> None:
        self._holdings, self._registry, self._source = holdings, registry, grid.source
        #: Nodes that connected during the wait.
        self.joined: set[int] = set()
        self.reasons: list[str] = []

    def probe(self, node: int) -> Message:
        """Returns the message that asks a node which shards it holds."""
        return Message(probe_content(), dst_node_id=node, message_type="train", ttl=_LEAST_TTL, group_id="0")

    @property
    def decided(self) -> bool:
        """Whether every shard has enough holders and the grace period is over."""
        return self.wake_at is not None and self._source.now() >= self.wake_at

    def join(self, node: int) -> Message | None:
        """Returns the probe for a node that connected during the wait."""
        self.joined.add(node)
        return self.probe(node)

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Record the worker number and the shards that a reply reports."""
        if reply is None or reply.has_error():
            self.reasons.append(arrival.failure if reply is None else rejection_of(reply).reason)
            return
        try:
            said = Reply.find_in(reply.content)
        except (ValueError, VersionMismatch) as error:
            self.reasons.append(str(error))
            return
        if said is None:
            self.reasons.append("not a reply of fl-gradcode: is gradient_coding_mod among the client's mods?")
            return
        refused = self._registry.claim(arrival.node, said.worker, 0)
        if refused is not None:
            self.reasons.append(f"node {arrival.node}: {refused.reason}")
            _log.warning("Node %d is left out: %s.", arrival.node, refused.reason)
            return
        if not said.holds:
            self.reasons.append(
                f"worker {said.worker} does not say what it holds: start its SuperNode with --node-config '... "
                f'shards-dir="/path/to/node-{said.worker}"\', or shards="0,3"'
            )
            return
        self._registry.holdings[arrival.node] = dict(said.holds)
        self._holdings.learn(said.worker, dict(said.holds))
        if self.wake_at is None and not self._holdings.lacking():
            self.wake_at = self._source.now() + _GRACE

    def finish(self, wait: Wait) -> list[Message]:
        """Returns no messages, because `offer` has recorded everything."""
        return []
