"""Computes by maximum flow which worker stores which shards, or explains why no assignment is possible."""

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
    """Returns an assignment in which the slowest worker finishes as early as possible, or None if there is none.

    Args:
        may: Which worker may hold which shard, shape (n, k).
        fixed: Which worker holds which shard in any case, shape (n, k).
        room: Capacity of each worker in shards, shape (n,).
        pace: Shards that each worker computes in a unit of time, shape (n,).
        domains: Failure domain of each worker, over which holders are spread; None for no spreading.
        holders: Number of holders of each shard.

    Returns:
        Booleans, shape (n, k).
    """
    k = may.shape[1]
    if not possible(may, fixed, room, holders):
        return None
    if may.all() and not fixed.any() and domains is None:
        return _wrapped(_even_loads(k * holders, room, pace), k)
    spread = None if domains is None else _spread(may, fixed, room, domains, holders)
    # A binary search finds the shortest time in which all workers can finish.
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
    """Returns whether each shard can have this number of holders."""
    if room.sum() < may.shape[1] * holders or may.sum(axis=0).min() < holders:
        return False
    return bool(may.all() and not fixed.any()) or _flow(may, fixed, room, holders, None) is not None


def obstacle(may: _Held, fixed: _Held, room: _Counts, holders: int, wish: str) -> str:
    """Returns a sentence that names the shards or workers that make `holders` holders of each shard impossible."""
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
    """Returns an assignment in which workers take their loads of shards one after another, cyclically.

    Holders of a shard are distinct, and each shard has the same number of them.
    """
    held = np.zeros((len(loads), k), bool)
    at = 0
    for worker, load in enumerate(loads):
        held[worker, (at + np.arange(load)) % k] = True
        at += load
    return held


def _even_loads(total: int, room: _Counts, pace: NDArray[np.float64]) -> _Counts:
    """Returns loads within `room` that add up to `total`, such that the last worker finishes as early as possible."""
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
    """Limits for spreading holders over failure domains.

    Attributes:
        groups: Number of each worker's domain, shape (n,).
        fewest: Least number of domains that each shard needs, shape (k,).
        most: Largest number of holders of each shard in one domain, shape (k,).
    """

    groups: _Counts
    fewest: _Counts
    most: _Counts


def _spread(may: _Held, fixed: _Held, room: _Counts, domains: Sequence[Any], holders: int) -> _Spread:
    """Returns limits with as many domains for each shard as possible, and then as few holders in one domain.

    A shard that cannot reach a limit gets its own, so that it does not restrict the others.
    """
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
    """Returns the flow network, with source 0, a layer of shards, a layer of workers, and the sink.

    For spreading, there are two more layers between shards and workers. One has a node for each (shard, domain) pair.
    The other has a node for each shard, through which all holders pass that are not the first in their domain. The
    limit of that node forces the other holders into different domains.

    Returns:
        (network, index of the first worker, index of the sink, total flow that is needed).
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
    """Returns shards that together need more places than their workers have, from the source side of a minimum cut."""
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
    """An assignment of shards to workers, for which `for_assignment` and `reed_solomon` make codes.

    Attributes:
        held: Booleans, shape (n, k), read-only; also the result of `numpy.asarray(assignment)`. Any form that
            `for_assignment` accepts may be given.
        speeds: Shards that each worker computes in a unit of time; None if all are equally fast.
        domains: Failure domain (site, rack, provider) of each worker; None if each worker is its own domain.
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
        """Returns `held` as an array."""
        if copy is None:  # NumPy 1.26 does not know copy=None
            return np.asarray(self.held, dtype=dtype)
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
        """Number of shards of each worker."""
        return tuple(self.held.sum(axis=1).tolist())

    @property
    def replication(self) -> int:
        """Smallest number of holders of a shard."""
        return int(self.held.sum(axis=0).min())

    def shards_of(self, worker: int) -> tuple[int, ...]:
        """Returns the shards that a worker holds, ascending."""
        return tuple(np.flatnonzero(self.held[worker]).tolist())

    def holders_of(self, shard: int) -> tuple[int, ...]:
        """Returns the workers that hold a shard, ascending."""
        return tuple(np.flatnonzero(self.held[:, shard]).tolist())

    def largest_s(self, m: int = 1) -> int:
        """Returns the largest straggler tolerance of a code at upload reduction m, or -1 if there is no such code."""
        return max(self.replication - m, -1)

    def largest_m(self, s: int) -> int:
        """Returns the largest upload reduction of a code at straggler tolerance s, or 0 if there is no such code."""
        return max(self.replication - s, 0)

    @property
    def domains_to_spare(self) -> int:
        """Number of failure domains of which any may fail together while every shard keeps a holder."""
        names = tuple(range(self.n)) if self.domains is None else self.domains
        members = [[i for i in range(self.n) if names[i] == domain] for domain in dict.fromkeys(names)]
        counts = np.array([self.held[inside].sum(axis=0) for inside in members])
        lost = np.cumsum(-np.sort(-counts, axis=0), axis=0)
        return int((lost < self.held.sum(axis=0)).all(axis=1).sum())

    @property
    def slowest(self) -> float:
        """Time until the last worker has computed its shards, in the unit of `speeds`."""
        return float(max(np.array(self.loads) / ((1.0,) * self.n if self.speeds is None else self.speeds)))

    def report(self) -> str:
        """Returns a text for people that says what the assignment supports, and lists each worker's load."""
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
    """Returns an assignment within the workers' capacities in which the slowest worker finishes as early as possible.

    Args:
        k: Number of shards.
        capacities: Largest number of shards for each worker.
        s: Straggler tolerance to plan for; each shard gets s + m holders.
        m: Upload reduction to plan for.
        holders: Number of holders of each shard, instead of s. With neither, each shard gets as many holders as the
            capacities allow.
        speeds: Shards that each worker computes in a unit of time. Loads are in proportion to them, within capacities.
        domains: Failure domain of each worker. The holders of a shard are spread over as many domains as possible.
        may_hold: Which worker may hold which shard, for reasons of consent or locality: a matrix of shape (n, k), or
            the list of each worker's shards. By default, every worker may hold every shard.
        owners: For each shard, the worker that holds it in any case.

    Raises:
        InvalidCode: There is no such assignment. The message names the shards or workers that prevent it.

    References:
        "Heterogeneity-aware gradient coding for straggler tolerance", 2019 (arXiv 1901.09339), for loads in proportion
        to speed. The assignment within constraints is a maximum flow.
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
        # The bisection works because fewer holders are never harder to place.
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
