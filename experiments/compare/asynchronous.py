"""Baselines that do not wait for a round: FedBuff, and semi-asynchronous rounds; both on the virtual clock.

Both send the same messages to the same ClientApp as every other scheme does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from experiments.compare.synchronous import WORK_SHARE
from fl_gradcode import VirtualGrid
from fl_gradcode.grid import Arrival

__all__ = ["fedbuff", "semi_asynchronous"]

Arrays = list[NDArray[Any]]
#: (number of server updates so far, model): called after each.
OnUpdate = Callable[[int, ArrayRecord], None]


class _Server:
    """The model, and who works on which version of it."""

    def __init__(
        self, grid: VirtualGrid, initial: ArrayRecord, *, share: float = 1.0, optimiser: FedAvg | None = None
    ) -> None:
        self.grid, self.share, self.optimiser = grid, share, optimiser
        self.keys = list(initial)
        self.model: Arrays = [array.astype(np.float64) for array in initial.to_numpy_ndarrays()]
        self.dtypes = [array.dtype for array in initial.to_numpy_ndarrays()]
        self.updates = 0
        self.nodes = sorted(grid.get_node_ids())
        self.base: dict[str, tuple[int, Arrays]] = {}  # token -> (version, model) that was sent

    def record(self) -> ArrayRecord:
        values = [array.astype(dtype) for array, dtype in zip(self.model, self.dtypes, strict=True)]
        return ArrayRecord(dict(zip(self.keys, ArrayRecord(values).values(), strict=True)))

    def send(self, nodes: list[int], server_round: int) -> None:
        record, config = self.record(), dict[str, Any]({"server-round": server_round})
        if self.share < 1:
            config[WORK_SHARE] = self.share
        messages = []
        for node in nodes:
            content = RecordDict({"arrays": record, "config": ConfigRecord(config)})
            messages.append(Message(content, dst_node_id=node, message_type="train"))
        version = (self.updates, self.model)
        for token in self.grid.push(messages):
            assert token is not None
            self.base[token] = version

    def arrivals(self, count: int) -> list[tuple[int, int, Arrays, float]]:
        """The next `count` replies: (node, versions behind, model after minus model before, examples)."""
        arrived: list[Arrival] = []
        while len(arrived) < count and (arrival := self.grid.next_arrival(None)) is not None:
            arrived.append(arrival)
        result = []
        for arrival, reply in zip(arrived, self.grid.fetch(arrived), strict=True):
            version, before = self.base.pop(arrival.token)
            assert reply is not None and reply.has_content(), reply
            arrays, metrics = reply.content["arrays"], reply.content["metrics"]
            assert isinstance(arrays, ArrayRecord) and isinstance(metrics, MetricRecord)
            pairs = zip(arrays.to_numpy_ndarrays(), before, strict=True)
            update = [after.astype(np.float64) - old for after, old in pairs]
            result.append((arrival.node, self.updates - version, update, float(metrics["num-examples"])))  # type: ignore[arg-type]
        return result

    def move(self, terms: list[tuple[float, Arrays]]) -> None:
        """Add a combination of updates; the old model stays as it is, since somebody may still work on it."""
        moved = [array.copy() for array in self.model]
        for coefficient, update in terms:
            for array, one in zip(moved, update, strict=True):
                array += coefficient * one
        if self.optimiser is not None:
            moved = self._optimised(moved)
        self.model = moved
        self.updates += 1

    def _optimised(self, mean: Arrays) -> Arrays:
        """What a strategy of Flower's makes of a mean, which it gets as one ordinary reply."""
        assert self.optimiser is not None
        before, record = (
            ArrayRecord(dict(zip(self.keys, ArrayRecord(one).values(), strict=True))) for one in (self.model, mean)
        )
        list(self.optimiser.configure_train(self.updates + 1, before, ConfigRecord({}), self.grid))
        asked = Message(RecordDict(), dst_node_id=self.nodes[0], message_type="train")
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})})
        arrays, _ = self.optimiser.aggregate_train(self.updates + 1, [Message(content, reply_to=asked)])
        assert arrays is not None
        return arrays.to_numpy_ndarrays()


def semi_asynchronous(
    grid: VirtualGrid,
    initial: ArrayRecord,
    *,
    wanted: int,
    rounds: int,
    on_update: OnUpdate,
    share: float = 1.0,
    optimiser: FedAvg | None = None,
) -> ArrayRecord:
    """Rounds that end with the `wanted`-th reply, whichever round it is of; late updates join the next round.

    Whoever is idle when a round begins gets the newest model. Updates are averaged by examples. The order of arrivals
    counts, not how often somebody polls. `share` is that of the local steps which everybody takes; `optimiser` makes
    the model of each mean.
    """
    server = _Server(grid, initial, share=share, optimiser=optimiser)
    idle = list(server.nodes)
    for number in range(1, rounds + 1):
        server.send(idle, number)
        arrived = server.arrivals(wanted)
        total = sum(examples for *_, examples in arrived)
        server.move([(examples / total, update) for _, _, update, examples in arrived])
        idle = [node for node, *_ in arrived]
        on_update(number, server.record())
    return server.record()


def fedbuff(
    grid: VirtualGrid,
    initial: ArrayRecord,
    *,
    buffer: int,
    server_rate: float,
    staleness: float,
    updates: int,
    until: float,
    on_update: OnUpdate,
) -> ArrayRecord:
    """FedBuff: whoever has finished gets the newest model at once; the server moves at each `buffer`-th update.

    An update that is tau versions behind counts (1 + tau)^-staleness. Slow spells last by the clock: the round of a
    job, on which its latency depends, is the number of seconds since the start.

    Args:
        buffer: K.
        server_rate: The server's learning rate.
        staleness: 0.5 in the paper.
        updates: Server updates after which it ends.
        until: Virtual seconds after which it ends.

    References:
        Nguyen et al., "Federated learning with buffered asynchronous aggregation", AISTATS 2022.
    """
    server = _Server(grid, initial)
    server.send(server.nodes, 1)
    while server.updates < updates and grid.now() < until:
        terms = []
        for _ in range(buffer):
            ((node, behind, update, _),) = server.arrivals(1)
            terms.append((server_rate / buffer / (1.0 + behind) ** staleness, update))
            if len(terms) == buffer:
                server.move(terms)
            server.send([node], 1 + int(grid.now()))
        on_update(server.updates, server.record())
    return server.record()
