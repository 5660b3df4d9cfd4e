"""Ways to run rounds, as values: who computes what, and when a round may end. What a planner compares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..codes import check_count, check_tolerance, fractional_repetition
from ..errors import InvalidSetting

__all__ = [
    "Scheme",
    "any_code",
    "drop_slowest",
    "over_selection",
    "partial_work",
    "repetition",
    "wait_for_all",
]


@dataclass(frozen=True)
class Scheme:
    """One way to run rounds of n workers.

    Attributes:
        name: For people.
        blocks: For each worker the shards that it holds, and that a coded reply covers.
        enough: A round ends with this many replies; None: as soon as each group has m of them, or, with
            `shardwise`, each shard a copy.
        groups: Workers that hold the same block.
        s: Straggler tolerance; of a scheme that is not exact, how many workers are left out.
        m: Replies are m times shorter.
        shardwise: One shard a message, handed out as workers become free.
        patience: See `GradientCoding`.
        exact: Whether a round is the full-participation update.
        python: The lines that make it a strategy; `strategy` is the wrapped one.
    """

    name: str
    blocks: tuple[tuple[int, ...], ...]
    enough: int | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    s: int = 0
    m: int = 1
    shardwise: bool = False
    patience: float = 0.0
    exact: bool = True
    python: str = ""

    @property
    def n(self) -> int:
        """Number of workers."""
        return len(self.blocks)

    @property
    def k(self) -> int:
        """Number of shards."""
        return 1 + max(shard for block in self.blocks for shard in block)

    @property
    def loads(self) -> NDArray[np.int64]:
        """Shards that each worker holds, shape (n,)."""
        return np.array([len(block) for block in self.blocks])

    @property
    def table(self) -> NDArray[np.int64]:
        """Groups as rows of one array, shape (groups, largest group); n fills up smaller ones."""
        width = max(map(len, self.groups))
        return np.array([[*group, *[self.n] * (width - len(group))] for group in self.groups])


def wait_for_all(n: int) -> Scheme:
    """Plain FedAvg: everybody trains their own shard, and everybody is waited for."""
    n = check_count(n, "n")
    return Scheme("wait for all", _own(n), enough=n, python="strategy  # no code: plain Flower")


def drop_slowest(n: int, s: int) -> Scheme:
    """Go on with the first n - s replies. Loses the data of whoever is slow."""
    n, s = check_count(n, "n"), check_tolerance(s, n)
    return Scheme(
        f"drop the slowest {s}",
        _own(n),
        enough=n - s,
        s=s,
        exact=False,
        python=f"grid = EarlyStopGrid(grid, stop_after={n - s})",
    )


def over_selection(n: int, factor: float = 1.3) -> Scheme:
    """Ask `factor` times as many as are needed, as production systems do: all n are asked, n / factor waited for."""
    n = check_count(n, "n")
    if not factor >= 1:
        raise InvalidSetting(f"factor={factor} of over-selection must be at least 1.")
    dropped = drop_slowest(n, n - math.ceil(n / factor))
    return replace(dropped, name=f"over-select {factor:.0%}")


def any_code(n: int, s: int) -> Scheme:
    """A code that decodes from any n - s replies, and from no fewer: cyclic repetition, s + 1 shards a worker."""
    n, s = check_count(n, "n"), check_tolerance(s, n)
    return Scheme(
        f"any n - s (cyclic), s = {s}",
        tuple(tuple(sorted((i + j) % n for j in range(s + 1))) for i in range(n)),
        enough=n - s,
        s=s,
        python=f"strategy = GradientCoding(strategy, cyclic_repetition({n}, {s}, rng=np.random.default_rng(0)))",
    )


def repetition(n: int, s: int, *, m: int = 1, order: Sequence[int] | None = None) -> Scheme:
    """Fractional repetition, stopped as soon as every group has m replies."""
    code = fractional_repetition(n, s, m=m, order=order)
    assert code.groups is not None
    return Scheme(
        f"repetition, s = {s}" + (f", m = {m}" if m > 1 else ""),
        tuple(code.shards_of(i) for i in range(n)),
        groups=code.groups,
        s=code.s,
        m=m,
        python=f"strategy = GradientCoding(strategy, {_call(n, s, m, order)})",
    )


def partial_work(n: int, s: int, *, patience: float = 2.0, order: Sequence[int] | None = None) -> Scheme:
    """Fractional repetition, one shard a message (`send="shards"`)."""
    base = repetition(n, s, order=order)
    return replace(
        base,
        name=f"partial work, s = {s}" + _patience(patience),
        shardwise=True,
        patience=patience,
        python=f"strategy = GradientCoding(strategy, {_call(n, s, 1, order)}, send={_send(patience)})",
    )


def _patience(patience: float) -> str:
    """2 is what to take unless there is a reason; 0 starts second copies at once."""
    return "" if patience == 2.0 else ", at once" if patience == 0.0 else f", patience {patience:g}"


def _send(patience: float) -> str:
    return '"shards"' if patience == 2.0 else f"Shards(patience={patience:g})"


def _own(n: int) -> tuple[tuple[int, ...], ...]:
    return tuple((i,) for i in range(n))


def _call(n: int, s: int, m: int, order: Sequence[int] | None) -> str:
    options = (f", m={m}" if m > 1 else "") + (f", order={list(order)}" if order is not None else "")
    return f"fractional_repetition({n}, {s}{options})"
