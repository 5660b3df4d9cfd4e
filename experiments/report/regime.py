"""Where coding pays: simulated rounds over the share of compute and over how heavy the tail is. Reads no rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.report.figures import new_figure
from experiments.report.style import INK, styled
from fl_gradcode.latency import Latency, Law, Parts, bimodal, lognormal
from fl_gradcode.planning import GAIN, Scheme, candidates, steady_rounds, wait_for_all

__all__ = ["Cell", "Regimes", "compute", "draw"]

SLOWDOWN = 10.0
PROBABILITIES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_CLOSE = 0.04  # a scheme this close to the fastest is named if its s is smaller, as the planner does
_JITTER = 0.1


@dataclass(frozen=True)
class Cell:
    """How many times faster than waiting for all the fastest coded scheme is, and which scheme to name."""

    speedup: float
    label: str


@dataclass(frozen=True)
class Regimes:
    """Cells of two families of schemes, under heavy and under light tails: (family, tail) -> rows of cells."""

    n: int
    shares: Sequence[float]
    heavy: Sequence[float]
    light: Sequence[float]
    cells: dict[tuple[str, str], list[list[Cell]]]


def compute(
    n: int = 30,
    *,
    shares: Sequence[float] = SHARES,
    heavy: Sequence[float] = PROBABILITIES,
    light: Sequence[float] = SIGMAS,
    runs: int = 6,
    rounds: int = 50,
) -> Regimes:
    """Simulate every exact scheme that the planner knows in every cell; all schemes meet the same draws.

    Args:
        runs: Of each cell; the first fifth of their rounds, in which a run settles, does not count.
    """
    schemes = [one for one in candidates(n) if one.exact]
    cells: dict[tuple[str, str], list[list[Cell]]] = {}
    laws: list[tuple[str, list[Law]]] = [
        ("heavy", [bimodal(p, SLOWDOWN, jitter=_JITTER) for p in heavy]),
        ("light", [lognormal(1.0, sigma) for sigma in light]),
    ]
    for tail, tables in laws:
        for law in tables:
            slow = [
                Latency(compute=1.0, slowdown=law).parts(seed=run, n=n, rounds=rounds).compute for run in range(runs)
            ]
            rows: dict[str, list[Cell]] = {"any": [], "coded": []}
            for share in shares:
                draws = [Parts((1 - share) * one, share * one, np.zeros_like(one)) for one in slow]
                plain = _mean(wait_for_all(n), draws)
                speedups = {one: plain / _mean(one, draws) for one in schemes}
                rows["any"].append(_cell(speedups))
                rows["coded"].append(_cell({one: x for one, x in speedups.items() if not one.shardwise}))
            for family, row in rows.items():
                cells.setdefault((family, tail), []).append(row)
    return Regimes(n, shares, heavy, light, cells)


@styled
def draw(regimes: Regimes) -> Figure:
    """Four maps: all exact schemes and coded replies alone, under heavy and under light tails."""
    sizes = [len(regimes.heavy), len(regimes.light)]
    figure, panels = new_figure(2, 2, (10.5, 1.6 + 0.42 * sum(sizes)), sharex=True, height_ratios=sizes, sharey="row")
    norm = TwoSlopeNorm(0.0, -2.5, 2.5)
    titles = {"any": "All exact schemes", "coded": "One coded reply a worker only"}
    for panel, (tail, family) in zip(panels, [(t, f) for t in ("heavy", "light") for f in titles], strict=True):
        _map(panel, regimes.cells[family, tail], norm)
        levels = regimes.heavy if tail == "heavy" else regimes.light
        panel.set_yticks(range(len(levels)), [f"{level:g}" for level in levels])
        panel.set_xticks(range(len(regimes.shares)), [f"{share:.0%}".replace("%", " %") for share in regimes.shares])
        if family == "any":
            heavy = f"probability that a job\nis {SLOWDOWN:g} times slower"
            panel.set_ylabel(heavy if tail == "heavy" else "lognormal tail: sigma")
        if tail == "heavy":
            panel.set_title(titles[family])
        else:
            panel.set_xlabel("share of a job's time that is compute")
    marks = (-2, -1, 0, 1, 2)
    bar = figure.colorbar(ScalarMappable(norm, "PuOr"), ax=panels, shrink=0.6, ticks=marks)
    bar.ax.set_yticklabels([f"{2.0**mark:g}" for mark in marks], color=INK)
    bar.set_label("speed-up over waiting for all (below 1: coding is slower)", color=INK)
    bar.ax.tick_params(color=INK)
    return figure


def _map(panel: Axes, cells: list[list[Cell]], norm: Normalize) -> None:
    values = np.log2([[cell.speedup for cell in row] for row in cells])
    panel.imshow(np.clip(values, norm.vmin, norm.vmax), cmap="PuOr", norm=norm, aspect="auto", origin="lower")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            colour = "#FFFFFF" if abs(values[y, x]) > 1.45 else "#000000"
            digits = 2 if cell.speedup < 0.995 else 1
            text = f"{cell.label}\n{cell.speedup:.{digits}f}x"
            panel.text(x, y, text, ha="center", va="center", fontsize=7, color=colour, linespacing=0.95)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def _cell(speedups: dict[Scheme, float]) -> Cell:
    fastest = max(speedups.values())
    if fastest < 1 / (1 - GAIN):
        return Cell(fastest, "no code")
    close = [one for one, x in speedups.items() if x >= fastest / (1 + _CLOSE)]
    best = min(close, key=lambda one: (one.s, -speedups[one]))
    return Cell(fastest, f"{_kind(best)} {best.s}")


def _kind(scheme: Scheme) -> str:
    if scheme.shardwise:
        return "pw" if scheme.patience else "rp"
    return "rep" if scheme.groups else "cyc"


def _mean(scheme: Scheme, draws: list[Parts]) -> float:
    times: list[NDArray[np.float64]] = [steady_rounds(scheme, parts).seconds for parts in draws]
    return float(np.mean([one[len(one) // 5 :].mean() for one in times]))
