"""The average of a run's models: it is evaluated and returned, and training does not see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg

from fl_gradcode import GradientCoding, Shards, fractional_repetition
from fl_gradcode.averaging import ModelAverage
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, toy_app


def train(rounds: int = 5, *, inner: Any = None, evaluate_fn: Any = None, **kwargs: Any) -> tuple[Any, Any, list[Any]]:
    """The result, the strategy, and the raw model after each round."""
    models: list[Any] = []
    strategy = GradientCoding(
        inner or FedAvg(),
        fractional_repetition(4, 1),
        on_round_end=lambda number, arrays, row: models.append(flat(arrays)),
        **{"verify": 0, **kwargs},
    )
    with InProcessGrid(toy_app(), 4) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=rounds, evaluate_fn=evaluate_fn)
    return result, strategy, models


def averages(models: list[Any], weight: float) -> list[Any]:
    means = [models[0]]
    for model in models[1:]:
        means.append((1 - weight) * means[-1] + weight * model)
    return means


@pytest.mark.parametrize("weight", [0.25, 1, 0.01])
@pytest.mark.parametrize("inner", [FedAvg, FedAdam])
def test_the_average_is_evaluated_and_returned_and_training_goes_on_from_the_model(inner: Any, weight: float) -> None:
    seen: list[Any] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(flat(arrays))
        return MetricRecord({"norm": float(np.linalg.norm(flat(arrays)))})

    _, _, plain = train(inner=inner())
    result, strategy, models = train(inner=inner(), average=weight, evaluate_fn=evaluate)
    assert all((a == b).all() for a, b in zip(plain, models, strict=True))
    means = averages(models, weight)
    assert np.allclose(flat(result.arrays), means[-1], rtol=0, atol=1e-5)
    assert np.allclose(seen[1:], means, rtol=0, atol=1e-5)
    assert (seen[0] == flat(initial_arrays())).all()
    assert (flat(strategy.arrays) == models[-1]).all()
    assert (flat(strategy.averaged) == flat(result.arrays)).all()


def test_clients_evaluate_the_average_too() -> None:
    seen: list[Any] = []

    def note(worker: int, message: Any, reply: Any) -> Any:
        if message.metadata.message_type == "evaluate":
            seen.append((worker, flat(message.content["arrays"])))
        return reply

    models: list[Any] = []
    strategy = GradientCoding(
        FedAvg(),
        fractional_repetition(4, 1),
        send=Shards(),
        average=0.5,
        on_round_end=lambda number, arrays, row: models.append(flat(arrays)),
    )
    with InProcessGrid(toy_app(), 4, tamper=note) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=3)
    means = averages(models, 0.5)
    for _, model in seen:
        assert min(float(np.abs(model - mean).max()) for mean in means) < 1e-5
    assert float(np.abs(seen[-1][1] - means[-1]).max()) < 1e-5


def test_without_it_nothing_changes() -> None:
    result, strategy, models = train()
    assert (flat(result.arrays) == models[-1]).all() and (flat(strategy.averaged) == models[-1]).all()


@pytest.mark.parametrize("central", [False, True])
def test_a_killed_run_goes_on_with_the_same_average(central: bool, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def die(number: int, arrays: Any, row: Any) -> None:
        if number == 4:
            raise Killed

    evaluate = (lambda number, arrays: MetricRecord({"x": 1.0})) if central else None
    whole, _, _ = train(6, average=0.3, evaluate_fn=evaluate)
    options: dict[str, Any] = {"average": 0.3, "checkpoint": str(tmp_path / "run"), "run": "r", "verify": 0}

    def start(rounds: int, **kwargs: Any) -> Any:
        strategy = GradientCoding(FedAvg(), fractional_repetition(4, 1), **options, **kwargs)
        with InProcessGrid(toy_app(), 4) as grid:
            return strategy, strategy.start(grid, initial_arrays(), num_rounds=rounds, evaluate_fn=evaluate)

    with pytest.raises(Killed):
        start(6, on_round_end=die)
    strategy, result = start(6)
    assert (flat(result.arrays) == flat(whole.arrays)).all()
    assert not (flat(strategy.arrays) == flat(result.arrays)).all()
    _, again = start(6)  # all rounds are done
    assert (flat(again.arrays) == flat(whole.arrays)).all()


def test_every_dtype_is_kept_and_counters_are_of_the_newest_model() -> None:
    def model(value: float) -> ArrayRecord:
        bfloat16 = Array("bfloat16", (2,), "numpy.ndarray", Array(np.full(2, 16256, np.uint16).view("V2")).data)
        return ArrayRecord(
            {
                "double": Array(np.full((2, 1), value)),
                "single": Array(np.full(3, value, np.float32)),
                "half": Array(np.full(2, value, np.float16)),
                "scalar": Array(np.array(value, np.float32)),
                "empty": Array(np.zeros((0, 3), np.float32)),
                "steps": Array(np.array(int(value), np.int64)),
                "brain": bfloat16,
            }
        )

    average = ModelAverage(0.5)
    for value in (1.0, 2.0, 4.0):
        average.add(model(value))
    mean: Any = average.arrays
    assert [(name, array.dtype, array.shape) for name, array in mean.items()] == [
        (name, array.dtype, array.shape) for name, array in model(1.0).items()
    ]
    assert [float(mean[name].numpy().flat[0]) for name in ("double", "single", "half", "scalar")] == [2.75] * 4
    assert int(mean["steps"].numpy()) == 4
    assert mean["brain"].data == model(1.0)["brain"].data


def test_small_steps_of_half_precision_are_not_lost() -> None:
    average = ModelAverage(0.01)
    average.add(ArrayRecord([np.ones(1, np.float16)]))
    for _ in range(200):
        average.add(ArrayRecord([np.full(1, 1.01, np.float16)]))
    assert average.arrays is not None
    assert abs(float(average.arrays.to_numpy_ndarrays()[0][0]) - (1.01 - 0.01 * 0.99**200)) < 2e-3


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan"), True, "0.25"])
def test_a_weight_that_is_no_share_is_refused(value: Any) -> None:
    with pytest.raises(InvalidSetting, match="must be the newest model's share"):
        GradientCoding(FedAvg(), fractional_repetition(4, 1), average=value)
