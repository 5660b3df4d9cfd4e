"""Nodes that are registered late: a simulation's arrive one by one, after the ServerApp has started."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import Discovered, GradientCoding, VirtualGrid, fractional_repetition
from fl_gradcode.errors import RoundFailed
from fl_gradcode.grid import poll_nodes
from fl_gradcode.latency import Latency
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, run_plain, toy_app


class LateGrid(InProcessGrid):
    """Registers a further node each time that it is asked for them."""

    late_nodes = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.there = -1

    def get_node_ids(self) -> Iterable[int]:
        self.there += 1
        return list(super().get_node_ids())[: self.there]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_gradcode.grid.nodes.time.sleep", lambda seconds: None)


@pytest.mark.parametrize("code", [fractional_repetition(4, 1), Discovered(k=4, s=1)], ids=["code", "Discovered"])
def test_a_run_waits_for_them(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def holds(worker: int) -> dict[str, Any]:
        return {"partition-id": worker, "num-partitions": 4, "shards": f"{worker},{(worker + 2) % 4}"}

    with LateGrid(toy_app(), 4, node_config=holds) as grid:
        result = GradientCoding(FedAvg(fraction_evaluate=0.0), code).start(
            VirtualGrid(grid, Latency(compute=1.0)), initial_arrays(), num_rounds=2
        )
    expected = run_plain(toy_app(), 4, FedAvg(fraction_evaluate=0.0), rounds=2)
    assert relative(result.arrays, expected.arrays) < 1e-6


def test_too_few_are_refused_once_no_more_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_gradcode.strategy.run.SETTLED", 0.1)
    with (
        LateGrid(toy_app(), 2) as grid,
        pytest.raises(RoundFailed, match=r"^2 nodes are online after \d s; the code has n=6 workers"),
    ):
        GradientCoding(FedAvg(), fractional_repetition(6, 1)).start(
            VirtualGrid(grid, Latency(compute=1.0)), initial_arrays(), num_rounds=1
        )


def test_nobody_at_all_is_waited_for_until_the_timeout() -> None:
    class Empty(LateGrid):
        def get_node_ids(self) -> Iterable[int]:
            return []

    with Empty(toy_app(), 2) as grid:
        assert poll_nodes(grid, 0.2, "2 nodes", lambda found: len(found) == 2, settled=0.0) == []
