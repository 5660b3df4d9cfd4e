"""A node of another version is refused with a sentence that says what to install where."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import Discovered, GradientCoding, gradient_coding_mod, uncoded
from fl_gradcode._versions import library_version
from fl_gradcode.errors import UnsuitableApp, VersionMismatch
from fl_gradcode.protocol.records import PROTOCOL, read_json, record_of
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app

_Call = Callable[[Message, Context], Message]


def other_version(message: Message, record: str, protocol: int, version: str = "9.9") -> None:
    found: Any = message.content[record] if message.has_content() else None
    if found is not None:
        found["protocol"], found["version"] = protocol, version


def newer_server(message: Message, context: Context, call_next: _Call) -> Message:
    """What this node gets is of a later version."""
    if context.node_config["partition-id"] == 1:
        name = "fl-gradcode.probe" if "fl-gradcode.probe" in message.content else "fl-gradcode.plan"
        other_version(message, name, PROTOCOL + 1)
    return call_next(message, context)


def app_with(mod: Any) -> ClientApp:
    """An app whose coding mod is handed what another function makes of the messages."""

    def both(message: Message, context: Context, call_next: _Call) -> Message:
        return mod(message, context, lambda *given: gradient_coding_mod(*given, call_next))  # type: ignore[call-arg, no-any-return]

    return toy_app([both])


def ledger_of(code: Any, app: ClientApp, **kwargs: Any) -> list[Any]:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code)
    config = lambda i: {"partition-id": i, "shards": "0,1,2,3"}  # noqa: E731
    with InProcessGrid(app, 4, node_config=config, **kwargs) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=2)
    return strategy.ledger.rows


def test_a_node_that_is_older_than_the_server_says_so() -> None:
    rows = ledger_of(uncoded(4), app_with(newer_server))
    (reason,) = {one["reason"] for row in rows for one in row["train"]["rejected"]}
    assert f"VersionMismatch: Worker 1: The node has fl-gradcode {library_version()} (protocol {PROTOCOL})" in reason
    assert "and the server 9.9" in reason
    assert "Install the same one on the node (pip install 'fl-gradcode==9.9') and start its SuperNode again." in reason


def test_a_reply_of_another_version_does_not_count() -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        if worker == 3:
            other_version(reply, "fl-gradcode.reply", 1, "0.0.1")
        return reply

    rows = ledger_of(uncoded(4), toy_app(), tamper=tamper)
    (reason,) = {one["reason"] for row in rows for one in row["train"]["rejected"]}
    assert "The node has fl-gradcode 0.0.1 (protocol 1)" in reason and "on the node" in reason
    assert all(3 not in row["train"]["used"] for row in rows)


def test_if_no_node_understands_the_server_the_run_ends_and_says_what_to_do() -> None:
    def newer(message: Message, context: Context, call_next: _Call) -> Message:
        other_version(message, "fl-gradcode.plan", PROTOCOL + 1)
        return call_next(message, context)

    with pytest.raises(UnsuitableApp, match="No client can take part: error 2: .*Install the same one on the node"):
        ledger_of(uncoded(4), app_with(newer))


def test_a_node_that_is_asked_what_it_holds_says_that_it_is_older() -> None:
    rows = ledger_of(Discovered(k=4, s=1), app_with(newer_server))
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * 2
    assert rows[0]["train"]["workers"] == 3


def test_a_record_without_a_protocol_is_of_the_first() -> None:
    with pytest.raises(VersionMismatch, match=r"The node has fl-gradcode of an older version \(protocol 1\)"):
        read_json(ConfigRecord({"json": "{}"}), "node")
    assert read_json(record_of({"a": 1}), "node") == '{"a": 1}'


@pytest.mark.parametrize("change", [{"json": None}, {"worker": -1}, {"worker": 10**12}, {"worker": 10_000}])
def test_a_reply_that_makes_no_sense_is_told_and_ends_nothing(change: dict[str, Any]) -> None:
    def spoil(worker: int, message: Message, reply: Message) -> Message:
        if worker == 3:
            record: Any = reply.content["fl-gradcode.reply"]
            if "json" in change:
                del record["json"]
            else:
                record["json"] = json.dumps({**json.loads(record["json"]), **change})
        return reply

    rows = ledger_of(Discovered(4, s=1), toy_app([gradient_coding_mod]), tamper=spoil)
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * 2


@pytest.mark.parametrize("number", [-1, 10_000])
def test_a_node_with_a_number_that_no_worker_has_says_so(number: int) -> None:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), uncoded(2))
    config = lambda i: {"partition-id": number if i else 0}  # noqa: E731
    with InProcessGrid(toy_app([gradient_coding_mod]), 2, node_config=config) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
    (one,) = strategy.ledger.rows[0]["train"]["rejected"]
    assert f"partition-id is {number}; workers have numbers from 0 to 9999" in one["reason"]
