"""For which splits of a job's time a verdict holds: the share that grows with the shards is often only assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..latency import Parts
from .schemes import Scheme
from .simulation import coded_rounds

__all__ = ["SHARES", "ShareRange", "at_shares", "range_of"]

#: Shares for which coded schemes are simulated.
SHARES = (0.0, 0.05, *(round(0.1 * step, 1) for step in range(1, 11)))


@dataclass(frozen=True)
class ShareRange:
    """The shares of compute for which a verdict holds.

    Attributes:
        low: Smallest share, among `SHARES`.
        high: Largest share.
        below: What is right for smaller shares; None if the verdict holds for all of them.
        above: The same for larger shares.
    """

    low: float
    high: float
    below: str | None
    above: str | None


def at_shares(scheme: Scheme, draws: Sequence[Parts], first: int, megabytes: float) -> NDArray[np.float64]:
    """Returns the mean seconds of a round with each of `SHARES`, shape (shares,).

    The seconds of a job of one shard stay the same, so waiting for all and partial work take as long with every share.

    Args:
        scheme: A scheme that is not `shardwise`.
        draws: Drawn times of runs.
        first: Round from which on the rounds count; a run settles before.
        megabytes: Megabytes of a message and its reply.
    """
    means = np.zeros(len(SHARES))
    load = scheme.loads.astype(np.float64)
    share = np.array(SHARES)[:, None, None]
    for parts in draws:
        durations = (parts.fixed + parts.compute) * (1 - share + share * load)
        if megabytes:
            durations = durations + parts.transfer * megabytes
        means += [run.seconds[first:].mean() for run in coded_rounds(scheme, durations)]
    return np.asarray(means / len(draws))


def range_of(share: float, holds: Sequence[bool], instead: Sequence[str]) -> ShareRange | None:
    """Returns the range around a share; None if the verdict does not hold at the share nearest to it.

    Args:
        share: The share that the plan used.
        holds: Whether the verdict holds at each of `SHARES`.
        instead: What is right at each of them.
    """
    at = int(np.argmin(np.abs(np.array(SHARES) - share)))
    if not holds[at]:
        return None
    low = high = at
    while low > 0 and holds[low - 1]:
        low -= 1
    while high < len(SHARES) - 1 and holds[high + 1]:
        high += 1
    return ShareRange(
        SHARES[low],
        SHARES[high],
        instead[low - 1] if low else None,
        instead[high + 1] if high < len(SHARES) - 1 else None,
    )
