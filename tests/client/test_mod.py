"""The client's mod: one call of the user's function for each shard, seeded, with its own data and state."""

from __future__ import annotations

import json
import logging
import random
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, cyclic_repetition, fractional_repetition, gradient_coding_mod
from fl_gradcode.errors import UnsuitableApp
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, toy_app


def app_of(train: Any, evaluate: Any = None) -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])
    app.train()(train)
    if evaluate is not None:
        app.evaluate()(evaluate)
    return app


def reply_to(message: Message, arrays: Any = None, **metrics: Any) -> Message:
    content: Any = message.content
    record = content["arrays"] if arrays is None else arrays
    values = MetricRecord({"num-examples": 1, **metrics})
    return Message(RecordDict({"arrays": record, "metrics": values}), reply_to=message)


def start(app: ClientApp, *, n: int = 4, s: int = 1, rounds: int = 1, arrays: Any = None, **kwargs: Any) -> Any:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(n, s), **kwargs)
    with InProcessGrid(app, n) as grid:
        result = strategy.start(grid, arrays or initial_arrays(), num_rounds=rounds)
    return result, strategy


def test_train_sees_the_shard_as_its_partition_and_k_partitions() -> None:
    seen: list[tuple[int, int]] = []

    def train(message: Message, context: Context) -> Message:
        seen.append((int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])))
        return reply_to(message)

    start(app_of(train))
    assert sorted({*seen}) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_other_keys_of_the_node_config_and_the_run_config_stay() -> None:
    seen: list[Any] = []

    def train(message: Message, context: Context) -> Message:
        seen.append((context.node_config["data"], context.run_config["lr"], context.node_config["partition-id"]))
        return reply_to(message)

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(2, 1), verify=0)

    def config(i: int) -> dict[str, Any]:
        return {"partition-id": i, "num-partitions": 2, "data": "/d"}

    with InProcessGrid(app_of(train), 2, node_config=config, run_config={"lr": 0.5}) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
    assert sorted(seen) == [("/d", 0.5, 0), ("/d", 0.5, 1)]


def test_a_message_without_a_plan_passes_unchanged() -> None:
    with InProcessGrid(toy_app(), 3) as grid:
        result = FedAvg().start(grid, initial_arrays(), num_rounds=2)
    assert set(result.train_metrics_clientapp[1]) == {"loss", "pair"}


@pytest.mark.parametrize("source", ["random", "numpy", "torch"])
def test_replicas_draw_the_same_from_the_global_generators(source: str) -> None:
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        draw = {"random": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.rand(()))}[source]
        content: Any = message.content
        new = [(a + draw()).astype(np.float32) for a in content["arrays"].to_numpy_ndarrays()]
        return reply_to(message, ArrayRecord(new))

    rng = np.random.default_rng(0)
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), cyclic_repetition(5, 2, rng=rng))
    models = []
    for _ in range(2):
        with InProcessGrid(app_of(train), 5) as grid:
            models.append(strategy.start(grid, initial_arrays(), num_rounds=2).arrays)
    assert relative(models[0], models[1]) == 0
    assert all(row["train"]["replica-disagreement"] == 0 for row in strategy.ledger.rows)


def test_the_seed_changes_with_round_shard_and_the_strategy_s_seed() -> None:
    draws: list[float] = []

    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        draws.append(random.random())
        return reply_to(message)

    for seed in (0, 1):
        start(app_of(train), n=2, s=1, rounds=2, seed=seed)
    assert len(set(draws)) == 8


class Watching(InProcessGrid):
    """Draws from the global generators around each call of a client, which must not notice."""

    def _answer(self, message: Message) -> Message:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - it is the global generator that matters
        torch.manual_seed(1)
        expected = (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        reply = super()._answer(message)
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected  # noqa: NPY002
        return reply


def test_the_process_gets_its_random_states_back() -> None:
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        return reply_to(message)

    with Watching(app_of(train), 4) as grid:
        GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1), verify=0).start(
            grid, initial_arrays(), num_rounds=1
        )
        assert sum(grid.calls) == 2


def test_each_shard_has_a_state_of_its_own_which_lasts(caplog: pytest.LogCaptureFixture) -> None:
    seen: dict[int, list[int]] = {}

    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        counter: Any = context.state.get("counter", ConfigRecord({"rounds": 0, "shard": shard}))
        assert counter["shard"] == shard
        seen.setdefault(shard, []).append(counter["rounds"])
        context.state["counter"] = ConfigRecord({"rounds": counter["rounds"] + 1, "shard": shard})
        return reply_to(message)

    with caplog.at_level(logging.WARNING):
        start(app_of(train), n=2, s=0, rounds=3)
    assert seen == {0: [0, 1, 2], 1: [0, 1, 2]}
    warnings = [record.message for record in caplog.records if "context.state" in record.message]
    assert len(warnings) == 1 and "may depend only on the message" in warnings[0]


