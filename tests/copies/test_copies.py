"""Copies of a shard are compared: in the first rounds, late, and whenever two come; and what disagrees is told."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedMedian

from fl_gradcode import (
    GradientCoding,
    Shards,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    gradient_coding_mod,
)
from fl_gradcode.codes import GradientCode, for_assignment, reed_solomon, uncoded
from fl_gradcode.errors import InvalidSetting, RoundFailed
from fl_gradcode.latency import Latency, Law, constant, scaled
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, toy_app, update_of

CODES: dict[str, Callable[[], GradientCode]] = {
    "fractional": lambda: fractional_repetition(6, 2),
    "cyclic": lambda: cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
}
WAYS = [("coded", "fractional"), ("coded", "cyclic"), ("shards", "fractional"), ("shards", "cyclic")]
DATA = np.random.default_rng(1).standard_normal((6, 4))


def app_of(update: Callable[[Context], Any], weight: Callable[[Context], int] = lambda context: 5) -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.node_config["partition-id"]
        record: Any = message.content["arrays"]
        w = record["w"].numpy() + update(context)
        metrics = MetricRecord({"num-examples": weight(context)})
        return Message(RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics}), reply_to=message)

    return app


def start(
    app: ClientApp, code: GradientCode, *, rounds: int = 2, latency: Any = None, n: int = 6, **options: Any
) -> tuple[GradientCoding, Any]:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, **options)
    with InProcessGrid(app, n) as nodes:
        grid = nodes if latency is None else VirtualGrid(nodes, Latency(compute=latency))
        return strategy, strategy.start(grid, ArrayRecord({"w": Array(np.zeros(4))}), num_rounds=rounds)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def kept_loader() -> Callable[[Context], Any]:
    """Each node is a process, which loads its data at the first call."""
    loaded: dict[int, Any] = {}
    return lambda context: loaded.setdefault(context.node_id, DATA[int(context.node_config["partition-id"])])


def kept_counter() -> Callable[[Context], Any]:
    calls: dict[int, int] = {}

    def update(context: Context) -> Any:
        calls[context.node_id] = calls.get(context.node_id, 0) + 1
        return DATA[int(context.node_config["partition-id"])] * calls[context.node_id]

    return update


def own_generator() -> Callable[[Context], Any]:
    generator = np.random.default_rng(3)
    return lambda context: DATA[int(context.node_config["partition-id"])] + generator.random()


def data_of_the_node() -> Callable[[Context], Any]:
    """The partition is read, and the data come from a path that each node has."""
    return lambda context: DATA[int(context.node_config["partition-id"])] + DATA[context.node_id % 5]


def one_file() -> Callable[[Context], Any]:
    """A state that is named by the partition, on a disk that all nodes share."""
    files: dict[int, int] = {}

    def update(context: Context) -> Any:
        shard = int(context.node_config["partition-id"])
        files[shard] = files.get(shard, 0) + 1
        return DATA[shard] * files[shard]

    return update


@pytest.mark.parametrize("broken", [kept_loader, kept_counter, own_generator, data_of_the_node, one_file])
@pytest.mark.parametrize(("send", "code"), WAYS)
def test_what_is_kept_between_calls_is_told_in_the_first_rounds(
    send: Any, code: str, broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strategy, _ = start(app_of(broken()), CODES[code](), rounds=2, send=send)
    told = [text for text in warnings_of(caplog) if "sent different updates" in text]
    assert len(told) == 1 and "both hold shard" in told[0]
    assert max(row["train"]["replica-disagreement"] or 0 for row in strategy.ledger.rows) > 1e-5


@pytest.mark.parametrize(("send", "code"), WAYS)
def test_a_file_on_each_node_s_own_disk_is_told_though_copies_agree_in_the_first_rounds(
    send: Any, code: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Holders drift apart only when one has missed a round, and later copies may never come."""

    def momentum(context: Context) -> Any:
        shard = int(context.node_config["partition-id"])
        path = tmp_path / f"{context.node_id}-momentum-{shard}.npy"
        kept = 0.9 * np.load(path) if path.exists() else 0.0
        np.save(path, kept + DATA[shard])
        time.sleep(0.02)  # clocks of file systems are coarse
        return kept + DATA[shard]

    strategy, _ = start(app_of(momentum), CODES[code](), rounds=2, send=send)
    told = [text for text in warnings_of(caplog) if "reads and rewrites a file" in text]
    assert len(told) == 1 and "momentum" in told[0] and "own" in told[0]
    assert max(row["train"]["replica-disagreement"] or 0 for row in strategy.ledger.rows) <= 1e-5


