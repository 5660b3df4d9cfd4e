"""Codes for data as they lie: nodes are asked what they hold, and the code is built for that."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from .._text import listed, numbered
from ..codes import GradientCode, check_count, for_assignment
from ..errors import InvalidSetting, RoundFailed, UnsuitableApp, VersionMismatch
from ..grid import Arrival, EarlyStopGrid, StopRule, Wait
from ..placement import WITHHELD
from ..protocol import Reply, probe_content, rejection_of
from .workers import WorkerRegistry

__all__ = ["Discovered", "Holdings", "discover"]


@dataclass(frozen=True)
class Discovered:
    """Instead of a code: make it for the shards that nodes report to hold.

        strategy = GradientCoding(FedAvg(), Discovered(k=12, s=1))

    Each SuperNode says what it holds in its node config: `shards-dir`, a folder that `fl-gradcode place` wrote, or
    `shards="0,3,7"`. Nodes may join, leave and return between rounds; the code is made anew for whoever is there, the
    same one for the same holdings.

    Attributes:
        k: Number of shards, numbered from 0.
        s: Straggler tolerance that is wished for. Where a shard has fewer than s + m holders, the code tolerates as
            many as it can, and a warning names the shards that lack holders.
        m: Upload reduction that is wished for; 1 where holders do not suffice.
    """

    k: int
    s: int = 1
    m: int = 1

    def __post_init__(self) -> None:
        check_count(self.k, "k")
        check_count(self.m, "m")
        if self.s < 0 or self.s % 1:
            raise InvalidSetting(f"s={self.s} must be a whole number of at least 0.")


class Holdings:
    """Who holds what, as nodes have told.

    Args:
        wish: What code is wanted.
        digests: Shard -> SHA-256 that its data must have, where that is known.
    """

    def __init__(self, wish: Discovered, digests: Mapping[int, str] | None = None) -> None:
        self.wish = wish
        #: Shard -> the SHA-256 that its data must have; None: none is known.
        self.required = dict(digests) if digests else None
        #: Worker -> shard -> SHA-256 of its data; empty: not told.
        self.told: dict[int, dict[int, str]] = {}

    def learn(self, worker: int, shards: Mapping[int, str]) -> None:
        """A worker says what it holds, now."""
        self.told[worker] = dict(shards)

    def held(self, workers: Collection[int] | None = None) -> dict[int, tuple[int, ...]]:
        """Worker -> what counts of what it holds: shards of other data than the other holders' do not."""
        right = self._right()
        return {
            worker: tuple(sorted(j for j, digest in shards.items() if j in right and self._counts(j, digest, right[j])))
            for worker, shards in sorted(self.told.items())
            if workers is None or worker in workers
        }

    def wrong(self) -> dict[int, list[int]]:
        """Worker -> shards that do not count, since they are of other data, or do not exist."""
        counted = self.held()
        found = {worker: sorted({*shards} - {*counted[worker]}) for worker, shards in self.told.items()}
        return {worker: shards for worker, shards in sorted(found.items()) if shards}

    def holders(self, workers: Collection[int] | None = None) -> dict[int, list[int]]:
        """Shard -> who holds it."""
        found: dict[int, list[int]] = {shard: [] for shard in range(self.wish.k)}
        for worker, shards in self.held(workers).items():
            for shard in shards:
                found[shard].append(worker)
        return found

    def lacking(self, workers: Collection[int] | None = None) -> dict[int, list[int]]:
        """Shards with fewer holders than wished for, and who these are."""
        least = self.wish.s + self.wish.m
        return {shard: who for shard, who in self.holders(workers).items() if len(who) < least}

    def code(self, workers: Collection[int] | None = None) -> GradientCode | None:
        """The code for these workers (all by default); None: some shard has no holder.

        The same holdings give the same code, whatever was before. Its rows are numbered as the workers; whoever does
        not hold anything, or is not there, has an empty one.
        """
        held = {worker: shards for worker, shards in self.held(workers).items() if shards}
        fewest = min(map(len, self.holders(workers).values()))
        if fewest == 0:
            return None
        m = self.wish.m if fewest >= self.wish.m else 1
        s = min(self.wish.s, fewest - m, len(held) - 1)
        return _code(held, self.wish.k, s, m)

    def told_lacking(self, workers: Collection[int] | None = None) -> str:
        """For people: which shards lack holders, who has them, and what to do; empty: none does."""
        lacking = self.lacking(workers)
        if not lacking:
            return ""
        least = self.wish.s + self.wish.m
        wanted = f"s={self.wish.s}" + (f" at m={self.wish.m}" if self.wish.m > 1 else "")
        named = [
            f"shard {shard} has {len(who)} ({', '.join(map(str, who)) or 'nobody'})" for shard, who in lacking.items()
        ]
        return f"{wanted} needs {least} holders of each shard: {listed(named, 6)}. Place them on further nodes."

    def _counts(self, shard: int, digest: str, right: str) -> bool:
        return digest in (WITHHELD, right) or (not digest and shard not in (self.required or {}))

    def _right(self) -> dict[int, str]:
        """Shard -> the digest that counts: the required one, else most holders', of equals the first worker's."""
        right = {}
        for shard in range(self.wish.k):
            digests = [d for _, shards in sorted(self.told.items()) if (d := shards.get(shard)) and d != WITHHELD]
            count = Counter(digests)
            right[shard] = (self.required or {}).get(shard) or max(digests, key=lambda d: count[d], default="")
        return right


