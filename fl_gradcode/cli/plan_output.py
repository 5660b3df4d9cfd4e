"""Tables, JSON and figures of `fl-gradcode plan`, for rounds and for matrix products."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import InvalidSetting
from ..planning import Line, ProductLine, ProductPlan, RoundPlan
from ._output import finite_or_none, plain_table
from .plan_source import Source

__all__ = [
    "draw_plan",
    "draw_products",
    "plan_as_json",
    "plan_remarks",
    "plan_table",
    "products_as_json",
    "products_table",
]


_SOONER = 0.9  # of the exact rounds' time, above which bounded staleness is not worth a sentence
_ROWS = 6  # of the table, unless all schemes are asked for
_GOOD = 0.05  # Kolmogorov-Smirnov distance of a law that is worth naming


def plan_remarks(plan: RoundPlan, read: Source) -> list[str]:
    """Returns what to know beside the verdict, one sentence or two each."""
    remarks = [meaning] if (meaning := plan.recommended.scheme.meaning) else []
    remarks += [f"Share of a job that grows with its shards: {read.split.told()}. {_of_shares(plan, read)}".rstrip()]
    if plan.evidence is not None:
        remarks += plan.evidence.parts
        if plan.evidence.simulated < plan.evidence.rounds:
            remarks.append(
                f"{plan.evidence.simulated} of the {plan.evidence.rounds} rounds were simulated, in blocks spread over "
                "all of them."
            )
    if plan.slow:
        plural = "s" if len(plan.slow) > 1 else ""
        remarks.append(f"Always slow: worker{plural} {', '.join(map(read.worker, plan.slow))}.")
    elif read.fits and read.fits[0].distance <= _GOOD:
        best = read.fits[0]
        remarks.append(f"Closest law: {best.code} (Kolmogorov-Smirnov distance {best.distance:.2f}).")
    stale = plan.stale
    exact = plan.recommended.steady
    if stale is not None and stale.steady < _SOONER * min(stale.exact, exact):
        remarks.append(
            f"Exact: {exact:.3g} s; with results up to {stale.bound} rounds old: {stale.steady:.3g} s "
            f"(mean age {stale.age:.2g}), by {stale.scheme.name} with Shards(staleness={stale.bound}). Such rounds are "
            "not exact: see docs/staleness.md."
        )
    remarks += [f"Read: {note}." for note in read.notes]
    return remarks


def _of_shares(plan: RoundPlan, read: Source) -> str:
    """Returns for which shares the verdict holds, and what to do where the share is not known."""
    shares, unsure = plan.shares, read.split.origin == "assumed"
    adaptive = ' If you do not know the share, send="adaptive" decides during the run.' if unsure else ""
    if shares is None:
        return "With this share for all workers another scheme would be recommended." + adaptive
    if (shares.low, shares.high) == (0.0, 1.0):
        return "The verdict holds for every share."
    others = [
        f"{where}, {advice}"
        for where, advice in (("below", shares.below), ("above", shares.above))
        if advice is not None
    ]
    return f"The verdict holds from {shares.low:g} to {shares.high:g}; {'; '.join(others)}.{adaptive}"


def plan_table(plan: RoundPlan, read: Source, *, uploads: bool, every: bool = False) -> Table:
    """Returns a table of schemes.

    Args:
        plan: The plan.
        read: What it was made from.
        uploads: Whether to add a column of the megabytes uploaded.
        every: Whether to show all schemes; otherwise at most six, with the best of each kind.
    """
    shown = list(plan.lines) if every else _that_matter(plan)
    measured = plan.evidence is not None
    sure = "90 %: interval from resampled rounds" if measured else "±: its standard error"
    starts = not uploads and not measured  # idle starts, where 80 columns have room for them; --json has them always
    idle_told = "idle: seconds of a round that begins with all workers idle (* closed form); " if starts else ""
    hidden = "" if len(shown) == len(plan.lines) else f" --all shows all {len(plan.lines)} schemes."
    caption = (
        f"run: mean seconds of a round in a run, where workers that were not needed are still busy; {sure}; "
        "gain: how many times faster than waiting for all; bound: times as long as for a server that knows all times "
        f"beforehand and stores the same shards on the same workers; {idle_told}"
        f"work: computing relative to plain FedAvg; {'up: MB of all replies of a round; ' if uploads else ''}"
        f"holds: shards that a worker stores; >: recommended; †: loses data.{hidden}"
    )
    table = plain_table(title=f"{plan.n} workers, {read.told}", caption=caption)
    table.add_column("  scheme", no_wrap=True)
    sureness, idle, up = "90 %" if measured else "±", ["idle"] if starts else [], ["up"] if uploads else []
    for column in ("run", sureness, "gain", "bound", *idle, "work", *up, "holds"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in shown:
        error = _cell(line.error, 1)
        if measured:
            error = "-" if line.interval is None else "-".join(_cell(end, 2) for end in line.interval)
        cells = [
            _cell(line.steady),
            error,
            f"{plan.speedup(line):.2f}x",
            "-" if line.over_bound is None else f"{line.over_bound:.2f}x",
            *([_cell(line.idle) + ("*" if line.closed_form else " ")] if starts else []),
            f"{line.computed:.2f}x",
            *([f"{line.upload:.3g}"] if uploads else []),
            str(line.storage),
        ]
        chosen = line is plan.recommended
        style = "bold green" if chosen else None if line.scheme.exact else "dim"
        mark = "> " if chosen else "  "
        table.add_row(mark + line.scheme.name + ("" if line.scheme.exact else " †"), *cells, style=style)
    return table


def _stale(plan: RoundPlan) -> dict[str, Any] | None:
    stale = plan.stale
    if stale is None:
        return None
    return {
        "scheme": stale.scheme.name,
        "staleness": stale.bound,
        "run": finite_or_none(stale.steady),
        "mean-age": finite_or_none(stale.age),
        "exact": finite_or_none(stale.exact),
    }


def _that_matter(plan: RoundPlan) -> list[Line]:
    """Returns waiting for all, the recommended line and the fastest of each kind, in the order of the plan."""
    kinds: dict[str | None, Line] = {}
    for line in plan.lines[1:]:
        kind = _family(line)
        if kind is not None and (kind not in kinds or line.steady < kinds[kind].steady):
            kinds[kind] = line
    rest = sorted(kinds.values(), key=lambda line: (not line.scheme.exact, line.steady))
    dropped = [line for line in rest if not line.scheme.exact][:1]
    chosen = [plan.lines[0], plan.recommended, *dropped]
    chosen += [line for line in rest if line.scheme.exact and not any(line is one for one in chosen)]
    chosen = chosen[: _ROWS + (plan.recommended is plan.lines[0])]
    return [line for line in plan.lines if any(line is one for one in chosen)]


def plan_as_json(plan: RoundPlan, read: Source) -> dict[str, Any]:
    """Returns a plan for rounds, with all of its lines, as JSON values."""
    shares, evidence = plan.shares, plan.evidence
    return {
        "source": read.told,
        "workers": plan.n,
        "verdict": plan.verdict,
        "recommended": _line(plan.recommended),
        "always-slow": list(plan.slow),
        "stale": _stale(plan),
        "names": list(read.names),
        "notes": list(read.notes),
        "compute-share": {
            "share": read.split.share,
            "origin": read.split.origin,
            "interval": None if read.split.interval is None else list(read.split.interval),
            "holds-from": None if shares is None else shares.low,
            "holds-to": None if shares is None else shares.high,
            "below": None if shares is None else shares.below,
            "above": None if shares is None else shares.above,
        },
        "evidence": None
        if evidence is None
        else {
            "rounds": evidence.rounds,
            "simulated": evidence.simulated,
            "times-faster": None if evidence.faster is None else [finite_or_none(end) for end in evidence.faster],
            "sure": evidence.sure,
            "parts": list(evidence.parts),
        },
        "fits": [{"law": one.code, "distance": one.distance} for one in read.fits],
        "schemes": [_line(line) for line in plan.lines],
    }


def _line(line: Line) -> dict[str, Any]:
    return {
        "scheme": line.scheme.name,
        "s": line.scheme.s,
        "exact": line.scheme.exact,
        **_numbers(line),
        "megabytes-up": finite_or_none(line.upload),
        "idle-start-is-closed-form": line.closed_form,
        "clairvoyant-bound": None if line.bound is None else finite_or_none(line.bound),
        "shards-stored": line.storage,
        "interval": None if line.interval is None else [finite_or_none(end) for end in line.interval],
        "python": line.scheme.to_paste,
    }


# Okabe and Ito's colours, which colour-blind readers can tell apart: colour, marker and line of each family.
_STYLES: dict[str, tuple[str, str, str]] = {
    "partial work": ("#0072B2", "o", "-"),
    "partial work, at once": ("#56B4E9", "v", "-"),
    "repetition": ("#009E73", "s", "-"),
    "repetition, m = 2": ("#CC79A7", "D", "-"),
    "any n - s code": ("#D55E00", "^", "-"),
    "dropping (loses data)": ("#999999", "x", "--"),
}


def _new_figure() -> tuple[Any, Any]:
    """Returns an empty figure and its axes.

    Raises:
        ImportError: matplotlib is not installed; it is in the extra `figures`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A figure needs matplotlib: pip install 'matplotlib>=3.8'.") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    return figure, figure.add_subplot()