@pytest.mark.parametrize(("send", "code"), WAYS)
def test_copies_that_agree_are_seen_in_the_first_round_and_then_not_waited_for(
    send: Any, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    strategy, _ = start(toy_like(), CODES[code](), rounds=3, send=send, latency=constant(1.0))
    first, *later = [row["train"] for row in strategy.ledger.rows]
    assert first["compared"] == [0, 1, 2, 3, 4, 5] and first["replica-disagreement"] < 1e-5
    assert all(row["seconds"]["verifying"] == 0 for row in later)
    assert warnings_of(caplog) == []


def toy_like() -> ClientApp:
    return app_of(lambda context: DATA[int(context.node_config["partition-id"])])


def test_different_data_are_told_by_the_numbers_of_examples(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(lambda context: DATA[0], weight=lambda context: 5 + context.node_id % 7)
    start(app, fractional_repetition(6, 2))
    assert any("trained on different data" in text and "examples" in text for text in warnings_of(caplog))


def test_a_state_that_differs_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def update(context: Context) -> Any:
        context.state["seen"] = MetricRecord({"by": context.node_id})
        return DATA[int(context.node_config["partition-id"])] + context.node_id % 5

    start(app_of(update), fractional_repetition(6, 2))
    assert any("keeps something in context.state" in text and "both hold" in text for text in warnings_of(caplog))


def kept_head(context: Context) -> Any:
    kept: Any = context.state.get("head")
    head = np.zeros(4) if kept is None else kept["h"].numpy()
    context.state["head"] = ArrayRecord({"h": Array(head + 1)})
    return head + DATA[int(context.node_config["partition-id"])]


@pytest.mark.parametrize(("send", "code"), WAYS)
def test_a_head_that_is_kept_is_told(send: Any, code: str, caplog: pytest.LogCaptureFixture) -> None:
    start(app_of(kept_head), CODES[code](), rounds=3, send=send, latency=constant(1.0))
    assert any("keeps something in context.state" in text for text in warnings_of(caplog))


def test_a_holder_that_missed_a_round_has_another_head(caplog: pytest.LogCaptureFixture) -> None:
    class DownInRoundOne(InProcessGrid):
        def _answer(self, message: Message) -> Message:
            config: Any = message.content["config"]
            if self._worker[message.metadata.dst_node_id] == 0 and config["server-round"] == 1:
                return Message(Error(2, "down"), reply_to=message)
            return super()._answer(message)

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 1))
    with DownInRoundOne(app_of(kept_head), 6) as grid:
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros(4))}), num_rounds=3)
    told = [text for text in warnings_of(caplog) if "both hold shard" in text]
    assert len(told) == 1 and "missed a round" in told[0]


