"""Which worker stores which shards: an assignment by maximum flow, or a sentence that says why there is none."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from .._text import listed
from ..codes import as_pattern, check_count, check_tolerance
from ..errors import InvalidCode

__all__ = ["Assignment", "assign", "obstacle", "place", "possible"]

_Held = NDArray[np.bool_]
_Counts = NDArray[np.int_]


def place(
    may: _Held,
    fixed: _Held,
    room: _Counts,
    pace: NDArray[np.float64],
    domains: Sequence[Any] | None,
    holders: int,
) -> _Held | None:
    """So many holders of each shard, `fixed` ones among them, such that the slowest worker ends early; None:
    impossible.

    Args:
        may: Who may hold what, shape (n, k).
        fixed: Who holds what in any case.
        room: Capacities, shape (n,).
        pace: Shards in a unit of time, shape (n,).
        domains: Failure domains to spread the holders over.
        holders: Of each shard.
    """
    k = may.shape[1]
    if not possible(may, fixed, room, holders):
        return None
    if may.all() and not fixed.any() and domains is None:
        return _wrapped(_even_loads(k * holders, room, pace), k)
    spread = None if domains is None else _spread(may, fixed, room, domains, holders)
    # The smallest time for which it still works.
    times = np.unique(np.concatenate([np.arange(1, c + 1) / v for c, v in zip(room, pace, strict=True)]))
    low, high = 0, len(times) - 1
    best = None
    while low <= high:
        middle = (low + high) // 2
        within = np.minimum(room, np.floor(times[middle] * pace + 1e-9).astype(int))
        held = _flow(may, fixed, within, holders, spread)
        if held is None:
            low = middle + 1
        else:
            best, high = held, middle - 1
    return best


def possible(may: _Held, fixed: _Held, room: _Counts, holders: int) -> bool:
    """Whether each shard can have so many holders."""
    if room.sum() < may.shape[1] * holders or may.sum(axis=0).min() < holders:
        return False
    return bool(may.all() and not fixed.any()) or _flow(may, fixed, room, holders, None) is not None


def obstacle(may: _Held, fixed: _Held, room: _Counts, holders: int, wish: str) -> str:
    """One sentence: which shards or workers are in the way of `holders` holders of each shard."""
    k = may.shape[1]
    allowed = may.sum(axis=0)
    shard = int(allowed.argmin())
    if allowed[shard] < holders:
        return (
            f"Shard {shard} may be held by {_count(allowed[shard], 'worker')} "
            f"({_list(np.flatnonzero(may[:, shard])) or 'none'}); the plan asks for {wish}. Let another worker hold "
            "it, or ask for fewer."
        )
    if room.sum() < k * holders:
        return (
            f"The capacities add up to {_count(room.sum(), 'place')} (none counts above k={k}); {_count(k, 'shard')} "
            f"with {wish} {'each need' if k > 1 else 'needs'} {k * holders}. Raise capacities (worker "
            f"{int(room.argmin())} has the least, {room.min()}), or ask for fewer."
        )
    shards = _short_of_room(may, fixed, room, holders)
    workers = np.flatnonzero(may[:, shards].any(axis=1))
    elsewhere = fixed.sum(axis=1) - fixed[:, shards].sum(axis=1)
    places = int(np.minimum(room - elsewhere, may[:, shards].sum(axis=1)).sum())
    one = len(shards) == 1
    few = f"{len(shards)} shards" if len(shards) > 10 else f"Shard{'' if one else 's'} {_list(shards)}"
    return (
        f"{few} with {wish} {'needs' if one else 'each need'} {len(shards) * holders} places; the workers that may "
        f"hold {'it' if one else 'them'} ({_list(workers)}) have {places}"
        f"{' beside the other shards that they own' if elsewhere[workers].any() else ''}. Raise their capacities, let "
        f"others hold {'this shard' if one else 'these shards'}, or ask for fewer."
    )


def _wrapped(loads: _Counts, k: int) -> _Held:
    """Worker after worker takes its load of shards, going round: distinct holders, equally many for each shard."""
    held = np.zeros((len(loads), k), bool)
    at = 0
    for worker, load in enumerate(loads):
        held[worker, (at + np.arange(load)) % k] = True
        at += load
    return held


def _even_loads(total: int, room: _Counts, pace: NDArray[np.float64]) -> _Counts:
    """Loads that add up to `total`, within `room`, such that the last worker ends as early as can be."""
    loads = np.zeros(len(room), int)
    heap = [(1 / pace[i], i) for i in range(len(room)) if room[i]]
    heapq.heapify(heap)
    for _ in range(total):
        _, i = heapq.heappop(heap)
        loads[i] += 1
        if loads[i] < room[i]:
            heapq.heappush(heap, ((loads[i] + 1) / pace[i], i))
    return loads


@dataclass(frozen=True)
class _Spread:
    """The domain of each worker, shape (n,), and for each shard the fewest domains and the most holders in one."""

    groups: _Counts
    fewest: _Counts
    most: _Counts


def _spread(may: _Held, fixed: _Held, room: _Counts, domains: Sequence[Any], holders: int) -> _Spread:
    """First as many domains as can be, then as few holders in one domain; a shard that cannot holds no other back."""
    number = {domain: q for q, domain in enumerate(dict.fromkeys(domains))}
    groups = np.array([number[domain] for domain in domains])
    choice = np.array([may[groups == q].sum(axis=0) for q in range(len(number))])  # (g, k)
    widest = np.minimum((choice > 0).sum(axis=0), holders)
    flattest = np.array([np.minimum(choice, t).sum(axis=0) < holders for t in range(1, holders)]).sum(axis=0) + 1

    def spread(fewest: int, most: int) -> _Spread:
        return _Spread(groups, np.minimum(widest, fewest), np.maximum(flattest, most))

    def feasible(fewest: int, most: int) -> bool:
        return _flow(may, fixed, room, holders, spread(fewest, most)) is not None

    fewest = bisect_left(range(2, int(widest.max()) + 1), True, key=lambda d: not feasible(d, holders)) + 1
    most = bisect_left(range(1, holders), True, key=lambda t: feasible(fewest, t)) + 1
    return spread(fewest, most)


def _network(may: _Held, fixed: _Held, room: _Counts, holders: int, spread: _Spread | None) -> Any:
    """Source 0, shards, workers, sink; to spread, two layers more between shards and workers.

    These are (shard, domain) pairs, and for each shard a node through which all holders go that are not the first in
    their domain: its limit is what makes the others be first ones.
    """
    n, k = may.shape
    need = holders - fixed.sum(axis=0)
    worker, shard = np.nonzero(may & ~fixed)
    shards, ones = 1 + np.arange(k), np.ones(len(worker), int)
    if spread is None:
        first_worker = 1 + k
        arcs = [(1 + shard, first_worker + worker, ones)]
    else:
        g = int(spread.groups.max()) + 1
        taken = np.array([fixed[spread.groups == q].sum(axis=0) for q in range(g)])  # (g, k)
        further = 1 + k + np.arange(k)
        pair = 1 + 2 * k + np.arange(k)[None, :] * g + np.arange(g)[:, None]  # (g, k)
        first_worker = 1 + 2 * k + k * g
        arcs = [
            (np.tile(shards, g), pair.ravel(), (taken == 0).ravel()),
            (shards, further, need - np.maximum(spread.fewest - (taken > 0).sum(axis=0), 0)),
            (np.tile(further, g), pair.ravel(), (spread.most - np.maximum(taken, 1)).ravel()),
            (pair[spread.groups[worker], shard], first_worker + worker, ones),
        ]
    sink = first_worker + n
    arcs += [
        (np.zeros(k, int), shards, need),
        (first_worker + np.arange(n), np.full(n, sink), room - fixed.sum(axis=1)),
    ]
    rows, columns, limits = (np.concatenate(part).astype(np.int32) for part in zip(*arcs, strict=True))
    network = csr_array((np.maximum(limits, 0), (rows, columns)), shape=(sink + 1, sink + 1))
    return network, first_worker, sink, int(need.sum())


def _flow(may: _Held, fixed: _Held, room: _Counts, holders: int, spread: _Spread | None) -> _Held | None:
    k = may.shape[1]
    if (room < fixed.sum(axis=1)).any():
        return None
    network, first_worker, sink, wanted = _network(may, fixed, room, holders, spread)
    result = maximum_flow(network, 0, sink)
    if result.flow_value < wanted:
        return None
    used = result.flow.tocoo()
    taken = (used.data > 0) & (used.row < first_worker) & (used.col >= first_worker) & (used.col < sink)
    shard = used.row[taken] - 1
    if spread is not None:
        shard = (shard - 2 * k) // (int(spread.groups.max()) + 1)
    held = fixed.copy()
    held[used.col[taken] - first_worker, shard] = True
    return held


def _short_of_room(may: _Held, fixed: _Held, room: _Counts, holders: int) -> _Counts:
    """Shards that together need more places than their workers have: the source's side of a minimum cut."""
    k = may.shape[1]
    network, _, sink, _ = _network(may, fixed, room, holders, None)
    flow = maximum_flow(network, 0, sink).flow
    rest = csr_array(network - flow)
    rest.eliminate_zeros()
    reached = breadth_first_order(rest, 0, return_predecessors=False)
    return np.sort(reached[(reached >= 1) & (reached <= k)]) - 1


def _list(numbers: NDArray[Any]) -> str:
    return listed(numbers.tolist(), 11)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
