"""How `experiments.ridge` shows its rows: a table, and accuracy over virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["draw", "markdown"]

# Okabe and Ito's colours, and a marker each.
_LOOKS = (("#666666", "o"), ("#0072B2", "^"), ("#009E73", "s"))


def _runs(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Law -> scheme -> its rows."""
    result: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        result.setdefault(row["law"], {}).setdefault(row["scheme"], []).append(row)
    return result


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line a run."""
    lines = [
        "| law | scheme | accuracy | virtual seconds | expected | faster | MB down | MB up | computed | off |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for law, schemes in _runs(rows).items():
        plain = schemes["no code"][-1]["expected"]
        for scheme, some in schemes.items():
            last = some[-1]
            lines.append(
                f"| {law} | {scheme} | {last['accuracy']:.2%} | {last['seconds']:.1f} | {last['expected']:.1f} | "
                f"{plain / last['expected']:.2f}x | "
                f"{last['megabytes-down']:,.0f} | {last['megabytes-up']:,.0f} | {last['computed']:.2f}x | "
                f"{last['off']:.0e} |"
            )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Test accuracy over virtual seconds, one panel a law."""
    runs = _runs(rows)
    figure, panels = plt.subplots(1, len(runs), figsize=(11, 4.4), sharey=True, layout="constrained", squeeze=False)
    for panel, (law, schemes) in zip(panels[0], runs.items(), strict=True):
        for (scheme, some), (colour, marker) in zip(schemes.items(), _LOOKS, strict=False):
            panel.plot(
                [row["seconds"] for row in some],
                [100 * row["accuracy"] for row in some],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.6,
                label=f"{scheme}: {some[-1]['seconds']:.0f} s",
            )
        panel.set_title(f"Law of latency: {law}", fontsize=10)
        panel.set_xlabel("virtual time (seconds, logarithmic)")
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False, fontsize=9)
    panels[0][0].set_ylabel("test accuracy (%)")
    first = rows[0]
    figure.suptitle(
        f"Ridge regression on {first['features']} random features of {first['dataset']}: {first['batches']} batches, "
        "one product each, on 20 workers",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