def test_the_same_update_for_two_shards_is_told(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(lambda context: DATA[0])
    start(app, CODES["cyclic"]())
    assert any("sent the same update for shards" in text for text in warnings_of(caplog))
    caplog.clear()
    start(app, CODES["cyclic"](), allow_fixed_data=True)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(("send", "code"), WAYS)
def test_skip_leaves_the_model_as_it_is(send: Any, code: str) -> None:
    strategy, result = start(
        app_of(own_generator()), CODES[code](), send=send, on_disagreement="skip", give_up_rounds=None
    )
    assert strategy.ledger.rows[0]["train"]["outcome"] == "skipped"
    assert send == "shards" or (result.arrays["w"].numpy() == 0).all()  # one copy of each shard may be all that came


def test_raise_ends_the_run_with_shard_holders_and_rule() -> None:
    with pytest.raises(RoundFailed, match="both hold shards .* sent different updates in round 1"):
        start(app_of(own_generator()), fractional_repetition(6, 2), on_disagreement="raise")


def test_skipped_rounds_end_the_run() -> None:
    with pytest.raises(RoundFailed, match="None of the last 2 rounds"):
        start(app_of(own_generator()), fractional_repetition(6, 2), on_disagreement="skip", give_up_rounds=2, rounds=4)


# How long rounds wait for second copies

#: The groups are (0, 2, 4) and (1, 3, 5).
SLOW = scaled(constant(1.0), {2: 1.5, 4: 9.0, 3: 2.5, 5: 9.0})


def test_a_round_waits_on_for_at_most_as_long_as_it_took() -> None:
    strategy, _ = start(toy_like(), fractional_repetition(6, 2), rounds=4, latency=SLOW)
    train = [row["train"] for row in strategy.ledger.rows]
    # Three shards each take 3 s. Worker 2 of the first group has a second copy after 4.5 s; worker 3 of the other
    # after 7.5 s, too late for the 6 s that round 1 may take, and compared when it comes.
    assert train[0]["decodable-after-seconds"] == 3 and train[0]["seconds"]["waiting"] == 6
    assert train[0]["seconds"]["verifying"] == 3 and train[0]["compared"] == [0, 2, 4]
    assert next(late for row in train for late in row["late"] if late["worker"] == 3)["replica-disagreement"] == 0
    assert all(row["seconds"]["verifying"] == 0 for row in train[1:])


def test_no_round_waits_on_if_none_may() -> None:
    strategy, _ = start(toy_like(), fractional_repetition(6, 2), rounds=2, latency=SLOW, verify=0)
    assert [row["train"]["seconds"]["waiting"] for row in strategy.ledger.rows] == [3, 3]
    assert all(row["train"]["replica-disagreement"] is None for row in strategy.ledger.rows)


def test_a_run_that_could_not_compare_says_so(caplog: pytest.LogCaptureFixture) -> None:
    silent = scaled(constant(1.0), dict.fromkeys((2, 3, 4, 5), float("inf")))
    strategy, _ = start(toy_like(), fractional_repetition(6, 2), rounds=2, latency=silent)
    assert any("no second copy has come of shards 0, 1, 2, 3, 4 and 5" in text for text in warnings_of(caplog))
    assert all(row["train"]["replica-disagreement"] is None for row in strategy.ledger.rows)


def test_a_code_without_replicas_has_nothing_to_compare(caplog: pytest.LogCaptureFixture) -> None:
    strategy, _ = start(toy_like(), uncoded(6))
    assert warnings_of(caplog) == []
    assert all(row["train"]["replica-disagreement"] is None for row in strategy.ledger.rows)


@pytest.mark.parametrize("code", ["fractional", "cyclic"])
def test_a_late_reply_that_differs_is_told_and_in_the_ledger(code: str, caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(lambda context: DATA[int(context.node_config["partition-id"])] * (2 if context.node_id == 3 else 1))
    latency = scaled(
        constant(1.0), {2: 9.0, 4: 9.0, 3: 2.5, 5: 9.0} if code == "fractional" else {3: 2.5, 4: float("inf")}
    )

    class Numbered(InProcessGrid):
        def __init__(self) -> None:
            super().__init__(app, 6)
            contexts = {self._worker[node]: context for node, context in self._contexts.items()}
            self._worker = {i: i for i in range(6)}
            for i, context in contexts.items():
                context.node_id = i
            self._contexts = contexts

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODES[code]())
    with Numbered() as nodes:
        grid = VirtualGrid(nodes, Latency(compute=latency))
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros(4))}), num_rounds=4)
    late = [one for row in strategy.ledger.rows for one in row["train"]["late"] if one["worker"] == 3]
    assert late and late[0]["replica-disagreement"] > 0.1
    assert any("has used one of the two" in text for text in warnings_of(caplog))


