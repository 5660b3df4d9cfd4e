"""Waits until enough nodes are online."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from flwr.serverapp import Grid

from ..errors import RoundFailed

__all__ = ["SETTLED", "nodes_of_a_phase", "poll_nodes", "wait_for_nodes"]

#: Seconds after which a simulation registers no further node, if it has registered some and none since.
SETTLED = 5.0

_log = logging.getLogger(__name__)


def wait_for_nodes(
    grid: Grid, n: int, s: int, timeout: float, *, settled: float = math.inf, surplus: bool = False
) -> None:
    """Wait up to `timeout` seconds for n nodes; afterwards n - s nodes are enough.

    With a timeout of 0, the nodes are listed once. With `surplus`, more than n nodes are only a warning, because who
    connects is not the run's to say, and a node that was restarted is listed twice for a while. For `settled` see
    `poll_nodes`.

    Raises:
        RoundFailed: More than n nodes are online without `surplus`, or fewer than n - s.
    """
    began = time.monotonic()
    online = len(poll_nodes(grid, timeout, f"{n} nodes", lambda nodes: len(nodes) == n, settled=settled))
    waited = min(timeout, round(time.monotonic() - began))
    if online > n:
        text = f"{online} nodes are online, but the code has n={n} workers."
        if not surplus:
            raise RoundFailed(f"{text} Build the code for {online}, or for as many as there are shards.")
        _log.warning("%s Nodes that are none of these workers are left out.", text)
    if online < n - s:
        raise RoundFailed(
            f"{online} nodes are online after {waited:g} s; the code has n={n} workers and needs at "
            f"least n - s = {n - s}. Start more nodes, or build the code for fewer."
        )
    if online < n:
        _log.warning("Starting with %d of %d nodes; the others count as stragglers.", online, n)


def nodes_of_a_phase(grid: Grid, n: int, s: int, timeout: float, hopeless: Callable[[list[int]], bool]) -> list[int]:
    """Returns the online nodes; waits up to `timeout` seconds while they are fewer than n - s and cannot decode.

    Without the wait, an outage would use up one round after another within seconds.
    """
    least = n - s
    wanted = f"at least {least} of {n} nodes"
    return poll_nodes(grid, timeout, wanted, lambda nodes: len(nodes) >= least or not hopeless(nodes))


def poll_nodes(
    grid: Grid, timeout: float, wanted: str, enough: Callable[[list[int]], bool], *, settled: float = math.inf
) -> list[int]:
    """Returns the online nodes once `enough` of them are, or after `timeout` seconds; logs once what is `wanted`.

    It also returns once there are nodes and their number has not changed for `settled` seconds.
    """
    changed = time.monotonic()
    deadline = changed + timeout
    logged, before = False, 0
    while not enough(nodes := list(grid.get_node_ids())) and time.monotonic() < deadline:
        if len(nodes) != before:
            changed, before = time.monotonic(), len(nodes)
        if nodes and time.monotonic() - changed >= settled:
            break
        if not logged:
            _log.info("Waiting up to %g s for %s; %d are online.", timeout, wanted, len(nodes))
            logged = True
        time.sleep(0.5)
    return nodes
