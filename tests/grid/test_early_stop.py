"""EarlyStopGrid around strategies of any kind: nothing that they send is lost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import EarlyStopGrid, VirtualGrid
from fl_gradcode.grid.arrivals import Arrival
from fl_gradcode.grid.polling import PollingArrivals
from fl_gradcode.grid.stop_rule import CountRule, Wait
from fl_gradcode.latency import Latency
from fl_gradcode.testing import InProcessGrid, inside_a_run
from tests.conftest import initial_arrays, toy_app
from tests.strategy.living import LivingGrid


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


def test_of_late_replies_nothing_large_lies_about() -> None:
    """They come in between two phases, when nobody asks for them, and have nobody who reads them."""
    grid = LivingGrid(toy_app(mods=()), 2)
    source = PollingArrivals(grid, poll_interval=0.01)
    with inside_a_run():
        records: dict[str, Any] = {"arrays": initial_arrays(), "config": ConfigRecord({"server-round": 1})}
        messages = [Message(RecordDict(dict(records)), dst_node_id=node, message_type="train") for node in (100, 101)]
        grid.nodes[100].silent = grid.nodes[101].silent = True
        tokens = source.push(messages)
        source.abandon([token for token in tokens[:1] if token])
        grid.nodes[100].silent = grid.nodes[101].silent = False
        found = [source.next_arrival(source.now() + 20) for _ in tokens]
    held = {one.node: [*one.reply.content] for one in found if one is not None and one.reply is not None}
    assert held[100] == ["metrics"] and set(held[101]) == {"arrays", "metrics"}
    source.close()


def test_a_debt_keeps_no_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node may owe its reply for rounds; what the others sent must not wait with it."""
    grid = LivingGrid(toy_app(mods=()), 3)
    next(one for one in grid.nodes.values() if one.worker == 0).silent = True
    waiting = EarlyStopGrid(grid, stop_after=2, poll_interval=0.01)
    made: list[Any] = []
    real = CountRule.finish

    def finish(self: CountRule, wait: Wait) -> list[Message]:
        made.append(weakref.ref(self))
        return real(self, wait)

    monkeypatch.setattr(CountRule, "finish", finish)
    with inside_a_run():
        FedAvg(fraction_evaluate=0.0).start(waiting, initial_arrays(), num_rounds=2, timeout=60)
    gc.collect()
    assert len(made) == 2 and len(waiting._debts) == 1
    assert [rule() for rule in made] == [None, None]


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
