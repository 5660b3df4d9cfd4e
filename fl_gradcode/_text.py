"""Lists and seconds as people read them, for messages, logs and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["duration_text", "listed", "numbered", "printable", "seconds_text"]


def printable(text: str, most: int = 100) -> str:
    """Returns the beginning of a text from outside, without signs that a terminal or a log would act on.

    Args:
        text: Any text. Control characters, line breaks and marks of direction become escapes such as `\\x1b`.
        most: Number of characters to which it is cut.
    """
    cut = text if len(text) <= most else f"{text[: most - 3]}..."
    if cut.isprintable():
        return cut
    shown = "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape", "surrogatepass").decode() for sign in cut
    )
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def listed(items: Iterable[Any], most: int = 8) -> str:
    """Returns items in words: "3", "3 and 4" or "1, 2, 3 and 97 more"; empty if there are none.

    Args:
        items: Anything that has a text.
        most: Of more items than that, the first `most - 1` are named and the others counted.
    """
    names = [str(item) for item in items]
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def numbered(noun: str, numbers: Sequence[int], most: int = 8) -> str:
    """Returns numbered things in words: "worker 3", "workers 3 and 4" or "workers 1, 2, 3 and 97 more"."""
    return f"{noun}{'' if len(numbers) == 1 else 's'} {listed(numbers, most)}"


def seconds_text(seconds: float | None) -> str:
    """Returns seconds in the unit that suits them, with three digits: "12 ms", "3.21 s", "11 h".

    Args:
        seconds: None or NaN where they are not known ("-"); infinity for what never ends ("never").
    """
    if seconds is None or math.isnan(seconds):
        return "-"
    if math.isinf(seconds):
        return "never"
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.3g} ms" if seconds >= 0.001 else "< 1 ms"
    if seconds < 999.5:
        return f"{seconds:.3g} s"
    return f"{seconds:.0f} s" if seconds < 36_000 else f"{seconds / 3600:.3g} h"


def duration_text(seconds: float) -> str:
    """Returns a finite time span as people say it: "12.5 s", "3 min 20 s", "2 d 4 h"."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    for unit, size, smaller, step in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // step)} {smaller}"
    raise AssertionError(seconds)
