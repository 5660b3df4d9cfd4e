"""A set-up's messages as a deployed node's mod answers them, by the rules of its owner."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fl_gradcode import fractional_repetition
from fl_gradcode.enrolment import Answer, Request
from fl_gradcode.enrolment.node_state import NodeState, StateFile
from fl_gradcode.errors import FlGradcodeError
from fl_gradcode.protocol import Plan
from fl_gradcode.protocol.records import SETUP, record_of
from fl_gradcode.secagg import ManifestBody
from fl_gradcode.testing import inside_a_run
from tests.enrolment.fleet import Server, enrolled, start
from tests.secagg.rounds import ask, dealt, known_app

FRC = fractional_repetition(8, 1)
W = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ManifestBody]:
    folder = tmp_path_factory.mktemp("nodes") / "nodes"
    return folder, enrolled(folder, FRC, colluders=1)


@pytest.fixture
def server(made: tuple[Path, ManifestBody], tmp_path: Path) -> Server:
    return Server(Path(shutil.copytree(made[0], tmp_path / "nodes")), made[1])


def refused(server: Server, content: RecordDict, match: str, **how: Any) -> None:
    called: list[int] = []
    app = known_app(before=lambda shard, message, context: called.append(shard))
    with pytest.raises(FlGradcodeError, match=match) as error:
        ask(app, server.folder, W, content, **how)
    assert str(error.value).startswith("fl-gradcode/secure-refused: ") and not called


def test_a_hello_says_the_worker_its_identity_and_its_ephemeral_key_alone(server: Server) -> None:
    reply = ask(known_app(), server.folder, W, Request(server.setup, "hello").content())
    (record,) = reply.content.values()
    assert {*record} == {"json", "protocol", "version"}
    answer = json.loads(json.loads(str(record["json"]))["answer"])
    assert [name for name, value in answer.items() if value] == ["worker", "step", "hello"]
    assert answer["hello"][:2] == [W, server.body.identities[W]]
    assert Answer.find_in(reply.content).to_json() == json.dumps(answer)


def test_the_owner_s_requirements_come_before_a_hello(server: Server, tmp_path: Path) -> None:
    hello = Request(server.setup, "hello").content()
    lines = (server.folder / "allow-list").read_text().splitlines()
    (tmp_path / "short").write_text("\n".join(lines[:-1]))
    refused(server, hello, "does not protect as this node's owner requires", node_config={"secagg-colluders": 3})
    refused(server, hello, "has 7 workers, the body 8", node_config={"secagg-allow-list": str(tmp_path / "short")})
    swapped = [lines[0].replace("0 ", "1 ", 1), lines[1].replace("1 ", "0 ", 1), *lines[2:]]
    (tmp_path / "swapped").write_text("\n".join(swapped))
    refused(server, hello, "another key of worker 0", node_config={"secagg-allow-list": str(tmp_path / "swapped")})
    assert not (server.folder / f"node-{W}" / "secagg-setup.json").exists()
    allowed = {"secagg-allow-list": str(server.folder / "allow-list"), "secagg-colluders": 1}
    assert Answer.find_in(ask(known_app(), server.folder, W, hello, node_config=allowed).content).hello is not None


def test_other_versions_than_the_body_pins_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"versions": {"numpy": "0.1"}}, "pins numpy 0.1"),
        ({"environment": ["machine=abacus"]}, "pins the environment 'machine=abacus'"),
    ]
    for number, (pinned, match) in enumerate(cases):
        body = enrolled(tmp_path / str(number), FRC, **pinned)
        server = Server(tmp_path / str(number), body)
        refused(server, Request(server.setup, "hello").content(), match)


def test_the_allow_list_is_asked_for_at_each_request_too(server: Server, tmp_path: Path) -> None:
    sent: dict[int, RecordDict] = {}

    def keep(worker: int, message: Message, reply: Message) -> Message:
        if Plan.find_in(message.content) is not None:
            sent[worker] = message.content
        return reply

    start(FRC, server.folder, tamper=keep)
    worker, content = next(iter(sent.items()))
    plan = Plan.find_in(content)
    assert plan is not None
    asked = replace(plan, rows={W: next(iter(plan.rows.values()))}).add_to(Plan.remove_from(content))
    other = tmp_path / "other"
    enrolled(other, FRC)
    with pytest.raises(FlGradcodeError, match="another key of worker 0"):
        ask(known_app(), server.folder, W, asked, node_config={"secagg-allow-list": str(other / "allow-list")})
    assert worker in range(8)


def test_a_node_without_a_folder_or_with_a_dealer_s_keys_says_no_hello(server: Server, tmp_path: Path) -> None:
    hello = Request(server.setup, "hello").content()
    context = Context(1, 7, {"partition-id": W, "num-partitions": 8}, RecordDict(), {})
    with inside_a_run(), pytest.raises(FlGradcodeError, match="no secagg-dir in its node config"):
        known_app()(Message(hello, dst_node_id=7, message_type="train"), context)
    dealt(tmp_path / "dealt", FRC)
    dealer = Server(tmp_path / "dealt", server.body)
    refused(dealer, hello, "A dealer made the keys in this node's secagg-dir")
    start_of = Request(server.setup, "hello").content()
    assert {*start_of} == {"fl-gradcode.setup", "fl-gradcode.cost"}


def test_an_owner_with_an_allow_list_masks_under_no_dealer_s_keys(server: Server, tmp_path: Path) -> None:
    from tests.secagg.rounds import start as start_dealt

    dealt(tmp_path / "dealt", FRC)
    owner = {"secagg-allow-list": str(server.folder / "allow-list")}
    strategy, _, _ = start_dealt(FRC, tmp_path / "dealt", owner=owner)
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] != "exact"
    assert {"dealer made its keys" in one["reason"] for one in row["train"]["rejected"]} == {True}


@pytest.mark.parametrize(
    "change",
    [
        {"step": "sing"}, {"epoch": 0}, {"epoch": "1"}, {"run": 1}, {"run": "r" * 1001}, {"body": "x"}, {"hellos": 1},
        {"hellos": [[1, 2]]}, {"hellos": [[0, "ab", "cd", "ef"]]}, {"classes": [[0, 0, "", "", ""]]},
        {"wraps": [[0, "00"]]}, {"wraps": {"a": 1}}, {"epoch": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_message_that_is_none_is_refused(server: Server, change: dict[str, Any]) -> None:
    content = Request(server.setup, "hello").content()
    record: Any = content["fl-gradcode.setup"]
    values = {**json.loads(record["json"]), **change}
    content["fl-gradcode.setup"] = ConfigRecord({**record, "json": json.dumps(values)})
    refused(server, content, "set-up message cannot be read|epoch of a set-up|names a run by")


def test_another_partition_id_than_the_identity_s_is_refused(server: Server) -> None:
    hello = Request(server.setup, "hello").content()
    refused(server, hello, "its identity is of worker 2", node_config={"partition-id": 3})


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "x"}', '{"format": "fl-gradcode set-up 1"}'])
def test_a_damaged_state_is_said_and_nothing_is_answered(server: Server, damage: str) -> None:
    server.say_hello([W])
    path = server.folder / f"node-{W}" / "secagg-setup.json"
    path.write_text(damage)
    with pytest.raises(FlGradcodeError, match="fl-gradcode/invalid-setting: The state of set-ups .* cannot be read"):
        ask(known_app(), server.folder, W, Request(server.setup, "hello").content())


def test_an_answer_that_is_nested_too_deep_is_unreadable_and_ends_nothing() -> None:
    deep = record_of({"answer": "[" * 100_000})
    with pytest.raises(ValueError, match="unreadable answer to a set-up"):
        Answer.find_in(RecordDict({SETUP: deep}))


def test_what_a_killed_process_left_of_the_state_goes_with_the_next_one(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    draft = state.path.with_name(f"{state.path.name}.new")
    draft.write_text("a private key")
    state.write(NodeState())
    assert [*tmp_path.iterdir()] == [state.path]
