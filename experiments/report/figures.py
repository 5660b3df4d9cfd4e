"""Figures of a problem: they read results and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.compare.problems import PROBLEMS
from experiments.compare.runs import EXACT, INEXACT
from experiments.report.data import Curve, Results, Run, titles
from experiments.report.measures import Target, What
from experiments.report.style import INK, look, styled

__all__ = ["accuracy_over_rounds", "accuracy_over_time", "new_figure", "timelines", "work", "worst_over_time"]

_LOSSY = ("wait", "partial", *INEXACT)
_FEW = ("wait", "repetition", "partial", "drop-s", "drop-owners", "deadline", "fedprox", "semi", "fedbuff")
_TIMELINES = ("wait", "repetition", "partial")


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure, and its panels row by row."""
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(panels.ravel())


@styled
def accuracy_over_time(results: Results, law: str, goal: Target | None) -> Figure:
    """Accuracy over virtual time: the exact schemes, and those that lose something."""
    figure, (left, right) = new_figure(1, 2, (10.5, 5.0), sharex=True, sharey=True)
    _over_time(left, results, law, EXACT, "accuracy")
    _over_time(right, results, law, _LOSSY, "accuracy")
    left.set_title("Exact schemes: the same models, at other times")
    right.set_title("Baselines that lose data, steps or freshness")
    left.set_ylabel("accuracy on the whole test set (%)")
    for panel in (left, right):
        if goal:
            _goal(panel, goal)
        _legend(panel)
    return figure


@styled
def worst_over_time(results: Results, law: str) -> Figure:
    """Accuracy on the worst class, and on the labels that only slow clients have."""
    owned = PROBLEMS[results.problem].owners > 0
    kinds: list[tuple[What, str]] = [("worst", "The worst class")]
    kinds += [("owned", "Labels that only the slow clients have")] if owned else []
    figure, panels = new_figure(1, len(kinds), (10.5 if owned else 6.5, 5.0), sharex=True, sharey=True)
    for panel, (what, title) in zip(panels, kinds, strict=True):
        _over_time(panel, results, law, _FEW, what)
        panel.set_title(title)
        _legend(panel)
    panels[0].set_ylabel("accuracy (%)")
    return figure


@styled
def accuracy_over_rounds(results: Results, law: str, goal: Target | None) -> Figure:
    """Accuracy over rounds: what each scheme's rounds are worth, whatever they take."""
    figure, (panel,) = new_figure(1, 1, (7.5, 4.8))
    if results.trajectories:
        _band(panel, "wait", results.trajectories.values(), "accuracy", "rounds", "all exact schemes")
    for scheme in INEXACT:
        curves = _curves(results.laws[law].get(scheme, {}))
        _band(panel, scheme, curves, "accuracy", "rounds", titles(results.problem)[scheme])
    panel.set_xlabel("server rounds (of FedBuff: as many trainings as a round has)")
    panel.set_ylabel("accuracy on the whole test set (%)")
    panel.grid(True)
    if goal:
        _goal(panel, goal)
    _legend(panel)
    return figure


@styled
def work(results: Results, law: str) -> Figure:
    """Shard trainings and megabytes up in a round, relative to waiting for all; bars are means, whiskers min to max."""
    schemes = {name: runs for name, runs in results.laws[law].items() if name in {**EXACT, **INEXACT}}
    names = list(schemes)[::-1]
    figure, panels = new_figure(1, 2, (10.5, 0.6 + 0.3 * len(names)), sharey=True)
    for panel, key, title in zip(panels, ("shards", "megabytes-up"), ("Shard trainings", "Megabytes up"), strict=True):
        base = _per_round(schemes.get("wait", {}), key)
        plain = float(np.mean(base)) if base else 1.0
        for place, name in enumerate(names):
            ratios = np.array(_per_round(schemes[name], key)) / plain
            mean = float(ratios.mean())
            whiskers = [[mean - ratios.min()], [ratios.max() - mean]]
            style = look(name)
            hatch = "" if style.line == "-" else {"--": "//", ":": "..", "-.": "xx"}[style.line]
            panel.barh(
                place, mean, 0.72, xerr=whiskers, color=style.colour, hatch=hatch, edgecolor="#FFFFFF", ecolor=INK
            )
            panel.text(ratios.max() + 0.05, place, f"{mean:.2f}", va="center", color=INK)
        panel.axvline(1.0, color=INK, linewidth=0.8, zorder=0.5)
        panel.margins(x=0.12)
        unit = "waiting for all = 1" if base else "in absolute numbers: waiting for all has no row yet"
        panel.set_title(f"{title} a round")
        panel.set_xlabel(unit)
    panels[0].set_yticks(range(len(names)), [titles(results.problem)[name] for name in names])
    return figure


