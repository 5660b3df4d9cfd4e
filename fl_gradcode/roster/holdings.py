"""Who holds which shards, as the nodes report it, and the code that is built for it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._text import listed, numbered
from ..codes import GradientCode, check_count, for_assignment
from ..errors import InvalidSetting
from ..placement import WITHHELD

__all__ = ["Discovered", "Holdings"]

_REMEMBERED = 3  # rounds for which the shards of a worker that is gone are kept
_NO_MAJORITY = "no majority"  # stands for the right SHA-256 where votes are tied


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

    Without a manifest, the data of a shard are right if more workers hold them than hold any other data for it. Each
    worker that is there has one vote; of a tie, what was right before stays right, and at first nothing is. So whoever
    runs most holders of a shard decides on its data: with a manifest, its maker does.

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
        self._absent: dict[int, int] = {}  # worker that is not there -> rounds since it was
        self._right: dict[int, str] = {}  # shard -> the SHA-256 that counts, as of the last vote
        self._voted = self._begun = False
        self._changes: list[str] = []

    def learn(self, worker: int, shards: Mapping[int, str]) -> None:
        """Record the shards that a worker reports; they replace its previous report."""
        if self.told.get(worker) == shards and worker not in self._absent:
            return
        self._absent.pop(worker, None)
        self.told[worker] = dict(shards)
        self._voted = False

    def follow(self, there: Mapping[int, Mapping[int, str]]) -> None:
        """Record what the workers that are there report, once a round.

        The vote of a worker that is not there counts no more, and its shards are forgotten after a few rounds.
        """
        for worker, shards in there.items():
            self.learn(worker, shards)
        for worker in [*self.told]:
            if worker not in there:
                self._voted &= worker in self._absent
                self._absent[worker] = self._absent.get(worker, 0) + 1
                if self._absent[worker] > _REMEMBERED:
                    del self.told[worker], self._absent[worker]

    def begin(self) -> None:
        """Note that the nodes that were there at first have reported: of a tie, what is right now stays right."""
        self._begun = True

    def changes(self) -> list[str]:
        """Returns a sentence for each shard of which other data count than before, since the last call."""
        self._vote()
        changes, self._changes = self._changes, []
        return changes

    def held(self, workers: Collection[int] | None = None) -> dict[int, tuple[int, ...]]:
        """Returns worker -> its shards that count; a shard whose data differ from the other holders' does not."""
        right = self._vote()
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
        return f"{wanted} needs {least} holders of each shard: {listed(named, 6)}. Place them on more nodes."

    def _counts(self, shard: int, digest: str, right: str) -> bool:
        return digest in (WITHHELD, right) or (not digest and shard not in (self.required or {}))

    def _vote(self) -> dict[int, str]:
        """Returns shard -> the SHA-256 that counts: the required one, else the one that most workers report."""
        if self._voted:
            return self._right
        self._voted, before = True, self._right if self._begun else {}
        self._right = {}
        for shard in range(self.wish.k):
            voters = {worker: shards[shard] for worker, shards in self.told.items() if shards.get(shard)}
            votes = Counter(d for worker, d in voters.items() if d != WITHHELD and worker not in self._absent)
            most = max(votes.values(), default=0)
            leading = [digest for digest, number in votes.items() if number == most]
            known = before.get(shard, "").replace(_NO_MAJORITY, "")
            right = known if known in leading or not leading else leading[0] if len(leading) == 1 else _NO_MAJORITY
            if self.required and shard in self.required:
                right = self.required[shard]
            elif known not in ("", right) and right:
                holders = [worker for worker, digest in sorted(voters.items()) if digest == right]
                self._changes.append(
                    f"The data that counts as shard {shard} has changed, because most of its holders now report other "
                    f"data: {numbered('worker', holders)}. A manifest would decide which data is right (manifest=)."
                    if holders
                    else f"The holders of shard {shard} report different data, and none is reported by most."
                )
            self._right[shard] = right
        return self._right


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
