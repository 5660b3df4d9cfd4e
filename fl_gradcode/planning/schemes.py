"""The schemes that the planner compares, as values that say who computes what and when a round may end."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..codes import check_count, check_tolerance, fractional_repetition
from ..errors import InvalidSetting
from .job_times import LEARNED

__all__ = [
    "Scheme",
    "any_code",
    "drop_slowest",
    "over_selection",
    "partial_work",
    "patience_of",
    "repetition",
    "wait_for_all",
]


@dataclass(frozen=True)
class Scheme:
    """A scheme for running rounds of n workers.

    Attributes:
        name: Name for people.
        blocks: For each worker, the shards that it holds and that its coded reply covers.
        enough: Number of replies with which a round ends. With None, a round ends when each group has m replies or,
            with `shardwise`, when each shard has a copy.
        groups: Groups of workers that hold the same block.
        s: Straggler tolerance; for a scheme that is not exact, the number of workers that are dropped.
        m: Upload reduction; replies are m times shorter.
        shardwise: Whether messages ask for one shard each, and are sent as workers become free.
        patience: Patience of second copies, with `shardwise`; see `Shards`.
        exact: Whether a round gives the update of full participation.
        python: Lines of Python that use the scheme; `strategy` is the wrapped strategy.
    """

    name: str
    blocks: tuple[tuple[int, ...], ...]
    enough: int | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    s: int = 0
    m: int = 1
    shardwise: bool = False
    patience: float | Literal["learned"] = 0.0
    exact: bool = True
    python: str = ""

    @property
    def phrase(self) -> str:
        """The name as a sentence takes it, such as "partial work (s = 3, at once)"."""
        scheme, comma, details = self.name.partition(", ")
        return f"{scheme} ({details})" if comma else scheme

    @property
    def meaning(self) -> str:
        """What the scheme does, in a sentence; empty for waiting for all."""
        if not self.exact or not self.s:
            return ""
        kind = self.name.partition(", ")[0]
        if self.shardwise:
            late = "when the first one is late"
            when = f"{late}, by the times that the run has learned" if self.patience == LEARNED else late
            second = "at once" if self.patience == 0 else when
            what = f"a message asks for one shard, and an idle worker begins a second copy of it {second}"
        elif self.groups:
            answers = "one of them has to answer" if self.m == 1 else f"{self.m} of them answer with a part each"
            what = f"the workers of a group store the same shards, and {answers}"
        else:
            what = f"each worker answers with one combination of its shards, and any {self.enough} answers decode"
        return f"{kind[0].upper()}{kind[1:]}: {what}."

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
        """Number of shards that each worker holds, shape (n,)."""
        return np.array([len(block) for block in self.blocks])

    @property
    def amplifies(self) -> bool:
        """Whether decoding amplifies rounding errors, as that of codes without groups does."""
        return self.exact and self.s > 0 and not self.groups

    @property
    def to_paste(self) -> str:
        """Python lines that import what `python` uses, and `python`."""
        used = sorted({*re.findall(r"\b(EarlyStopGrid|GradientCoding|Shards|\w+_repetition)\(", self.python)})
        imports = [f"from fl_gradcode import {', '.join(used)}"] if used else []
        numpy = ["import numpy as np"] if "np." in self.python else []
        return "\n".join([*numpy, *imports, self.python])

    @property
    def table(self) -> NDArray[np.int64]:
        """The groups as rows of one array, shape (groups, largest group), padded with n."""
        width = max(map(len, self.groups))
        return np.array([[*group, *[self.n] * (width - len(group))] for group in self.groups])


def wait_for_all(n: int) -> Scheme:
    """Returns the scheme of plain FedAvg, in which each worker trains its own shard and a round waits for all."""
    n = check_count(n, "n")
    return Scheme("wait for all", _own(n), enough=n, python="strategy  # no code: plain Flower")


def drop_slowest(n: int, s: int) -> Scheme:
    """Returns the scheme that ends a round with the first n - s replies, and loses the data of slow workers."""
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
    """Returns the scheme of over-selection, as in production systems: all n are asked, and n / factor waited for."""
    n = check_count(n, "n")
    if not factor >= 1:
        raise InvalidSetting(f"factor={factor} of over-selection must be at least 1.")
    dropped = drop_slowest(n, n - math.ceil(n / factor))
    return replace(dropped, name=f"over-select {factor:.0%}")


def any_code(n: int, s: int) -> Scheme:
    """Returns the scheme of cyclic repetition, which decodes from any n - s replies, with s + 1 shards a worker."""
    n, s = check_count(n, "n"), check_tolerance(s, n)
    return Scheme(
        f"any n - s (cyclic), s = {s}",
        tuple(tuple(sorted((i + j) % n for j in range(s + 1))) for i in range(n)),
        enough=n - s,
        s=s,
        python=f"strategy = GradientCoding(strategy, cyclic_repetition({n}, {s}, rng=np.random.default_rng(0)))",
    )


def repetition(n: int, s: int, *, m: int = 1, order: Sequence[int] | None = None) -> Scheme:
    """Returns the scheme of fractional repetition, in which a round ends when every group has m replies."""
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


def partial_work(
    n: int, s: int, *, patience: float | Literal["learned"] = 2.0, order: Sequence[int] | None = None
) -> Scheme:
    """Returns the scheme of fractional repetition with one shard a message (`send="shards"`)."""
    base = repetition(n, s, order=order)
    return replace(
        base,
        name=f"partial work, s = {s}" + _patience(patience),
        shardwise=True,
        patience=patience,
        python=f"strategy = GradientCoding(strategy, {_call(n, s, 1, order)}, send={_send(patience)})",
    )


def patience_of(scheme: Scheme) -> float:
    """Returns the patience of second copies as a number; 0 if it is learned, where the number does not count."""
    return 0.0 if isinstance(scheme.patience, str) else scheme.patience


def _patience(patience: float | Literal["learned"]) -> str:
    """Returns the part of a name that tells the patience; it is empty for 2, the default."""
    if patience == LEARNED:
        return ", learned"
    return "" if patience == 2.0 else ", at once" if patience == 0.0 else f", patience {patience:g}"


def _send(patience: float | Literal["learned"]) -> str:
    if patience == LEARNED:
        return f'Shards(patience="{LEARNED}")'
    return '"shards"' if patience == 2.0 else f"Shards(patience={patience:g})"


def _own(n: int) -> tuple[tuple[int, ...], ...]:
    return tuple((i,) for i in range(n))


def _call(n: int, s: int, m: int, order: Sequence[int] | None) -> str:
    options = (f", m={m}" if m > 1 else "") + (f", order={list(order)}" if order is not None else "")
    return f"fractional_repetition({n}, {s}{options})"
