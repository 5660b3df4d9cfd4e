"""Which strategies can be wrapped, and how the others are refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, Ledger, fractional_repetition
from fl_gradcode.errors import IncompatibleStrategy, InvalidSetting
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, run_plain, toy_app

CODE = fractional_repetition(6, 2)


def test_a_strategy_that_overrides_start_is_refused_with_the_alternative() -> None:
    class Saving(FedAvg):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            return super().start(*args, **kwargs)

    with pytest.raises(IncompatibleStrategy, match="on_round_end="):
        GradientCoding(Saving(), CODE)
    with pytest.raises(IncompatibleStrategy, match="on_round_end="):
        GradientCoding(GradientCoding(FedAvg(), CODE), CODE)


def test_something_else_is_refused() -> None:
    with pytest.raises(IncompatibleStrategy, match="is not a flwr.serverapp.strategy.Strategy"):
        GradientCoding("FedAvg", CODE)  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="pass a GradientCode"):
        GradientCoding(FedAvg(), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", ["min_train_nodes", "min_evaluate_nodes", "min_available_nodes"])
def test_bounds_that_would_wait_for_ever_are_refused(bound: str) -> None:
    with pytest.raises(IncompatibleStrategy, match=rf"{bound}=7\) asks for 7 nodes.*k=6 shards"):
        GradientCoding(FedAvg(**{bound: 7}), CODE)  # type: ignore[arg-type]


def test_an_unknown_strategy_that_waits_for_more_nodes_is_stopped() -> None:
    class Waiting(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            while len(list(grid.get_node_ids())) < 100:
                pass
            return []

    with InProcessGrid(toy_app(), 6) as grid, pytest.raises(IncompatibleStrategy, match="keeps waiting"):
        GradientCoding(Waiting(), CODE).start(grid, initial_arrays(), num_rounds=1)


def test_contents_that_differ_between_shards_are_refused() -> None:
    class Personal(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            messages = list(super().configure_train(server_round, arrays, config, grid))
            messages[3].content = RecordDict({**messages[3].content, "extra": MetricRecord({"x": 1})})
            return messages

    with InProcessGrid(toy_app(), 6) as grid, pytest.raises(IncompatibleStrategy, match="sends other content to shard"):
        GradientCoding(Personal(), CODE).start(grid, initial_arrays(), num_rounds=1)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("the first shard twice", "sends 2 messages to shard"),
        ("two types", "of type 'train.other' to shard"),
        ("nodes of its own", "message to node 106, and sees the code's k=6 shards as its nodes"),
    ],
)
@pytest.mark.parametrize("send", ["coded", "shards"])
def test_messages_that_one_message_to_a_worker_cannot_stand_for_are_refused(
    case: str, sentence: str, send: Any
) -> None:
    """Plain Flower trains a client twice if it is asked twice, and calls the function of each message's own type."""

    class Odd(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            first, *others = super().configure_train(server_round, arrays, config, grid)
            node, content = first.metadata.dst_node_id, first.content
            if case == "two types":
                return [Message(content, dst_node_id=node, message_type="train.other"), *others]
            again = Message(content, dst_node_id=node if "twice" in case else 106, message_type="train")
            return [first, again, *others]

    strategy = GradientCoding(Odd(), CODE, send=send)
    with InProcessGrid(toy_app(), 6) as grid, pytest.raises(IncompatibleStrategy, match=sentence):
        strategy.start(grid, initial_arrays(), num_rounds=1)


def test_a_strategy_that_chooses_replies_in_a_helper_of_flower_s_needs_each_of_them() -> None:
    class Choosing(FedAvg):
        def _check_and_log_replies(self, replies: Any, is_train: bool, validate: bool = True) -> Any:
            good, bad = super()._check_and_log_replies(replies, is_train, validate)
            if is_train:
                good = [one for one in good if float(one.content.metric_records["metrics"]["loss"]) < 4]  # type: ignore[arg-type]
            return good, bad

    with pytest.raises(IncompatibleStrategy, match=r"its own _check_and_log_replies\(\).*send='shards'"):
        GradientCoding(Choosing(), CODE)
    with InProcessGrid(toy_app(), 6) as grid:
        coded = GradientCoding(Choosing(), CODE, send="shards").start(grid, initial_arrays(), num_rounds=2)
    assert relative(coded.arrays, run_plain(toy_app(), 6, Choosing(), rounds=2).arrays) < 1e-6


@pytest.mark.parametrize("send", ["coded", "shards"])
def test_a_strategy_may_change_what_it_weighs_by(send: Any) -> None:
    class Changing(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            self.weighted_by_key = "loss" if server_round % 2 else "num-examples"
            return super().configure_train(server_round, arrays, config, grid)

    strategy = GradientCoding(Changing(fraction_evaluate=0.0), CODE, send=send)
    with InProcessGrid(toy_app(), 6) as grid:
        coded = strategy.start(grid, initial_arrays(), num_rounds=2)
    plain = run_plain(toy_app(), 6, Changing(fraction_evaluate=0.0), rounds=2)
    assert relative(coded.arrays, plain.arrays) < 1e-6


def test_a_strategy_that_sends_by_itself_is_refused() -> None:
    class Dispatch(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            return grid.send_and_receive(super().configure_train(server_round, arrays, config, grid))

    with InProcessGrid(toy_app(), 6) as grid, pytest.raises(IncompatibleStrategy, match="tried to send messages"):
        GradientCoding(Dispatch(), CODE).start(grid, initial_arrays(), num_rounds=1)


def test_the_inner_strategy_sees_the_shards_as_its_nodes() -> None:
    seen: list[list[int]] = []

    class Looking(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            seen.append(list(grid.get_node_ids()))
            return super().configure_train(server_round, arrays, config, grid)

    with InProcessGrid(toy_app(), 6) as grid:
        GradientCoding(Looking(), fractional_repetition(6, 2, k=4)).start(grid, initial_arrays(), num_rounds=1)
    assert seen == [[0, 1, 2, 3]]


def test_a_metric_function_of_ones_own_is_called_on_the_decoded_record_if_it_is_said_to_suffice() -> None:
    calls: list[int] = []

    def mine(records: list[RecordDict], weight_key: str) -> MetricRecord:
        calls.append(len(records))
        return MetricRecord({"mine": 1.0})

    strategy = GradientCoding(FedAvg(train_metrics_aggr_fn=mine), CODE, sees="mean")
    with InProcessGrid(toy_app(), 6) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=2)
    assert calls == [1, 1]
    assert result.train_metrics_clientapp[1]["mine"] == 1.0


def test_evaluation_can_be_left_out_and_training_too() -> None:
    for kwargs in ({"fraction_evaluate": 0.0}, {"fraction_train": 0.0}):
        strategy = GradientCoding(FedAvg(**kwargs), CODE)  # type: ignore[arg-type]
        with InProcessGrid(toy_app(), 6) as grid:
            result = strategy.start(grid, initial_arrays(), num_rounds=1)
        (row,) = strategy.ledger.rows
        assert (row["train"] is None) == ("fraction_train" in kwargs)
        assert len(result.arrays) == 2


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"on_undecodable": "ignore"}, "must be one of skip, approximate, raise"),
        ({"node_timeout": 0.0}, "node_timeout=0.0 must be"),
        ({"ledger": "out/ledger.jsonl"}, "is a relative path.*Give an absolute path"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kwargs: Any, sentence: str) -> None:
    with pytest.raises(InvalidSetting, match=sentence):
        GradientCoding(FedAvg(), CODE, **kwargs)


def test_the_ledger_has_one_row_a_round_in_memory_and_in_the_file(tmp_path: Any) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    strategy = GradientCoding(FedAvg(), CODE, ledger=path, run="my-run")
    with InProcessGrid(toy_app(), 6) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=3)
    rows = Ledger.read(path)
    assert rows == strategy.ledger.rows
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert all(row["run"] == "my-run" and row["train"]["outcome"] == "exact" for row in rows)
    train = rows[0]["train"]
    assert train["bytes-down"] > 0 and train["bytes-up"] > 0
    assert train["coverage"] == [1.0] * 6 and train["decoding-error"] <= 1e-8 and train["kappa"] == 1.0


