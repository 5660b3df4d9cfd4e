"""Records that come as the function returned them: what makes two replies alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.protocol.returned import difference_of_names, names_of
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, run_plain, toy_app

WEIGHT = "num-examples"


def reply(scale: float = 1.0, *, count: int = 7, **more: Any) -> RecordDict:
    arrays = ArrayRecord({"w": Array(np.arange(1.0, 5.0) * scale), "n": Array(np.array([3]))})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({WEIGHT: count, "seconds": scale}), **more})


def test_names_count_and_their_order_does_not() -> None:
    other = RecordDict(
        {
            "metrics": MetricRecord({"seconds": 2.0, WEIGHT: 1}),
            "arrays": ArrayRecord({"n": Array(np.array([1])), "w": Array(np.zeros(9))}),
        }
    )
    assert names_of(reply(), WEIGHT) == names_of(other, WEIGHT)
    assert names_of(reply(), WEIGHT) != names_of(reply(told=ConfigRecord({"a": 1})), WEIGHT)
    told = (reply(told=ConfigRecord({"a": 1})), reply(told=ConfigRecord({"b": "x"})))
    assert names_of(told[0], WEIGHT) == names_of(told[1], WEIGHT)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"told": ConfigRecord({"a": 1})}, "its record 'told' is not among most"),
        ({"metrics": None}, "it lacks the record 'metrics', which is among most"),
        ({"arrays": ConfigRecord()}, "its record 'arrays' is of type ConfigRecord, and most is of type ArrayRecord"),
        ({"metrics": MetricRecord({WEIGHT: 1, "x": 1})}, "it lacks the entry 'seconds' of 'metrics'"),
        ({"metrics": MetricRecord({WEIGHT: 1, "seconds": 1, "x": 1})}, "its entry 'x' of 'metrics' is not among most"),
        (
            {"metrics": MetricRecord({WEIGHT: 1, "seconds": [1.0, 2.0]})},
            "its entry 'seconds' of 'metrics' is a list of 2, and most is one number",
        ),
        (
            {"arrays": ArrayRecord({"w": Array(np.zeros(9)), "n": Array(np.array([3]))})},
            r"its entry 'w' of 'arrays' is of shape \[9\], and most is of shape \[4\]",
        ),
    ],
)
def test_the_first_difference_is_told_also_in_shapes_and_lengths_if_they_are_added_up(
    change: dict[str, Any], sentence: str
) -> None:
    records = {name: record for name, record in {**reply(), **change}.items() if record is not None}
    odd, most = (names_of(one, WEIGHT, {"arrays", "metrics"}) for one in (RecordDict(records), reply()))
    assert re.match(sentence, difference_of_names(odd, most, "most"))
    assert difference_of_names(most, most, "most") == ""


_ODD: dict[str, Callable[[Any], None]] = {
    "one entry": lambda r: r["arrays"].update({"0": Array(np.ones(1, np.float32))}),
    "a shape that broadcasts": lambda r: r["arrays"].update({"0": Array(np.ones((3, 1), np.float32))}),
    "a shape that does not": lambda r: r["arrays"].update({"0": Array(np.ones(7, np.float32))}),
    "many more entries": lambda r: r["arrays"].update({"0": Array(np.ones((500, 3, 2), np.float32))}),
    "a longer list": lambda r: r["metrics"].update({"pair": [1.0] * 5}),
    "a number for a list": lambda r: r["metrics"].update({"pair": 1.0}),
    "a list for a number": lambda r: r["metrics"].update({"loss": [1.0]}),
    "a list for the weight": lambda r: r["metrics"].update({WEIGHT: [1]}),
}


@pytest.mark.parametrize("inner", [FedAvg, FedMedian])
@pytest.mark.parametrize("odd", _ODD)
def test_one_reply_of_another_shape_ends_no_run_and_is_not_broadcast(odd: str, inner: Any) -> None:
    """Flower adds up and stacks what it gets: one odd reply would end the run, or be repeated in all rows."""

    def tamper(worker: int, message: Message, answer: Message) -> Message:
        if worker == 1 and "arrays" in answer.content:
            _ODD[odd](answer.content)
        return answer

    strategy = GradientCoding(inner(), fractional_repetition(4, 1), send="shards")
    with InProcessGrid(toy_app(), 4, tamper=tamper) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=2)
    expected = run_plain(toy_app(), 4, inner(), rounds=2)
    assert relative(result.arrays, expected.arrays) < 1e-6
    assert any("its entry" in one["reason"] for row in strategy.ledger.rows for one in row["train"]["rejected"])


def test_a_strategy_of_ones_own_that_fails_for_one_odd_reply_says_whose(caplog: pytest.LogCaptureFixture) -> None:
    """It may want lists of different lengths, so that nothing is outvoted for it."""

    class Saving(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return super().aggregate_train(server_round, replies)

    def tamper(worker: int, message: Message, answer: Message) -> Message:
        if "arrays" in answer.content and worker == 1:
            _ODD["a shape that does not"](answer.content)
        return answer

    strategy = GradientCoding(Saving(), fractional_repetition(4, 0), send="shards")
    with InProcessGrid(toy_app(), 4, tamper=tamper) as grid, pytest.raises(ValueError, match="broadcast"):
        strategy.start(grid, initial_arrays(), num_rounds=1)
    (text,) = (one for one in caplog.messages if "unlike most" in one)
    assert re.match(
        r"Round 1: Saving.aggregate_train\(\) raised ValueError, and the reply for shard 1 .*'0' .* \[7\]", text
    )


@pytest.mark.parametrize("weight", [0, 1e308])
def test_weights_without_a_mean_skip_the_round(weight: float, caplog: pytest.LogCaptureFixture) -> None:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1), send="shards")
    with InProcessGrid(toy_app(examples=lambda shard: weight), 4) as grid:  # type: ignore[arg-type, return-value]
        result = strategy.start(grid, initial_arrays(), num_rounds=1)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["skipped"]
    assert relative(result.arrays, initial_arrays()) == 0
    assert "a mean needs a positive, finite one" in caplog.text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (RecordDict({"m": MetricRecord({WEIGHT: 2**64})}), "its metric 'num-examples' is a whole number of 65 bits"),
        (RecordDict({"a": ArrayRecord([np.array([1.0, math.nan])])}), r"its array a\['0'\] is not finite"),
        (RecordDict({"m": MetricRecord({WEIGHT: math.inf})}), "its 'num-examples' is not finite"),
        (RecordDict({"a": ArrayRecord({"x": Array("float32", (3,), "numpy.ndarray", b"nonsense")})}), "cannot be read"),
        (RecordDict({"a": ArrayRecord({"x": Array("float32", (3,), "torch", b"")})}), "cannot be read"),
    ],
    ids=["large", "NaN", "infinite weight", "no array", "another format"],
)
def test_what_would_spoil_the_model_or_cannot_be_read_is_told(content: RecordDict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        names_of(content, WEIGHT)


def test_a_reply_with_other_names_is_outvoted_and_its_shard_comes_from_another_holder() -> None:
    def tamper(worker: int, message: Message, answer: Message) -> Message:
        if worker == 1 and "arrays" in answer.content:
            answer.content["surplus"] = MetricRecord({"x": 1.0})
        return answer

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1), send="shards")
    with InProcessGrid(toy_app(), 4, tamper=tamper) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=2)
    assert all(row["train"]["outcome"] == "exact" for row in strategy.ledger.rows)
    assert 1 not in strategy.ledger.rows[-1]["train"]["used"]
    assert len(result.arrays) == 2
