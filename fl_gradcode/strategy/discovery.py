"""Asks the nodes which shards they hold, and builds a code for that assignment."""

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
from ..grid import SETTLED, Arrival, EarlyStopGrid, StopRule, Wait
from ..placement import WITHHELD
from ..protocol import Reply, probe_content, rejection_of
from .worker_registry import WorkerRegistry

__all__ = ["Discovered", "Holdings", "discover"]


@dataclass(frozen=True)
class Discovered:
    """A request for a code that is built for the shards that nodes report to hold; takes the place of a code.

        strategy = GradientCoding(FedAvg(), Discovered(k=12, s=1))

    Each SuperNode states its shards in its node config, either as `shards-dir`, a folder that `fl-gradcode place`
    wrote, or as `shards="0,3,7"`. Nodes may join, leave and return between rounds. The code is then rebuilt for the
    nodes that are connected; equal holdings always give the same code.

    Attributes:
        k: Number of shards, numbered from 0.
        s: Desired straggler tolerance. If a shard has fewer than s + m holders, the code tolerates as many stragglers
            as it can, and a warning names the shards that lack holders.
        m: Desired upload reduction; 1 is used if there are too few holders.
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
    """Collects which worker holds which shards, as the nodes report it.

    Args:
        wish: The desired code.
        digests: Shard -> SHA-256 that its data must have, as far as known.
    """

    def __init__(self, wish: Discovered, digests: Mapping[int, str] | None = None) -> None:
        self.wish = wish
        #: Shard -> the SHA-256 that its data must have; None if no digests are known.
        self.required = dict(digests) if digests else None
        #: Worker -> shard -> SHA-256 of its data; an empty string if the worker did not report one.
        self.told: dict[int, dict[int, str]] = {}

    def learn(self, worker: int, shards: Mapping[int, str]) -> None:
        """Record the shards that a worker reports; they replace its previous report."""
        self.told[worker] = dict(shards)

    def held(self, workers: Collection[int] | None = None) -> dict[int, tuple[int, ...]]:
        """Returns worker -> its shards that count; a shard whose data differ from the other holders' does not."""
        right = self._right()
        return {
            worker: tuple(sorted(j for j, digest in shards.items() if j in right and self._counts(j, digest, right[j])))
            for worker, shards in sorted(self.told.items())
            if workers is None or worker in workers
        }

    def wrong(self) -> dict[int, list[int]]:
        """Returns worker -> its shards that do not count, because their data differ or the shard does not exist."""
        counted = self.held()
        rest = {worker: sorted({*shards} - {*counted[worker]}) for worker, shards in self.told.items()}
        return {worker: shards for worker, shards in sorted(rest.items()) if shards}

    def holders(self, workers: Collection[int] | None = None) -> dict[int, list[int]]:
        """Returns shard -> the workers that hold it, ascending."""
        holders: dict[int, list[int]] = {shard: [] for shard in range(self.wish.k)}
        for worker, shards in self.held(workers).items():
            for shard in shards:
                holders[shard].append(worker)
        return holders

    def lacking(self, workers: Collection[int] | None = None) -> dict[int, list[int]]:
        """Returns shard -> its holders, for each shard with fewer holders than desired."""
        least = self.wish.s + self.wish.m
        return {shard: who for shard, who in self.holders(workers).items() if len(who) < least}

    def code(self, workers: Collection[int] | None = None) -> GradientCode | None:
        """Returns the code for these workers (all by default), or None if some shard has no holder.

        Equal holdings give the same code, regardless of earlier reports. Its rows are numbered as the workers; a worker
        that is absent or holds nothing has an empty row.
        """
        held = {worker: shards for worker, shards in self.held(workers).items() if shards}
        fewest = min(map(len, self.holders(workers).values()))
        if fewest == 0:
            return None
        m = self.wish.m if fewest >= self.wish.m else 1
        s = min(self.wish.s, fewest - m, len(held) - 1)
        return _code(held, self.wish.k, s, m)

    def told_lacking(self, workers: Collection[int] | None = None) -> str:
        """Returns a sentence that names the shards that lack holders, or an empty string if none does."""
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
        """Returns shard -> the digest that counts: the required one, else the most frequent one, ties to the first."""
        right = {}
        for shard in range(self.wish.k):
            digests = [d for _, shards in sorted(self.told.items()) if (d := shards.get(shard)) and d != WITHHELD]
            count = Counter(digests)
            right[shard] = (self.required or {}).get(shard) or max(digests, key=lambda d: count[d], default="")
        return right


def _code(held: Mapping[int, tuple[int, ...]], k: int, s: int, m: int) -> GradientCode:
    """Returns fractional repetition if any two workers hold equal or disjoint shards, else a universal code."""
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
    """Returns a random generator that depends on the holdings alone."""
    digest = hashlib.sha256(repr((pattern.shape, s, m)).encode() + np.packbits(pattern).tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


_log = logging.getLogger(__name__)
_GRACE = 3.0  # seconds to wait for further answers once every shard has enough holders
_LEAST_TTL = 600.0


def discover(grid: EarlyStopGrid, holdings: Holdings, registry: WorkerRegistry, timeout: float) -> None:
    """Ask all nodes for their shards until every shard has enough holders, for at most `timeout` seconds.

    Nodes that connect in the meantime are asked too.

    Raises:
        UnsuitableApp: No node can take part. The message says why.
        RoundFailed: Some shard has no holder, or two nodes report the same worker number.
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
    wrong = holdings.wrong()
    if wrong:
        worker, shards = next(iter(wrong.items()))
        _log.warning(
            "Worker %d's shards %s do not count: they do not exist, %s.%s",
            worker,
            shards,
            "or their data differ from the other holders'"
            if holdings.required is None
            else "or their data differ from the manifest, or the node reports only numbers (use shards-dir)",
            f" The same of workers {[*wrong][1:]}." if len(wrong) > 1 else "",
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
        self._node_of: dict[int, int] = {}
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
        """Returns no messages, because `offer` has recorded everything."""
        return []
