"""Codes for data as they lie: nodes tell which shards they hold, and the code is made for that."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .border import check_count
from .errors import InvalidSetting
from .gradient_code import GradientCode
from .manifest import WITHHELD
from .universal import for_assignment

__all__ = ["Discovered", "Holdings"]


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
            f"shard {shard} has {len(who)} ({', '.join(map(str, who)) or 'nobody'})"
            for shard, who in [*lacking.items()][:5]
        ]
        more = f", and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        return f"{wanted} needs {least} holders of each shard: {'; '.join(named)}{more}. Place them on further nodes."

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
