"""Records that come as the function returned them: what makes two replies alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.protocol.returned import names_of
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app

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
    ("content", "sentence"),
    [
        (RecordDict({"a": ArrayRecord([np.array([1.0, math.nan])])}), r"its array a\['0'\] is not finite"),
        (RecordDict({"m": MetricRecord({WEIGHT: math.inf})}), "its 'num-examples' is not finite"),
        (RecordDict({"a": ArrayRecord({"x": Array("float32", (3,), "numpy.ndarray", b"nonsense")})}), "cannot be read"),
        (RecordDict({"a": ArrayRecord({"x": Array("float32", (3,), "torch", b"")})}), "cannot be read"),
    ],
    ids=["NaN", "infinite weight", "no array", "another format"],
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
