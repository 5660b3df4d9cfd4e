"""Tables of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from experiments.compare.problems import LAWS, PROBLEMS
from experiments.compare.runs import ASYNCHRONOUS, EXACT
from experiments.compare.suites import TUNED
from experiments.report.blocks import NOTHING, Table, number, percent, seconds, spread
from experiments.report.data import Results, Run, curve_of, titles
from experiments.report.measures import (
    Spread,
    Target,
    adaptive_ratios,
    best_coded,
    fastest_inexact,
    final,
    finals,
    regret,
    time_ratio,
    times_to,
)

__all__ = ["adaptive", "at_a_glance", "headline", "hindsight", "in_short", "long", "settings", "tuned"]

BOUND = 1.05  # of the planner's regret, and of adaptive over plain FedAvg


def kept(scheme: str) -> str:
    """What becomes of the data."""
    if scheme in EXACT:
        return "exact"
    return (
        "all data, stale"
        if scheme in ASYNCHRONOUS
        else "all data, fewer steps"
        if scheme == "fedprox"
        else "loses data"
    )


def in_short(problems: Sequence[Results], goals: Mapping[str, Target | None]) -> Table:
    """One line a problem, under its first law: waiting, the best code, dropping, the best of the other baselines."""
    lines = []
    for results in problems:
        goal, law = goals[results.problem], results.headline
        if goal is None or law is None:
            continue
        schemes, title = results.laws[law], titles(results.problem)
        waiting = schemes.get("wait", {})
        coded, other = best_coded(schemes, goal.level), fastest_inexact(schemes, goal.level)
        dropping = "drop-owners" if "drop-owners" in schemes else "drop-s"

        def ratio(scheme: str, runs: Mapping[str, Mapping[int, Run]] = schemes, goal: Target = goal) -> str:
            return spread(time_ratio(runs[scheme], runs.get("wait", {}), goal.level), digits=2)

        lines.append(
            [
                results.title,
                f"{percent(goal.waiting)} in {spread(Spread.of(run.total for run in waiting.values()))} s",
                f"{title[coded[0]]}: {ratio(coded[0])}" if coded else NOTHING,
                percent(finals(schemes.get(dropping, {}))),
                f"{title[other[0]]}: {ratio(other[0])}" if other else "none",
            ]
        )
    headers = ["clients and data", "waiting for all: accuracy (%)", "fastest code: time to the same accuracy"]
    headers += ["dropping the slowest: accuracy (%)", "fastest other scheme that gets there"]
    caption = "Times are shares of the time that waiting for all takes to the same accuracy; below 1 is faster"
    return Table(caption, headers, lines, left=5)


def headline(results: Results, law: str, goal: Target | None, *, short: bool = False) -> Table:
    """One line a scheme: how good, how long, at what cost."""
    owned = PROBLEMS[results.problem].owners > 0
    columns = ["scheme", "data", "final accuracy (%)"]
    columns += [] if short else ["worst class (%)"]
    columns += ["owned labels (%)"] if owned else []
    columns += [] if short else ["virtual s in all"]
    columns += ["virtual s to target", "of waiting for all"]
    columns += [] if short else ["shard trainings", "MB up"]
    schemes = results.laws[law]
    lines = []
    for scheme, runs in schemes.items():
        to_target = list(times_to(runs, goal.level).values()) if goal else []
        ratio = time_ratio(runs, schemes.get("wait", {}), goal.level) if goal else None
        line = [titles(results.problem)[scheme], kept(scheme), percent(finals(runs))]
        line += [] if short else [percent(finals(runs, "worst"))]
        line += [percent(finals(runs, "owned"))] if owned else []
        line += [] if short else [spread(Spread.of(run.total for run in runs.values()))]
        line += [seconds(to_target), spread(ratio, digits=2)]
        line += [] if short else [_work(runs, "shards"), _work(runs, "megabytes-up")]
        lines.append(line)
    seeds = max((len(runs) for runs in schemes.values()), default=0)
    caption = f"{LAWS[law][0]}: mean ± standard deviation over {seeds} seed{'s' * (seeds != 1)}"
    return Table(caption, columns, lines, left=2)


def long(results: Results, goal: Target | None) -> Table:
    """Baselines that were given as long as waiting for all takes."""
    lines = []
    for scheme, runs in results.long.items():
        to_target = list(times_to(runs, goal.level).values()) if goal else []
        waiting = results.laws.get(results.headline or "", {}).get("wait", {})
        ratio = time_ratio(runs, waiting, goal.level) if goal else None
        line = [titles(results.problem)[scheme], percent(finals(runs)), percent(finals(runs, "owned"))]
        line += [spread(Spread.of(run.total for run in runs.values())), seconds(to_target), spread(ratio, digits=2)]
        lines.append([*line, _work(runs, "shards")])
    seeds = max((len(runs) for runs in results.long.values()), default=0)
    caption = f"Baselines given as long as waiting for all takes: mean ± standard deviation over {seeds} seeds"
    headers = ["scheme", "final accuracy (%)", "owned labels (%)", "virtual s in all", "virtual s to target"]
    return Table(caption, [*headers, "of waiting for all", "shard trainings"], lines)


def at_a_glance(results: Results, goal: Target | None) -> Table:
    """Time to the target over that of waiting for all: schemes against laws."""
    laws = list(results.laws)
    names = dict.fromkeys(scheme for schemes in results.laws.values() for scheme in schemes)
    lines = []
    for scheme in (name for name in titles(results.problem) if name in names):
        line = [titles(results.problem)[scheme]]
        for law in laws:
            schemes = results.laws[law]
            runs, plain = schemes.get(scheme, {}), schemes.get("wait", {})
            ratio = time_ratio(runs, plain, goal.level) if goal else None
            times = list(times_to(runs, goal.level).values()) if goal else []
            if ratio:
                missed = sum(time is None for time in times)
                line.append(f"{ratio.mean:.2f}" + (f" ({missed} never)" if missed else ""))
            else:
                line.append("never" if times and not any(times) else NOTHING)
        lines.append(line)
    caption = "Time to the target over that of waiting for all, mean over seeds; below 1 is faster"
    return Table(caption, ["scheme", *(LAWS[law][0] for law in laws)], lines)


def hindsight(results: Results) -> Table:
    """What the planner chose, and what would have been best."""
    lines = []
    for law in (law for law in LAWS if law in results.hindsight):
        planned, best, ratio = regret(results.hindsight[law])
        lines.append([LAWS[law][0], planned, best, f"{ratio:.3f}", "yes" if ratio <= BOUND else "**no**"])
    caption = "The planner against hindsight: mean round seconds of its choice over those of the best exact scheme"
    return Table(caption, ["law", "planned", "best in hindsight", "ratio", f"at most {BOUND}"], lines, left=3)


def adaptive(results: Results, goal: Target | None) -> Table:
    """Adaptive's time to the target over plain FedAvg's."""
    lines = []
    for law in results.laws:
        ratios = adaptive_ratios(results, law, goal)
        if ratios:
            cells = [
                f"{ratios[seed][0]:.3f}{'' if ratios[seed][1] else ' *'}" if seed in ratios else NOTHING
                for seed in results.seeds
            ]
            most = max(ratio for ratio, _ in ratios.values())
            lines.append([LAWS[law][0], *cells, f"{most:.3f}", "yes" if most <= BOUND else "**no**"])
    caption = "Adaptive's time to the target over plain FedAvg's (* target not reached: of the whole run)"
    headers = ["law", *(f"seed {seed}" for seed in results.seeds), "maximum", f"at most {BOUND}"]
    return Table(caption, headers, lines)


def settings(problems: Sequence[Results]) -> Table:
    """Hyperparameters of the problems, by default."""
    lines = []
    for results in problems:
        problem = PROBLEMS[results.problem]
        split = (
            f"{problem.partitioner} {problem.alpha:g}" if problem.partitioner == "dirichlet" else problem.partitioner
        )
        lines.append(
            [
                problem.title,
                problem.model,
                split,
                *map(str, (problem.n, problem.s, problem.rounds, problem.every)),
                f"{problem.learning_rate:g}",
                *map(str, (problem.local_epochs, problem.batch_size)),
                str(problem.train_examples or "all"),
            ]
        )
    headers = ["problem", "model", "split", "clients", "s", "rounds", "evaluated every"]
    headers += ["learning rate", "local epochs", "batch", "training examples"]
    return Table("Default hyperparameters, the same for every scheme", headers, lines, left=3)


def tuned(problems: Iterable[Results]) -> Table:
    """What was tuned, over which grid, and what came out."""
    lines = []
    for results in problems:
        for row in sorted(results.tuning, key=lambda row: (row["task"]["scheme"], row["task"]["options"])):
            task = row["task"]
            if "points" not in row:
                continue
            options = dict(task["options"])
            grid = TUNED.get(task["scheme"], ((),))
            used = options.items() <= dict(grid[0]).items()
            evaluations = curve_of(row)
            owned = final(evaluations, "owned")
            lines.append(
                [
                    titles(results.problem)[task["scheme"]],
                    ", ".join(f"{name} {value:g}" for name, value in options.items()),
                    f"{100 * (final(evaluations) or 0.0):.1f}",
                    NOTHING if owned is None else f"{100 * owned:.1f}",
                    number(float(evaluations.seconds[-1])),
                    "yes" if used else "",
                ]
            )
    headers = ["scheme", "setting", "final accuracy (%)", "owned labels (%)", "virtual s in all", "used"]
    return Table("What was tuned, over which grid (seed 100, which no curve shows)", headers, lines, left=2)


def _work(runs: dict[int, Run], key: str) -> str:
    return spread(Spread.of(run.row["work"][key] for run in runs.values()))
