"""Which node is which worker: learnt from replies, never from node ids, which change."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import RoundFailed

__all__ = ["Roster"]


class Roster:
    """Node -> worker, as far as known."""

    def __init__(self) -> None:
        self._worker: dict[int, int] = {}
        self._answered: dict[int, dict[int, set[int]]] = {}  # worker -> round -> nodes

    def worker_of(self, node: int) -> int | None:
        """The worker that this node said it is, or None."""
        return self._worker.get(node)

    def learn(self, node: int, worker: int) -> None:
        """A node reported its worker number."""
        self._worker[node] = worker

    def forget(self, node: int) -> None:
        """The node failed: it may be another worker next time, so it gets the whole plan again."""
        self._worker.pop(node, None)

    def answered(self, node: int, worker: int, server_round: int) -> None:
        """A node answered as `worker`.

        Raises:
            RoundFailed: In this round and the one before, the same two nodes answered as the same worker. Once
                is normal (a restarted node has a new id); twice means that two nodes were given one number.
        """
        self.learn(node, worker)
        rounds = self._answered.setdefault(worker, {})
        rounds.setdefault(server_round, set()).add(node)
        both = rounds[server_round] & rounds.get(server_round - 1, set())
        for old in [r for r in rounds if r < server_round - 1]:
            del rounds[old]
        if len(both) > 1:
            named = " and ".join(map(str, sorted(both)[:2]))
            raise RoundFailed(
                f"Nodes {named} both answer as worker {worker}, in rounds {server_round - 1} and {server_round}. "
                "Give each node its own partition-id."
            )

    def missing(self, workers: Iterable[int]) -> list[int]:
        """Those of `workers` whose node is not known."""
        known = set(self._worker.values())
        return [i for i in workers if i not in known]
