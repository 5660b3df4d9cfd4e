"""Baselines with rounds: those that leave clients out, and FedProx, where slow clients train for less long."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx

from fl_gradcode import VirtualGrid
from fl_gradcode.latency import Latency

__all__ = ["WORK_SHARE", "PartialProx", "WorkShareGrid", "quiet", "server_strategy"]

#: Nobody evaluates on the clients: all schemes are measured on the whole test set, by the server.
quiet: dict[str, Any] = {
    "fraction_evaluate": 0.0,
    "min_evaluate_nodes": 0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
}

WORK_SHARE = "work-share"


class WorkShareGrid(VirtualGrid):
    """A virtual clock that charges a message which asks for part of the training with that part."""

    def shards_of(self, message: Message, worker: int) -> float:
        """The share that the message asks for, of each shard."""
        config = message.content.get("config")
        share = config.get(WORK_SHARE, 1.0) if isinstance(config, ConfigRecord) else 1.0
        return float(share) * super().shards_of(message, worker)  # type: ignore[arg-type]


def server_strategy(options: Mapping[str, float]) -> FedAvg:
    """FedAvg, or with the option "adam" FedAdam with one setting for all schemes and problems, which was not tuned."""
    if "adam" in options:
        return FedAdam(eta=options["adam"], beta_1=0.9, beta_2=0.99, tau=1e-3, **quiet)
    return FedAvg(**quiet)


class PartialProx(FedProx):
    """FedProx in which each client trains for as long as a deadline allows, and everybody is waited for.

    The share of the local steps that a client manages is taken from the very draws that the virtual clock charges: what
    a client that watches its clock would do.

    Args:
        deadline: Seconds.
        least: The smallest share: one batch.
        mu: Weight of the proximal term.
        most: The largest share.
        server: Makes the model of the mean.

    References:
        Li et al., "Federated optimization in heterogeneous networks", MLSys 2020.
    """

    def __init__(
        self, *, deadline: float, least: float, mu: float, most: float = 1.0, server: FedAvg | None = None
    ) -> None:
        super().__init__(proximal_mu=mu, **quiet)
        self.deadline, self.least, self.most, self.server = deadline, least, most, server

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of their own for each client."""
        assert isinstance(grid, WorkShareGrid)
        workers = grid.known_workers()
        if self.server is not None:
            list(self.server.configure_train(server_round, arrays, config, grid))  # notes the model
        for message in super().configure_train(server_round, arrays, config, grid):
            share = self._share(grid.latency, grid.seed, workers[message.metadata.dst_node_id], server_round)
            mine = ConfigRecord({**message.content["config"], WORK_SHARE: share})  # type: ignore[dict-item]
            # The strategy has put one RecordDict into all messages.
            message.content = RecordDict({**message.content, "config": mine})
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the server's optimiser makes of the mean."""
        if self.server is None:
            return super().aggregate_train(server_round, replies)
        return self.server.aggregate_train(server_round, replies)

    def _share(self, latency: Latency, seed: int, worker: int, server_round: int) -> float:
        def seconds(shards: float) -> float:
            return latency.seconds(seed=seed, worker=worker, tick=2 * server_round, shards=shards, megabytes=0.0)

        idle = seconds(0.0)
        whole = seconds(1.0) - idle
        return min(self.most, max(self.least, (self.deadline - idle) / whole)) if whole > 0 else self.most
