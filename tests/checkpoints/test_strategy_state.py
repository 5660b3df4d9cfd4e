"""What a strategy keeps between rounds is kept over a kill, or named if it cannot be."""

from __future__ import annotations

import functools
import json
import random
import threading
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, FedAvgM
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fl_gradcode.checkpoints.strategy_state import StrategyState, Unstorable, decode, encode
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, toy_app
from tests.strategy.test_resume import ROUNDS, STARTED, Killed, start


def test_a_strategy_may_keep_itself(tmp_path: Path) -> None:
    class Counting(FedAvg):
        def __init__(self) -> None:
            super().__init__(fraction_evaluate=0.0)
            self._lock = object()
            self.count = 0

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            self.count += 1
            return super().aggregate_train(server_round, replies)

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "deep": {"a": [np.arange(3), (1, 2)]}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]
            assert (state["deep"]["a"][0] == np.arange(3)).all() and state["deep"]["a"][1] == (1, 2)

    with pytest.raises(Killed):
        start(tmp_path, Counting(), killed_in=3)
    inner = Counting()
    start(tmp_path, inner)
    assert inner.count == ROUNDS


def test_an_attribute_that_cannot_be_kept_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inner = FedAvg(fraction_evaluate=0.0)
    inner.history = object()  # type: ignore[attr-defined]
    start(tmp_path, inner, rounds=1)
    assert "FedAvg.history is a object" in caplog.text and "state_dict()" in caplog.text
    caplog.clear()
    start(tmp_path / "plain", FedAvg(fraction_evaluate=0.0), rounds=1)
    assert "cannot hold" not in caplog.text


ARRAYS: Any = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.bool_]), hnp.array_shapes(min_dims=0, min_side=0)
)
SIMPLE: Any = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | ARRAYS
KEYS: Any = st.text() | st.integers() | st.tuples(st.text())
VALUES: Any = st.recursive(
    SIMPLE, lambda one: st.lists(one) | st.tuples(one, one) | st.dictionaries(KEYS, one), max_leaves=8
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@given(VALUES)
@settings(deadline=None, max_examples=200)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    blobs: list[bytes] = []
    assert same(decode(json.loads(json.dumps(encode(value, blobs))), blobs), value)


def test_generators_and_records_come_back_as_they_were() -> None:
    rng, python = np.random.default_rng(1), random.Random(2)
    rng.random(3)
    value = {"rng": rng, "python": python, "arrays": initial_arrays(), "scalar": np.float32(0.1)}
    value |= {"metrics": MetricRecord({"a": 1, "b": [0.5, 2.0]}), "config": ConfigRecord({"x": b"y", "z": "t"})}
    blobs: list[bytes] = []
    again = decode(json.loads(json.dumps(encode(value, blobs))), blobs)
    assert again["rng"].random() == rng.random() and again["python"].random() == python.random()
    assert again["arrays"] == value["arrays"] and again["scalar"] == value["scalar"]
    assert dict(again["metrics"].items()) == {"a": 1, "b": [0.5, 2.0]}
    assert dict(again["config"].items()) == {"x": b"y", "z": "t"}


def test_what_is_no_plain_value_is_named() -> None:
    with pytest.raises(Unstorable, match="Thread"):
        encode({"a": [threading.Thread()]}, [])
    with pytest.raises(Unstorable, match="ndarray"):
        encode(np.array([object()]), [])  # would take code to read


def test_a_strategy_inside_a_strategy_is_kept_too() -> None:
    class Around(FedAvg):
        def __init__(self, inside: FedAvgM) -> None:
            super().__init__()
            self.inside = inside

    first, second = Around(FedAvgM()), Around(FedAvgM())
    state, other = StrategyState(first), StrategyState(second)
    assert state.changed() == {}
    first.inside.momentum_vector = {"0": np.ones(2)}  # type: ignore[assignment]
    other.restore(state.changed())
    vector: Any = second.inside.momentum_vector
    assert (vector["0"] == 1).all()


def again(value: Any) -> Any:
    blobs: list[bytes] = []
    return decode(json.loads(json.dumps(encode(value, blobs))), blobs)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).T,
        torch.tensor(3, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.float64),
        torch.tensor([True, False]),
    ],
    ids=lambda value: f"{value.dtype} {list(value.shape)}",
)
def test_tensors_come_back_as_they_were(value: torch.Tensor) -> None:
    found = again({"a": value})["a"]
    assert found.dtype == value.dtype and found.shape == value.shape and torch.equal(found, value)
    found += found  # it can be written to


