"""The work of a round grows linearly with the clients. It is counted, since seconds would depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import (
    GradientCode,
    GradientCoding,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    gradient_coding_mod,
)
from fl_gradcode.grid import early_stop
from fl_gradcode.latency import Latency, lognormal
from fl_gradcode.planning import work_queue
from fl_gradcode.strategy import phase, replies, stop_rules
from fl_gradcode.testing import InProcessGrid

#: Modules that run at each arrival.
_WATCHED = {module.__file__ for module in (early_stop, stop_rules, phase, replies, work_queue)}


class _Lines:
    """Counts the lines of the watched modules that are executed, those of comprehensions once for each item."""

    def __init__(self) -> None:
        self.count = 0
        self._known: dict[CodeType, bool] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self._known:
            self._known[code] = code.co_filename in _WATCHED
        return self._line if self._known[code] else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.count += event == "line"
        return self._line


def _app() -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        arrays = ArrayRecord([np.full(2, float(shard), np.float32)])
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def _lines(code: GradientCode, send: Any) -> int:
    """Returns how many lines three rounds execute in virtual time, where replies are read when they suffice."""
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, send=send)
    lines = _Lines()
    with InProcessGrid(_app(), code.n) as inner:
        grid = VirtualGrid(inner, Latency(compute=lognormal(sigma=0.6)))
        before = sys.gettrace()
        sys.settrace(lines)
        try:
            strategy.start(grid, ArrayRecord([np.zeros(2, np.float32)]), num_rounds=3)
        finally:
            sys.settrace(before)
    assert all(row.train is not None and row.train.outcome == "exact" for row in strategy.ledger.rounds)
    return lines.count


def _cyclic(n: int) -> GradientCode:
    return cyclic_repetition(n, 2, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "send"),
    [
        (lambda n: fractional_repetition(n, 2), "coded"),
        (lambda n: fractional_repetition(n, 2), "shards"),
        (_cyclic, "coded"),
    ],
    ids=["coded vectors", "one shard a message", "cyclic"],
)
def test_four_times_the_clients_are_at_most_five_times_the_work(make: Callable[[int], GradientCode], send: str) -> None:
    few, many = (_lines(make(n), send) for n in (24, 96))
    assert many <= 5 * few
