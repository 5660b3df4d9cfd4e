"""The figure of a plan: expected round time against s, one line for each kind of scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InvalidSetting
from .planner import Line, RoundPlan

__all__ = ["draw_plan", "new_figure", "save_figure"]

# Okabe and Ito's colours: told apart by colour-blind readers too.
_STYLES: dict[str, tuple[str, str, str]] = {
    "partial work": ("#0072B2", "o", "-"),
    "partial work, at once": ("#56B4E9", "v", "-"),
    "repetition": ("#009E73", "s", "-"),
    "repetition, m = 2": ("#CC79A7", "D", "-"),
    "any n - s code": ("#D55E00", "^", "-"),
    "dropping (loses data)": ("#999999", "x", "--"),
}


def new_figure() -> tuple[Any, Any]:
    """An empty figure and its axes.

    Raises:
        ImportError: matplotlib is not installed; it is in the extra `figures`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A figure needs matplotlib: pip install 'fl-gradcode[figures]'.") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: Any, path: str | Path) -> None:
    """Write it; the format follows the file's ending.

    Raises:
        InvalidSetting: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"The figure {str(path)!r} cannot be written: {error}.") from error


def draw_plan(plan: RoundPlan, path: str | Path, *, title: str) -> None:
    """Write a figure; the format follows the file's ending.

    Raises:
        ImportError: matplotlib is not installed; it is in the extra `figures`.
        InvalidSetting: The file cannot be written.
    """
    figure, axes = new_figure()
    families: dict[str, list[Line]] = {}
    for line in plan.lines[1:]:
        family = _family(line)
        if family is not None:
            families.setdefault(family, []).append(line)
    plain = plan.lines[0].steady
    axes.axhline(plain, color="black", linewidth=1.2, label="waiting for all (no code)")
    for name, (colour, marker, dash) in _STYLES.items():
        lines = sorted(families.get(name, ()), key=lambda line: line.scheme.s)
        if lines:
            axes.plot(
                [line.scheme.s for line in lines],
                [line.steady for line in lines],
                color=colour,
                marker=marker,
                linestyle=dash,
                label=name,
            )
    best = plan.recommended
    axes.plot(
        [best.scheme.s], [best.steady], marker="*", markersize=17, color="#F0E442", markeredgecolor="black",
        linestyle="", label="recommended", zorder=5,
    )  # fmt: skip
    values = [line.steady for line in plan.lines if line.steady < float("inf")]
    if max(values) > 8 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({0, *(line.scheme.s for line in plan.lines if _family(line))}))
    axes.set_xlabel("s: stragglers that a code tolerates, or that are dropped")
    axes.set_ylabel("mean seconds a round, over a run")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, path)


def _family(line: Line) -> str | None:
    scheme = line.scheme
    if scheme.name.startswith("over-select"):
        return None
    if not scheme.exact:
        return "dropping (loses data)"
    if scheme.shardwise:
        return "partial work" if scheme.patience else "partial work, at once"
    if scheme.groups:
        return "repetition, m = 2" if scheme.m > 1 else "repetition"
    return "any n - s code"
