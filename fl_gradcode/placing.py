"""Placing shards on workers: round the workers where everything is allowed, a maximum flow where it is not."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

__all__ = ["obstacle", "place", "possible"]

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
    return ", ".join(str(int(i)) for i in numbers[:10]) + (", ..." if len(numbers) > 10 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
