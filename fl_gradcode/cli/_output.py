"""What the commands print: tables of one look, lines to paste, and numbers that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["finite_or_none", "plain_table", "print_lines"]


def plain_table(*, title: str | None = None, caption: str | None = None, header: bool = True) -> Table:
    """Returns an empty table in the look that all commands share. A free line separates it from a caption."""
    return Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", title_style="",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=header, show_edge=caption is not None,
    )  # fmt: skip


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Prints lines as they are: without markup, and without breaks inside them, so that they can be pasted."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def finite_or_none(value: float) -> float | None:
    """Returns the value, or None if it is infinite or not a number, which JSON cannot hold."""
    return value if math.isfinite(value) else None
