"""Loads that change in a run, or that no replay of single shards can tell: how much `adaptive` may lose by them.

`python -m experiments.bound` prints a line for each, in units of plain rounds, which wait for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg

from experiments.rounds import FOREVER, app
from fl_gradcode import GradientCoding, VirtualGrid, fractional_repetition
from fl_gradcode.latency import Latency, Law, lognormal
from fl_gradcode.planning import steady_rounds, wait_for_all
from fl_gradcode.testing import InProcessGrid

__all__ = ["SCENARIOS", "Scenario", "over_plain"]

N, SWITCH = 12, 20


class _Costly(VirtualGrid):
    """Jobs of several shards take as long as 20 shards, as on nodes whose memory holds one and no more."""

    def shards_of(self, message: Message, worker: int) -> float:
        shards = super().shards_of(message, worker)
        return shards if shards <= 1 else 20.0


@dataclass(frozen=True)
class Scenario:
    """Latency of the nodes over a run.

    Attributes:
        latency: Spread of the noise, the sigma of a lognormal law with mean 1 -> the latency.
        grid: The grid on which it is run.
    """

    latency: Callable[[float], Latency]
    grid: type[VirtualGrid] = VirtualGrid


def _in_rounds(law: Law, first: int, last: int) -> Law:
    """Returns a law that is 0 in all rounds but these."""
    return Law(
        law.name,
        lambda seed, worker, tick: law.draw(seed, worker, tick) if first <= tick // 2 <= last else 0.0,
    )


def _switching(*, compute_first: bool) -> Callable[[float], Latency]:
    def latency(sigma: float) -> Latency:
        noise = lognormal(1.0, sigma)
        before, after = _in_rounds(noise, 0, SWITCH), _in_rounds(noise, SWITCH + 1, 10**9)
        return Latency(fixed=after, compute=before) if compute_first else Latency(fixed=before, compute=after)

    return latency


SCENARIOS: dict[str, Scenario] = {
    f"noise, all compute after round {SWITCH}": Scenario(_switching(compute_first=False)),
    f"all compute, noise after round {SWITCH}": Scenario(_switching(compute_first=True)),
    "several shards cost 20 times one": Scenario(
        lambda sigma: Latency(fixed=0.9, compute=0.1, slowdown=lognormal(1.0, sigma)), _Costly
    ),
}


def over_plain(scenario: Scenario, sigma: float, *, rounds: int = 60, seed: int = 0) -> float:
    """Returns the time of a run with `send="adaptive"` over that of plain rounds with the same draws.

    Args:
        scenario: One of `SCENARIOS`.
        sigma: Spread of the noise.
        rounds: Number of rounds.
        seed: Seed of the latencies.
    """
    latency = scenario.latency(sigma)
    with InProcessGrid(app, N) as inner:
        grid = scenario.grid(inner, latency, seed=seed)
        inside = FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0)
        strategy = GradientCoding(inside, fractional_repetition(N, 2), send="adaptive", verify=0)
        strategy.start(grid, ArrayRecord([np.zeros(1, np.float32)]), rounds, timeout=FOREVER)
    mine = sum(row["train"]["seconds"]["waiting"] for row in strategy.ledger.rows)
    plain = steady_rounds(wait_for_all(N), latency.parts(seed=seed, n=N, rounds=rounds)).seconds
    return float(mine / plain.sum())
