"""How long a reply takes: a declared split into what is fixed, what grows with the shards, what grows with the bytes.

`Latency` adds up three laws and multiplies them by a fourth. All laws are here too, and in `laws` and `traces`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting
from .laws import (
    Law,
    Marginal,
    bimodal,
    bursty,
    constant,
    device_classes,
    exponential,
    from_quantiles,
    lognormal,
    pareto,
    poisson_stragglers,
    scaled,
    shifted_exponential,
)
from .traces import Fit, fit, read_trace, replay, trace

__all__ = [
    "Fit",
    "Latency",
    "Law",
    "Marginal",
    "Parts",
    "bimodal",
    "bursty",
    "constant",
    "device_classes",
    "exponential",
    "fit",
    "from_quantiles",
    "lognormal",
    "pareto",
    "poisson_stragglers",
    "read_trace",
    "replay",
    "scaled",
    "shifted_exponential",
    "trace",
]

_SLOWDOWN_STREAM = 10**9  # seeds of the parts are below it


@dataclass(frozen=True)
class Parts:
    """Drawn times of n workers over some rounds; each array has shape (rounds, n).

    Attributes:
        fixed: Seconds of a job whatever it holds.
        compute: Seconds a shard.
        transfer: Seconds a megabyte.
    """

    fixed: NDArray[np.float64]
    compute: NDArray[np.float64]
    transfer: NDArray[np.float64]

    def seconds(self, shards: float | NDArray[np.float64], megabytes: float) -> NDArray[np.float64]:
        """Seconds of a job of so many shards and megabytes (both ways), shape (rounds, n)."""
        total = self.fixed.copy()
        for part, amount in ((self.compute, shards), (self.transfer, megabytes)):
            if np.any(amount):
                total += part * amount
        return total


@dataclass(frozen=True)
class Latency:
    """Seconds from send to reply: `slowdown * (fixed + compute * shards + transfer * megabytes)`, four laws.

    A plain number stands for a constant. Evaluating a shard takes `evaluation` times as long as training it. One random
    `slowdown` over constant parts says that a slow moment slows everything down: `Latency(fixed=0.2, compute=0.8,
    slowdown=lognormal())` is a second a shard, 80 % of it compute.
    """

    fixed: Law | float = 0.0
    compute: Law | float = 0.0
    transfer: Law | float = 0.0
    evaluation: float = 0.3
    slowdown: Law | float = 1.0

    def __post_init__(self) -> None:
        for name in ("fixed", "compute", "transfer", "evaluation", "slowdown"):
            value = getattr(self, name)
            if not isinstance(value, Law) and not value >= 0:
                raise InvalidSetting(f"{name}={value} of a latency law must be at least 0.")

    def seconds(
        self, *, seed: int, worker: int, tick: int, shards: float, megabytes: float, evaluating: bool = False
    ) -> float:
        """Seconds until `worker` has answered its `tick`-th job of `shards` shards, `megabytes` both ways."""
        load = shards * (self.evaluation if evaluating else 1.0)
        total = 0.0
        for stream, (part, amount) in enumerate(((self.fixed, 1.0), (self.compute, load), (self.transfer, megabytes))):
            if amount:
                total += _draw(part, seed * 3 + stream, worker, tick) * amount
        return total * self._slowdown(seed, worker, tick) if total else total

    def computing(self, *, seed: int, worker: int, tick: int, shards: float, evaluating: bool = False) -> float:
        """The part of `seconds` that is spent on the shards: what a client would measure."""
        load = shards * (self.evaluation if evaluating else 1.0)
        one = _draw(self.compute, seed * 3 + 1, worker, tick) * load if load else 0.0
        return one * self._slowdown(seed, worker, tick) if one else one

    def parts(self, *, seed: int, n: int, rounds: int) -> Parts:
        """What workers 0..n-1 draw in training rounds 1..`rounds`, as a virtual clock with this seed does."""
        slow = self._table(self.slowdown, _SLOWDOWN_STREAM + seed, n, rounds)
        laws = (self.fixed, self.compute, self.transfer)
        tables = [self._table(law, seed * 3 + stream, n, rounds) for stream, law in enumerate(laws)]
        # What takes no time takes none however slow a worker is, one that never answers included.
        return Parts(*(np.multiply(slow, table, out=np.zeros_like(slow), where=table > 0) for table in tables))

    def marginal(self, worker: int, *, shards: float, megabytes: float) -> Marginal | None:
        """The distribution of `seconds` of a training job, if at most one law is random and it is known; else None."""
        amounts = ((self.fixed, 1.0), (self.compute, shards), (self.transfer, megabytes))
        used = [(law, amount) for law, amount in amounts if amount and not (isinstance(law, float | int) and not law)]
        random = [(law, amount) for law, amount in used if isinstance(law, Law)]
        certain = sum(float(law) * amount for law, amount in used if not isinstance(law, Law))
        if isinstance(self.slowdown, Law):
            if random or self.slowdown.marginal is None:
                return None
            return self.slowdown.marginal(worker).times(certain) if certain else Marginal.of_values([0.0])
        if len(random) > 1 or any(law.marginal is None for law, _ in random):
            return None
        if not random or not self.slowdown:
            return Marginal.of_values([certain * self.slowdown])
        law, amount = random[0]
        assert law.marginal is not None
        return law.marginal(worker).times(amount).plus(certain).times(self.slowdown)

    def _slowdown(self, seed: int, worker: int, tick: int) -> float:
        return _draw(self.slowdown, _SLOWDOWN_STREAM + seed, worker, tick)

    @staticmethod
    def _table(law: Law | float, seed: int, n: int, rounds: int) -> NDArray[np.float64]:
        if not isinstance(law, Law):
            return np.full((rounds, n), float(law))
        # Tick 2 t is training in round t.
        return np.array([[law.draw(seed, worker, 2 * t) for worker in range(n)] for t in range(1, rounds + 1)])


def _draw(law: Law | float, seed: int, worker: int, tick: int) -> float:
    return law.draw(seed, worker, tick) if isinstance(law, Law) else float(law)
