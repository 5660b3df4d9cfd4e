"""`python -m experiments.sooner`: what brings plain rounds to the target sooner, as tables of the suite "sooner".

    python -m experiments.compare --suite sooner --data-dir DIR --rows out/compare/sooner.jsonl   # hours, resumes
    python -m experiments.sooner --rows out/compare/sooner.jsonl

Each time is over that of plain FedAvg that waits for all, seed by seed. The target is what waiting for all ends with,
less its standard deviation over seeds. The averaged model is an exponential average of the server's models (weight
0.25), which is evaluated alone: training is the same. `never`: of no seed; (3): of three seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.compare.problems import LAWS, OWNERS, PROBLEMS
from experiments.compare.runs import scheme_titles
from experiments.compare.store import ROOT, Store, Task
from experiments.compare.suites import ADAM, AVERAGE, STEPS, SUITES
from experiments.report.data import Curve
from experiments.report.measures import LAST, Spread, time_to

__all__ = ["main", "tables"]

_ADAM, _FEWER = " + FedAdam", ", 60 % of the steps"
_EXACT = (("waiting for all", "wait", 1), ("exact, r = 3", "partial", 3), ("exact, r = 8", "partial", 8))
Which = Literal["raw", "averaged"]
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Way:
    """One line of the tables: a scheme, the server's strategy, and the share of the local steps.

    Attributes:
        title: For people.
        scheme: Name in the comparison.
        options: Of the tasks, besides the average.
        holders: Holders of each shard, for an exact scheme.
    """

    title: str
    scheme: str
    options: tuple[tuple[str, float], ...] = ()
    holders: int = 0


def ways_of(tasks: Iterable[Task]) -> list[Way]:
    """The lines for which there are tasks: exact ones first, then baselines, each without and with FedAdam."""
    there = {task.scheme for task in tasks}
    schemes = [name for name in scheme_titles() if name in there]
    exact = [
        Way(f"{what}{_ADAM if server else ''}{_FEWER if steps else ''}", scheme, server + steps, r)
        for steps in ((), (STEPS,))
        for what, scheme, r in (
            ("waiting for all", "wait", 1),
            ("exact, r = 3", "partial", 3),
            ("exact, r = 8", "partial", 8),
        )
        for server in ((), (ADAM,))
    ]
    others = [
        Way(f"{scheme_titles()[name]}{_ADAM if server else ''}{_FEWER if steps else ''}", name, server + steps)
        for steps in ((), (STEPS,))
        for name in schemes
        if name not in ("exact", "wait", "partial")
        for server in ((), (ADAM,))
        if name != "stale" or not server + steps
    ]
    return [*exact, *others]


class Points:
    """The evaluations of one run.

    Args:
        points: What was evaluated.
        ends: The times of rounds, where they were simulated apart from the training.
        rounds: Number of rounds of waiting for all. A way whose rounds are shorter has more, up to the time that exact
            rounds with r = 3 take for as many.
    """

    def __init__(self, points: list[dict[str, Any]], ends: np.ndarray[Any, Any] | None, rounds: int) -> None:
        self._points = points if ends is None else [one for one in points if one["round"] < len(ends)]
        self.seconds = np.array([one["seconds"] if ends is None else ends[one["round"]] for one in self._points])
        self._within = sum(one["round"] <= rounds for one in self._points)

    def values(self, which: Which, what: str = "accuracy") -> np.ndarray[Any, Any]:
        """Accuracy, worst class or owned labels at each evaluation; the first model stands for its own average."""
        name = what if which == "raw" else f"{what}-averaged"
        return np.array([one.get(name, one.get(what, np.nan)) for one in self._points], float)

    def reached(self, level: float, which: Which) -> float | None:
        """Virtual seconds to a level that is held; see the report."""
        accuracy = self.values(which)
        return time_to(Curve(np.arange(len(accuracy)), self.seconds, accuracy, accuracy, None), level)

    def final(self, which: Which, what: str = "accuracy") -> float:
        """Mean of the last evaluations."""
        return float(self.values(which, what)[-LAST:].mean())

    def after_rounds(self, which: Which, what: str = "accuracy") -> float:
        """Mean of the last evaluations within the rounds of waiting for all."""
        return float(self.values(which, what)[: self._within][-LAST:].mean())


def points_of(rows: Rows, tasks: Mapping[Task, str], problem: str, law: str, way: Way) -> dict[int, Points]:
    """Seed -> evaluations, of the seeds that have rows."""
    found = {}
    for task in tasks:
        if (task.problem, task.law, task.scheme) != (problem, law, way.scheme):
            continue
        options, wanted = dict(task.options), dict(way.options)
        if way.holders:
            if options.get("steps") != wanted.get("steps") or options.get("holders", 1) != way.holders:
                continue
            model = tuple(sorted((*way.options, AVERAGE)))
            trained = rows.get(Task(problem, "", "exact", task.seed, task.rounds, model).hash)
            times = rows.get(task.hash)
            if trained and times:
                ends = np.concatenate([[0.0], np.cumsum(times["seconds"])])
                found[task.seed] = Points(trained["points"], ends, task.rounds)
        elif all(options.get(one) == wanted.get(one) for one in ("adam", "steps")) and (row := rows.get(task.hash)):
            found[task.seed] = Points(row["points"], None, task.rounds)
    return found


def _told(spread: Spread | None, seeds: int, form: str = "{:.2f}") -> str:
    if spread is None:
        return "never"
    sd = "" if spread.sd is None else " ± " + form.format(spread.sd)
    return form.format(spread.mean) + sd + ("" if len(spread.values) == seeds else f" ({len(spread.values)})")


def tables(rows: Rows, suite: str) -> str:
    """All tables, as Markdown."""
    tasks = {task: task.hash for task in dict.fromkeys(SUITES[suite]()) if task.hash in rows}
    lines = []
    for problem in dict.fromkeys(task.problem for task in tasks):
        laws = [law for law in LAWS if any(task.problem == problem and task.law == law for task in tasks)]
        ways = ways_of(task for task in tasks if task.problem == problem)
        lines += [f"## {PROBLEMS[problem].title}", ""]
        waiting = {law: points_of(rows, tasks, problem, law, ways[0]) for law in laws}
        known = waiting[laws[0]]
        ends = Spread.of(one.final("raw") for one in known.values())
        if ends is None:
            continue
        level = ends.mean - (ends.sd or 0.0)
        lines += [f"Target: {level:.2%}; waiting for all ends with {_told(ends, len(known), '{:.2%}')}.", ""]
        found = {way: {law: points_of(rows, tasks, problem, law, way) for law in laws} for way in ways}
        for which in ("raw", "averaged"):
            lines += [f"Time to the target over waiting for all with FedAvg, {which} model:", ""]
            lines += ["| | " + " | ".join(LAWS[law][0] for law in laws) + " |", "|---" * (len(laws) + 1) + "|"]
            for way, of_laws in found.items():
                cells = []
                for law in laws:
                    ratios = []
                    for seed, one in of_laws[law].items():
                        mine = one.reached(level, which)
                        theirs = waiting[law][seed].reached(level, "raw") if seed in waiting[law] else None
                        ratios.append(mine / theirs if mine is not None and theirs else None)
                    cells.append(_told(Spread.of(ratios), len(of_laws[law])) if of_laws[law] else "")
                lines.append(f"| {way.title} | " + " | ".join(cells) + " |")
            lines.append("")
        whats = ("accuracy", "owned", "worst") if PROBLEMS[problem].owners else ("accuracy", "worst")
        heads = [f"{what}, {which}" for what in whats for which in ("raw", "averaged")]
        for title, figure in (
            ("After as many rounds", Points.after_rounds),
            ("At the end, which is no earlier than exact rounds with r = 3 take for as many rounds", Points.final),
        ):
            lines += [f"{title}, mean over laws and seeds (%):", "", "| | " + " | ".join(heads) + " |"]
            lines.append("|---" * (len(heads) + 1) + "|")
            for way, of_laws in found.items():
                runs = [one for of_seeds in of_laws.values() for one in of_seeds.values()]
                if runs:
                    cells = [
                        _told(Spread.of(100 * figure(one, which, what) for one in runs), len(runs), "{:.1f}")
                        for what in whats
                        for which in ("raw", "averaged")
                    ]
                    lines.append(f"| {way.title} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def _figure(rows: Rows, suite: str, path: Path) -> None:
    from experiments.sooner_figure import learned_labels

    tasks = {task: task.hash for task in dict.fromkeys(SUITES[suite]()) if task.hash in rows}
    problem = next(task.problem for task in tasks if PROBLEMS[task.problem].owners)
    ways = {way.title.removeprefix("FedAvg, "): way for way in ways_of(tasks)}
    chosen = ("waiting for all", "exact, r = 8 + FedAdam", "bounded staleness", f"drop the slowest {OWNERS}")
    curves = {name: [*points_of(rows, tasks, problem, "slow-owners", ways[name]).values()] for name in chosen}
    path.parent.mkdir(parents=True, exist_ok=True)
    learned_labels(curves).savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables of the rows that are there."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sooner", description=__doc__)
    parser.add_argument("--rows", default=str(ROOT / "out" / "compare" / "rows.jsonl"))
    parser.add_argument("--suite", choices=[name for name in SUITES if name.startswith("sooner")], default="sooner")
    parser.add_argument("--figure", metavar="PNG", help="also draw what slow clients' labels cost, as a picture")
    options = parser.parse_args(arguments)
    rows = Store(Path(options.rows).expanduser()).rows()
    text = tables(rows, options.suite)
    if not text:
        print(f"There are no rows of the suite {options.suite} in {options.rows}: run experiments.compare first.")
        return 1
    print(text)
    if options.figure:
        _figure(rows, options.suite, Path(options.figure).expanduser())
    return 0


if __name__ == "__main__":
    sys.exit(main())
