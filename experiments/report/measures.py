"""Numbers of the report, computed from results: final accuracies, the target, times to it, ratios.

All of them are defined here and nowhere else, so that tables, figures and sentences agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.compare.runs import ASYNCHRONOUS, EXACT
from experiments.report.data import Curve, Results, Run

__all__ = [
    "LAST",
    "Closest",
    "Spread",
    "Target",
    "adaptive_ratios",
    "best_coded",
    "closest_asynchronous",
    "coded",
    "fastest_inexact",
    "final",
    "finals",
    "regret",
    "rise",
    "target",
    "time_ratio",
    "time_to",
    "times_to",
]

LAST = 3  # evaluations whose mean is the final accuracy
HELD = 3  # evaluations in a row that must hold the target
What = Literal["accuracy", "worst", "owned"]


@dataclass(frozen=True)
class Spread:
    """Values over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def sd(self) -> float | None:
        """Sample standard deviation; None of one value."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None if there is no value."""
        known = tuple(value for value in values if value is not None)
        return cls(known) if known else None


@dataclass(frozen=True)
class Target:
    """The accuracy to reach: what waiting for all ends with, minus its standard deviation over seeds."""

    level: float
    waiting: Spread


@dataclass(frozen=True)
class Closest:
    """The asynchronous baseline that ends with the highest accuracy; `above` the target, negative if below."""

    scheme: str
    accuracy: Spread
    above: float


def final(curve: Curve, what: What = "accuracy") -> float | None:
    """Mean of the last evaluations."""
    values = getattr(curve, what)
    return float(np.mean(values[-LAST:])) if values is not None and len(values) else None


def finals(runs: Mapping[int, Run], what: What = "accuracy") -> Spread | None:
    """Of each seed whose curve is known."""
    return Spread.of(final(run.curve, what) for run in runs.values() if run.curve is not None)


def target(results: Results) -> Target | None:
    """None as long as no trajectory of the exact schemes is known."""
    waiting = Spread.of(final(curve) for curve in results.trajectories.values())
    return Target(waiting.mean - (waiting.sd or 0.0), waiting) if waiting else None


def time_to(curve: Curve, level: float) -> float | None:
    """Virtual seconds at which the accuracy first reaches a level and holds it; None if it never does.

    It holds if this and the next two evaluations, or all that are left before the end of the run, are at or above the
    level. Time is interpolated linearly between the evaluation before and the first one that is above.
    """
    above = curve.accuracy >= level
    for i in range(len(above)):
        if above[i : i + HELD].all():
            if i == 0:
                return float(curve.seconds[0])
            low, high = curve.accuracy[i - 1], curve.accuracy[i]
            # At or above before, but not held: it does not count, and nothing is interpolated.
            share = (level - low) / (high - low) if low < level else 1.0
            return float(curve.seconds[i - 1] + share * (curve.seconds[i] - curve.seconds[i - 1]))
    return None


def times_to(runs: Mapping[int, Run], level: float) -> dict[int, float | None]:
    """Seed -> `time_to`, of each seed whose curve is known."""
    return {seed: time_to(run.curve, level) for seed, run in runs.items() if run.curve is not None}


def time_ratio(runs: Mapping[int, Run], waiting: Mapping[int, Run], level: float) -> Spread | None:
    """Time to the target over that of waiting for all, seed by seed, where both reach it."""
    ours, theirs = times_to(runs, level), times_to(waiting, level)
    return Spread.of(a / b for seed, a in ours.items() if a is not None and (b := theirs.get(seed)))


def coded(scheme: str) -> bool:
    """Whether it is exact and uses a code. Uncoded replication has the same storage, and is a baseline."""
    return scheme in EXACT and scheme not in ("wait", "replication")


def best_coded(schemes: Mapping[str, Mapping[int, Run]], level: float) -> tuple[str, Spread] | None:
    """The coded scheme with the shortest mean time to the target, among those that all seeds reach it with."""
    found = []
    for scheme, runs in schemes.items():
        times = times_to(runs, level) if coded(scheme) else {}
        reached = Spread.of(times.values())
        if reached:
            found.append((-len(reached.values), reached.mean, scheme, reached))
    if not found:
        return None
    *_, scheme, reached = min(found, key=lambda one: one[:2])
    return scheme, reached


def fastest_inexact(schemes: Mapping[str, Mapping[int, Run]], level: float) -> tuple[str, Spread] | None:
    """The inexact baseline with the shortest mean time to the target, among those that reach it with every seed."""
    found = []
    for scheme, runs in schemes.items():
        times = list(times_to(runs, level).values())
        reached = Spread.of(times)
        if scheme not in EXACT and reached and len(reached.values) == len(times):
            found.append((reached.mean, scheme, reached))
    return min(found, key=lambda one: one[:2])[1:] if found else None


def rise(results: Results, law: str, what: What) -> tuple[float, float] | None:
    """(what is learnt after the first evaluation, what seeds differ by) under a law: means over schemes and seeds.

    None if nothing is known. A figure of curves shows something if the first is a few times the second.
    """
    rises, bands = [], []
    for runs in results.laws[law].values():
        curves = [getattr(run.curve, what) for run in runs.values() if run.curve is not None]
        length = min((len(one) for one in curves if one is not None), default=0)
        if length > 2:
            table = np.array([one[1:length] for one in curves], dtype=np.float64)
            rises.append(float((table[:, -LAST:].mean(axis=1) - table[:, 0]).mean()))
            bands.append(float((table.max(axis=0) - table.min(axis=0)).mean()))
    return (float(np.median(rises)), float(np.median(bands))) if rises else None


def closest_asynchronous(schemes: Mapping[str, Mapping[int, Run]], level: float) -> Closest | None:
    """Which baseline that does not wait for a round comes closest to the target, or passes it by most."""
    found = []
    for scheme in ASYNCHRONOUS:
        accuracy = finals(schemes.get(scheme, {}))
        if accuracy:
            found.append(Closest(scheme, accuracy, accuracy.mean - level))
    return max(found, key=lambda one: one.above, default=None)


def adaptive_ratios(results: Results, law: str, goal: Target | None) -> dict[int, tuple[float, bool]]:
    """Seed -> (adaptive's time to the target over plain FedAvg's, whether both reach it).

    Where the target is not reached, or not known yet, the ratio is that of the whole runs.
    """
    schemes = results.laws.get(law, {})
    ours, plain = schemes.get("adaptive", {}), schemes.get("wait", {})
    found = {}
    for seed in sorted(ours.keys() & plain.keys()):
        a = times_to({seed: ours[seed]}, goal.level).get(seed) if goal else None
        b = times_to({seed: plain[seed]}, goal.level).get(seed) if goal else None
        found[seed] = (a / b, True) if a and b else (ours[seed].total / plain[seed].total, False)
    return found


def regret(hindsight: Mapping[str, dict[str, float]] | dict[str, object]) -> tuple[str, str, float]:
    """(what the planner chose, the best exact scheme in hindsight, mean round seconds of the one over the other's)."""
    means, planned = hindsight["means"], hindsight["planned"]
    assert isinstance(means, dict) and isinstance(planned, str)
    best = min(means, key=lambda name: means[name])
    return planned, str(best), float(means[planned] / means[best])