def test_holders_that_disagree_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content: Any = message.content
        lie = 1e-3 if context.node_id % 2 and shard == 3 else 0.0
        return reply_to(message, ArrayRecord([a + np.float32(1 + lie) for a in content["arrays"].to_numpy_ndarrays()]))

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), cyclic_repetition(6, 2, rng=np.random.default_rng(0)))
    with InProcessGrid(app_of(train), 6) as grid, caplog.at_level(logging.WARNING):
        strategy.start(grid, initial_arrays(), num_rounds=2)
    disagreement = strategy.ledger.rows[0]["train"]["replica-disagreement"]
    assert 1e-4 < disagreement < 1e-2
    assert sum("both hold shard 3 and sent different" in record.message for record in caplog.records) == 1


def test_holders_that_have_nothing_in_common_make_a_combining_code_undecodable() -> None:
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        content: Any = message.content
        rng = np.random.default_rng(context.node_id)
        new = [(a + rng.standard_normal(a.shape)).astype(np.float32) for a in content["arrays"].to_numpy_ndarrays()]
        return reply_to(message, ArrayRecord(new))

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), cyclic_repetition(5, 2, rng=np.random.default_rng(0)))
    with InProcessGrid(app_of(train), 5) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=1)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "skipped"
    assert relative(result.arrays, initial_arrays()) == 0


READS: dict[str, Any] = {
    "index": lambda config: config["partition-id"],
    "get": lambda config: config.get("partition-id"),
    "items": lambda config: dict(config.items())["partition-id"],
    "unpacked": lambda config: {**config}["partition-id"],
    "copy": lambda config: config.copy()["partition-id"],
    "dict": lambda config: dict(config)["partition-id"],
    "pop": lambda config: config.pop("partition-id"),
    "setdefault": lambda config: config.setdefault("partition-id", 0),
    "text": lambda config: str(config),
    "json": lambda config: json.loads(json.dumps(config))["partition-id"],
}


@pytest.mark.parametrize("how", READS)
def test_reading_partition_id_in_any_way_counts(how: str) -> None:
    def train(message: Message, context: Context) -> Message:
        READS[how](context.node_config)
        return reply_to(message)

    _, strategy = start(app_of(train))
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


def test_an_app_that_never_reads_partition_id_is_refused() -> None:
    def train(message: Message, context: Context) -> Message:
        return reply_to(message)

    with pytest.raises(UnsuitableApp, match="never read context.node_config"):
        start(app_of(train))
    _, strategy = start(app_of(train), allow_fixed_data=True)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


def test_an_app_that_reads_it_once_and_keeps_the_data_is_refused() -> None:
    kept: list[int] = []

    def train(message: Message, context: Context) -> Message:
        if not kept:
            kept.append(int(context.node_config["partition-id"]))
        return reply_to(message)

    with pytest.raises(UnsuitableApp, match="Choose the data by partition-id at every call"):
        start(app_of(train))


def test_what_train_does_to_its_message_does_not_reach_the_next_shard() -> None:
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        content: Any = message.content
        arrays = ArrayRecord(content["arrays"].to_numpy_ndarrays())
        content["config"]["server-round"] = 99
        content["arrays"].clear()
        del content["config"]
        return reply_to(message, arrays)

    result, strategy = start(app_of(train), n=2, s=1, rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact", "exact"]
    assert relative(result.arrays, initial_arrays()) == 0


#: A dtype of a library of its own, which NumPy cannot name.
FLOAT8 = Array("float8_e4m3fn", (3, 2), "numpy.ndarray", Array(np.zeros((3, 2), np.uint8)).data)


@pytest.mark.parametrize(("returned", "what"), [(None, "None"), ({}, "a dict"), (RecordDict(), "a RecordDict")])
@pytest.mark.parametrize("send", ["coded", "shards"])
def test_a_function_that_returns_no_message_is_told_so(returned: Any, what: str, send: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        return cast(Message, returned)

    with pytest.raises(UnsuitableApp, match=rf"train\(\) returned {what} for shard \d; it must return a Message"):
        start(app_of(train), n=2, s=0, send=send)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.content.pop("metrics"), "exactly one MetricRecord, not 0"),
        (lambda r: r.content.pop("arrays"), "exactly one ArrayRecord, not 0"),
        (lambda r: r.content["metrics"].pop("num-examples"), "lack 'num-examples'"),
        (lambda r: r.content["metrics"].update({"num-examples": -1}), "'num-examples' is -1"),
        (lambda r: r.content["metrics"].update({"num-examples": [1, 2]}), "one finite number"),
        (lambda r: r.content["arrays"].update({"new": Array(np.zeros(1))}), "named 'new' that the server did not send"),
        (lambda r: r.content["arrays"].update({"0": Array(np.zeros(3))}), r"shape \(3,\); the server sent \(3, 2\)"),
        (lambda r: r.content["arrays"].update({"0": Array(np.zeros((3, 2), complex))}), "only real numbers"),
        (lambda r: r.content["arrays"].update({"0": Array(np.zeros((3, 2), [("a", "f4")]))}), "only real numbers"),
        (lambda r: r.content["arrays"].update({"0": FLOAT8}), "'0' has dtype float8_e4m3fn; only real numbers"),
        (lambda r: r.content["metrics"].update({"num-examples": 10**400}), "'num-examples' is a whole number of 1329"),
        (
            lambda r: r.content["metrics"].update({"steps": [1, 2**63]}),
            "'steps' is a whole number of 64 bits; Flower sends at most 63 and a sign",
        ),
    ],
)
def test_a_reply_that_cannot_be_coded_is_told_in_one_sentence(change: Any, sentence: str) -> None:
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        content: Any = message.content
        reply = reply_to(message, ArrayRecord(content["arrays"].to_numpy_ndarrays()))
        change(reply)
        return reply

    with pytest.raises(UnsuitableApp, match=f"No client can take part: error 2: UnsuitableApp: Shard 0, .*{sentence}"):
        start(app_of(train), n=2, s=0)


