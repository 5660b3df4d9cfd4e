"""Before the first round: every node is asked which worker it is and what it holds, and the code is made for that."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from flwr.app import Message

from .arrivals import Arrival
from .discovered import Holdings
from .errors import RoundFailed, UnsuitableApp
from .grid import EarlyStopGrid
from .messages import error_text
from .roster import Roster
from .stop import Wait
from .wire import Reply, probe_content

__all__ = ["discover"]

_log = logging.getLogger(__name__)
_GRACE = 3.0  # seconds that further answers are waited for once every shard has its holders
_LEAST_TTL = 600.0


def discover(grid: EarlyStopGrid, holdings: Holdings, roster: Roster, timeout: float) -> None:
    """Ask all nodes, those that come meanwhile too, until every shard has the holders wished for, or `timeout` seconds.

    Raises:
        UnsuitableApp: No node can take part; with the reason.
        RoundFailed: Some shard has no holder; or two nodes say that they are the same worker.
    """
    deadline = grid.source.now() + timeout
    rule = _ProbeRule(holdings, roster, grid)
    asked: set[int] = set()
    while True:
        nodes = [node for node in grid.get_node_ids() if node not in asked | rule.joined]
        asked.update(nodes)
        if nodes:
            grid.expect(rule)
            left = max(1.0, deadline - grid.source.now())
            grid.send_and_receive([rule.probe(node) for node in nodes], timeout=left)
        if not holdings.lacking() or grid.source.fixed_nodes or grid.source.now() >= deadline:
            break
        time.sleep(0.5)
    wrong = holdings.wrong()
    if wrong:
        worker, shards = next(iter(wrong.items()))
        _log.warning(
            "Worker %d's shards %s do not count: they do not exist, %s.%s",
            worker,
            shards,
            "or hold other data than the other holders'"
            if holdings.required is None
            else "or hold other data than the manifest says, or the node says numbers alone (shards-dir says more)",
            f" The same of workers {[*wrong][1:]}." if len(wrong) > 1 else "",
        )
    if holdings.code() is None:
        reasons = "; ".join(sorted(set(rule.reasons))[:3])
        if not holdings.told and reasons:
            raise UnsuitableApp(f"No client can take part: {reasons}")
        orphans = [shard for shard, who in holdings.holders().items() if not who]
        listed = ", ".join(map(str, orphans[:10])) + (", ..." if len(orphans) > 10 else "")
        raise RoundFailed(
            f"Nobody holds shards {listed}: {len(holdings.told)} nodes told what they hold within {timeout:g} s. Start "
            f"the nodes that hold them, or lower k={holdings.wish.k}.{' ' + reasons if reasons else ''}"
        )


class _ProbeRule:
    """Wait for what nodes say that they hold."""

    label = "probe 0"

    def __init__(self, holdings: Holdings, roster: Roster, grid: EarlyStopGrid) -> None:
        self._holdings, self._roster, self._source = holdings, roster, grid.source
        self._node_of: dict[int, int] = {}
        #: Nodes that came while others were waited for.
        self.joined: set[int] = set()
        self.reasons: list[str] = []
        self.wake_at: float | None = None

    def probe(self, node: int) -> Message:
        """The question."""
        return Message(probe_content(), dst_node_id=node, message_type="train", ttl=_LEAST_TTL, group_id="0")

    @property
    def decided(self) -> bool:
        """Whether every shard has its holders, and others had a moment more."""
        return self.wake_at is not None and self._source.now() >= self.wake_at

    def arrived(self, arrival: Arrival) -> None:
        """Nothing to do."""

    def next_message(self, node: int, held: Message | None, now: float) -> Message | None:
        """Its one message."""
        return held

    def join(self, node: int) -> Message | None:
        """The same question."""
        self.joined.add(node)
        return self.probe(node)

    def restarted(self, node: int) -> None:
        """It is asked again."""

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """All."""
        return list(arrivals)

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Never: every answer helps."""
        return False

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Note who it is, and what it holds."""
        if reply is None or reply.has_error():
            self.reasons.append(arrival.failure if reply is None else error_text(reply))
            return
        try:
            said = Reply.find_in(reply.content)
        except ValueError as error:
            self.reasons.append(str(error))
            return
        if said is None:
            self.reasons.append("no fl-gradcode reply: is gradient_coding_mod among the client's mods?")
            return
        other = self._node_of.setdefault(said.worker, arrival.node)
        if other != arrival.node:
            raise RoundFailed(
                f"Nodes {other} and {arrival.node} both answer as worker {said.worker}. Give each node its own "
                "partition-id."
            )
        if not said.holds:
            self.reasons.append(
                f"worker {said.worker} does not say what it holds: start its SuperNode with --node-config '... "
                f'shards-dir="/path/to/node-{said.worker}"\', or shards="0,3"'
            )
            return
        self._roster.learn(arrival.node, said.worker)
        self._roster.holdings[said.worker] = dict(said.holds)
        self._holdings.learn(said.worker, dict(said.holds))
        if self.wake_at is None and not self._holdings.lacking():
            self.wake_at = self._source.now() + _GRACE

    def finish(self, wait: Wait) -> list[Message]:
        """Nothing is left to do."""
        return []
