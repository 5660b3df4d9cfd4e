"""The figure of `python -m experiments.sooner`: what exact, stale and dropped rounds learn, also of owned labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.report.figures import new_figure
from experiments.report.style import Look, look, styled
from experiments.sooner import Points

__all__ = ["PANELS", "learned_labels"]

#: What each panel shows, and its title.
PANELS = {"accuracy": "All labels", "owned": "Labels that slow clients alone have"}
_FIRST = 0.005  # where the time axis begins
_LOOKS = {
    "waiting for all": look("wait"),
    "exact, r = 8 + FedAdam": look("partial"),
    "bounded staleness": Look("#009E73", marker="^"),
    "drop the slowest 3": look("drop-owners"),
}


@styled
def learned_labels(curves: Mapping[str, Collection[Points]]) -> Figure:
    """Accuracy over virtual time, of the averaged model; a line is the mean over seeds, a band their range.

    Args:
        curves: Way -> the evaluations of each seed; "waiting for all" is the unit of time.
    """
    whole = float(np.mean([one.seconds[-1] for one in curves["waiting for all"]]))
    figure, panels = new_figure(1, 2, (9.5, 4.2), sharex=True)
    for panel, (what, title) in zip(panels, PANELS.items(), strict=True):
        for way, runs in curves.items():
            _draw(panel, runs, what, whole, _LOOKS[way], way)
        panel.set_title(title)
        panel.set_xlabel("time, where 1 is 60 rounds of waiting for all (logarithmic)")
        panel.set_ylabel("accuracy (%)")
        panel.set_xscale("log")
        panel.set_xlim(_FIRST, 1)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_ylim(0, 100)
        panel.grid(True)
    panels[0].legend(loc="lower right")
    figure.suptitle("3 of 30 clients are 10 times slower, and only they have two of the ten labels")
    return figure


def _draw(panel: Axes, runs: Collection[Points], what: str, whole: float, style: Look, label: str) -> None:
    if not runs:
        return
    grid = np.geomspace(_FIRST, min(1.0, min(float(one.seconds[-1]) for one in runs) / whole), 200)
    values: NDArray[np.float64] = np.array(
        [100 * np.interp(grid, one.seconds / whole, one.values("averaged", what)) for one in runs]
    )
    panel.fill_between(grid, values.min(axis=0), values.max(axis=0), color=style.colour, alpha=0.15, linewidth=0)
    seeds = f" ({len(runs)} seed{'s' * (len(runs) > 1)})" if len(runs) < 5 else ""
    panel.plot(grid, values.mean(axis=0), **style.kwargs, markevery=25, label=label + seeds)