def _code(held: Mapping[int, tuple[int, ...]], k: int, s: int, m: int) -> GradientCode:
    """Groups where workers hold the same or nothing in common; else the universal construction."""
    workers = sorted(held)
    pattern = np.zeros((workers[-1] + 1, k), bool)
    for worker, shards in held.items():
        pattern[worker, list(shards)] = True
    blocks: dict[tuple[int, ...], list[int]] = {}
    for worker in workers:
        blocks.setdefault(held[worker], []).append(worker)
    if m == 1 and sum(map(len, blocks)) == k:
        return GradientCode(pattern.astype(float), s, "fractional repetition", tuple(map(tuple, blocks.values())))
    compact = for_assignment(pattern[workers], s=s, m=m, rng=_generator(pattern, s, m))
    B: NDArray[np.float64] = np.zeros((len(pattern), *compact.B.shape[1:]))
    B[workers] = compact.B
    return GradientCode(B, s, compact.name)


def _generator(pattern: NDArray[np.bool_], s: int, m: int) -> np.random.Generator:
    """The same for the same holdings."""
    digest = hashlib.sha256(repr((pattern.shape, s, m)).encode() + np.packbits(pattern).tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


_log = logging.getLogger(__name__)
_GRACE = 3.0  # seconds that further answers are waited for once every shard has its holders
_LEAST_TTL = 600.0


def discover(grid: EarlyStopGrid, holdings: Holdings, registry: WorkerRegistry, timeout: float) -> None:
    """Ask all nodes, those that come meanwhile too, until every shard has the holders wished for, or `timeout` seconds.

    Raises:
        UnsuitableApp: No node can take part; with the reason.
        RoundFailed: Some shard has no holder; or two nodes say that they are the same worker.
    """
    deadline = grid.source.now() + timeout
    rule = _ProbeRule(holdings, registry, grid)
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
        without = numbered("shard", orphans, 11)
        raise RoundFailed(
            f"Nobody holds {without}: {len(holdings.told)} nodes told what they hold within {timeout:g} s. Start "
            f"the nodes that hold them, or lower k={holdings.wish.k}.{' ' + reasons if reasons else ''}"
        )


class _ProbeRule(StopRule):
    """Wait for what nodes say that they hold."""

    label = "probe 0"

    def __init__(self, holdings: Holdings, registry: WorkerRegistry, grid: EarlyStopGrid) -> None:
        self._holdings, self._registry, self._source = holdings, registry, grid.source
        self._node_of: dict[int, int] = {}
        #: Nodes that came while others were waited for.
        self.joined: set[int] = set()
        self.reasons: list[str] = []

    def probe(self, node: int) -> Message:
        """Returns the question."""
        return Message(probe_content(), dst_node_id=node, message_type="train", ttl=_LEAST_TTL, group_id="0")

    @property
    def decided(self) -> bool:
        """Whether every shard has its holders, and others had a moment more."""
        return self.wake_at is not None and self._source.now() >= self.wake_at

    def join(self, node: int) -> Message | None:
        """Returns the same question."""
        self.joined.add(node)
        return self.probe(node)

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Note who it is, and what it holds."""
        if reply is None or reply.has_error():
            self.reasons.append(arrival.failure if reply is None else rejection_of(reply).reason)
            return
        try:
            said = Reply.find_in(reply.content)
        except (ValueError, VersionMismatch) as error:
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
        self._registry.learn(arrival.node, said.worker)
        self._registry.holdings[said.worker] = dict(said.holds)
        self._holdings.learn(said.worker, dict(said.holds))
        if self.wake_at is None and not self._holdings.lacking():
            self.wake_at = self._source.now() + _GRACE

    def finish(self, wait: Wait) -> list[Message]:
        """Nothing is left to do."""
        return []
