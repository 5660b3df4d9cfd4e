"""What a page is made of. Both the HTML and the Markdown page render the same blocks, so their numbers agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from matplotlib.figure import Figure

from experiments.report.measures import Spread

__all__ = [
    "Block",
    "Bullets",
    "Code",
    "Fold",
    "Heading",
    "Shown",
    "Table",
    "Text",
    "flat",
    "number",
    "percent",
    "points",
    "seconds",
    "spread",
]

NOTHING = "–"  # noqa: RUF001 - an en dash is what an empty cell shows


@dataclass(frozen=True)
class Heading:
    """Level 2 or 3; `anchor` is what the list of contents leads to."""

    text: str
    anchor: str
    level: int = 2
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` and **strong** may be in it."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Bullets:
    """A list of sentences; each may have `code` and **strong** in it."""

    items: Sequence[str]
    kind: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Code:
    """Commands for a shell."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Table:
    """Cells are text.

    Attributes:
        left: Columns that are text, and stand on the left.
    """

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Shown:
    """A figure with its caption."""

    name: str
    figure: Figure
    alt: str
    caption: str
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Fold:
    """Details that are folded away under a line of words until a reader opens them."""

    summary: str
    blocks: Sequence[Block]
    kind: ClassVar[str] = "fold"


Block = Heading | Text | Bullets | Code | Table | Shown | Fold


def flat(blocks: Iterable[Block]) -> Iterator[Block]:
    """All blocks in the order of the page, those of folds too; the folds themselves are left out."""
    for block in blocks:
        if isinstance(block, Fold):
            yield from flat(block.blocks)
        else:
            yield block


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: Spread | None, *, scale: float = 1.0, digits: int | None = None) -> str:
    """Mean and standard deviation over seeds."""
    if values is None:
        return NOTHING

    def show(value: float) -> str:
        return number(value) if digits is None else f"{value:.{digits}f}"

    mean = show(scale * values.mean)
    if values.sd is None:
        return mean
    precision = len(mean.partition(".")[2])
    return f"{mean} ± {scale * values.sd:.{precision}f}"


def percent(values: Spread | None) -> str:
    """Of shares, in per cent, without the sign."""
    return spread(values, scale=100, digits=1)


def points(difference: float) -> str:
    """A difference of shares, in percentage points, without its sign."""
    return f"{abs(100 * difference):.1f} points"


def seconds(values: Sequence[float | None]) -> str:
    """Times to the target, None for each seed that never reaches it."""
    reached = Spread.of(values)
    if reached is None:
        return "never" if values else NOTHING
    some = f" ({len(reached.values)} of {len(values)} seeds)" if len(reached.values) < len(values) else ""
    return spread(reached) + some
