"""Numbers of the page, computed from rows: final accuracies, times, and differences to the baseline seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from experiments.privacy.tasks import BASELINE, SCHEMES, TUNING_SEED
from experiments.report.measures import LAST, Spread

__all__ = ["Paired", "Results", "final"]


@dataclass(frozen=True)
class Paired:
    """Differences between two schemes that share seed and epsilon."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN of one value."""
        if len(self.values) < 2:
            return float("nan")
        return float(np.std(self.values, ddof=1) / np.sqrt(len(self.values)))

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Student's t."""
        half = float(stats.t.ppf(0.975, max(1, len(self.values) - 1))) * self.error
        return self.mean - half, self.mean + half


class Results:
    """Rows of one problem, by scheme, epsilon and seed; the runs that tuned are apart.

    Attributes:
        tuning: Rows of the tuning seed.
        rows: All others.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        ordered = sorted(rows, key=lambda row: row["hash"])
        self.tuning = [row for row in ordered if row["task"]["seed"] == TUNING_SEED]
        self.rows = [row for row in ordered if row["task"]["seed"] != TUNING_SEED]
        self._runs = {(row["task"]["scheme"], _epsilon(row), int(row["task"]["seed"])): row for row in self.rows}

    @property
    def schemes(self) -> list[str]:
        """Those with rows, in the order of SCHEMES."""
        there = {scheme for scheme, _, _ in self._runs}
        return [name for name in SCHEMES if name in there]

    @property
    def epsilons(self) -> list[float]:
        return sorted({epsilon for _, epsilon, _ in self._runs if epsilon is not None})

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, _, seed in self._runs})

    def runs(self, scheme: str, epsilon: float | None) -> list[dict[str, Any]]:
        """Of all seeds that have a row."""
        found = (self._runs.get((scheme, epsilon, seed)) for seed in self.seeds)
        return [row for row in found if row is not None]

    def spread(self, scheme: str, epsilon: float | None, value: Callable[[dict[str, Any]], float]) -> Spread | None:
        return Spread.of(value(row) for row in self.runs(scheme, epsilon))

    def accuracy(self, scheme: str, epsilon: float | None) -> Spread | None:
        return self.spread(scheme, epsilon, lambda row: final(row, "accuracy"))

    def seconds(self, scheme: str) -> Spread | None:
        """Virtual seconds in all, over seeds: noise takes no time, so those of the first epsilon."""
        return self.spread(scheme, self.epsilons_of(scheme)[0], seconds)

    def epsilons_of(self, scheme: str) -> list[float] | list[None]:
        """One that is None where nothing is promised."""
        return self.epsilons if SCHEMES[scheme].noise in ("shared", "independent") else [None]

    def paired(self, schemes: Sequence[str], epsilons: Iterable[float], what: str = "accuracy") -> Paired | None:
        """Scheme minus baseline, for each epsilon and seed; None if there is no pair.

        Several schemes are averaged first: their runs would share the baseline's, and not be independent.
        """
        found = []
        for epsilon in epsilons:
            for seed in self.seeds:
                rows = [self._runs.get((name, epsilon, seed)) for name in (*schemes, BASELINE)]
                if None not in rows:
                    *ours, base = [final(row, what) for row in rows if row is not None]
                    found.append(float(np.mean(ours)) - base)
        return Paired(tuple(found)) if found else None


def final(row: dict[str, Any], what: str) -> float:
    """Mean of the last evaluations of a run: the models of a private run go on moving."""
    return float(np.mean([point[what] for point in row["points"][-LAST:]]))


def seconds(row: dict[str, Any]) -> float:
    """Virtual, of the whole run."""
    return float(row["points"][-1]["seconds"])


def _epsilon(row: dict[str, Any]) -> float | None:
    return dict(row["task"]["options"]).get("epsilon")
