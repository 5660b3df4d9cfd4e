"""How `fl-gradcode plan --matmul` shows its plan: a table, JSON, and a figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .plan_figure import new_figure, save_figure
from .product_plan import ProductLine, ProductPlan

__all__ = ["as_json", "draw_products", "seconds_text", "table_of"]

_SHOWN = 16  # rows of the table; --json has all


def table_of(plan: ProductPlan, title: str) -> Table:
    """The lines around the best one, and some of the others."""
    caption = (
        "run: mean seconds a product over a run, where workers that were not needed are still busy; ±: its standard "
        "error; gain: against k = n, no code; idle: seconds of a product that finds everybody idle (* closed form); "
        "work: what all workers compute, in products."
    )
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
        caption=caption, caption_justify="left",
    )  # fmt: skip
    for column in ("k", "run", "±", "gain", "idle", "work"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in _shown(plan):
        table.add_row(
            str(line.k),
            seconds_text(line.steady),
            seconds_text(line.error, 1),
            f"{plan.speedup(line):.2f}x",
            seconds_text(line.idle) + ("*" if line.closed_form else " "),
            f"{line.computed:.2f}x",
            style="bold green" if line is plan.best else None,
        )
    return table


def as_json(plan: ProductPlan, source: str) -> dict[str, Any]:
    """All lines."""
    return {
        "source": source,
        "workers": plan.n,
        "verdict": plan.verdict,
        "best-k": plan.best.k,
        "best-k-idle-start": min(plan.lines, key=lambda line: (line.idle, -line.k)).k,
        "lines": [_line(line) for line in plan.lines],
    }


def draw_products(plan: ProductPlan, path: str | Path, *, title: str) -> None:
    """Speed-up over no code against k, in a run and from an idle start.

    Raises:
        ImportError: matplotlib is not installed; it is in the extra `figures`.
        InvalidSetting: The file cannot be written.
    """
    figure, axes = new_figure()
    last = plan.lines[-1]
    shown = [line for line in plan.lines if math.isfinite(line.steady) and math.isfinite(line.idle)]
    k = [line.k for line in shown]
    axes.axhline(1.0, color="black", linewidth=1.2, label="no code (k = n)")
    if math.isfinite(last.idle):
        idle = [last.idle / line.idle for line in shown]
        axes.plot(k, idle, color="#56B4E9", linestyle="--", marker="o", mfc="white", markersize=4, label="idle start")
    if math.isfinite(last.steady):
        axes.plot(
            k, [plan.speedup(line) for line in shown], color="#0072B2", marker="o", markersize=4, label="in a run"
        )
        axes.plot(
            [plan.best.k], [plan.speedup(plan.best)], marker="*", markersize=17, color="#F0E442", linestyle="",
            markeredgecolor="black", label=f"recommended: k = {plan.best.k}", zorder=5,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"k: answers that decode, of n = {plan.n} workers (each computes a k-th of the product)")
    axes.set_ylabel("speed-up over no code (times)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def _shown(plan: ProductPlan) -> list[ProductLine]:
    if len(plan.lines) <= _SHOWN:
        return list(plan.lines)
    place = plan.lines.index(plan.best)
    step = -(-len(plan.lines) // (_SHOWN - 5))
    chosen = {*range(len(plan.lines) - 1, -1, -step), *range(place - 2, place + 3)}
    return [plan.lines[i] for i in sorted(chosen) if 0 <= i < len(plan.lines)]


def _line(line: ProductLine) -> dict[str, Any]:
    numbers = {
        "seconds-over-a-run": line.steady,
        "standard-error": line.error,
        "seconds-idle-start": line.idle,
        "computed": line.computed,
    }
    return {
        "k": line.k,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "idle-start-is-closed-form": line.closed_form,
        "python": line.python,
    }


def seconds_text(value: float, digits: int = 3) -> str:
    """For a table."""
    return "-" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.{digits}g}"
