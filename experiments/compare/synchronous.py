"""Baselines with rounds: those that leave clients out, and FedProx, where slow clients train for less long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedProx

from fl_gradcode import VirtualGrid
from fl_gradcode.latency import Latency

__all__ = ["PartialProx", "WorkShareGrid", "quiet"]

#: Nobody evaluates on the clients: all schemes are measured on the whole test set, by the server.
quiet: dict[str, Any] = {
    "fraction_evaluate": 0.0,
    "min_evaluate_nodes": 0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
}

_SHARE = "work-share"


class WorkShareGrid(VirtualGrid):
    """A virtual clock that charges a message which asks for part of the training with that part."""

    def shards_of(self, message: Message, worker: int) -> float:
        """The share that the message asks for."""
        config = message.content.get("config")
        share = config.get(_SHARE, 1.0) if isinstance(config, ConfigRecord) else 1.0
        return float(share)  # type: ignore[arg-type]


class PartialProx(FedProx):
    """FedProx in which each client trains for as long as a deadline allows, and everybody is waited for.

    The share of the local steps that a client manages is taken from the very draws that the virtual clock charges: what
    a client that watches its clock would do.

    Args:
        deadline: Seconds.
        least: The smallest share: one batch.
        mu: Weight of the proximal term.

    References:
        Li et al., "Federated optimization in heterogeneous networks", MLSys 2020.
    """

    def __init__(self, *, deadline: float, least: float, mu: float) -> None:
        super().__init__(proximal_mu=mu, **quiet)
        self.deadline, self.least = deadline, least

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of their own for each client."""
        assert isinstance(grid, WorkShareGrid)
        workers = grid.known_workers()
        for message in super().configure_train(server_round, arrays, config, grid):
            share = self._share(grid.latency, grid.seed, workers[message.metadata.dst_node_id], server_round)
            mine = ConfigRecord({**message.content["config"], _SHARE: share})  # type: ignore[dict-item]
            # The strategy has put one RecordDict into all messages.
            message.content = RecordDict({**message.content, "config": mine})
            yield message

    def _share(self, latency: Latency, seed: int, worker: int, server_round: int) -> float:
        def seconds(shards: float) -> float:
            return latency.seconds(seed=seed, worker=worker, tick=2 * server_round, shards=shards, megabytes=0.0)

        idle = seconds(0.0)
        whole = seconds(1.0) - idle
        return min(1.0, max(self.least, (self.deadline - idle) / whole)) if whole > 0 else 1.0
