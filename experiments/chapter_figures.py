"""How `experiments.chapter` shows its results: tables, and figures whose filled markers are Monte Carlo means."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from rich import box
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fl_gradcode.planning import best_fraction

if TYPE_CHECKING:
    from experiments.chapter import Matvec, Times

__all__ = ["Sheet", "example", "products", "rounds", "sheets", "wrapped"]

# Okabe and Ito's colours, and a marker each: told apart by colour-blind readers, and without colour.
_LOOKS = {
    "no code": ("#666666", "o"),
    "any n - s": ("#D55E00", "^"),
    "repetition": ("#0072B2", "o"),
    "partial work": ("#009E73", "D"),
    "partial work, patience 2": ("#009E73", "s"),
}
_GREY = "#666666"
_SPEEDS = (("#CC79A7", "^"), ("#0072B2", "o"), ("#E69F00", "s"))

Curves = Mapping[str, Mapping[tuple[str, int], "Times"]]


@dataclass(frozen=True)
class Sheet:
    """A table that can be printed, and written as Markdown."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.header, ("---", *["---:"] * (len(self.header) - 1)), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table


def sheets(curves: Curves, products: Sequence[Matvec], decodable: Callable[..., float]) -> list[Sheet]:
    """All tables; the first two curves are those of the example."""
    shown = (0, 1, 3, 7, 10)
    codes, beside = [], []
    for name, curve in curves.items():
        times = {s: one for (scheme, s), one in curve.items() if scheme == "any n - s"}
        closed = np.array([one.closed for one in times.values()])
        best = int(np.argmin(closed))
        cells = [f"{closed[s]:.2f} ({times[s].idle:.2f})" for s in shown]
        codes.append((name, *cells, str(best), f"{closed[0] / closed[best]:.2f}x"))
        for s in (1, 3, 7):
            three = [curve[scheme, s] for scheme in ("any n - s", "repetition", "partial work")]
            pairs = [f"{_idle(one):.2f} / {one.steady:.2f}" for one in three]
            beside.append((name if s == 1 else "", str(s), f"{closed[0]:.2f}", *pairs))
    return [
        Sheet(
            "codes",
            "Any n - s: seconds of a round from an idle start, closed form (Monte Carlo)",
            ("model", *(f"s = {s}" for s in shown), "best s", "gain"),
            tuple(codes),
        ),
        Sheet(
            "beside",
            "Seconds of a round: idle start / in a run",
            ("model", "s", "no code", "any n - s", "repetition", "partial work"),
            tuple(beside),
        ),
        Sheet(
            "products",
            "Coded matrix-vector multiplication",
            (
                "n, mu",
                "uncoded",
                "best k",
                "E[T]",
                "Monte Carlo",
                "speed-up",
                "best_fraction(mu) n",
                "two-fold repetition",
            ),
            tuple(map(_product, products)),
        ),
        Sheet(
            "example",
            "64 GPUs, s = 3: seconds of a round, and how many times shorter than without a code",
            ("scheme", "closed form", "idle start", "gain", "in a run", "gain"),
            tuple(
                (
                    label,
                    "" if one.closed is None else f"{one.closed:.3f}",
                    f"{one.idle:.2f}",
                    f"{base / _idle(one):.2f}x",
                    f"{one.steady:.2f}",
                    f"{base / one.steady:.2f}x",
                )
                for label, _, one, base in _example_rows(curves)
            ),
        ),
        Sheet(
            "decodable",
            "P(a round decodes), 5 % straggle",
            ("s", "any n - s", "repetition, groups of s + 1"),
            tuple((str(s), *(f"{decodable(s, groups=groups):.4f}" for groups in (False, True))) for s in (0, 1, 3, 7)),
        ),
    ]