@pytest.mark.parametrize("value", [None, "3", True, 2.0])
def test_a_node_without_a_usable_partition_id_says_so(value: Any) -> None:
    def config(i: int) -> dict[str, Any]:
        return {"partition-id": i if i else value, "num-partitions": 2}

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(2, 1))
    with InProcessGrid(toy_app(), 2, node_config=config) as grid:
        grid.known_workers = dict  # type: ignore[method-assign]
        strategy.start(grid, initial_arrays(), num_rounds=1)
    row = strategy.ledger.rows[0]["train"]
    assert row["outcome"] == "exact"
    assert all("must be its worker number" in one["reason"] for one in row["rejected"])


def test_the_nodes_own_shard_has_the_nodes_state_and_copies_have_theirs() -> None:
    def keep(message: Message, context: Context, call_next: Any) -> Message:
        shard = int(context.node_config["partition-id"])
        before = context.state.get("head")
        assert before is None or before["shard"] == shard
        context.state["head"] = MetricRecord({"shard": shard})
        return call_next(message, context)  # type: ignore[no-any-return]

    with InProcessGrid(toy_app([gradient_coding_mod, keep]), 4) as grid:
        GradientCoding(FedAvg(), fractional_repetition(4, 1)).start(grid, initial_arrays(), num_rounds=2)
        answered = [(grid._worker[node], context.state) for node, context in grid._contexts.items() if context.state]
    assert answered
    for worker, state in answered:
        head: Any = state["head"]  # where @app.query finds it
        assert head["shard"] == worker
        assert sum(name.endswith("head") for name in state) == 2


def app_of_any_order(names: list[str], **more: Any) -> ClientApp:
    """Odd shards name their arrays and metrics the other way round."""
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard, sent = int(context.node_config["partition-id"]), message.content["arrays"]
        order = names[:: -1 if shard % 2 else 1]
        arrays = ArrayRecord({name: Array(sent[name].numpy() + shard) for name in order})  # type: ignore[union-attr]
        metrics = MetricRecord({"num-examples": 1, **{f"of-{name}": float(shard) for name in order}})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics, **more}), reply_to=message)

    return app


@pytest.mark.parametrize("send", ["coded", "shards"])
def test_arrays_and_metrics_may_come_in_any_order(send: Any) -> None:
    sent = ArrayRecord({name: Array(np.full(size, 1.0, np.float32)) for size, name in enumerate("wab", 1)})
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1, k=8), send=send)
    with InProcessGrid(app_of_any_order(["w", "a", "b"]), 4) as grid:
        result = strategy.start(grid, sent, num_rounds=1)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"
    for size, name in enumerate("wab", 1):
        assert result.arrays[name].numpy().tolist() == [4.5] * size
        assert result.train_metrics_clientapp[1][f"of-{name}"] == pytest.approx(3.5)


def test_a_config_record_is_refused_under_coded_vectors_by_its_name() -> None:
    app = app_of_any_order(["w"], told=ConfigRecord({"trained": True}))
    with (
        InProcessGrid(app, 4) as grid,
        pytest.raises(UnsuitableApp, match="holds the ConfigRecord 'told', which coded vectors cannot carry; .*shards"),
    ):
        GradientCoding(FedAvg(), fractional_repetition(4, 1)).start(
            grid, ArrayRecord({"w": Array(np.zeros(2, np.float32))}), num_rounds=1
        )
