"""What went wrong under attack once: restarts, outages, malformed records, extreme numbers."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy

from fl_gradcode import (
    GradientCode,
    GradientCoding,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    gradient_coding_mod,
    uncoded,
)
from fl_gradcode.grid.nodes import nodes_of_a_phase
from fl_gradcode.latency import Latency, Law, lognormal
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, relative, run_plain, toy_app


class Engine(InProcessGrid):
    """Like a real engine: it does not know who is who, and nodes restart under new ids."""

    def known_workers(self) -> dict[int, int]:
        return {}

    def restart(self, worker: int) -> None:
        (old,) = [node for node, who in self._worker.items() if who == worker]
        new = old + 10**12
        self._worker[new] = self._worker.pop(old)
        context = self._contexts.pop(old)
        self._contexts[new] = Context(1, new, context.node_config, RecordDict(), context.run_config)

    def next_arrival(self, deadline: float | None) -> Any:
        while (arrival := super().next_arrival(deadline)) is not None and arrival.node not in self._worker:
            self._pending.pop(arrival.token)  # the old incarnation took its message along
        return arrival


@pytest.mark.parametrize("code", [uncoded(4), fractional_repetition(4, 1)], ids=["uncoded", "fractional"])
@pytest.mark.parametrize("gone", [(1,), (0, 2), (0, 1, 2, 3)])
def test_nodes_that_restart_under_new_ids_are_heard_again(gone: tuple[int, ...], code: GradientCode) -> None:
    plain = run_plain(toy_app(), 4, FedAvg(fraction_evaluate=0.0), rounds=6)
    engine = Engine(toy_app(), 4)
    with engine as grid:

        def restart(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
            if server_round in (2, 4):
                for worker in gone:
                    engine.restart(worker)

        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, on_round_end=restart)
        result = strategy.start(grid, initial_arrays(), num_rounds=6)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 6
    assert relative(result.arrays, plain.arrays) < 1e-6


def test_an_outage_is_waited_for_instead_of_burning_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_gradcode.grid.nodes.time.sleep", lambda seconds: None)
    looks = iter([[], [1], [1, 2, 3]])

    class Outage(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            return next(looks)

    grid = Outage(toy_app(), 4)
    assert nodes_of_a_phase(grid, 4, 1, 60.0, lambda nodes: True) == [1, 2, 3]
    assert list(looks) == []


def errors_but(*good: int) -> Any:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        return reply if worker in good else Message(Error(2, "broken"), reply_to=message)

    return tamper


@pytest.mark.parametrize(
    ("code", "good"),
    [
        (GradientCode(np.array([[0.5, 1, 0], [0, 1, -1], [0.5, 0, 1]]), 1), 1),
        (cyclic_repetition(6, 2, rng=np.random.default_rng(5)), 0),
    ],
)
def test_an_estimate_that_is_no_mean_is_not_used(code: GradientCode, good: int) -> None:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, on_undecodable="approximate")
    with InProcessGrid(toy_app(), code.n, tamper=errors_but(good)) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=1)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "skipped"
    assert relative(result.arrays, initial_arrays()) == 0


def test_an_estimate_reads_the_replica_of_a_reply_that_turned_out_bad() -> None:
    # Groups (0, 2) and (1, 3): worker 0 is broken, worker 2 is in, the others are silent.
    law = Law("", lambda seed, worker, tick: {0: 1.0, 2: 2.0}.get(worker, float("inf")))
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1), on_undecodable="approximate")
    with InProcessGrid(toy_app(), 4, tamper=errors_but(1, 2, 3)) as grid:
        strategy.start(VirtualGrid(grid, Latency(fixed=law)), initial_arrays(), num_rounds=1, timeout=9.0)
    row = strategy.ledger.rows[0]["train"]
    assert (row["outcome"], row["used"], row["coverage"]) == ("approximate", [2], [1, 0, 1, 0])


def app_with(move: float, weight: Any) -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content: Any = message.content
        new = [(a + np.float32(move)).astype(np.float32) for a in content["arrays"].to_numpy_ndarrays()]
        metrics = MetricRecord({"num-examples": weight(shard) if callable(weight) else weight})
        return Message(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=message)

    return app


def test_a_sum_that_overflows_skips_the_round_instead_of_poisoning_the_model(caplog: pytest.LogCaptureFixture) -> None:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), uncoded(4))
    with InProcessGrid(app_with(1e34, 10000), 4) as grid, caplog.at_level(logging.WARNING):
        result = strategy.start(grid, initial_arrays(), num_rounds=1)
    assert np.isfinite(flat(result.arrays)).all()
    assert "the decoded '0' is not finite in float32" in caplog.text


@pytest.mark.filterwarnings("ignore:underflow")
def test_weights_that_float32_cannot_hold_still_give_the_mean() -> None:
    with InProcessGrid(app_with(1.0, 1e-30), 4) as grid:
        result = GradientCoding(FedAvg(fraction_evaluate=0.0), uncoded(4)).start(grid, initial_arrays(), num_rounds=1)
    assert np.allclose(flat(result.arrays), flat(initial_arrays()) + 1.0)


def test_weights_may_be_whole_numbers_on_some_shards_only() -> None:
    app = app_with(1.0, lambda shard: 3 if shard % 2 else 3.0)
    for code in (uncoded(4), fractional_repetition(4, 1), cyclic_repetition(4, 1, rng=np.random.default_rng(0))):
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code)
        with InProcessGrid(app, 4) as grid:
            strategy.start(grid, initial_arrays(), num_rounds=1)
        assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


MALFORMED: dict[str, Any] = {
    "empty figures": {"figures": [[], []]},
    "infinite figures": {"figures": [[1e400, 0, 0, 0]]},
    "infinite round": {"round": float("inf")},
    "text for seconds": {"outcome": "gave-up", "seconds": ["x"]},
    "unknown outcome": {"outcome": "nonsense"},
    "number for layout": {"layout": 3},
    "unknown field": {"surprise": 1},
    "list for worker": {"worker": [1]},
    "unknown dtype": {"layout": [["0", "float12", [3, 2]], ["1", "float32", [5]]]},
    "negative shape": {"layout": [["0", "float32", [-3, -2]], ["1", "float32", [5]]]},
    "structured dtype": {"layout": [["0", "(2,,)f4", [3, 2]], ["1", "float32", [5]]]},
    "no name for the arrays": {"arrays_name": ""},
    "one name for both records": {"arrays_name": "metrics"},
    "list for a name": {"arrays_name": [], "metrics_name": []},
    "weight without entries": {"metrics_layout": [["num-examples", 0, True], ["loss", -1, False], ["pair", 2, False]]},
    "negative length": {"metrics_layout": [["num-examples", -1, True], ["loss", -7, False]]},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_record_counts_as_a_straggler(case: str) -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        if worker == 4:
            record: Any = reply.content["fl-gradcode.reply"]
            record["json"] = json.dumps({**json.loads(record["json"]), **MALFORMED[case]})
        return reply

    plain = run_plain(toy_app(), 6, FedAvg(fraction_evaluate=0.0))
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 2))
    with InProcessGrid(toy_app(), 6, tamper=tamper) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=3)
    assert relative(result.arrays, plain.arrays) < 1e-6
    assert all(4 not in row["train"]["used"] for row in strategy.ledger.rows)
    assert any(one["worker"] in (4, None) for row in strategy.ledger.rows for one in row["train"]["rejected"])


def test_the_row_tells_what_happened_even_if_the_inner_strategy_raises() -> None:
    class Broken(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            raise RuntimeError("out of memory")

    strategy = GradientCoding(Broken(), fractional_repetition(4, 1), sees="mean")
    with InProcessGrid(toy_app(), 4) as grid, pytest.raises(RuntimeError, match="out of memory"):
        strategy.start(grid, initial_arrays(), num_rounds=1)
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "exact"
    assert row["ended-by"] == "RuntimeError: out of memory"


class Silent(Strategy):
    """Averages, and tells nobody which round it is."""

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.1})})
        return [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays = next(iter(next(iter(replies)).content.array_records.values()))
        return arrays, None

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        return None

    def summary(self) -> None:
        pass


def test_schemes_meet_the_same_slow_moments_whatever_the_strategy_sends() -> None:
    seconds = []
    for strategy in (Silent(), GradientCoding(Silent(), uncoded(3), sees="mean")):
        with InProcessGrid(app_with(1.0, 1), 3) as grid:
            virtual = VirtualGrid(grid, Latency(compute=lognormal()))
            strategy.start(virtual, initial_arrays(), num_rounds=4)
            seconds.append(virtual.now())
    assert seconds[0] == pytest.approx(seconds[1])


def test_evaluation_on_one_common_test_set_is_allowed_and_mentioned_once(caplog: pytest.LogCaptureFixture) -> None:
    app = app_with(1.0, 1)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 10, "accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    strategy = GradientCoding(FedAvg(), fractional_repetition(4, 1))
    with InProcessGrid(app, 4) as grid, caplog.at_level(logging.WARNING):
        result = strategy.start(grid, initial_arrays(), num_rounds=2)
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == 0.5
    assert sum("evaluate() never read" in record.message for record in caplog.records) == 1


def test_a_combining_code_says_which_holders_disagree(caplog: pytest.LogCaptureFixture) -> None:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        record: Any = message.content["arrays"]
        arrays = ArrayRecord([a + np.float32(context.node_id % 97) for a in record.to_numpy_ndarrays()])
        return Message(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), cyclic_repetition(5, 2, rng=np.random.default_rng(0)))
    arrays = ArrayRecord([np.zeros(3, np.float32)])
    with InProcessGrid(app, 5) as grid, caplog.at_level(logging.WARNING):
        strategy.start(grid, arrays, num_rounds=1)
    assert "disagree by up to" in caplog.text and strategy.ledger.rows[0]["train"]["outcome"] == "skipped"


def test_counters_of_any_size_are_exact_to_the_wire_s_precision() -> None:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        content: Any = message.content
        new = {"n": Array(np.asarray(content["arrays"]["n"].numpy() + 100)), "w": content["arrays"]["w"]}
        metrics = MetricRecord({"num-examples": 7})
        return Message(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=message)

    arrays = ArrayRecord({"n": Array(np.array(2**40 + 1)), "w": Array(np.zeros(2, np.float32))})
    with InProcessGrid(app, 4) as grid:
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1))
        result = strategy.start(grid, arrays, num_rounds=3)
    assert int(result.arrays["n"].numpy()) == 2**40 + 301


def test_replies_are_let_go_after_their_round() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Message]] = []

    def watch(worker: int, message: Message, reply: Message) -> Message:
        alive.append(weakref.ref(reply))
        return reply

    counts: list[int] = []

    def count(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))

    # Worker 0 never answers: its debt keeps the first round in mind.
    law = Law("", lambda seed, worker, tick: 1.0 if worker else float("inf"))
    strategy = GradientCoding(FedAvg(), fractional_repetition(4, 1), on_round_end=count, verify=0)
    with InProcessGrid(toy_app(), 4, tamper=watch) as grid:
        strategy.start(VirtualGrid(grid, Latency(fixed=law)), initial_arrays(), num_rounds=4)
    assert len(alive) == 16
    assert max(counts) <= 2


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04junk", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4', (", b"\x93NUMPY\x01\x00\x04\x00(((("]
)
def test_arrays_of_junk_count_as_a_straggler(data: bytes) -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content.get("fl-gradcode.update")
        if worker == 4 and record is not None:
            record["arrays"] = Array("float32", (11,), "numpy.ndarray", data)
        return reply

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 2))
    with InProcessGrid(toy_app(), 6, tamper=tamper) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
    row = strategy.ledger.rows[0]["train"]
    assert row["outcome"] == "exact"
    assert [one["worker"] for one in row["rejected"]] == [4]


def test_deeply_nested_json_counts_as_a_straggler() -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        if worker == 4:
            reply.content["fl-gradcode.reply"] = ConfigRecord({"json": "[" * 100000})
        return reply

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 2))
    with InProcessGrid(toy_app(), 6, tamper=tamper) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


def test_figures_of_any_size_leave_a_row_in_the_file(tmp_path: Any) -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content["fl-gradcode.reply"]
        said = json.loads(record["json"])
        if worker == 1:
            said["figures"] = [[0, 1e308, 0, 0] for _ in said["figures"]]
        record["json"] = json.dumps(said)
        return reply

    code = cyclic_repetition(4, 1, rng=np.random.default_rng(0))
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, ledger=tmp_path / "ledger.jsonl")
    with InProcessGrid(toy_app(), 4, tamper=tamper) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=2)
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 2


def test_a_mean_that_its_dtype_cannot_hold_skips_the_round() -> None:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        content: Any = message.content
        new = ArrayRecord({"w": Array(content["arrays"]["w"].numpy() + np.float16(60000))})
        return Message(RecordDict({"arrays": new, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content["fl-gradcode.update"]
        record["arrays"] = Array(np.full(2, 1e8, np.float32))
        return reply

    arrays = ArrayRecord({"w": Array(np.zeros(2, np.float16))})
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), uncoded(2))
    with InProcessGrid(app, 2, tamper=tamper) as grid:
        result = strategy.start(grid, arrays, num_rounds=1)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "skipped"
    assert np.isfinite(result.arrays["w"].numpy()).all()


def test_lists_in_a_config_are_each_shard_s_own() -> None:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        int(context.node_config["partition-id"])
        content: Any = message.content
        rate = content["config"]["lrs"].pop(0)
        new = ArrayRecord([a + np.float32(rate) for a in content["arrays"].to_numpy_ndarrays()])
        return Message(RecordDict({"arrays": new, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(2, 1))
    with InProcessGrid(app, 2) as grid:
        config = ConfigRecord({"lrs": [1.0, 3.0]})
        result = strategy.start(grid, initial_arrays(), num_rounds=1, train_config=config)
    assert np.allclose(flat(result.arrays), flat(initial_arrays()) + 1.0)


def test_one_client_that_never_reads_its_data_does_not_end_a_run_that_works() -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content["fl-gradcode.reply"]
        said = json.loads(record["json"])
        if worker == 4 and said["round"] > 1:
            record["json"] = json.dumps({**said, "outcome": "fixed-data"})
        return reply

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 2))
    with InProcessGrid(toy_app(), 6, tamper=tamper) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=3)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 3


def test_a_class_instead_of_a_strategy_is_told_apart() -> None:
    with pytest.raises(TypeError, match=r"FedAvg is a class; pass an instance: FedAvg\(\)"):
        GradientCoding(FedAvg, uncoded(2))  # type: ignore[arg-type]
