"""How schemes look in every figure: a hue for a family, a line for a member (Okabe and Ito's colours)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib

__all__ = ["INK", "LOOKS", "SCREEN", "Look", "look", "styled"]

#: Text and axes; the page replaces it by the colour of its own text. Black stays black.
INK = "#202124"
_GREY, _BLUE, _SKY, _GREEN = "#8A8A8A", "#0072B2", "#56B4E9", "#009E73"
_ORANGE, _VERMILION, _PURPLE = "#E69F00", "#D55E00", "#CC79A7"


@dataclass(frozen=True)
class Look:
    """Colour, line and marker of a scheme."""

    colour: str
    line: Any = "-"
    marker: str = ""

    @property
    def kwargs(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        return {"color": self.colour, "linestyle": self.line, "marker": self.marker, "markersize": 3.5}


LOOKS = {
    "wait": Look(_GREY, marker="s"),
    # One coded reply a worker: green.
    "repetition": Look(_GREEN),
    "cyclic": Look(_GREEN, "--"),
    "general": Look(_GREEN, ":"),
    "repetition-m2": Look(_GREEN, "-."),
    # One shard a message: blue.
    "replication": Look(_SKY, "--"),
    "partial": Look(_BLUE, marker="o"),
    "adaptive": Look(_SKY, marker="^"),
    # Replies left out: orange.
    "drop-s": Look(_ORANGE, "--"),
    "drop-owners": Look(_ORANGE),
    "deadline": Look(_ORANGE, "-."),
    "over-selection": Look(_ORANGE, ":"),
    "fedprox": Look(_PURPLE, marker="D"),
    # No rounds to wait for: vermilion.
    "semi": Look(_VERMILION, "--"),
    "fedbuff": Look(_VERMILION),
}

#: Of every figure.
SCREEN: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.alpha": 0.25,
    "grid.color": "#808080",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "svg.fonttype": "none",
}

#: For functions that draw.
styled = matplotlib.rc_context(SCREEN)


def look(scheme: str) -> Look:
    """Of a scheme that has none, grey."""
    return LOOKS.get(scheme, Look(_GREY))
