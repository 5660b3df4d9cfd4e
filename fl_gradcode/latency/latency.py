"""The latency of a reply, as the sum of a fixed part, a part for each shard, and a part for each megabyte.

`Latency` adds up three laws and multiplies them by a fourth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting
from .laws import (
    Law,
    Marginal,
)

__all__ = ["Latency", "Parts"]

_SLOWDOWN_STREAM = 10**9  # offset of the slowdown's seeds, which keeps them apart from the parts' seeds


@dataclass(frozen=True)
class Parts:
    """The drawn times of n workers over some rounds, each an array of shape (rounds, n).

    Attributes:
        fixed: Seconds of a job that do not depend on its size.
        compute: Seconds for each shard.
        transfer: Seconds for each megabyte.
    """

    fixed: NDArray[np.float64]
    compute: NDArray[np.float64]
    transfer: NDArray[np.float64]

    def seconds(self, shards: float | NDArray[np.float64], megabytes: float) -> NDArray[np.float64]:
        """Returns the seconds of a job with this number of shards and of megabytes (both ways), shape (rounds, n)."""
        total = self.fixed.copy()
        for part, amount in ((self.compute, shards), (self.transfer, megabytes)):
            if np.any(amount):
                total += part * amount
        return total


@dataclass(frozen=True)
class Latency:
    """The seconds from send to reply, as `slowdown * (fixed + compute * shards + transfer * megabytes)`.

    A random `slowdown` with constant parts means that a slow moment slows everything down. For example,
    `Latency(fixed=0.2, compute=0.8, slowdown=lognormal())` takes about a second for one shard, 80 % of it compute.

    Attributes:
        fixed: Law of the seconds that do not depend on the job, or a constant.
        compute: Law of the seconds for each shard, or a constant.
        transfer: Law of the seconds for each megabyte, or a constant.
        evaluation: Time to evaluate a shard, relative to the time to train it.
        slowdown: Law of a factor that applies to all parts, or a constant.
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
        """Returns the seconds until `worker` has answered a job.

        Args:
            seed: Seed of the latencies.
            worker: The worker.
            tick: Number of the job; training in round t is tick 2 t, and evaluation is tick 2 t + 1.
            shards: Number of shards.
            megabytes: Size of the message and the reply together.
            evaluating: Whether the job is an evaluation.
        """
        load = shards * (self.evaluation if evaluating else 1.0)
        total = 0.0
        for stream, (part, amount) in enumerate(((self.fixed, 1.0), (self.compute, load), (self.transfer, megabytes))):
            if amount:
                total += _draw(part, seed * 3 + stream, worker, tick) * amount
        return total * self._slowdown(seed, worker, tick) if total else total

    def computing(self, *, seed: int, worker: int, tick: int, shards: float, evaluating: bool = False) -> float:
        """Returns the part of `seconds` that is spent on the shards, which is what a client would measure."""
        load = shards * (self.evaluation if evaluating else 1.0)
        plain = _draw(self.compute, seed * 3 + 1, worker, tick) * load if load else 0.0
        return plain * self._slowdown(seed, worker, tick) if plain else plain

    def parts(self, *, seed: int, n: int, rounds: int) -> Parts:
        """Returns the times of workers 0..n-1 in training rounds 1..`rounds`, as drawn by a virtual clock.

        Args:
            seed: Seed of the virtual clock.
            n: Number of workers.
            rounds: Number of rounds.
        """
        slow = self._table(self.slowdown, _SLOWDOWN_STREAM + seed, n, rounds)
        laws = (self.fixed, self.compute, self.transfer)
        tables = [self._table(law, seed * 3 + stream, n, rounds) for stream, law in enumerate(laws)]
        # A part of 0 seconds stays 0 for any slowdown, including an infinite one.
        return Parts(*(np.multiply(slow, table, out=np.zeros_like(slow), where=table > 0) for table in tables))

    @property
    def measured_rounds(self) -> int | None:
        """Number of measured rounds after which all times repeat; None if a part is drawn at random."""
        laws = [law for law in (self.fixed, self.compute, self.transfer, self.slowdown) if isinstance(law, Law)]
        tables = [law.table for law in laws if law.table is not None]
        return max(map(len, tables)) if tables and len(tables) == len(laws) else None

    def marginal(self, worker: int, *, shards: float, megabytes: float) -> Marginal | None:
        """Returns the distribution of a training job's `seconds`, or None if more than one law is random.

        The result is also None if the distribution of the random law is not known.
        """
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
        if law.table is not None:
            return law.table[np.arange(rounds) % len(law.table)][:, np.arange(n) % law.table.shape[1]]
        # Tick 2 t is training in round t.
        return np.array([[law.draw(seed, worker, 2 * t) for worker in range(n)] for t in range(1, rounds + 1)])


def _draw(law: Law | float, seed: int, worker: int, tick: int) -> float:
    return law.draw(seed, worker, tick) if isinstance(law, Law) else float(law)
