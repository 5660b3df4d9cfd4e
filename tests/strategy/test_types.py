"""Names, shapes and dtypes come back as train() returned them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fl_gradcode import GradientCoding, cyclic_repetition, fractional_repetition, gradient_coding_mod
from fl_gradcode.protocol import packing as pack
from fl_gradcode.testing import InProcessGrid


def bfloat16(values: Any) -> Array:
    """An Array as ml_dtypes would make it: 16-bit payload, dtype named."""
    bits = np.asarray(values, np.float32).view(np.uint32) >> 16
    raw = Array(bits.astype(np.uint16).view("V2").reshape(np.shape(values)))
    return Array("bfloat16", raw.shape, raw.stype, raw.data)


def moving_app(returned: Any = None) -> ClientApp:
    """Adds shard + 1 to every array, in its own dtype; `returned` may change the reply."""
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content: Any = message.content
        new: dict[str, Array] = {}
        for name, array in content["arrays"].items():
            if array.dtype == "bfloat16":
                new[name] = bfloat16(np.asarray(pack.view(array), np.float32) + np.float32(shard + 1))
            else:
                values = array.numpy()
                new[name] = Array(np.asarray(values + np.asarray(shard + 1, values.dtype)))
        arrays = ArrayRecord(new if returned is None else returned(new))
        metrics = MetricRecord({"num-examples": 2 * shard + 1})
        return Message(RecordDict({"model": arrays, "m": metrics}), reply_to=message)

    return app


def run(
    arrays: ArrayRecord, app: ClientApp | None = None, strategy: Any = None, rounds: int = 1, code: Any = None
) -> Any:
    coding = GradientCoding(strategy or FedAvg(fraction_evaluate=0.0), code or fractional_repetition(4, 1), sees="mean")
    with InProcessGrid(app or moving_app(), 4) as grid:
        return coding.start(grid, arrays, num_rounds=rounds).arrays


MEAN = sum((j + 1) * (2 * j + 1) for j in range(4)) / sum(2 * j + 1 for j in range(4))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_floats_keep_their_dtype(dtype: str) -> None:
    result = run(ArrayRecord({"w": Array(np.full((2, 3), 5, dtype))}))
    assert result["w"].dtype == dtype or np.dtype(result["w"].dtype) == np.dtype(dtype).newbyteorder("=")
    assert np.allclose(result["w"].numpy().astype(float), 5 + MEAN, rtol=1e-3 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("code", [fractional_repetition(4, 1), cyclic_repetition(4, 1, rng=np.random.default_rng(0))])
@pytest.mark.parametrize(("dtype", "step"), [("float32", 1e-41), ("float64", 1e-200)])
def test_an_app_that_makes_numpy_raise_trains_on_what_underflows(dtype: str, step: float, code: Any) -> None:
    """`np.seterr(all="raise")` finds NaN in an app's own arithmetic; squares of small updates underflow in ours."""

    def train(message: Message, context: Context) -> Message:
        np.seterr(all="raise")
        content: Any = message.content
        shard = int(context.node_config["partition-id"])
        with np.errstate(all="ignore"):
            new = content["m"]["w"].numpy() + np.asarray(step * (shard + 1), dtype)
        metrics = MetricRecord({"num-examples": 3})
        return Message(RecordDict({"m": ArrayRecord({"w": Array(new)}), "n": metrics}), reply_to=message)

    app = ClientApp(mods=[gradient_coding_mod])
    app.train()(train)
    before = np.seterr(all="raise")
    try:
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0, arrayrecord_key="m"), code)
        with InProcessGrid(app, 4) as grid:
            result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(3, dtype))}), num_rounds=1)
    finally:
        np.seterr(**before)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"
    assert np.allclose(result.arrays["w"].numpy() / step, 2.5, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_counters_are_rounded_back_to_their_type(dtype: str) -> None:
    result = run(ArrayRecord({"w": Array(np.zeros(2, np.float32)), "steps": Array(np.asarray(7, dtype))}))
    assert result["steps"].dtype == dtype
    assert result["steps"].numpy() == round(7 + MEAN)
    assert result["steps"].shape == ()


def test_the_ends_of_an_integer_s_range_come_back_without_a_warning() -> None:
    """A warning is an error in tests, and where an app has said `np.seterr(all="raise")`."""
    ends = np.array([2**63 - 1, -(2**63)])

    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        content: Any = message.content
        records = {"m": content["model"], "n": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(records), reply_to=message)

    app = ClientApp(mods=[gradient_coding_mod])
    app.train()(train)
    strategy = FedAvg(fraction_evaluate=0.0, arrayrecord_key="model")
    assert (run(ArrayRecord({"w": Array(ends)}), app, strategy)["w"].numpy() == ends).all()


def test_booleans_are_decided_by_the_majority() -> None:
    def returned(new: dict[str, Array]) -> dict[str, Array]:
        return {**new, "mask": Array(np.array([True, False]))}

    result = run(ArrayRecord({"mask": Array(np.array([False, False]))}), moving_app(returned))
    assert result["mask"].dtype == "bool"
    assert result["mask"].numpy().tolist() == [True, False]


def test_bfloat16_comes_back_as_bfloat16() -> None:
    result = run(ArrayRecord({"w": bfloat16([[1.0, 2.0], [0.5, -4.0]])}), rounds=2)
    assert result["w"].dtype == "bfloat16"
    assert np.allclose(pack.view(result["w"]), np.array([[1.0, 2.0], [0.5, -4.0]]) + 2 * MEAN, rtol=1e-2)


def test_empty_and_zero_dimensional_arrays_work() -> None:
    arrays = ArrayRecord({"none": Array(np.zeros((3, 0), np.float32)), "one": Array(np.array(2.0, np.float32))})
    result = run(arrays)
    assert result["none"].shape == (3, 0)
    assert float(result["one"].numpy()) == pytest.approx(2 + MEAN)


def test_fortran_ordered_arrays_keep_their_values() -> None:
    values = np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3))
    assert np.allclose(run(ArrayRecord({"w": Array(values)}))["w"].numpy(), values + MEAN)