def test_a_readable_line_is_logged_for_each_phase(caplog: pytest.LogCaptureFixture) -> None:
    with InProcessGrid(toy_app(), 6) as grid, caplog.at_level(logging.INFO, "fl_gradcode"):
        GradientCoding(FedAvg(), CODE).start(grid, initial_arrays(), num_rounds=1)
    lines = [record.message for record in caplog.records if record.name == "fl_gradcode.runlog.ledger"]
    assert len(lines) == 2
    assert lines[0].startswith("round 1 train: exact after 0.00 s from 2 of 6 workers")


def test_on_round_end_gets_the_round_the_arrays_and_the_row() -> None:
    seen: list[tuple[int, int, int]] = []
    strategy = GradientCoding(FedAvg(), CODE, on_round_end=lambda r, a, row: seen.append((r, len(a), row["round"])))
    with InProcessGrid(toy_app(), 6) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=2)
    assert seen == [(1, 2, 1), (2, 2, 2)]


def test_a_broken_ledger_file_is_told_by_its_line(tmp_path: Any) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"round": 1}\n{"rou')
    with pytest.raises(InvalidSetting, match="Line 2 of the ledger"):
        Ledger.read(path)
    with pytest.raises(InvalidSetting, match="cannot be read: No such file"):
        Ledger.read(tmp_path / "none.jsonl")
    with pytest.raises(InvalidSetting, match="is a folder"):
        Ledger(tmp_path)


def test_messages_of_the_inner_strategy_are_never_sent() -> None:
    sent: list[Message] = []

    class Watched(InProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            sent.extend(messages)
            return super().push_messages(messages)

    with Watched(toy_app(), 6) as grid:
        GradientCoding(FedAvg(), CODE).start(grid, initial_arrays(), num_rounds=1)
        nodes = set(grid.get_node_ids())
    assert sent and all(message.metadata.dst_node_id in nodes for message in sent)
    assert all("fl-gradcode.plan" in message.content for message in sent)
