"""The ledger's rounding error bounds what a run's model is off, for every number of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, gradient_coding_mod
from fl_gradcode.codes import GradientCode, fractional_repetition, reed_solomon
from fl_gradcode.testing import InProcessGrid
from tests.codes.samples import cyclic, universal

SIZE = 501


def update(shard: int, scale: float) -> np.ndarray:
    return (np.random.default_rng(shard).standard_normal(SIZE) * scale * 10.0 ** (shard % 3)).astype(np.float32)


def model_of(code: GradientCode, scale: float) -> tuple[np.ndarray, dict[str, Any]]:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content: Any = {
            "arrays": ArrayRecord([update(shard, scale)]),
            "metrics": MetricRecord({"num-examples": 3 * shard + 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, verify=0)
    with InProcessGrid(app, code.n) as grid:
        # From zeros, so that the model is the update.
        result = strategy.start(grid, ArrayRecord([np.zeros(SIZE, np.float32)]), num_rounds=1)
    return result.arrays.to_numpy_ndarrays()[0], strategy.ledger.rows[0]["train"]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(
    "code",
    [
        fractional_repetition(8, 3),
        fractional_repetition(8, 3, m=2),
        fractional_repetition(8, 3, m=3),
        cyclic(8, 3),
        universal(6, 6, 2, 1, 0),
        universal(6, 6, 2, 2, 0),
        universal(8, 8, 2, 3, 1),
    ],
    ids=repr,
)
def test_the_model_is_within_the_rounding_error_of_the_row(code: GradientCode, scale: float) -> None:
    model, row = model_of(code, scale)
    weights = np.array([3 * shard + 1 for shard in range(code.k)]) / sum(3 * shard + 1 for shard in range(code.k))
    parts = np.array([update(shard, scale).astype(np.float64) for shard in range(code.k)]) * weights[:, None]
    off = np.linalg.norm(model - parts.sum(axis=0)) / np.linalg.norm(parts)
    assert off <= row["rounding-error"] < 1e-4
    assert row["rounding-error"] < 200 * off


def test_over_a_prime_field_there_is_none() -> None:
    _, row = model_of(reed_solomon(6, 2), 1e-3)
    assert row["rounding-error"] is None and row["quantisation-error"] is not None
