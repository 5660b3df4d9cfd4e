"""Named populations of clients: latencies shaped by published measurements, to plan with before there are own ones.

A healthy client takes about a second a round (a second and three quarters, serverless), the rest follows the facts that
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
# Seconds for a megabyte down and one up over the 19 measured links of the same source: the same quantiles.
_LINK_SECONDS = (0.250, 0.300, 0.361, 0.469, 0.510, 0.535, 0.578, 0.655, 0.747, 1.752)


def serverless() -> Latency:
    """256 serverless workers called once a round, 208,640 times: a common heavy tail, nearly without memory.

    0.639 + 1.127 x load seconds at the median; around the round's median p95 is 1.25x, p99 1.68x, p99.9 16x, the
    largest 42x; 0.19 % of the calls are above 10x. How far the fastest are below the median was not published: taken
    as the mirror image of the centre (0.8x).
    """
    law = from_quantiles(
        [0.0, 0.5, 0.95, 0.99, 0.9981, 0.999, 1 - 1 / 208640],
        [0.8, 1.0, 1.25, 1.68, 10.0, 16.0, 42.0],
        name="serverless",
    )
    return Latency(fixed=0.639, compute=1.127, slowdown=law)


def virtual_machines(compute: float = 0.8) -> Latency:
    """10 to 15 virtual machines: one is 10 to 12 times slower for tens of rounds, then another.

    Base rate 5 % (2 to 9 % were measured), a slow round is followed by a slow one with probability 0.95 (0.74 to 1.0),
    11 times slower; lognormal jitter 0.1 besides. A law's tick is half a round.
    """
    stay, share = 0.95, 0.05
    leave = 1 - stay**0.5
    return _split(bursty(leave * share / (1 - share), leave, 11.0, jitter=0.1), compute)


def phones(compute: float = 0.8, *, scores: ArrayLike | None = None, links: ArrayLike | None = None) -> Latency:
    """Phones: compute as slow as the device's benchmark score says, for good, and a measured link, for good.

    Args:
        compute: Share of a median phone's second that is compute.
        scores: CPU scores of devices, shape (devices,); by default quantiles of 333 phones.
        links: Seconds for a megabyte down and one up, shape (links,); by default quantiles of 19.
    """
    table = np.asarray(_PHONE_SCORES if scores is None else scores, dtype=np.float64)
    if not table.size or not (np.isfinite(table) & (table > 0)).all():
        raise InvalidSetting("Scores of devices must be finite numbers above 0.")
    middle = _MEDIAN_SCORE if scores is None else float(np.median(table))
    _check_share(compute)
    speed = device_classes(compute * middle / table, name="phones") if compute else 0.0
    link = device_classes(
        np.asarray(_LINK_SECONDS if links is None else links, float) / 2, name="links"
    )  # of one megabyte, either way
    return Latency(fixed=1 - compute, compute=speed, transfer=link, slowdown=lognormal(1.0, 0.1))


def _split(law: Law, compute: float) -> Latency:
    _check_share(compute)
    return Latency(fixed=1 - compute, compute=compute, slowdown=law)


def _check_share(compute: float) -> None:
    if not 0 <= compute <= 1:
        raise InvalidSetting(f"compute={compute}: the share of a second that is compute must lie in 0..1.")


#: name -> (share of compute) -> Latency. Serverless workers have their own split.
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
    """The population of that name.

    Args:
        name: One of `POPULATIONS`.
        compute: Share of a healthy client's second that grows with the number of shards.

    Raises:
        InvalidSetting: Naming those that there are.
    """
    if name not in POPULATIONS:
        raise InvalidSetting(f"There is no law {name!r}; choose one of {', '.join(POPULATIONS)}, or give a file.")
    _check_share(compute)
    return POPULATIONS[name](compute)