@styled
def timelines(results: Results, law: str) -> Figure | None:
    """The first rounds, a line a worker: whose reply was used; None if no jobs were kept."""
    shown = [name for name in _TIMELINES if _jobs(results.laws[law].get(name, {}))]
    if not shown:
        return None
    n = PROBLEMS[results.problem].n
    height = max(1.8, 0.075 * n)
    figure, panels = new_figure(len(shown), 1, (10.5, 0.9 + (height + 0.3) * len(shown)), sharex=True)
    ends = {name: np.cumsum(results.laws[law][name][0].row["seconds"]) for name in shown}
    last = max([ends[name][1] if name == "wait" else ends[name][5] for name in shown if len(ends[name]) > 5], default=0)
    for panel, name in zip(panels, shown, strict=True):
        row = results.laws[law][name][0].row
        _timeline(panel, row, look(name).colour)
        kept = len({job[1] for job in row["jobs"]})
        for number, end in enumerate(ends[name][:kept], 1):
            panel.axvline(end, color=INK, linewidth=1.1)
            if last and end <= last * 1.02:
                panel.text(end, -0.9, f"{number}", va="bottom", ha="center", fontsize=8, color=INK)
        panel.set_ylim(-0.7, n - 0.1)
        panel.invert_yaxis()
        seen = int((ends[name][:kept] <= last * 1.02).sum()) if last else kept
        title = f"{titles(results.problem)[name]}: {kept} rounds in {ends[name][kept - 1]:.1f} s"
        panel.set_title(title + (f", {seen} of them shown" if seen < kept else ""), pad=14)
        panel.set_ylabel("worker")
        panel.set_yticks(range(0, n, 5 if n > 15 else 3))
    if last:
        panels[-1].set_xlim(0, float(last) * 1.02)
    panels[-1].set_xlabel("virtual time (seconds); a numbered line is the end of that round")
    figure.legend(handles=_job_legend(), loc="outside lower center", ncol=3)
    return figure


def _timeline(panel: Axes, row: dict[str, Any], colour: str) -> None:
    ends = np.cumsum(row["seconds"])
    for worker, number, began, finished in row["jobs"]:
        used = worker in row["used"][number - 1] if "used" in row else True
        if finished > ends[number - 1] + 1e-3:  # times are kept to a thousandth
            kind = _RUNNING
        else:
            kind = {"facecolor": colour} if used else _UNUSED
        panel.barh(worker, finished - began, 0.8, left=began, edgecolor="#FFFFFF", linewidth=0.4, **kind)


_UNUSED: dict[str, Any] = {"facecolor": "#F0E442", "hatch": "////"}
_RUNNING: dict[str, Any] = {"facecolor": "#C9C9C9", "hatch": "...."}


def _job_legend() -> list[Patch]:
    return [
        Patch(facecolor=look("partial").colour, edgecolor="#FFFFFF", label="reply used (in the scheme's colour)"),
        Patch(edgecolor="#FFFFFF", label="finished in its round, not needed", **_UNUSED),
        Patch(edgecolor="#FFFFFF", label="still running when its round ended", **_RUNNING),
    ]


def _over_time(panel: Axes, results: Results, law: str, names: Iterable[str], what: What) -> None:
    schemes, title = results.laws[law], titles(results.problem)
    for scheme in names:
        _band(panel, scheme, _curves(schemes.get(scheme, {})), what, "seconds", title[scheme])
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("virtual time (seconds, logarithmic)")
    panel.grid(True)


def _band(panel: Axes, scheme: str, curves: Iterable[Curve], what: What, axis: str, label: str) -> None:
    """The mean over seeds, from the first evaluation after the start; a band from the least to the most."""
    known = [curve for curve in curves if getattr(curve, what) is not None and len(curve.rounds) > 1]
    if not known:
        return
    table = [(np.asarray(getattr(curve, axis), float), 100 * getattr(curve, what)) for curve in known]
    first = max(float(at[1]) for at, _ in table)
    end = min(float(at[-1]) for at, _ in table)
    if end <= first:
        return
    place: Callable[..., Any] = np.linspace if axis == "rounds" else np.geomspace
    grid = place(first, end, 200)
    values = np.array([np.interp(grid, at, value) for at, value in table])
    style = look(scheme)
    panel.fill_between(grid, values.min(axis=0), values.max(axis=0), color=style.colour, alpha=0.15, linewidth=0)
    panel.plot(grid, values.mean(axis=0), **style.kwargs, markevery=25, label=label)


def _goal(panel: Axes, goal: Target) -> None:
    level = 100 * goal.level
    panel.axhline(level, color=INK, linewidth=0.9, dashes=(2, 2), label=f"target, {level:.1f} %")


def _legend(panel: Axes) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3)


def _curves(runs: Mapping[int, Run]) -> list[Curve]:
    return [run.curve for run in runs.values() if run.curve is not None]


def _jobs(runs: Mapping[int, Run]) -> Sequence[Any]:
    return runs[0].row.get("jobs", ()) if 0 in runs else ()


def _per_round(runs: Mapping[int, Run], key: str) -> list[float]:
    return [run.row["work"][key] / run.rounds for run in runs.values() if run.rounds]
