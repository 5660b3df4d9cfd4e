"""Figures: they read rows and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["accuracy_over_time"]

# Okabe and Ito's colours: told apart by colour-blind readers too.
_COLOURS = ("#999999", "#E69F00", "#0072B2", "#009E73")
_MARKERS = ("s", "^", "o", "D")


def accuracy_over_time(series: Sequence[tuple[str, Sequence[dict[str, Any]]]], path: Path, *, title: str) -> None:
    """Test accuracy, and accuracy on the worst class, over the run's seconds; one line a scheme."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    for panel, name in zip(panels, ("all test images", "the worst of the ten classes"), strict=True):
        for number, (label, rows) in enumerate(series):
            values = [row["accuracy"] if name.startswith("all") else min(row["class-accuracies"]) for row in rows]
            panel.plot(
                [row["seconds"] for row in rows],
                [100 * value for value in values],
                color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
                linewidth=1.6,
                label=label,
            )
        panel.set_title(f"Accuracy on {name}", fontsize=10)
        panel.set_xlabel("virtual time (seconds)")
        panel.set_ylim(_floor(series) if panel is panels[0] else -3, 103)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy (%)")
    panels[0].legend(loc="lower right", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _floor(series: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> float:
    """Where the axis of accuracy begins, in per cent: an untrained model is far below, and would flatten the rest."""
    after_one_round = [100 * rows[1]["accuracy"] for _, rows in series if len(rows) > 1]
    return 10 * (min(after_one_round) // 10) - 20 if after_one_round and min(after_one_round) >= 30 else -3