def _save_figure(figure: Any, path: str | Path) -> None:
    """Writes a figure to a file. The format follows the file's ending.

    Raises:
        InvalidSetting: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"The figure {str(path)!r} cannot be written: {error}.") from error


def draw_plan(plan: RoundPlan, path: str | Path, *, told: str) -> None:
    """Writes a figure of the seconds a round of each scheme over s. The format follows the file's ending.

    Raises:
        ImportError: matplotlib is not installed; it is in the extra `figures`.
        InvalidSetting: The file cannot be written.
    """
    figure, axes = _new_figure()
    from matplotlib.ticker import LogLocator, NullFormatter

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
        [best.scheme.s], [best.steady], marker="o", markersize=15, markerfacecolor="none", markeredgecolor="black",
        markeredgewidth=1.8,
        linestyle="", label=f"recommended:\n{best.scheme.name}", zorder=5,
    )  # fmt: skip
    values = [line.steady for line in plan.lines if line.steady < float("inf")]
    if max(values) > 8 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({0, *(line.scheme.s for line in plan.lines if _family(line))}))
    axes.set_xlabel("s: stragglers that a code tolerates, or that are dropped")
    axes.set_ylabel("mean seconds a round, over a run")
    axes.set_title("\n".join([*textwrap.wrap(plan.headline, 84), told]), fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    _save_figure(figure, path)


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


_SHOWN = 16  # lines of the table of products; --json has all


def products_table(plan: ProductPlan, title: str) -> Table:
    """Returns a table with the lines around the best k, and some of the others."""
    caption = (
        "run: mean seconds a product over a run, where workers that were not needed are still busy; ±: its standard "
        "error; gain: against k = n, no code; idle: seconds of a product that finds all workers idle (* closed form); "
        "work: what all workers compute, in products."
    )
    table = plain_table(title=title, caption=caption)
    for column in ("k", "run", "±", "gain", "idle", "work"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in _shown(plan):
        table.add_row(
            str(line.k),
            _cell(line.steady),
            _cell(line.error, 1),
            f"{plan.speedup(line):.2f}x",
            _cell(line.idle) + ("*" if line.closed_form else " "),
            f"{line.computed:.2f}x",
            style="bold green" if line is plan.best else None,
        )
    return table


def products_as_json(plan: ProductPlan, source: str) -> dict[str, Any]:
    """Returns a plan for products, with all of its lines, as JSON values."""
    return {
        "source": source,
        "workers": plan.n,
        "verdict": plan.verdict,
        "best-k": plan.best.k,
        "best-k-idle-start": min(plan.lines, key=lambda line: (line.idle, -line.k)).k,
        "lines": [
            {"k": line.k, **_numbers(line), "idle-start-is-closed-form": line.closed_form, "python": line.python}
            for line in plan.lines
        ],
    }


def draw_products(plan: ProductPlan, path: str | Path, *, title: str) -> None:
    """Writes a figure of the speed-up over no code against k, in a run and from an idle start.

    Raises:
        ImportError: matplotlib is not installed; it is in the extra `figures`.
        InvalidSetting: The file cannot be written.
    """
    figure, axes = _new_figure()
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
    _save_figure(figure, path)


def _shown(plan: ProductPlan) -> list[ProductLine]:
    if len(plan.lines) <= _SHOWN:
        return list(plan.lines)
    place = plan.lines.index(plan.best)
    step = -(-len(plan.lines) // (_SHOWN - 5))
    chosen = {*range(len(plan.lines) - 1, -1, -step), *range(place - 2, place + 3)}
    return [plan.lines[i] for i in sorted(chosen) if 0 <= i < len(plan.lines)]


def _numbers(line: Line | ProductLine) -> dict[str, float | None]:
    """Returns the numbers that the lines of both planners have in common."""
    return {
        "seconds-over-a-run": finite_or_none(line.steady),
        "standard-error": finite_or_none(line.error),
        "seconds-idle-start": finite_or_none(line.idle),
        "computed": finite_or_none(line.computed),
    }


def _cell(value: float, digits: int = 3) -> str:
    """Returns seconds without their unit, for a cell of a table."""
    return "-" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.{digits}g}"
