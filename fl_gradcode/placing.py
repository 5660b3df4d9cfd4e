"""Placing shards on workers: round the workers where everything is allowed, a maximum flow where it is not."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

__all__ = ["obstacle", "place"]

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
    n, k = may.shape
    if room.sum() < k * holders or may.sum(axis=0).min() < holders or fixed.sum(axis=0).max() > holders:
        return None
    if may.all() and not fixed.any() and domains is None:
        return _wrapped(_even_loads(k * holders, room, pace), k)
    groups = np.arange(n) if domains is None else np.unique([str(d) for d in domains], return_inverse=True)[1]
    most = -(-holders // len(np.unique(groups)))  # as few of one domain as can be
    for together in range(most, holders + 1):
        if _flow(may, fixed, room, groups, together, holders) is not None:
            break
    else:
        return None
    # The smallest time for which it still works.
    times = np.unique(np.concatenate([np.arange(1, c + 1) / v for c, v in zip(room, pace, strict=True)]))
    low, high = 0, len(times) - 1
    best = None
    while low <= high:
        middle = (low + high) // 2
        within = np.minimum(room, np.floor(times[middle] * pace + 1e-9).astype(int))
        held = _flow(may, fixed, within, groups, together, holders)
        if held is None:
            low = middle + 1
        else:
            best, high = held, middle - 1
    return best


def obstacle(may: _Held, fixed: _Held, room: _Counts, holders: int, wish: str) -> str:
    """One sentence: which shards or workers are in the way of `holders` holders of each shard."""
    n, k = may.shape
    allowed = may.sum(axis=0)
    shard = int(allowed.argmin())
    if allowed[shard] < holders:
        return (
            f"Shard {shard} may be held by {allowed[shard]} workers ({_list(np.flatnonzero(may[:, shard])) or 'none'})"
            f"; {wish} are asked for. Let another worker hold it, or ask for fewer."
        )
    if room.sum() < k * holders:
        return (
            f"The {n} workers have room for {room.sum()} shards in all; {k} shards with {wish} need {k * holders}. "
            f"Raise capacities (worker {int(room.argmin())} has the least, {room.min()}), or ask for fewer."
        )
    if fixed.sum(axis=0).max() > holders:
        return f"Shard {int(fixed.sum(axis=0).argmax())} has more owners than the {wish} asked for."
    shards = _short_of_room(may, fixed, room, holders)
    workers = np.flatnonzero(may[:, shards].any(axis=1))
    places = int(np.minimum(room, may[:, shards].sum(axis=1)).sum())
    few = f"{len(shards)} shards" if len(shards) > 10 else f"Shards {_list(shards)}"
    return (
        f"{few} with {wish} each need {len(shards) * holders} places; the workers that may hold them "
        f"({_list(workers)}) have {places}{' with the shards they own' if fixed.any() else ''}. Raise their "
        "capacities, let others hold these shards, or ask for fewer."
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


def _network(may: _Held, fixed: _Held, room: _Counts, groups: _Counts, together: int, holders: int) -> Any:
    """Source 0, shards, (shard, domain) pairs, workers, sink: what the shards need, may have, and the workers' room."""
    n, k = may.shape
    g = int(groups.max()) + 1
    need = holders - fixed.sum(axis=0)
    taken = np.array([fixed[groups == q].sum(axis=0) for q in range(g)])  # (g, k)
    pair = 1 + k + np.arange(k)[None, :] * g + np.arange(g)[:, None]  # (g, k)
    first_worker, sink = 1 + k + k * g, 1 + k + k * g + n
    worker, shard = np.nonzero(may & ~fixed)
    rows = [np.zeros(k, int), np.tile(1 + np.arange(k), g), pair[groups[worker], shard], first_worker + np.arange(n)]
    columns = [1 + np.arange(k), pair.ravel(), first_worker + worker, np.full(n, sink)]
    limits = [need, np.maximum(together - taken, 0).ravel(), np.ones(len(worker), int), room - fixed.sum(axis=1)]
    capacity = np.maximum(np.concatenate(limits), 0).astype(np.int32)
    where = (np.concatenate(rows).astype(np.int32), np.concatenate(columns).astype(np.int32))
    return csr_array((capacity, where), shape=(sink + 1, sink + 1)), first_worker, sink, int(need.sum())


def _flow(may: _Held, fixed: _Held, room: _Counts, groups: _Counts, together: int, holders: int) -> _Held | None:
    k = may.shape[1]
    if (room < fixed.sum(axis=1)).any():
        return None
    network, first_worker, sink, wanted = _network(may, fixed, room, groups, together, holders)
    result = maximum_flow(network, 0, sink)
    if result.flow_value < wanted:
        return None
    used = result.flow.tocoo()
    g = int(groups.max()) + 1
    taken = (used.data > 0) & (used.row > k) & (used.row < first_worker) & (used.col >= first_worker)
    held = fixed.copy()
    held[used.col[taken] - first_worker, (used.row[taken] - 1 - k) // g] = True
    return held


def _short_of_room(may: _Held, fixed: _Held, room: _Counts, holders: int) -> _Counts:
    """Shards that together need more places than their workers have: the source's side of a minimum cut."""
    n, k = may.shape
    network, _, sink, _ = _network(may, fixed, room, np.arange(n), holders, holders)
    flow = maximum_flow(network, 0, sink).flow
    rest = csr_array(network - flow)
    rest.eliminate_zeros()
    reached = breadth_first_order(rest, 0, return_predecessors=False)
    return np.sort(reached[(reached >= 1) & (reached <= k)]) - 1


def _list(numbers: NDArray[Any]) -> str:
    return ", ".join(str(int(i)) for i in numbers[:10]) + (", ..." if len(numbers) > 10 else "")
