"""Who is to hold what, as the command line asks for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .assignment import Assignment, assign
from .border import as_pattern
from .codes import cyclic_repetition, fractional_repetition
from .errors import FlGradcodeError

__all__ = ["CODES", "Wish", "lists", "numbers", "words"]

CODES = ("fractional", "cyclic", "assignment")


@dataclass(frozen=True)
class Wish:
    """What the command line asks of the code."""

    workers: int | None
    s: int
    m: int
    code: str | None
    capacities: list[int] | None
    domains: list[str] | None
    assignment: Path | None

    def n(self) -> int:
        """Number of workers, from whatever says it."""
        told = {
            "--workers": self.workers,
            "--capacities": None if self.capacities is None else len(self.capacities),
            "--domains": None if self.domains is None else len(self.domains),
            "--assignment": None if self.assignment is None else len(lists(self.assignment)),
        }
        given = {name: value for name, value in told.items() if value is not None}
        if not given:
            raise FlGradcodeError("The number of workers is missing: say --workers N.")
        if len({*given.values()}) > 1:
            raise FlGradcodeError(
                f"Options differ in the number of workers: {', '.join(f'{a} {b}' for a, b in given.items())}."
            )
        n = next(iter(given.values()))
        if n < 1:
            raise FlGradcodeError(f"--workers {n} must be at least 1.")
        return n

    def held(self, k: int) -> tuple[list[tuple[int, ...]], str]:
        """Of each worker, its shards of k; and the code as a line of Python."""
        n, s, m = self.n(), self.s, self.m
        if s < 0 or m < 1:
            raise FlGradcodeError(f"--s {s} must be at least 0, and --m {m} at least 1.")
        free = (self.capacities, self.domains, self.assignment)
        code = self.code or ("fractional" if all(one is None for one in free) else "assignment")
        if code not in CODES:
            raise FlGradcodeError(f"--code {code!r} must be one of {', '.join(CODES)}.")
        if code != "assignment" and any(one is not None for one in free):
            raise FlGradcodeError(
                f"--code {code} says who holds what: leave out --capacities, --domains, --assignment."
            )
        if code == "fractional":
            made = fractional_repetition(n, s, k=k, m=m)
            line = f"fractional_repetition({n}, {s}{f', k={k}' if k != n else ''}{f', m={m}' if m > 1 else ''})"
            return [made.shards_of(worker) for worker in range(n)], line
        if code == "cyclic":
            if k != n or m != 1:
                raise FlGradcodeError(
                    f"--code cyclic needs as many shards as workers, and m=1; here k={k}, n={n}, m={m}."
                )
            made = cyclic_repetition(n, s, rng=np.random.default_rng(0))
            return [
                made.shards_of(worker) for worker in range(n)
            ], f"cyclic_repetition({n}, {s}, rng=np.random.default_rng(0))"
        if self.assignment is not None:
            if self.capacities or self.domains:
                raise FlGradcodeError("--assignment says who holds what: leave out --capacities and --domains.")
            plan = Assignment(as_pattern(lists(self.assignment), k))
            if plan.largest_s(m) < s:
                few = min(range(k), key=lambda shard: len(plan.holders_of(shard)))
                raise FlGradcodeError(
                    f"Shard {few} has {len(plan.holders_of(few))} holders in {self.assignment}; s={s} at m={m} needs "
                    f"{s + m}."
                )
        else:
            # Without capacities, everybody takes an equal part.
            capacities = self.capacities or [-(-k * (s + m) // n)] * n
            plan = assign(k, capacities, s=s, m=m, domains=self.domains)
        held = [plan.shards_of(worker) for worker in range(n)]
        return held, f"for_assignment(Manifest.read(path).held, s={s}{f', m={m}' if m > 1 else ''})"


def lists(path: Path) -> list[list[int]]:
    """The shards of each worker, from a JSON file."""
    try:
        told: Any = json.loads(path.read_text())
        found = [[int(shard) for shard in one] for one in told]
        if (
            not found
            or len(found) < len(told)
            or json.dumps(found) != json.dumps(told)
            or min(map(min, filter(None, found)), default=0) < 0
        ):
            raise ValueError
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        raise FlGradcodeError(
            f"{path} must hold, as JSON, for each worker the list of its shards, such as [[0, 1], [1, 2], [2, 0]]."
        ) from None
    return found


def numbers(text: str | None) -> list[int] | None:
    """Whole numbers with commas between."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise FlGradcodeError(
            f"--capacities {text!r} must be whole numbers with commas between, such as 6,6,3,3."
        ) from None


def words(text: str | None) -> list[str] | None:
    """Words with commas between."""
    return None if text is None else [part.strip() for part in text.split(",")]
