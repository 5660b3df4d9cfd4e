"""Rows of the comparison, sorted by problem, law, scheme and seed; what is missing stays missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from experiments.compare.problems import LAWS, PROBLEMS
from experiments.compare.runs import EXACT, scheme_titles
from experiments.compare.store import Store
from experiments.compare.suites import SOONER, SOONER_SEEDS, SUITES, TUNED

__all__ = [
    "HEADLINE",
    "MAIN",
    "Curve",
    "Results",
    "Run",
    "curve_of",
    "missing",
    "read",
    "read_rows",
    "suite_of",
    "titles",
]

MAIN, HEADLINE = "slow-owners", "slow-owners"  # the problem, and the law, that come first
_TUNING_SEED = 100
_LONG = "as-long-as-waiting"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run; each array has one entry an evaluation. `owned` is None where nobody owns labels."""

    rounds: NDArray[np.int64]
    seconds: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    worst: NDArray[np.float64]
    owned: NDArray[np.float64] | None

    def at(self, round_seconds: Sequence[float]) -> Curve:
        """The same models at the times of an exact scheme, as far as its rounds go."""
        ends = np.concatenate([[0.0], np.cumsum(round_seconds)])
        kept = self.rounds < len(ends)
        owned = None if self.owned is None else self.owned[kept]
        return Curve(self.rounds[kept], ends[self.rounds[kept]], self.accuracy[kept], self.worst[kept], owned)


@dataclass(frozen=True)
class Run:
    """One scheme, one seed.

    Attributes:
        row: As it was written.
        curve: None for an exact scheme whose trajectory has no row yet.
    """

    row: dict[str, Any]
    curve: Curve | None

    @property
    def total(self) -> float:
        """Virtual seconds in all."""
        return float(sum(self.row["seconds"])) if "seconds" in self.row else float(self.row["points"][-1]["seconds"])

    @property
    def rounds(self) -> int:
        """Server rounds; of FedBuff as many trainings as a round has."""
        return len(self.row["seconds"]) if "seconds" in self.row else int(self.row["points"][-1]["round"])


@dataclass
class Results:
    """All rows of one problem.

    Attributes:
        trajectories: Seed -> the evaluations that all exact schemes have in common; their seconds mean nothing.
        laws: Law -> scheme -> seed -> run.
        hindsight: Law -> what the planner chose, and the means that it did not know.
        tuning: Rows of the tuning.
        long: Scheme -> seed -> run, of baselines that were given as long as waiting for all takes (headline's law).
    """

    problem: str
    trajectories: dict[int, Curve] = field(default_factory=dict)
    laws: dict[str, dict[str, dict[int, Run]]] = field(default_factory=dict)
    hindsight: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    long: dict[str, dict[int, Run]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return PROBLEMS[self.problem].title

    @property
    def seeds(self) -> list[int]:
        """Every seed that has a row."""
        runs = (seed for schemes in self.laws.values() for by_seed in schemes.values() for seed in by_seed)
        return sorted({*self.trajectories, *runs})

    @property
    def headline(self) -> str | None:
        """The law that is shown at length."""
        order = [HEADLINE, *LAWS]
        return next((law for law in order if law in self.laws), None)


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All rows of some files, each task once: the last file counts."""
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        rows.update(Store(path).rows())
    return list(rows.values())


def read(rows: Iterable[dict[str, Any]]) -> list[Results]:
    """Results of each problem that has rows, the main one first."""
    found: dict[str, Results] = {}
    timed = []
    for row in rows:
        task = row["task"]
        if task["seed"] in SOONER_SEEDS:  # another comparison's, which may lie in the same file
            continue
        results = found.setdefault(task["problem"], Results(task["problem"]))
        law, scheme, seed = task["law"], task["scheme"], task["seed"]
        if _LONG in _options(row):
            results.long.setdefault(scheme, {})[seed] = Run(row, curve_of(row))
        elif seed == _TUNING_SEED or _options(row) != dict(TUNED.get(scheme, ((),))[0]):
            results.tuning.append(row)
        elif scheme == "hindsight":
            results.hindsight[law] = row
        elif scheme == "exact":
            results.trajectories[seed] = curve_of(row)
        else:
            timed.append((results, law, scheme, seed, row))
    for results, law, scheme, seed, row in timed:
        if scheme in EXACT:
            trajectory = results.trajectories.get(seed)
            curve = trajectory.at(row["seconds"]) if trajectory is not None else None
        else:
            curve = curve_of(row)
        results.laws.setdefault(law, {}).setdefault(scheme, {})[seed] = Run(row, curve)
    for results in found.values():
        results.laws = {law: _ordered(results.laws[law], scheme_titles()) for law in LAWS if law in results.laws}
    return [found[name] for name in _ordered(found, [MAIN, *PROBLEMS])]


def missing(results: Results) -> tuple[int, int, str]:
    """(tasks without a row, tasks, which they are): of the suites, without the tuning."""
    have = {("", "exact", seed) for seed in results.trajectories} | {(law, "hindsight", 0) for law in results.hindsight}
    have |= {
        (law, scheme, seed) for law, schemes in results.laws.items() for scheme in schemes for seed in schemes[scheme]
    }
    wanted = dict.fromkeys(
        (task.law, task.scheme, task.seed)
        for name, tasks in SUITES.items()
        if name not in ("tuning", *SOONER)
        for task in tasks()
        if task.problem == results.problem
    )
    lacking = [key for key in wanted if key not in have]
    parts = []
    for law in dict.fromkeys(law for law, *_ in lacking):
        seeds: dict[str, list[int]] = {}
        for other, scheme, seed in lacking:
            if other == law:
                seeds.setdefault(scheme, []).append(seed)
        there = results.laws.get(law, {})
        names = [
            f"{scheme} (seed {', '.join(map(str, which))})" if scheme in there or not law else scheme
            for scheme, which in seeds.items()
        ]
        everything = law and not there and law not in results.hindsight
        parts.append(f"{law or 'models of the exact schemes'}: {'all' if everything else ', '.join(names)}")
    return len(lacking), len(wanted), "; ".join(parts)


def titles(problem: str) -> dict[str, str]:
    """Scheme -> what people read, with the problem's s."""
    s = PROBLEMS[problem].s
    return {name: title.replace("slowest s", f"slowest {s}") for name, title in scheme_titles().items()}


def suite_of(problem: str) -> str:
    """Name of the suite that runs a problem."""
    return next(name for name, tasks in SUITES.items() if any(task.problem == problem for task in tasks()))


def _options(row: dict[str, Any]) -> dict[str, float]:
    return dict(row["task"]["options"])


def curve_of(row: dict[str, Any]) -> Curve:
    """The evaluations of a row that has points."""
    points = row["points"]

    def column(key: str) -> NDArray[np.float64]:
        return np.array([point[key] for point in points], dtype=np.float64)

    owned = column("owned") if points and all("owned" in point for point in points) else None
    rounds = np.array([point["round"] for point in points], dtype=np.int64)
    return Curve(rounds, column("seconds"), column("accuracy"), column("worst"), owned)


def _ordered(table: dict[str, _T], order: Iterable[str]) -> dict[str, _T]:
    return {name: table[name] for name in dict.fromkeys(order) if name in table}
