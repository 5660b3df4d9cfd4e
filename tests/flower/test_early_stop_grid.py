"""EarlyStopGrid around strategies of any kind: nothing that they send is lost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import EarlyStopGrid, VirtualGrid
from fl_gradcode.arrivals import Arrival
from fl_gradcode.latency import Latency
from fl_gradcode.polling import PollingArrivals
from fl_gradcode.testing import InProcessGrid, inside_a_run
from tests.conftest import initial_arrays, toy_app
from tests.flower.living import LivingGrid


class Twice(FedAvg):
    """Asks each node two things a round."""

    seen: list[int] = []  # noqa: RUF012

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        for message in super().configure_train(server_round, arrays, config, grid):
            for part in (1, 2):
                records = {**message.content, "part": ConfigRecord({"part": part})}
                yield Message(RecordDict(records), message.metadata.dst_node_id, message.metadata.message_type)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        self.seen.append(len(replies))
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize("kind", ["virtual", "living"])
def test_a_node_gets_all_that_a_strategy_asks_of_it_one_after_the_other(kind: str) -> None:
    strategy = Twice(fraction_evaluate=0.0)
    strategy.seen = []
    if kind == "virtual":
        with InProcessGrid(toy_app(mods=()), 3) as inner:
            grid = EarlyStopGrid(VirtualGrid(inner, Latency(compute=1.0)))
            strategy.start(grid, initial_arrays(), num_rounds=2)
    else:
        living = LivingGrid(toy_app(mods=()), 3)
        with inside_a_run():
            strategy.start(EarlyStopGrid(living, poll_interval=0.01), initial_arrays(), num_rounds=2, timeout=60)
        assert len(living.pushed) == 12
    assert strategy.seen == [6, 6]


class Stopped(BaseException):
    """As Flower says that a run is not running any more: no Exception."""


def test_a_run_that_is_stopped_ends_its_pulls_with_a_reason() -> None:
    class Ended(LivingGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            raise Stopped("no run")

    source = PollingArrivals(Ended(toy_app(), 1), poll_interval=0.01)
    with inside_a_run():
        source.push([Message(RecordDict(), dst_node_id=100, message_type="train")])
    arrival = source.next_arrival(source.now() + 20)
    assert isinstance(arrival, Arrival) and arrival.failure == "pulling its reply ended: Stopped no run"
    source.close()