def wrapped(block: str) -> str:
    """A paragraph of Markdown in lines of 120; none begins with a sign, which would make it a list."""
    if block[0] in "#|!":
        return block
    kept = re.sub(" ([-+=]|<=) ", "\0\\1\0", " ".join(block.split()))
    end = "\n" if block.endswith("\n") else ""
    return textwrap.fill(kept, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ") + end


def _product(one: Matvec) -> tuple[str, ...]:
    best = one.best - 1
    seconds = [f"{x:#.3g}" for x in (one.seconds[-1], one.seconds[best], one.simulated[best], one.repetition)]
    gain, limit = f"{one.seconds[-1] / one.seconds[best]:.2f}x", f"{best_fraction(one.mu) * one.n:.1f}"
    return (f"{one.n}, {one.mu:g}", seconds[0], str(one.best), *seconds[1:3], gain, limit, seconds[3])


def _example_rows(curves: Curves) -> Iterator[tuple[str, str, Times, float]]:
    """(label, scheme, times, expected seconds without a code)."""
    ignored, charged = list(curves.values())[:2]
    base = ignored["any n - s", 0]
    assert base.closed is not None
    yield "no code", "no code", base, base.closed
    for name in ("any n - s", "repetition"):
        yield f"{name}, load ignored", name, ignored[name, 3], base.closed
    for name in list(_LOOKS)[1:]:
        yield f"{name}, load charged", name, charged[name, 3], base.closed


def _idle(times: Times) -> float:
    return times.idle if times.closed is None else times.closed


def rounds(curves: Curves, path: Path) -> None:
    """Seconds of a round against s, one panel a model."""
    figure, grid = plt.subplots(2, 3, figsize=(10.5, 6.8), layout="constrained", sharex=True)
    for panel, (name, curve) in zip(grid.flat, curves.items(), strict=True):
        _plain(panel, name)
        base = curve["any n - s", 0].closed
        assert base is not None
        panel.axhline(base, color=_GREY, linewidth=1, linestyle=":")
        for scheme in ("any n - s", "repetition", "partial work"):
            colour, marker = _LOOKS[scheme]
            s = sorted(t for one, t in curve if one == scheme)
            times = [curve[scheme, t] for t in s]
            panel.plot(s, [_idle(t) for t in times], color=colour, linewidth=1.5)
            panel.plot(s, [t.idle for t in times], color=colour, marker=marker, markersize=5, linestyle="none")
            panel.plot(
                s,
                [t.steady for t in times],
                color=colour,
                marker=marker,
                markersize=5,
                markerfacecolor="white",
                linewidth=1,
                linestyle="--",
            )
        panel.set_ylim(0, None)
        panel.set_xticks(range(0, 11, 2))
    for panel in grid[1]:
        panel.set_xlabel("s, stragglers tolerated (workers)")
    for panel in grid[:, 0]:
        panel.set_ylabel("mean time of a round (s)")
    handles = [
        *(Line2D([], [], color=c, marker=m, markersize=5, label=name) for name, (c, m) in list(_LOOKS.items())[1:4]),
        Line2D([], [], color=_GREY, linestyle=":", label="no code"),
        Line2D([], [], color="black", marker="o", markersize=5, label="idle start (line: closed form)"),
        Line2D([], [], color="black", marker="o", markersize=5, mfc="white", linestyle="--", label="in a run"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    _write(figure, path)


def products(results: Sequence[Matvec], path: Path) -> None:
    """Speed-up over no code against k, one panel for each number of workers."""
    sizes = sorted({one.n for one in results})
    figure, panels = plt.subplots(1, len(sizes), figsize=(10.5, 4.2), layout="constrained")
    for panel, n in zip(panels, sizes, strict=True):
        _plain(panel, f"n = {n} workers")
        panel.axhline(1, color=_GREY, linewidth=1, linestyle=":")
        for one, (colour, marker) in zip((one for one in results if one.n == n), _SPEEDS, strict=True):
            k = range(1, n + 1)
            gain = one.seconds[-1] / one.seconds
            every = max(1, n // 20)
            panel.plot(k, gain, color=colour, linewidth=1.5)
            simulated = (one.seconds[-1] / one.simulated)[every - 1 :: every]
            panel.plot(k[every - 1 :: every], simulated, color=colour, marker=marker, markersize=4, linestyle="none")
            panel.plot(one.best, gain[one.best - 1], color=colour, marker="*", markersize=15, markeredgecolor="black")
            limit = best_fraction(one.mu) * n
            panel.plot([limit, limit], [0, 0.05], color=colour, linewidth=2.5, transform=panel.get_xaxis_transform())
            panel.plot(
                n / 2, one.seconds[-1] / one.repetition, color=colour, marker="X", markersize=9, markeredgecolor="black"
            )
        panel.set_ylim(0, None)
        panel.legend(
            handles=[
                Line2D([], [], color=c, marker=m, markersize=4, label=f"mu = {one.mu:g}: best k = {one.best}")
                for one, (c, m) in zip((one for one in results if one.n == n), _SPEEDS, strict=True)
            ],
            loc="lower right",
            bbox_to_anchor=(1, 0.07),
            frameon=False,
            fontsize=9,
        )
        panel.set_xlabel("k, answers that are waited for (workers)")
    panels[0].set_ylabel("speed-up over k = n, no code (times)")
    handles = [
        Line2D([], [], color="black", marker="o", markersize=4, label="closed form, and Monte Carlo"),
        Line2D([], [], color="white", marker="*", markersize=14, markeredgecolor="black", label="best k"),
        Line2D([], [], color="black", marker="|", markersize=9, linestyle="none", mew=2.5, label="best_fraction(mu) n"),
        Line2D([], [], color="white", marker="X", markersize=9, markeredgecolor="black", label="two-fold repetition"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    _write(figure, path)


def example(curves: Curves, decodable: Callable[..., float], path: Path) -> None:
    """64 GPUs and s = 3: seconds of a round for each scheme; and how likely a round decodes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained", width_ratios=(3, 2))
    rows = list(_example_rows(curves))
    _plain(left, "64 GPUs, s = 3, exponential delays")
    left.axvline(rows[0][3], color=_GREY, linewidth=1, linestyle=":")
    for y, (_, name, one, _) in enumerate(rows):
        colour, marker = _LOOKS[name]
        idle = _idle(one)
        left.plot([idle, one.steady], [y, y], color=colour, linewidth=1.5)
        left.plot(idle, y, color=colour, marker=marker, markersize=8)
        left.plot(one.steady, y, color=colour, marker=marker, markersize=8, markerfacecolor="white")
        left.annotate(
            f"{idle:.2f}" if name == "no code" else f"{idle:.2f}, in a run {one.steady:.2f}",
            (max(idle, one.steady), y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    left.set_yticks(range(len(rows)), [label.replace(", load", ",\nload") for label, *_ in rows], fontsize=9)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlim(0, 18)
    left.set_xlabel("mean time of a round (s): idle start filled, in a run hollow")
    _plain(right, "Each of 64 straggles with probability 5 %")
    for name, tolerances in (("any n - s", range(11)), ("repetition", (1, 3, 7))):
        colour, marker = _LOOKS[name]
        chance = [decodable(s, groups=name == "repetition") for s in tolerances]
        right.plot(tolerances, chance, color=colour, marker=marker, markersize=6, linewidth=1.5)
    right.annotate("any n - s", (4.2, 0.72), color=_LOOKS["any n - s"][0], fontsize=9)
    right.annotate("repetition, groups of s + 1", (1.6, 1.03), color=_LOOKS["repetition"][0], fontsize=9)
    right.set_ylim(0, 1.1)
    right.set_xlabel("s, stragglers tolerated (workers)")
    right.set_ylabel("probability that a round decodes")
    _write(figure, path)


def _plain(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _write(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