def test_copies_of_a_worker_that_a_late_reply_blames_count_no_more_in_the_round_under_way() -> None:
    """Two late copies of round 1 outvote worker 0, which has answered round 2 already: others train its shards."""

    def seconds(seed: int, worker: int, tick: int) -> float:
        first = {0: 2.0, 2: 16.0, 4: 16.5}  # 2 and 4 are later than round 1 waits for second copies
        return (first if tick <= 2 else {0: 0.5, 2: 1.0, 4: 1.0}).get(worker, 7.0)

    def lies(worker: int, message: Message, answer: Message) -> Message:
        if worker == 0:
            record: Any = answer.content["arrays"]
            answer.content["arrays"] = ArrayRecord({name: Array(one.numpy() + 1) for name, one in record.items()})
        return answer

    code, after = fractional_repetition(6, 2), [flat(initial_arrays())]
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, send=Shards(patience=0.0))
    with InProcessGrid(toy_app(), 6, tamper=lies) as nodes:
        grid = VirtualGrid(nodes, Latency(compute=Law("late blame", seconds)))
        strategy.start(
            grid,
            initial_arrays(),
            num_rounds=2,
            evaluate_fn=lambda server_round, arrays: after.append(flat(arrays)) if server_round else None,
        )
    first, second = (row["train"] for row in strategy.ledger.rows)
    assert 0 in first["used"] and first["seconds"]["waiting"] < 16.0  # nothing was known yet
    began = {i: [job.began for job in grid.jobs if job.worker == i and job.round == 2] for i in (0, 2, 4)}
    assert len(began[0]) == 3  # worker 0 has answered for all shards of its group
    assert began[2][0] == began[4][0] == pytest.approx(16.5)  # worker 2 had nothing to do before
    assert {one["worker"] for one in second["late"]} >= {2, 4}
    assert second["outcome"] == "exact" and 0 not in second["used"]
    mean = sum((j + 1) * update_of(2, j, 11) for j in range(6)) / 21
    assert np.allclose(after[2] - after[1], mean, rtol=0, atol=2e-5)


# What is no disagreement, and what must not go wrong with one


def test_one_reply_that_cannot_be_sketched_costs_itself_and_nothing_else() -> None:
    def tamper(worker: int, message: Message, answer: Message) -> Message:
        if worker == 2 and "arrays" in answer.content:
            answer.content["arrays"] = ArrayRecord({"w": Array("float64", (4,), "numpy.ndarray", b"\x93NUMPY\x01\x00")})
        return answer

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODES["fractional"](), send="shards")
    with InProcessGrid(toy_like(), 6, tamper=tamper) as grid:
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros(4))}), num_rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact", "exact"]
    assert {one["kind"] for one in strategy.ledger.rows[0]["train"]["rejected"]} == {"layout"}


@pytest.mark.parametrize("dtype", ["M8[D]", "c16", "S3"])
def test_an_array_of_any_dtype_ends_no_run(dtype: str) -> None:
    def tamper(worker: int, message: Message, answer: Message) -> Message:
        if worker == 2 and "arrays" in answer.content:
            answer.content["arrays"] = ArrayRecord({"w": Array(np.zeros(4, dtype))})
        return answer

    strategy = GradientCoding(FedMedian(fraction_evaluate=0.0), CODES["fractional"](), send="shards")
    with InProcessGrid(toy_like(), 6, tamper=tamper) as grid, contextlib.suppress(Exception):
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros(4))}), num_rounds=1)
    assert strategy.ledger.rows or strategy._run is not None  # whatever the median makes of it, comparing went on


def test_a_small_update_of_a_large_model_is_compared_and_not_the_model(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(lambda context: np.random.default_rng(context.node_id).standard_normal(4) * 1e-4)
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODES["fractional"](), send="shards")
    with InProcessGrid(app, 6) as grid:
        strategy.start(grid, ArrayRecord({"w": Array(np.full(4, 1e6))}), num_rounds=1)
    assert strategy.ledger.rows[0]["train"]["replica-disagreement"] > 0.1
    told = warnings_of(caplog)
    assert any("both hold" in text for text in told) and not any("no second copy" in text for text in told)


@pytest.mark.parametrize(("send", "code"), WAYS)
def test_training_that_changes_nothing_is_no_kept_data(send: Any, code: str, caplog: pytest.LogCaptureFixture) -> None:
    start(app_of(lambda context: np.zeros(4)), CODES[code](), send=send)
    assert warnings_of(caplog) == []


def test_shards_of_several_holders_are_compared_beside_shards_of_one(caplog: pytest.LogCaptureFixture) -> None:
    code = for_assignment([[0, 1], [0, 1], [0, 1, 2]], s=0)
    strategy, _ = start(app_of(own_generator()), code, n=3)
    assert strategy.ledger.rows[0]["train"]["replica-disagreement"] > 1e-5
    caplog.clear()
    start(toy_like(), code, n=3)
    assert warnings_of(caplog) == []  # nobody waits for a second copy of shard 2


