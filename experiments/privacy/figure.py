"""Accuracy against epsilon, and how long each scheme takes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.privacy.measures import Results, final
from experiments.privacy.tasks import SCHEMES
from experiments.report.style import INK, Look, styled

__all__ = ["draw"]

# Okabe and Ito's colours; a dashed line is the cyclic code.
_LOOKS = {
    "no-privacy": Look("#CC79A7", (0, (1, 1.5))),
    "no-noise": Look(INK, (0, (4, 2))),
    "opacus": Look("#8A8A8A", "-", "s"),
    "drop": Look("#E69F00", "-", "v"),
    "shared-fractional": Look("#009E73", "-", "o"),
    "shared-cyclic": Look("#009E73", "--", "D"),
    "independent-fractional": Look("#0072B2", "-", "^"),
    "independent-cyclic": Look("#0072B2", "--", "X"),
}
_DODGE = 1.035  # markers of one epsilon stand side by side


@styled
def draw(results: Results, path: Path) -> None:
    """Write the figure as PNG."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.6, 5.0), layout="constrained", gridspec_kw={"width_ratios": [1.5, 1]}
    )
    _accuracy(left, results)
    _times(right, results)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=3.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _accuracy(panel: Axes, results: Results) -> None:
    private = [name for name in results.schemes if results.epsilons_of(name) == results.epsilons]
    for number, name in enumerate(private):
        found = [(epsilon, results.accuracy(name, epsilon)) for epsilon in results.epsilons]
        points = [(epsilon, values) for epsilon, values in found if values is not None]
        x = [epsilon * _DODGE ** (number - (len(private) - 1) / 2) for epsilon, _ in points]
        means = [100 * values.mean for _, values in points]
        below = [mean - 100 * min(values.values) for mean, (_, values) in zip(means, points, strict=True)]
        above = [100 * max(values.values) - mean for mean, (_, values) in zip(means, points, strict=True)]
        look = {**_LOOKS[name].kwargs, "markersize": 5.5}
        panel.errorbar(x, means, yerr=[below, above], capsize=2, elinewidth=1, label=SCHEMES[name].title, **look)
    for name, place, side in (("no-noise", 0.0, "left"), ("no-privacy", 1.0, "right")):
        ceiling = results.accuracy(name, None)
        if ceiling is not None:
            height, colour = 100 * ceiling.mean, _LOOKS[name].colour
            panel.axhline(height, color=colour, linestyle=_LOOKS[name].line, linewidth=1.2, zorder=1)
            panel.annotate(
                f"{SCHEMES[name].title.split(',')[0]}: {height:.1f} %",
                (place, height),
                xycoords=("axes fraction", "data"),
                xytext=(4 if side == "left" else 0, 3),
                textcoords="offset points",
                ha=side,
                color=colour,
                fontsize=8.5,
            )
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(results.epsilons))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("epsilon of the whole run (log axis; more privacy to the left)")
    panel.set_ylabel("test accuracy (%)")
    panel.set_title("Accuracy: mean, least and most over seeds")
    panel.set_xlim(results.epsilons[0] / 1.25, 1.25 * results.epsilons[-1])
    panel.margins(y=0.08)
    panel.grid(axis="y")


def _times(panel: Axes, results: Results) -> None:
    names = results.schemes[::-1]
    spreads = [results.seconds(name) for name in names]
    means = [values.mean if values else 0.0 for values in spreads]
    panel.barh(range(len(names)), means, color=[_LOOKS[name].colour for name in names], height=0.62)
    for place, (name, mean) in enumerate(zip(names, means, strict=True)):
        owned = results.spread(name, results.epsilons_of(name)[-1], lambda row: final(row, "owned"))
        lost = ", without the owned labels" if owned is not None and owned.mean < 0.01 else ""
        panel.annotate(
            f"{mean:.0f} s{lost}", (mean, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    panel.set_yticks(range(len(names)), [SCHEMES[name].title for name in names])
    panel.tick_params(axis="y", length=0)
    panel.set_xlim(0, 1.2 * max(means))
    panel.set_xlabel("virtual seconds; two clients are 10x slower")
    panel.set_title("Time to finish")
