"""Who holds which shard: planned from capacities, speeds, failure domains, and what may be held where.

>>> plan = assign(6, capacities=[4, 4, 2, 2], s=1)      # six shards, any one worker may straggle
>>> plan.loads, plan.replication
((4, 4, 2, 2), 2)
>>> code = for_assignment(plan, s=1)                     # from fl_gradcode.codes
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .border import as_pattern, check_count, check_tolerance
from .errors import InvalidCode
from .placing import obstacle, place, possible

__all__ = ["Assignment", "assign"]


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which worker holds which shards. Codes are made for it by `for_assignment` and `reed_solomon`.

    Attributes:
        held: Shape (n, k), booleans, read-only; also what `numpy.asarray(assignment)` gives. Any form that
            `for_assignment` takes may be given.
        speeds: Shards that each worker works off in a unit of time; None: all alike.
        domains: Failure domain (site, rack, provider) of each worker; None: each its own.
    """

    held: NDArray[np.bool_]
    speeds: tuple[float, ...] | None = None
    domains: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        held = np.array(as_pattern(self.held))
        held.setflags(write=False)
        object.__setattr__(self, "held", held)
        for name in ("speeds", "domains"):
            value = getattr(self, name)
            if value is not None and len(value) != self.n:
                raise InvalidCode(f"{name}={value} must have one entry for each of the {self.n} workers.")
            if value is not None:
                object.__setattr__(self, name, tuple(value))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The matrix."""
        return np.array(self.held, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return f"<assignment of k={self.k} shards to n={self.n} workers, {self.replication} or more holders each>"

    @property
    def n(self) -> int:
        """Number of workers."""
        return int(self.held.shape[0])

    @property
    def k(self) -> int:
        """Number of shards."""
        return int(self.held.shape[1])

    @property
    def loads(self) -> tuple[int, ...]:
        """Shards of each worker."""
        return tuple(self.held.sum(axis=1).tolist())

    @property
    def replication(self) -> int:
        """The fewest holders that a shard has."""
        return int(self.held.sum(axis=0).min())

    def shards_of(self, worker: int) -> tuple[int, ...]:
        """What a worker holds, ascending."""
        return tuple(np.flatnonzero(self.held[worker]).tolist())

    def holders_of(self, shard: int) -> tuple[int, ...]:
        """Who holds a shard, ascending."""
        return tuple(np.flatnonzero(self.held[:, shard]).tolist())

    def largest_s(self, m: int = 1) -> int:
        """The largest straggler tolerance that a code for it can have at upload reduction m; -1: none."""
        return max(self.replication - m, -1)

    def largest_m(self, s: int) -> int:
        """The largest upload reduction at straggler tolerance s; 0: not even m = 1."""
        return max(self.replication - s, 0)

    @property
    def domains_to_spare(self) -> int:
        """How many whole failure domains may be gone, whichever they are, with a holder of every shard left."""
        names = tuple(range(self.n)) if self.domains is None else self.domains
        members = [[i for i in range(self.n) if names[i] == domain] for domain in dict.fromkeys(names)]
        counts = np.array([self.held[inside].sum(axis=0) for inside in members])
        lost = np.cumsum(-np.sort(-counts, axis=0), axis=0)
        return int((lost < self.held.sum(axis=0)).all(axis=1).sum())

    @property
    def slowest(self) -> float:
        """Time until the last worker has worked off its shards."""
        return float(max(np.array(self.loads) / ((1.0,) * self.n if self.speeds is None else self.speeds)))

    def report(self) -> str:
        """For people: what it supports, and each worker's load."""
        lines = [
            f"{self.k} shards on {self.n} workers, at least {self.replication} holders each (mean load "
            f"{np.mean(self.loads):.3g}).",
            f"Largest straggler tolerance: s = {self.largest_s()} (m = 1). Largest upload reduction: "
            + (", ".join(f"m = {self.largest_m(s)} at s = {s}" for s in range(min(self.replication, 4))) or "none")
            + ".",
        ]
        if self.domains is not None:
            lines.append(f"Failure domains that may all be gone at once: {self.domains_to_spare}.")
        for worker, load in enumerate(self.loads):
            where = f" in {self.domains[worker]}" if self.domains else ""
            pace = f", {load / self.speeds[worker]:.3g} units of time" if self.speeds else ""
            lines.append(f"  worker {worker}{where}: {load} shards{pace}")
        return "\n".join(lines)


