"""A strategy of Flower that averages gets one reply for all shards, and makes the same of it to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg

from fl_gradcode._flower_internals import inside_a_run, reply_in_process
from fl_gradcode.strategy.reply_groups import Returned
from fl_gradcode.strategy.wrapped import aggregate

SHARDS = [3, 0, 4, 1, 2]  # in the order in which Flower draws them

ARRAYS: dict[str, Callable[[np.random.Generator], Any]] = {
    "float32": lambda rng: rng.standard_normal((3, 4)).astype(np.float32),
    "float64": lambda rng: rng.standard_normal(7),
    "float16": lambda rng: rng.standard_normal(5).astype(np.float16),
    "int64": lambda rng: rng.integers(-9, 9, (2, 2)),
    "bool": lambda rng: rng.random(3) < 0.5,
    "scalar": lambda rng: np.asarray(rng.random(), np.float32),
    "empty": lambda rng: np.zeros((0, 3), np.float32),
    "other byte order": lambda rng: rng.standard_normal(3).astype(">f4"),
    "Fortran": lambda rng: np.asfortranarray(rng.standard_normal((3, 4))),
    "negative zeros": lambda rng: np.array([-0.0, 0.0, -0.0], np.float32),
    "infinities": lambda rng: np.array([np.inf, 1.0], np.float32),
}


class Watched(FedAvg):
    """Notes how many replies it was given; what it makes of them is FedAvg's.

    It overrides no method: one that overrides what is counted here would get all replies.
    """

    seen = 0

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name != "_check_and_log_replies":
            return method

        def counting(replies: Iterable[Message], *args: Any, **kwargs: Any) -> Any:
            self.seen = len(list(replies))
            return method(replies, *args, **kwargs)

        return counting


def contents_of(arrays: Callable[[np.random.Generator], Any], seed: int = 0) -> dict[int, Any]:
    contents = {}
    for shard in range(5):
        rng = np.random.default_rng([seed, shard])
        numbers = MetricRecord({"loss": rng.random(), "num-examples": int(rng.integers(1, 50))})
        numbers["errors"] = rng.random(3).tolist()
        numbers["steps"] = int(rng.integers(100))
        if shard == 2:
            numbers["loss"] = float("nan")
        record = ArrayRecord({"w": Array(arrays(rng)), "b": Array(rng.standard_normal(2))})
        contents[shard] = RecordDict(
            {"numbers": numbers, "told": ConfigRecord({"shard": shard}), "model": record},
        )
    return contents


def made_by_flower(strategy: Any, contents: dict[int, Any], kind: str) -> tuple[Any, Any]:
    with inside_a_run(), np.errstate(all="ignore"):
        asked = [Message(RecordDict(), dst_node_id=shard, message_type=kind) for shard in SHARDS]
        replies = [reply_in_process(contents[shard], one) for shard, one in zip(SHARDS, asked, strict=True)]
        if kind == "evaluate":
            return in_bytes(None, strategy.aggregate_evaluate(1, replies))
        return in_bytes(*strategy.aggregate_train(1, replies))


def in_bytes(arrays: Any, metrics: Any) -> tuple[Any, Any]:
    as_bytes = None if arrays is None else [(name, array.dtype, array.data) for name, array in arrays.items()]
    return as_bytes, None if metrics is None else repr(list(metrics.items()))


def made_of(strategy: Any, contents: dict[int, Any], kind: str, sees: Any) -> tuple[Any, Any]:
    with inside_a_run(), np.errstate(all="ignore"):
        drafts = [Message(RecordDict(), dst_node_id=shard, message_type=kind) for shard in SHARDS]
        decoded = Returned(contents, np.ones(5), tuple(range(5)))
        arrays, metrics = aggregate(strategy, kind, drafts, 1, decoded, sees=sees)
    return in_bytes(arrays, metrics)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("arrays", ARRAYS)
def test_one_reply_gives_what_all_replies_give_to_the_last_bit(arrays: str, kind: str) -> None:
    for seed in range(20):
        contents = contents_of(ARRAYS[arrays], seed)
        strategy = Watched()
        one = made_of(strategy, contents, kind, None)
        assert strategy.seen == 1
        each = made_of(strategy, contents, kind, "replies")
        assert strategy.seen == 5
        assert one == each == made_by_flower(FedAvg(), contents, kind) and one[1] is not None


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedProx"])
def test_the_same_holds_for_the_other_strategies_that_average(name: str) -> None:
    options: dict[str, Any] = {"FedAvgM": {"server_momentum": 0.9}, "FedProx": {"proximal_mu": 0.1}}.get(name, {})
    strategies = [getattr(flower, name)(**options) for _ in range(2)]
    for strategy in strategies:
        strategy.current_arrays = None
    start = contents_of(ARRAYS["float32"])[0]["model"]
    for seed in range(3):
        made = []
        for strategy, sees in zip(strategies, (None, "replies"), strict=True):
            strategy.current_arrays = strategy.current_arrays or start
            if not isinstance(strategy, flower.FedAvgM | flower.FedProx):
                strategy.current_arrays = {key: array.numpy() for key, array in start.items()}
            made.append(made_of(strategy, contents_of(ARRAYS["float32"], seed), "train", sees))
        assert made[0] == made[1] and made[0][0]


def test_a_strategy_with_an_aggregation_of_its_own_gets_each_reply() -> None:
    class Counting(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            self.nodes = [reply.metadata.src_node_id for reply in replies]
            return None, None

    strategy = Counting()
    made_of(strategy, contents_of(ARRAYS["float32"]), "train", None)
    assert strategy.nodes == SHARDS


def _no_weights(contents: dict[int, Any]) -> None:
    for content in contents.values():
        content["numbers"]["num-examples"] = 0


def _weights_too_large(contents: dict[int, Any]) -> None:
    for content in contents.values():
        content["numbers"]["num-examples"] = 1e308


def _a_list_as_weight(contents: dict[int, Any]) -> None:
    for content in contents.values():
        content["numbers"]["num-examples"] = [1.0]


def _no_weight(contents: dict[int, Any]) -> None:
    for content in contents.values():
        del content["numbers"]["num-examples"]


def _two_records_of_metrics(contents: dict[int, Any]) -> None:
    for content in contents.values():
        content["more"] = MetricRecord({"x": 1.0})


def _two_models(contents: dict[int, Any]) -> None:
    for content in contents.values():
        content["second"] = content["model"]


def _other_shape(contents: dict[int, Any]) -> None:
    contents[4]["model"]["w"] = Array(np.zeros(9, np.float32))


def _a_longer_list(contents: dict[int, Any]) -> None:
    contents[4]["numbers"]["errors"] = [1.0] * 4


@pytest.mark.parametrize(
    "wrong",
    [
        _no_weights,
        _weights_too_large,
        _a_list_as_weight,
        _no_weight,
        _two_records_of_metrics,
        _two_models,
        _other_shape,
        _a_longer_list,
    ],
)
def test_what_flower_refuses_is_refused_in_its_own_words(wrong: Callable[[dict[int, Any]], None]) -> None:
    contents = contents_of(ARRAYS["float32"])
    wrong(contents)
    outcomes = []
    for sees in (None, "replies"):
        strategy = Watched()
        try:
            outcomes.append(repr(made_of(strategy, contents, "train", sees)))
        except (InconsistentMessageReplies, ValueError, ZeroDivisionError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        assert strategy.seen == 5
    assert outcomes[0] == outcomes[1]