def test_evaluations_are_not_compared_but_over_a_field_their_copies_must_agree(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = iter(range(10_000))

    def with_metrics(value: Callable[[], float]) -> ClientApp:
        app = toy_like()

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            context.node_config["partition-id"]
            metrics = MetricRecord({"num-examples": 10, "accuracy": 0.5, "time": value()})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        return app

    for app, outcome in ((with_metrics(lambda: 1.0), "exact"), (with_metrics(lambda: float(next(calls))), "skipped")):
        strategy = GradientCoding(FedAvg(), reed_solomon(6, 2), on_disagreement="raise")
        with InProcessGrid(app, 6) as grid:
            strategy.start(grid, ArrayRecord({"w": Array(np.zeros(4, np.float32))}), num_rounds=1)
        assert strategy.ledger.rows[0]["evaluate"]["outcome"] == outcome
    assert not any("same update" in text or "different updates" in text for text in warnings_of(caplog))


def test_a_resumed_run_does_not_verify_anew(tmp_path: Path) -> None:
    for rounds in range(1, 6):
        strategy = GradientCoding(
            FedAvg(fraction_evaluate=0.0),
            fractional_repetition(6, 2),
            checkpoint=tmp_path / "run.ckpt",
            ledger=tmp_path / "ledger.jsonl",
            run="r",
        )
        with InProcessGrid(toy_like(), 6) as nodes:
            grid = VirtualGrid(nodes, Latency(compute=SLOW))
            strategy.start(grid, ArrayRecord({"w": Array(np.zeros(4))}), num_rounds=rounds)
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert [row["train"]["seconds"]["verifying"] > 0 for row in rows][3:] == [False, False]


def test_skipping_does_not_wait_for_ever_for_holders_that_are_gone() -> None:
    gone = Law("", lambda seed, worker, tick: 1.0 if worker in (0, 1) or tick < 4 else float("inf"))
    app = app_of(lambda context: DATA[int(context.node_config["partition-id"])] * (1 + context.node_id % 1009))
    strategy, _ = start(
        app, fractional_repetition(6, 2), rounds=8, latency=gone, on_disagreement="skip", give_up_rounds=None
    )
    assert strategy.ledger.rows[0]["train"]["outcome"] == "skipped"
    assert sum(row["train"]["seconds"]["verifying"] > 0 for row in strategy.ledger.rows) <= 4


# Clients' own figures


def test_figures_that_do_not_add_up_are_rejected_and_the_rest_decodes() -> None:
    def tamper(worker: int, message: Message, answer: Message) -> Message:
        record = answer.content.config_records.get("fl-gradcode.reply")
        if worker == 2 and record is not None:
            said = json.loads(str(record["json"]))
            said["figures"] = [[9.0] * len(one) for one in said["figures"]]
            record["json"] = json.dumps(said)
        return answer

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODES["cyclic"]())
    with InProcessGrid(toy_app(), 6, tamper=tamper) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=2)
    for row in strategy.ledger.rows:
        assert row["train"]["outcome"] == "exact" and row["train"]["replica-disagreement"] < 1e-5
    assert [one["kind"] for one in strategy.ledger.rows[0]["train"]["rejected"]] == ["wrong-figures"]


@pytest.mark.parametrize("setting", [{"verify": -1}, {"verify": True}, {"on_disagreement": "ignore"}])
def test_settings_that_cannot_be(setting: Any) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(setting))):
        GradientCoding(FedAvg(), uncoded(2), **setting)


def test_a_late_reply_in_another_worker_s_name_is_not_compared() -> None:
    app, code = toy_like(), fractional_repetition(3, 2)
    kept: dict[int, Message] = {}

    def keep(worker: int, message: Message, reply: Message) -> Message:
        kept[worker] = reply
        return reply

    with InProcessGrid(app, 3, tamper=keep) as grid:
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code)
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros(4))}), num_rounds=1)
        run: Any = strategy._run
        comparisons = run._comparisons
        assert comparisons.late("train 1", kept[2], 1) is None and comparisons.late("train 1", kept[2], None) is None
