"""Bad replies never reach the model: each counts as a straggler, with its reason in the ledger."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCode, GradientCoding, fractional_repetition
from fl_gradcode.errors import RoundFailed, UnsuitableApp
from fl_gradcode.protocol.records import PROTOCOL
from fl_gradcode.testing import InProcessGrid
from tests.conftest import all_codes, flat, initial_arrays, relative, run_plain, toy_app, update_of

# The worker whose replies are spoilt: the one that is read first, so that it is read under every code.
BAD = next(worker for _, worker in sorted(InProcessGrid(ClientApp(), 6).known_workers().items()))
Tamper = Callable[[Message], Message]


def with_update(change: Callable[[Any], Any]) -> Tamper:
    def tamper(reply: Message) -> Message:
        record = reply.content["fl-gradcode.update"]
        assert isinstance(record, ArrayRecord)
        if "arrays" in record:  # evaluation replies have none
            record["arrays"] = Array(np.asarray(change(record["arrays"].numpy().copy())))
        return reply

    return tamper


def with_reply(**changes: Any) -> Tamper:
    def tamper(reply: Message) -> Message:
        record = reply.content["fl-gradcode.reply"]
        assert isinstance(record, ConfigRecord)
        record["json"] = json.dumps({**json.loads(str(record["json"])), **changes})
        return reply

    return tamper


def put(index: int, value: float) -> Callable[[Any], Any]:
    def change(x: Any) -> Any:
        x[index] = value
        return x

    return change


def as_error(reply: Message) -> Message:
    reply.__dict__["_content"] = None
    reply.__dict__["_error"] = Error(2, "Traceback\nValueError: out of disk")
    return reply


def without(name: str) -> Tamper:
    def tamper(reply: Message) -> Message:
        reply.content = RecordDict({key: value for key, value in reply.content.items() if key != name})
        return reply

    return tamper


def unreadable(reply: Message) -> Message:
    reply.content["fl-gradcode.reply"] = ConfigRecord({"json": "{", "protocol": PROTOCOL})
    return reply


# What is done to the reply; what its reason says; its kind.
CASES: dict[str, tuple[Tamper, str, str]] = {
    "NaN": (with_update(put(3, np.nan)), "not finite", "not-finite"),
    "infinity": (with_update(put(-1, -np.inf)), "not finite", "not-finite"),
    "too short": (with_update(lambda x: x[:-1]), r"shape \(10,\), expected \(11,\)", "layout"),
    "too long": (with_update(lambda x: np.append(x, x[:1])), "shape", "layout"),
    "two-dimensional": (with_update(lambda x: x.reshape(1, -1)), "shape", "layout"),
    "float64 for float32": (with_update(lambda x: x.astype(np.float64)), "float64, expected float32", "layout"),
    "whole numbers": (with_update(lambda x: x.astype(np.int64)), "int64", "layout"),
    "without vectors": (without("fl-gradcode.update"), "missing", "layout"),
    "without a reply record": (without("fl-gradcode.reply"), "is gradient_coding_mod among", "no-mod"),
    "unreadable": (unreadable, "unreadable", "unreadable"),
    "earlier round": (with_reply(round=0), "wrong round: it answers train 0", "wrong-round"),
    "other phase": (with_reply(kind="evaluate"), "wrong round", "wrong-round"),
    "other run": (with_reply(run="somebody else's"), "run \"?'?somebody", "wrong-round"),
    "unknown worker": (with_reply(worker=17), r"worker 17 is not in the code \(workers 0..5\)", "wrong-worker"),
    "other shards": (with_reply(shards=[0]), "combines shards", "wrong-shards"),
    "other shape": (with_reply(layout=[["0", "float32", [11]]]), "does not match what was sent", "layout"),
    "unknown array": (with_reply(layout=[["x", "float32", [11]]]), "does not match what was sent", "layout"),
    "no metrics": (with_reply(metrics_layout=[]), "num-examples", "layout"),
    "error reply": (as_error, "error 2: ValueError: out of disk", "error"),
}


def run(code: GradientCode, tamper: Any, rounds: int = 3, **kwargs: Any) -> tuple[Any, list[dict[str, Any]]]:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, **kwargs)
    with InProcessGrid(toy_app(), 6, tamper=tamper) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=rounds)
    return result, strategy.ledger.rows


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [1, 2], ids=["fractional", "cyclic"])
def test_counts_as_a_straggler_with_its_reason(case: str, number: int) -> None:
    import re

    change, reason, kind = CASES[case]
    expected = run_plain(toy_app(), 6, FedAvg(fraction_evaluate=0.0))
    result, rows = run(all_codes(6, 2)[number], lambda w, m, r: change(r) if w == BAD else r)
    assert relative(result.arrays, expected.arrays) < 1e-6
    rejected = [one for row in rows for one in row["train"]["rejected"]]
    assert rejected, "the bad worker was never read"
    assert all(re.search(reason, one["reason"]) for one in rejected), rejected
    assert {one["kind"] for one in rejected} == {kind}
    assert all(BAD not in row["train"]["used"] for row in rows)


def test_a_wrong_dtype_that_comes_first_does_not_shut_out_the_others() -> None:
    def lie(worker: int, message: Message, reply: Message) -> Message:
        if worker != BAD:
            return reply
        reply = with_update(lambda x: x.astype(np.float64))(reply)
        return with_reply(layout=[["0", "float64", [3, 2]], ["1", "float64", [5]]])(reply)

    expected = run_plain(toy_app(), 6, FedAvg(fraction_evaluate=0.0))
    for code in all_codes(6, 2)[1:]:
        result, rows = run(code, lie)
        assert relative(result.arrays, expected.arrays) < 1e-6
        reasons = [one["reason"] for row in rows for one in row["train"]["rejected"]]
        assert any(re.search("is float64 of shape|differs from the one on which", reason) for reason in reasons)


def test_a_bad_reply_under_an_uncoded_round_skips_it() -> None:
    result, rows = run(all_codes(6, 2)[0], lambda w, m, r: as_error(r) if w == BAD else r, rounds=2)
    assert [row["train"]["outcome"] for row in rows] == ["skipped", "skipped"]
    assert [row["train"]["ended"] for row in rows] == ["hopeless", "hopeless"]
    assert relative(result.arrays, initial_arrays()) == 0  # the last model, although nothing was aggregated
    assert result.train_metrics_clientapp[1]["fl-gradcode.decoded"] == 0


def test_raise_ends_the_run_and_keeps_the_row() -> None:
    strategy = GradientCoding(FedAvg(), all_codes(6, 2)[0], on_undecodable="raise")
    with (
        InProcessGrid(toy_app(), 6, tamper=lambda w, m, r: as_error(r) if w == BAD else r) as grid,
        pytest.raises(RoundFailed, match=r"Round 1, train: undecodable.*worker 4: error 2: ValueError: out of disk"),
    ):
        strategy.start(grid, initial_arrays(), num_rounds=2)
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "raised"
    assert "RoundFailed" in row["ended-by"]


def test_approximate_uses_what_is_there_and_says_how_far_off() -> None:
    # Workers 0, 2, 4 are one group: with all of them bad, the shards 1, 3, 5 of the other group remain.
    result, rows = run(
        fractional_repetition(6, 2),
        lambda w, m, r: as_error(r) if w % 2 == 0 else r,
        rounds=1,
        on_undecodable="approximate",
    )
    mean = sum((j + 1) * update_of(1, j, 11) for j in (1, 3, 5)) / (2 + 4 + 6)
    assert np.abs(flat(result.arrays) - (flat(initial_arrays()) + mean)).max() < 1e-6
    (row,) = rows
    assert row["train"]["outcome"] == "approximate"
    assert row["train"]["coverage"] == [0, 1, 0, 1, 0, 1]
    assert row["train"]["decoding-error"] == 1.0


def test_a_diverged_model_skips_the_round_instead_of_becoming_nan() -> None:
    result, rows = run(fractional_repetition(6, 2), lambda w, m, r: with_update(put(0, np.nan))(r), rounds=1)
    assert rows[0]["train"]["outcome"] == "skipped"
    assert np.isfinite(flat(result.arrays)).all()


def test_clients_without_the_mod_are_told_apart_from_stragglers() -> None:
    app = toy_app()
    bare = ClientApp()
    bare._registered_funcs = {}

    @bare.train()
    def train(message: Message, context: Any) -> Message:
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    with InProcessGrid(bare, 6) as grid, pytest.raises(UnsuitableApp, match="Add the mod to their app"):
        GradientCoding(FedAvg(), fractional_repetition(6, 2)).start(grid, initial_arrays(), num_rounds=1)
    assert app is not bare


def test_of_two_nodes_with_one_partition_id_one_counts_and_the_run_goes_on() -> None:
    def config(i: int) -> dict[str, Any]:
        return {"partition-id": min(i, 4), "num-partitions": 6}

    with InProcessGrid(toy_app(), 6, node_config=config) as grid:
        hide(grid)
        strategy = GradientCoding(FedAvg(), fractional_repetition(6, 2))
        strategy.start(grid, initial_arrays(), num_rounds=4)
        lacking = GradientCoding(FedAvg(), fractional_repetition(6, 0))
        with pytest.raises(RoundFailed, match=r"node \d+: it answers as worker 4, which is node"):
            lacking.start(grid, initial_arrays(), num_rounds=4)
    twins = [one for row in strategy.ledger.rows for one in row["train"]["rejected"]]
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 4
    assert {one["kind"] for one in twins} == {"duplicate-worker"} and len({one["node"] for one in twins}) == 1


def test_one_duplicate_counts_once() -> None:
    with InProcessGrid(toy_app(), 6) as grid:
        hide(grid)
        strategy = GradientCoding(FedAvg(), fractional_repetition(6, 2))
        messages = list(strategy.configure_train(1, initial_arrays(), ConfigRecord(), grid))
        replies = grid.send_and_receive(messages)
        arrays, _ = strategy.aggregate_train(1, [*replies, *replies[:2]])
        strategy.aggregate_evaluate(1, [])
    assert arrays is not None
    mean = sum((j + 1) * update_of(1, j, 11) for j in range(6)) / 21
    assert np.abs(flat(arrays) - (flat(initial_arrays()) + mean)).max() < 1e-6
    (row,) = strategy.ledger.rows
    assert [one["reason"] for one in row["train"]["rejected"]] == ["duplicate", "duplicate"]
    assert len(row["train"]["answered"]) == 6


def test_a_node_beyond_the_code_is_refused_in_its_own_words() -> None:
    def config(i: int) -> dict[str, Any]:
        return {"partition-id": i + 3, "num-partitions": 9}

    with InProcessGrid(toy_app(), 6, node_config=config) as grid:
        hide(grid)
        strategy = GradientCoding(FedAvg(), fractional_repetition(6, 2))
        strategy.start(grid, initial_arrays(), num_rounds=1)
    reasons = [one["reason"] for one in strategy.ledger.rows[0]["train"]["rejected"]]
    assert any("partition-id 6, but the code has workers 0..5" in reason for reason in reasons)


def hide(grid: InProcessGrid) -> None:
    """Make the grid as ignorant of who is who as a real engine."""
    grid.known_workers = dict  # type: ignore[method-assign]
