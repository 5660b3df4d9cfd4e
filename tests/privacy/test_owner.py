"""The data owner's own limit: a node with max-epsilon gives no update without noise, whatever the server asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.errors import PrivacyRefused
from fl_gradcode.privacy import CentralNoise
from fl_gradcode.testing import InProcessGrid, inside_a_run
from tests.conftest import flat
from tests.privacy.direct import Node, linear, move, records
from tests.privacy.private_app import initial, keys_for, private_app, settings

CODE = fractional_repetition(4, 1)  # groups (0, 2) and (1, 3)


def grid_of(folder: Path, owners: dict[int, float]) -> InProcessGrid:
    def node_config(worker: int) -> dict[str, Any]:
        own: dict[str, Any] = {"privacy-dir": str(folder / f"node-{worker}")}
        budget = {**own, "max-epsilon": owners[worker]} if worker in owners else {}
        return {"partition-id": worker, "num-partitions": 4, **budget}

    return InProcessGrid(private_app(), 4, run_config=keys_for(CODE, folder), node_config=node_config)


@pytest.mark.parametrize("privacy", [None, CentralNoise(noise_multiplier=1.0, clipping_norm=1.0)])
def test_a_node_with_a_budget_refuses_to_train_in_the_clear(privacy: Any, tmp_path: Path) -> None:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODE, privacy=privacy)
    with grid_of(tmp_path, {0: 3.0}) as grid:
        strategy.start(grid, initial(), num_rounds=2)
    for row in strategy.ledger.rows:
        assert row["train"]["outcome"] == "exact"  # worker 2 holds the same
        assert 0 not in row["train"]["used"]
        assert any("max-epsilon=3" in one["reason"] for one in row["train"]["rejected"])


def test_so_it_does_under_a_plain_strategy() -> None:
    def node_config(worker: int) -> dict[str, Any]:
        return {"partition-id": worker, "num-partitions": 2, "max-epsilon": 3.0}

    with InProcessGrid(private_app(), 2, node_config=node_config) as grid:
        result = FedAvg(fraction_evaluate=0.0).start(grid, initial(), num_rounds=1)
    assert not result.arrays  # no reply was usable


def test_it_trains_privately_within_its_budget(tmp_path: Path) -> None:
    asked = settings()
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODE, privacy=asked)
    owners = dict.fromkeys(range(4), 1.001 * asked.epsilon(2))
    with grid_of(tmp_path, owners) as grid:
        strategy.start(grid, initial(), num_rounds=3)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact", "exact", "skipped"]
    assert all("above the budget" in one["reason"] for one in strategy.ledger.rows[2]["train"]["rejected"])


def test_the_owner_may_allow_one_way_to_clip(tmp_path: Path) -> None:
    node, net = Node(tmp_path / "node"), linear()
    allowed = {"grad-sample-mode": "hooks"}
    with (
        inside_a_run(),
        pytest.raises(PrivacyRefused, match=r"allows grad-sample-mode='hooks', and the server asks for 'ghost'"),
        node.ask(net, privacy=settings(grad_sample_mode="ghost"), node_config=allowed),
    ):
        pass
    assert not node.ledger.exists()
    with inside_a_run(), node.ask(net, node_config=allowed) as dp:
        move(dp, net, *records())
    assert dp.record


def test_evaluation_is_not_training(tmp_path: Path) -> None:
    strategy = GradientCoding(FedAvg(), CODE, privacy=settings())
    with grid_of(tmp_path, dict.fromkeys(range(4), 100.0)) as grid:
        result = strategy.start(grid, initial(), num_rounds=1)
    assert flat(result.arrays).shape == flat(initial()).shape
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.5)