def test_dicts_come_back_as_the_dicts_that_they_were() -> None:
    groups: Any = defaultdict(list, {1: [2]})
    found = again(groups)
    assert type(found) is defaultdict and found == groups and found[7] == []
    for value in (Counter("abca"), OrderedDict(b=1, a=2)):
        assert type(again(value)) is type(value) and again(value) == value

    class Mine(dict[str, int]):
        pass

    odd: list[Any] = [Mine(a=1), defaultdict(lambda: 3), torch.nn.Parameter(torch.ones(2))]
    for strange in odd:
        with pytest.raises(Unstorable):
            encode(strange, [])


class Momentum(FedAvg):
    """Keeps a tensor that is not there at first."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.velocity: torch.Tensor | None = None

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        first = next(iter(arrays.values()))
        now = torch.from_numpy(first.numpy().copy())
        self.velocity = now if self.velocity is None else 0.9 * self.velocity + now
        arrays[next(iter(arrays))] = type(first)((first.numpy() + 0.1 * self.velocity.numpy()).astype(np.float32))
        return arrays, metrics


@pytest.mark.parametrize("killed_in", [1, 3])
@pytest.mark.parametrize("same_object", [False, True])
def test_what_was_none_at_first_is_kept_and_a_lost_round_leaves_nothing(
    same_object: bool, killed_in: int, tmp_path: Path
) -> None:
    whole, _ = start(tmp_path / "whole", Momentum())
    inner = Momentum()
    with pytest.raises(Killed):
        start(tmp_path / "killed", inner, killed_in=killed_in)
    assert inner.velocity is not None
    if same_object:  # the same process calls start() again
        STARTED[-1].on_round_end = None
        with InProcessGrid(toy_app(), 6) as grid:
            result = STARTED[-1].start(grid, initial_arrays(), num_rounds=ROUNDS)
    else:
        result, _ = start(tmp_path / "killed", Momentum())
    assert (flat(result.arrays) == flat(whole.arrays)).all()


def test_what_cannot_come_back_as_it_was_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inner: Any = FedAvg(fraction_evaluate=0.0)
    inner.masked = np.ma.masked_array([1.0, 2.0], [True, False])
    inner.circle = {}
    inner.circle["me"] = inner.circle
    start(tmp_path, inner, rounds=1)
    assert (
        "FedAvg.masked is a MaskedArray" in caplog.text and "FedAvg.circle is a dict that holds itself" in caplog.text
    )


def test_an_object_that_is_called_and_keeps_something_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Schedule:
        calls = 0

        def __call__(self) -> int:
            self.calls += 1
            return self.calls

    inner: Any = FedAvg(fraction_evaluate=0.0)
    inner.schedule, inner.plain, inner.part = Schedule(), len, functools.partial(max, 1)
    start(tmp_path, inner, rounds=1)
    assert "FedAvg.schedule is a Schedule" in caplog.text and caplog.text.count("cannot hold") == 1


def test_what_becomes_such_an_object_later_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Later(FedAvg):
        history: Any = None

        def __init__(self) -> None:
            super().__init__(fraction_evaluate=0.0)
            self.history = None

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            self.history = threading.Lock()
            return super().aggregate_train(server_round, replies)

    start(tmp_path, Later(), rounds=3)
    assert caplog.text.count("Later.history is a lock") == 1


class Keeping(FedAvg):
    def __init__(self, value: Any = 0) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_a_state_dict_may_hold_tensors_and_nothing_strange(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(tmp_path, Keeping(torch.ones(3)), killed_in=2)
    inner = Keeping()
    start(tmp_path, inner)
    assert torch.equal(inner.value, torch.ones(3))
    with pytest.raises(InvalidSetting, match=r"Keeping\.state_dict\(\) holds a object, which a checkpoint cannot"):
        start(tmp_path / "strange", Keeping(object()))


def test_a_state_dict_that_is_new_or_gone_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(tmp_path / "with", Keeping(), killed_in=2)
    with pytest.raises(Killed):
        start(tmp_path / "without", Momentum(), killed_in=2)
    saved = StrategyState(Keeping()).changed()
    with pytest.raises(InvalidSetting, match=r"FedAvg has no state_dict\(\), and the checkpoint was written with it"):
        StrategyState(FedAvg()).restore(saved)
    with pytest.raises(InvalidSetting, match=r"Keeping has a state_dict\(\), and the checkpoint was written without"):
        StrategyState(Keeping()).restore({"momentum": {"value": 1}})