def assign(
    k: int,
    capacities: Sequence[int],
    *,
    s: int | None = None,
    m: int = 1,
    holders: int | None = None,
    speeds: Sequence[float] | None = None,
    domains: Sequence[Any] | None = None,
    may_hold: ArrayLike | None = None,
    owners: Sequence[int] | None = None,
) -> Assignment:
    """Plan who holds what: every shard on as many workers as asked, nobody over capacity, the slowest as fast as can
    be.

    Args:
        k: Number of shards.
        capacities: How many shards each worker can take.
        s, m: Straggler tolerance and upload reduction to plan for: s + m holders of each shard.
        holders: Holders of each shard instead; with neither, as many as the capacities allow.
        speeds: Shards that each worker works off in a unit of time: loads follow them, within capacities.
        domains: Failure domain of each worker: the holders of a shard are spread over as many as possible.
        may_hold: Consent and locality: who may hold what, shape (n, k) or the list of each worker's shards; all by
            default.
        owners: Of each shard, the worker that holds it in any case.

    Raises:
        InvalidCode: It cannot be done; names the shards or workers that are in the way.

    References:
        Loads in proportion to speed: "Heterogeneity-aware gradient coding for straggler tolerance", 2019 (arXiv
        1901.09339). Placing within constraints is a maximum flow.
    """
    k, m, n = check_count(k, "k"), check_count(m, "m"), len(capacities)
    if n == 0:
        raise InvalidCode("capacities is empty; name the capacity of each worker.")
    room = np.array([min(_capacity(i, c), k) for i, c in enumerate(capacities)], int)
    pace = np.ones(n) if speeds is None else _paces(speeds, n)
    if domains is not None and len(domains) != n:
        raise InvalidCode(f"domains={domains} must have one entry for each of the {n} workers.")
    may = np.ones((n, k), bool) if may_hold is None else as_pattern(may_hold, k)
    if may.shape != (n, k):
        raise InvalidCode(f"may_hold is of shape {may.shape}; {n} capacities and k={k} shards ask for ({n}, {k}).")
    fixed = _owned(owners, n, k, room)
    may = may | fixed
    least = m if s is None else check_tolerance(s, n) + m
    wish = f"s + m = {least} holder{'' if least == 1 else 's'}"
    if holders is not None:
        holders = check_count(holders, "holders")
        if holders < least:
            raise InvalidCode(f"holders={holders} of each shard; s={s or 0} and m={m} need at least s + m = {least}.")
        wish = f"{holders} holder{'' if holders == 1 else 's'}"
    elif s is not None:
        holders = least
    else:
        # Fewer holders are never harder to place.
        most = int(min(may.sum(axis=0).min(), room.sum() // k))
        holders = least + bisect_left(range(least, most + 1), True, key=lambda r: not possible(may, fixed, room, r)) - 1
        if holders < least:
            raise InvalidCode(obstacle(may, fixed, room, least, wish))
    held = place(may, fixed, room, pace, domains, holders)
    if held is None:
        raise InvalidCode(obstacle(may, fixed, room, holders, wish))
    return Assignment(
        held, None if speeds is None else tuple(pace.tolist()), None if domains is None else tuple(domains)
    )


def _capacity(worker: int, value: Any) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not value >= 0
        or value % 1
    ):
        raise InvalidCode(f"Worker {worker} has capacity {value}; it must be a whole number of at least 0.")
    return int(value)


def _paces(speeds: Sequence[Any], n: int) -> NDArray[np.float64]:
    if len(speeds) != n:
        raise InvalidCode(f"speeds={speeds} must have one entry for each of the {n} workers.")
    for worker, speed in enumerate(speeds):
        if not isinstance(speed, int | float | np.number) or not 0 < speed < np.inf:
            raise InvalidCode(f"Worker {worker} has speed {speed}; it must be a number greater than 0.")
    return np.asarray(speeds, float)


def _owned(owners: Sequence[Any] | None, n: int, k: int, room: NDArray[np.int_]) -> NDArray[np.bool_]:
    fixed = np.zeros((n, k), bool)
    if owners is None:
        return fixed
    if len(owners) != k or not all(isinstance(i, int | np.integer) and 0 <= i < n for i in owners):
        raise InvalidCode(
            f"owners=[{', '.join(map(str, owners))}] must name one of the workers 0..{n - 1} for each of the k={k} "
            "shards."
        )
    fixed[list(owners), np.arange(k)] = True
    for worker in np.flatnonzero(fixed.sum(axis=1) > room):
        raise InvalidCode(
            f"Worker {worker} owns {fixed[worker].sum()} shards, and its capacity is {room[worker]}. Raise it, or let "
            "another worker own some."
        )
    return fixed
