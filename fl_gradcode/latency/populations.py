"""Named populations of clients, whose latencies follow published measurements; for planning without measured times.

A healthy client takes about one second a round (1.75 seconds for serverless). The rest follows the measurements that
each function names.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InvalidSetting
from .latency import Latency
from .laws import (
    Law,
    bimodal,
    bursty,
    constant,
    device_classes,
    exponential,
    from_quantiles,
    lognormal,
    pareto,
    shifted_exponential,
)

__all__ = ["POPULATIONS", "named", "phones", "serverless", "virtual_machines"]

# Single-precision CPU score of 333 phones of AI-Benchmark, as FLASH (Yang et al., "Characterizing impacts of
# heterogeneity in federated learning upon large-scale smartphone data", WWW 2021) publishes it: quantiles 0.05,
# 0.15, ..., 0.95.
_PHONE_SCORES = (218, 311, 568, 1142, 1445, 1636, 1926, 2154, 3062, 3691)
_MEDIAN_SCORE = 1548
# Seconds for one megabyte in each direction over the 19 network links measured by the same source, at the same
# quantiles.
_LINK_SECONDS = (0.250, 0.300, 0.361, 0.469, 0.510, 0.535, 0.578, 0.655, 0.747, 1.752)


def serverless() -> Latency:
    """Returns the latency of 256 serverless workers, measured over 208,640 calls, one a worker and round.

    The distribution is the same for all workers, has a heavy tail, and is almost memoryless. The median is
    0.639 + 1.127 x load seconds. Relative to the median of the round, the 95th percentile is 1.25x, the 99th is 1.68x,
    the 99.9th is 16x, and the maximum is 42x; 0.19 % of the calls are above 10x. The fastest calls were not published,
    and are assumed to take 0.8x, as if the centre were symmetric.
    """
    law = from_quantiles(
        [0.0, 0.5, 0.95, 0.99, 0.9981, 0.999, 1 - 1 / 208640],
        [0.8, 1.0, 1.25, 1.68, 10.0, 16.0, 42.0],
        name="serverless",
    )
    return Latency(fixed=0.639, compute=1.127, slowdown=law)


def virtual_machines(compute: float = 0.8) -> Latency:
    """Returns the latency of 10 to 15 virtual machines, of which one at a time is slow for tens of rounds.

    A slow machine takes 11 times as long (10 to 12 were measured). The share of slow rounds is 5 % (2 to 9 % were
    measured), and a slow round is followed by another one with probability 0.95 (0.74 to 1.0). In addition, there is
    lognormal jitter with sigma 0.1. A tick of the law is half a round.
    """
    stay, share = 0.95, 0.05
    leave = 1 - stay**0.5
    return _split(bursty(leave * share / (1 - share), leave, 11.0, jitter=0.1), compute)


def phones(compute: float = 0.8, *, scores: ArrayLike | None = None, links: ArrayLike | None = None) -> Latency:
    """Returns the latency of phones, each of which permanently has a measured CPU speed and network link.

    Args:
        compute: Fraction of a median phone's second that is compute.
        scores: CPU scores of devices, shape (devices,); by default quantiles of 333 phones.
        links: Seconds for one megabyte in each direction, shape (links,); by default quantiles of 19 links.
    """
    table = np.asarray(_PHONE_SCORES if scores is None else scores, dtype=np.float64)
    if not table.size or not (np.isfinite(table) & (table > 0)).all():
        raise InvalidSetting("Scores of devices must be finite numbers above 0.")
    middle = _MEDIAN_SCORE if scores is None else float(np.median(table))
    _check_share(compute)
    speed = device_classes(compute * middle / table, name="phones") if compute else 0.0
    link = device_classes(
        np.asarray(_LINK_SECONDS if links is None else links, float) / 2, name="links"
    )  # halved, since a table entry covers a megabyte in both directions
    return Latency(fixed=1 - compute, compute=speed, transfer=link, slowdown=lognormal(1.0, 0.1))


def _split(law: Law, compute: float) -> Latency:
    _check_share(compute)
    return Latency(fixed=1 - compute, compute=compute, slowdown=law)


def _check_share(compute: float) -> None:
    if not 0 <= compute <= 1:
        raise InvalidSetting(f"compute={compute}: the share of a second that is compute must lie in 0..1.")


#: Name -> function from the fraction of compute to a Latency. Serverless workers have a measured fraction.
POPULATIONS: dict[str, Callable[[float], Latency]] = {
    "none": lambda compute: _split(constant(1.0), compute),
    "lognormal": lambda compute: _split(lognormal(1.0, 0.3), compute),
    "exponential": lambda compute: _split(exponential(1.0), compute),
    "shifted-exponential": lambda compute: _split(shifted_exponential(0.5, 0.5), compute),
    "pareto": lambda compute: _split(pareto(1.5, 0.5), compute),
    "bimodal": lambda compute: _split(bimodal(0.05, 10.0, jitter=0.1), compute),
    "serverless": lambda compute: serverless(),
    "virtual-machines": virtual_machines,
    "phones": phones,
}


def named(name: str, compute: float = 0.8) -> Latency:
    """Returns the latency of a named population.

    Args:
        name: One of `POPULATIONS`.
        compute: Fraction of a healthy client's second that grows with the number of shards.

    Raises:
        InvalidSetting: There is no such population. The message lists them.
    """
    if name not in POPULATIONS:
        raise InvalidSetting(f"There is no law {name!r}; choose one of {', '.join(POPULATIONS)}, or give a file.")
    _check_share(compute)
    return POPULATIONS[name](compute)