def test_one_double_makes_the_wire_double() -> None:
    arrays = ArrayRecord({"a": Array(np.array([1e9], np.float64)), "b": Array(np.zeros(1, np.float32))})
    result = run(arrays)
    assert result["a"].numpy()[0] == 1e9 + MEAN
    assert (result["a"].dtype, result["b"].dtype) == ("float64", "float32")


def test_adaptive_strategies_that_send_doubles_work_for_many_rounds() -> None:
    def as_float32(new: dict[str, Array]) -> dict[str, Array]:
        return {name: Array(array.numpy().astype(np.float32)) for name, array in new.items()}

    app = moving_app(as_float32)
    arrays = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    code = cyclic_repetition(4, 1, rng=np.random.default_rng(0))
    coded = run(arrays, app, FedAdam(fraction_evaluate=0.0, tau=0.1), rounds=4, code=code)
    with InProcessGrid(app, 4) as grid:
        plain = FedAdam(fraction_evaluate=0.0, tau=0.1).start(grid, arrays, num_rounds=4).arrays
    assert coded["w"].dtype == plain["w"].dtype == "float64"
    assert np.allclose(coded["w"].numpy(), plain["w"].numpy(), rtol=1e-6)


def test_arrays_that_train_leaves_out_are_left_out() -> None:
    arrays = ArrayRecord({"kept": Array(np.zeros(1, np.float32)), "frozen": Array(np.ones(2, np.float32))})
    result = run(arrays, moving_app(lambda new: {"kept": new["kept"]}))
    assert list(result) == ["kept"]


def test_the_user_s_record_names_reach_the_inner_strategy() -> None:
    seen: list[Any] = []

    class Looking(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            seen.extend(dict(reply.content) for reply in replies)
            return super().aggregate_train(server_round, replies)

    run(ArrayRecord({"w": Array(np.zeros(1, np.float32))}), strategy=Looking(fraction_evaluate=0.0))
    (content,) = seen
    assert list(content) == ["m", "model"]
    assert content["m"]["num-examples"] == 16


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    weight=st.floats(0.5, 1e6),
)
@settings(max_examples=50, deadline=None)
def test_bfloat16_rounding_is_to_nearest(values: list[float], weight: float) -> None:
    array = np.array(values, np.float32)
    back = pack.view(pack._to_bfloat16(array))
    error = np.abs(back.astype(np.float64) - array)
    assert (error <= np.abs(array) * 2.0**-8 + 1e-38).all()


@given(st.integers(0, 3000), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_encoding_a_row_block_by_block_is_linear(size: int, m: int) -> None:
    rng = np.random.default_rng(size)
    vectors = rng.standard_normal((3, size))
    coefficients = rng.standard_normal((3, m))
    total: NDArray[Any] | None = None
    for vector, row in zip(vectors, coefficients, strict=True):
        total = pack.encode_row(total, vector, tuple(row))
    assert total is not None
    length = -(-size // m)
    padded = np.zeros((3, m * length))
    padded[:, :size] = vectors
    expected = np.einsum("tl,tlx->x", coefficients, padded.reshape(3, m, length))
    assert np.allclose(total, expected)


def test_pickled_arrays_are_refused() -> None:
    evil = Array("object", (1,), "pickle", b"")
    with pytest.raises(ValueError, match="expected 'numpy.ndarray'"):
        pack.view(evil)
    good = Array(np.zeros(4))
    with pytest.raises(ValueError, match="do not fit"):
        pack.view(Array(good.dtype, good.shape, good.stype, good.data[:-1]))
