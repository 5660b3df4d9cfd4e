"""A set-up step by step: what honest nodes end with, and what each node refuses of a server that does as it likes."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_gradcode import fractional_repetition
from fl_gradcode._files import lock
from fl_gradcode.codes import reed_solomon
from fl_gradcode.enrolment import ClassKey, EnrolledNode, Hello, Request, Setup, agree, agreement, node, read_identity
from fl_gradcode.enrolment.node_state import StateFile, name_of_run
from fl_gradcode.errors import FlGradcodeError, InvalidSetting, SecureRefused
from fl_gradcode.secagg import ManifestBody, make_body
from tests.enrolment.fleet import Server, enrolled, manifest_of
from tests.enrolment.second import Reading, ephemeral_of

FRC = fractional_repetition(8, 1)  # classes 0..3, class c is held by workers c and c + 4
ALL = range(8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ManifestBody]:
    folder = tmp_path_factory.mktemp("nodes") / "nodes"
    return folder, enrolled(folder, FRC)


@pytest.fixture
def folder(made: tuple[Path, ManifestBody], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "nodes"))


@pytest.fixture
def server(folder: Path, made: tuple[Path, ManifestBody]) -> Server:
    return Server(folder, made[1])


def state_of(folder: Path, worker: int) -> dict[str, Any]:
    path = folder / f"node-{worker}" / "secagg-setup.json"
    return json.loads(path.read_text()) if path.exists() else {}


def refused(server: Server, worker: int, request: Request, match: str) -> None:
    """The node answers with one sentence, and keeps what it had."""
    before = state_of(server.folder, worker)
    with pytest.raises(SecureRefused, match=match) as error:
        server.ask(worker, request)
    assert "\n" not in str(error.value)
    assert state_of(server.folder, worker) == before


def refuses_a_stranger(server: Server, strangers: Path) -> None:
    """Everybody says hello, and worker 1 notices that another node has taken worker 4's place."""
    enrolled(strangers, FRC, first_use=True)
    server.say_hello(ALL)
    forged = Hello.signed(server.setup, read_identity(strangers / "node-4"), bytes(31) + b"\x09")
    shown = tuple(forged if hello.worker == 4 else hello for hello in server.shown)
    refused(server, 1, Request(server.setup, "lead", shown), "Worker 4 has another identity than in the first set-up")


def to_confirm(server: Server, workers: Any = ALL) -> Server:
    server.say_hello(workers)
    server.lead()
    return server


# ---- what honest nodes end with ----


@pytest.mark.parametrize("code", [FRC, reed_solomon(6, 2), reed_solomon(6, 1, m=2)], ids=str)
def test_all_nodes_have_one_manifest_and_the_seeds_of_their_classes(tmp_path: Path, code: Any) -> None:
    body = enrolled(tmp_path / "nodes", code)
    Server(tmp_path / "nodes", body).run()
    found: dict[int, set[bytes]] = defaultdict(set)
    manifests = set()
    for worker in range(code.n):
        manifest, seeds = EnrolledNode(tmp_path / "nodes" / f"node-{worker}", worker, None).keys_of("run-1")
        manifests.add(manifest.digest)
        assert {*seeds} == {*body.classes.supports[worker]}
        for c, seed in seeds.items():
            found[c].add(seed)
    assert len(manifests) == 1 and {*found} == {*range(len(body.classes))}
    assert all(len(one) == 1 for one in found.values()) and len(
        {seed for one in found.values() for seed in one}
    ) == 4 + (2 if code.n == 6 else 0)


def test_a_second_reading_of_the_messages_agrees(server: Server) -> None:
    to_confirm(server)
    hellos, classes = [one.to_list() for one in server.shown], [one.to_list() for one in server.keys]
    reading = Reading("run-1", 1, server.body.text, hellos, classes)
    reading.verify()
    for worker in range(4, 8):
        ephemeral = ephemeral_of(server.folder / f"node-{worker}")
        seed = reading.opened(worker, ephemeral, worker - 4, server.boxes[worker][worker - 4])
        assert reading.public_of(worker - 4, seed) == server.keys[worker - 4].public
    answer = server.ask(5, server.confirm_request(5)).confirmation
    assert answer is not None and answer.manifest == reading.manifest() == manifest_of(server.folder, 5).digest.hex()
    reading.verify_confirmation(*answer.to_list())


def test_the_ephemeral_key_is_erased_once_the_keys_are_there(server: Server) -> None:
    to_confirm(server)
    ephemeral = ephemeral_of(server.folder / "node-5").hex()
    server.confirm(5)
    text = (server.folder / "node-5" / "secagg-setup.json").read_text()
    assert ephemeral not in text and json.loads(text)["pending"] is None


def test_a_new_epoch_erases_the_keys_of_the_one_before(server: Server) -> None:
    server.run()
    seeds = [state_of(server.folder, worker)["sealed"]["seeds"] for worker in ALL]
    Server(server.folder, server.body, epoch=2).run()
    for worker in ALL:
        text = json.dumps(state_of(server.folder, worker))
        assert not any(seed in text for kept in seeds for seed in kept.values())


def test_only_the_owner_can_read_identity_and_keys(server: Server) -> None:
    server.run()
    for name in ("identity.json", "secagg-setup.json", "secagg-body-digest"):
        path = server.folder / "node-3" / name
        assert path.stat().st_mode & 0o077 == 0
        path.chmod(0o644)
        with pytest.raises(InvalidSetting, match="accessible to other users"):
            server.node(3).keys_of("run-1")
        path.chmod(0o600)


def test_a_killed_node_answers_each_step_with_the_same_bytes(server: Server) -> None:
    """Each `ask` of these tests reads all from disk, as a new process does."""
    to_confirm(server)
    assert server.ask(2, Request(server.setup, "hello")).hello == server.hellos[2]
    assert server.ask(2, server.lead_request()).classes == (server.classes[2],)
    first = server.ask(2, server.confirm_request(2))
    assert server.ask(2, server.confirm_request(2)) == first
    again = server.ask(2, Request(server.setup, "hello"))  # and after the end, too
    assert (again.hello, again.confirmation) == (server.hellos[2], first.confirmation)


def test_with_a_worker_missing_the_next_holder_leads(server: Server) -> None:
    server.run([1, 2, 3, 4, 5, 6, 7])
    assert server.keys[0].leader == 4


# ---- what a node refuses ----


def test_a_step_out_of_order_is_refused(server: Server, tmp_path: Path) -> None:
    other = Server(Path(shutil.copytree(server.folder, tmp_path / "other")), server.body)
    to_confirm(other)
    refused(server, 1, other.lead_request(), "said no hello")
    refused(server, 5, other.confirm_request(5), "said no hello")
    server.say_hello(ALL)
    refused(server, 1, replace(other.confirm_request(1), hellos=server.shown), "not one that worker 0 made")


def test_a_leader_that_was_not_asked_to_draw_confirms_nothing(server: Server) -> None:
    server.say_hello(ALL)
    server.lead([0, 1, 2])
    forged = replace(server.keys[2], number=3, leader=3)
    refused(server, 3, replace(server.confirm_request(3), classes=(*server.keys, forged)), "class 3 is not one")


def test_another_body_is_refused(server: Server) -> None:
    """The server changes the clipping bound, the colluders, or who is on the allow-list."""
    keys = list(server.body.identities)
    for settings_ in ({"bound": 1.0}, {"colluders": 1}, {"identities": [keys[1], keys[0], *keys[2:]]}):
        named: dict[str, Any] = {
            "arrays": [("0", "float32", (3, 2)), ("1", "float32", (5,))], "metrics": [("loss", -1), ("pair", 2)],
            "bound": 4.0, "largest_weight": 16.0, "colluders": 0, "identities": keys, **settings_,
        }  # fmt: skip
        other = Server(server.folder, make_body(FRC, **named))
        assert other.setup.body != server.setup.body
        refused(other, 1, Request(other.setup, "hello"), "another body than this node's owner agreed to")


def test_an_old_epoch_is_refused(server: Server) -> None:
    first = to_confirm(server)
    second = Server(server.folder, server.body, epoch=2)
    second.say_hello(ALL)
    refused(first, 1, Request(first.setup, "hello"), "Epoch 1 of this run is over: .* in epoch 2")
    refused(first, 1, first.lead_request(), "not in epoch 1")
    refused(first, 5, first.confirm_request(5), "not in epoch 1")
    for epoch in (0, -1, 1.0, "1", True, 2**31):
        with pytest.raises(SecureRefused, match="epoch of a set-up is a whole number"):
            Setup("run-1", epoch, first.setup.body)  # type: ignore[arg-type]


@pytest.mark.parametrize(("run", "epoch"), [("run-1", 2), ("run-2", 1)])
def test_a_hello_of_another_epoch_or_run_is_refused(server: Server, run: str, epoch: int) -> None:
    old = to_confirm(server)
    new = Server(server.folder, server.body, run, epoch)
    new.say_hello(ALL)
    for worker in (0, 6):
        mixed = tuple(old.hellos[i] if i == worker else hello for i, hello in new.hellos.items())
        match = f"hello of worker {worker} is not its own"
        refused(new, 1, Request(new.setup, "lead", mixed), match)
        refused(new, 5, Request(new.setup, "confirm", mixed), match)


def test_a_hello_that_the_server_made_is_refused(server: Server, tmp_path: Path) -> None:
    server.say_hello(ALL)
    ours = ("00" * 31 + "09", "ff" * 32)
    theirs = server.hellos[4]
    stranger = Server(server.folder, enrolled(tmp_path / "strangers", FRC))
    key = read_identity(stranger.folder.parent / "strangers" / "node-4")
    signed = Hello.signed(server.setup, key, bytes.fromhex(ours[0]))
    for forged, match in (
        (replace(theirs, ephemeral=ours[0]), "worker 4 is not its own"),
        (replace(server.hellos[1], worker=4), "other identity|another identity|one identity"),
        (replace(server.hellos[1], worker=4, identity=theirs.identity), "worker 4 is not its own"),
        (signed, "another identity than the allow-list"),
        (replace(signed, identity=theirs.identity), "worker 4 is not its own"),
    ):
        shown = tuple(forged if hello.worker == 4 else hello for hello in server.shown)
        refused(server, 0, Request(server.setup, "lead", shown), match)
        refused(server, 5, Request(server.setup, "confirm", shown), match)


def test_a_node_s_own_hello_cannot_be_replaced_or_left_out(server: Server) -> None:
    server.say_hello(ALL)
    without = tuple(hello for hello in server.shown if hello.worker != 1)
    refused(server, 1, Request(server.setup, "lead", without), "lack this node's own")
    other = Hello.signed(server.setup, read_identity(server.folder / "node-1"), bytes(31) + b"\x09")
    shown = tuple(other if hello.worker == 1 else hello for hello in server.shown)
    refused(server, 1, Request(server.setup, "lead", shown), "lack this node's own")


def test_a_server_that_leaves_workers_out_is_refused(server: Server) -> None:
    server.say_hello(ALL)
    by = server.hellos
    refused(server, 1, Request(server.setup, "lead", tuple(by[i] for i in (1, 2, 3, 4, 5, 6))), "at least n - s = 7")
    refused(server, 1, Request(server.setup, "lead", (*server.shown, server.shown[-1])), "different workers")
    refused(server, 1, Request(server.setup, "lead", server.shown[::-1]), "ascending order")
    refused(server, 1, Request(server.setup, "lead"), "too few|lack")


def test_a_class_without_any_holder_is_refused(tmp_path: Path) -> None:
    body = enrolled(tmp_path / "nodes", fractional_repetition(8, 3), min_classes=2)  # 2 classes of 4 holders
    server = Server(tmp_path / "nodes", body)
    server.say_hello([0, 2, 4, 6, 1])
    server.hellos.pop(1)
    refused(server, 0, server.lead_request(), "too few")


def test_the_second_message_with_other_hellos_is_refused(server: Server) -> None:
    """Two seeds under the same ephemeral keys would be two messages under one key."""
    server.say_hello(ALL)
    answer = server.ask(1, server.lead_request())
    fewer = Request(server.setup, "lead", tuple(hello for hello in server.shown if hello.worker != 7))
    refused(server, 1, fewer, "shown other hellos .* before")
    assert server.ask(1, server.lead_request()) == answer
    refused(server, 1, replace(server.confirm_request(1), hellos=fewer.hellos), "shown other hellos .* before")


def test_a_worker_that_leads_nothing_wraps_nothing(server: Server) -> None:
    server.say_hello(ALL)
    refused(server, 5, server.lead_request(), "this node leads none")


def test_a_late_lowest_numbered_leader_changes_nothing_in_its_epoch(server: Server) -> None:
    """Worker 0 comes when the classes have their keys: nobody takes its hello, or a key of its own, for this epoch."""
    to_confirm(server, range(1, 8))
    late = Server(server.folder, server.body)
    late.hellos, late.classes = {**server.hellos}, {**server.classes}
    late.say_hello([0])
    refused(late, 1, late.lead_request(), "shown other hellos")
    alone = late.ask(0, late.lead_request())  # worker 0 leads what it is shown, and nobody else follows
    classes = (*alone.classes, *server.keys[1:])
    boxes = {0: alone.wraps[0, 4]}
    refused(late, 4, Request(late.setup, "confirm", late.shown, classes, boxes), "shown other hellos")
    refused(late, 5, Request(late.setup, "confirm", late.shown, classes, late.boxes.get(5, {})), "and these hellos")
    refused(late, 5, Request(late.setup, "confirm", server.shown, classes, server.boxes[5]), "worker 4 leads it")
    assert len({server.confirm(worker) for worker in range(1, 8)}) == 1
    before = manifest_of(server.folder, 4).digest
    Server(server.folder, server.body, epoch=2).run()  # the next epoch has it
    assert manifest_of(server.folder, 4).digest == manifest_of(server.folder, 0).digest != before


def test_two_groups_that_are_shown_different_hellos_never_share_keys(server: Server) -> None:
    server.say_hello(ALL)
    one, two = server.shown[1:], server.shown[:-1]  # without worker 0, and without worker 7
    keys = {}
    for worker, shown in ((1, one), (2, one), (4, one), (0, two), (3, two)):
        for key in server.ask(worker, Request(server.setup, "lead", shown)).classes:
            keys[worker] = key
    for shown, leaders in ((one, (4, 1, 2, 3)), (two, (0, 1, 2, 3))):
        request = Request(server.setup, "confirm", shown, tuple(keys[worker] for worker in leaders))
        refused(server, 5, request, "made for epoch 1 .* and these hellos")


def test_a_class_key_that_is_not_its_leader_s_is_refused(server: Server) -> None:
    old = to_confirm(server)
    new = to_confirm(Server(server.folder, server.body, epoch=2))
    for number, key in enumerate(new.keys):
        asked = 5 if number != 1 else 6
        for forged, match in (
            (old.keys[number], "made for epoch 2"),
            (replace(key, public=new.keys[number - 1].public), "made for epoch 2"),
            (replace(key, commitment="00" * 32), "made for epoch 2"),
            (replace(key, leader=number + 4), f"worker {number} leads it"),
            (_signed_by(new, number + 4, number), f"worker {number} leads it"),
            (replace(_signed_by(new, number + 4, number), leader=number), "made for epoch 2"),
        ):
            classes = tuple(forged if one.number == number else one for one in new.keys)
            refused(new, asked, replace(new.confirm_request(asked), classes=classes), match)
        refused(new, asked, replace(new.confirm_request(asked), classes=new.keys[:number]), "one key of each")
    refused(new, 5, replace(new.confirm_request(5), classes=new.keys[::-1]), "one key of each")


def _signed_by(server: Server, worker: int, number: int) -> ClassKey:
    """A class key that some worker has signed, as one that colludes with the server would."""
    from fl_gradcode.enrolment.statements import digest_of

    key, identity = server.keys[number], read_identity(server.folder / f"node-{worker}")
    public, commitment = bytes.fromhex(key.public), bytes.fromhex(key.commitment)
    return ClassKey.signed(server.setup, digest_of(server.shown), identity, number, public, commitment)


def test_a_wrap_that_is_not_the_leader_s_for_this_node_is_refused(server: Server) -> None:
    old = to_confirm(server)
    new = to_confirm(Server(server.folder, server.body, epoch=2))
    box = new.boxes[5][1]
    flipped = bytes([box[0] ^ 1, *box[1:]])
    for forged in (old.boxes[5][1], new.boxes[6][2], flipped, bytes(48)):
        refused(new, 5, replace(new.confirm_request(5), wraps={1: forged}), "not wrapped for this node in this epoch")
    refused(new, 5, replace(new.confirm_request(5), wraps={}), "has no seed of class 1 for worker 5")
    refused(new, 5, replace(new.confirm_request(5), wraps={0: box}), "has no seed of class 1 for worker 5")


def test_a_leader_that_colludes_harms_nobody_but_its_class(server: Server) -> None:
    """It may wrap another seed, or publish a key of small order: the holders refuse."""
    to_confirm(server)
    from fl_gradcode.enrolment.statements import digest_of
    from fl_gradcode.enrolment.wraps import wrap

    identity, digest = read_identity(server.folder / "node-1"), digest_of(server.shown)
    commitment = bytes.fromhex(server.keys[1].commitment)
    ephemeral = ephemeral_of(server.folder / "node-1")
    for public in (bytes(32), bytes.fromhex(server.keys[1].public), bytes.fromhex(server.keys[0].public)):
        key = ClassKey.signed(server.setup, digest, identity, 1, public, commitment)
        classes = tuple(key if one.number == 1 else one for one in server.keys)
        label = (*server.setup.label, digest, 1, 1, 5, public)
        box = wrap(b"s" * 32, ephemeral, bytes.fromhex(server.hellos[5].ephemeral), *label)
        request = replace(server.confirm_request(5), classes=classes, wraps={1: box})
        refused(server, 5, request, "another public key of class 1")
    key = ClassKey.signed(server.setup, digest, identity, 1, bytes(32), commitment)
    classes = tuple(key if one.number == 1 else one for one in server.keys)
    for worker in (4, 6):  # neighbours of class 1 in the graph
        refused(server, worker, replace(server.confirm_request(worker), classes=classes), "gives no secret")


def test_other_keys_after_the_confirmation_are_refused(server: Server) -> None:
    to_confirm(server)
    server.confirm(5)
    refused(server, 5, replace(server.confirm_request(5), wraps={}), "confirmed other keys .* before")
    refused(server, 5, replace(server.confirm_request(5), classes=server.keys[:3]), "confirmed other keys")


def test_other_data_are_refused(server: Server) -> None:
    to_confirm(server)
    with pytest.raises(SecureRefused, match="data of class 1 are not those"):
        server.node(5).answer(server.confirm_request(5), {1: "00" * 32})
    assert state_of(server.folder, 5)["sealed"] is None


def test_without_a_set_up_of_its_run_a_node_has_no_keys(server: Server) -> None:
    with pytest.raises(SecureRefused, match="No set-up of this run"):
        server.node(1).keys_of("run-1")
    server.run()
    with pytest.raises(SecureRefused, match="No set-up of this run"):
        server.node(1).keys_of("run-2")


# ---- owners ----


def test_an_owner_s_allow_list_must_be_the_body_s(server: Server, tmp_path: Path) -> None:
    keys = list(server.body.identities)
    for wrong, match in (
        (keys[:-1], "has 7 workers, the body 8"),
        ([keys[1], keys[0], *keys[2:]], "another key of worker 0"),
        ([*keys[:-1], "ab" * 32], "another key of worker 7"),
    ):
        with pytest.raises(SecureRefused, match=match):
            EnrolledNode(server.folder / "node-1", 1, wrong)
        with pytest.raises(InvalidSetting, match=match):
            agree(server.folder / "node-1", server.body.text, wrong)
    with pytest.raises(InvalidSetting, match="compare them with an allow-list"):
        agree(server.folder / "node-1", server.body.text, None)
    open_body = enrolled(tmp_path / "open", FRC, first_use=True)
    with pytest.raises(SecureRefused, match="names no identities, and the owner has an allow-list"):
        EnrolledNode(tmp_path / "open" / "node-1", 1, keys)
    with pytest.raises(InvalidSetting, match="names no identities"):
        agree(tmp_path / "open" / "node-1", open_body.text, keys)


def test_a_node_that_is_not_on_the_allow_list_takes_no_part(server: Server, tmp_path: Path) -> None:
    enrolled(tmp_path / "strangers", FRC)
    shutil.copy(tmp_path / "strangers" / "node-1" / "identity.json", server.folder / "node-1" / "identity.json")
    with pytest.raises(SecureRefused, match="another key of worker 1 than this node's identity"):
        server.node(1)
    with pytest.raises(InvalidSetting, match="another key of worker 1 than this node's identity"):
        agree(server.folder / "node-1", server.body.text, server.body.identities)
    with pytest.raises(SecureRefused, match="identity is of worker 2"):
        EnrolledNode(server.folder / "node-2", 3, None)


def test_a_body_that_was_changed_on_disk_is_refused(server: Server) -> None:
    path = server.folder / "node-1" / "secagg-body.json"
    path.write_bytes(path.read_bytes().replace(b'"colluders":0', b'"colluders":1'))
    with pytest.raises(InvalidSetting, match="not the body that the owner agreed to"):
        server.node(1)


def test_agreeing_on_another_body_erases_the_keys_of_the_one_before(server: Server, tmp_path: Path) -> None:
    server.run()
    agree(server.folder / "node-1", server.body.text, server.body.identities)  # the same one again
    assert manifest_of(server.folder, 1).body.digest == server.body.digest
    named: dict[str, Any] = {"arrays": [("w", "float32", (3,))], "identities": server.body.identities, "colluders": 0}
    agree(server.folder / "node-1", make_body(FRC, **named).text, server.body.identities)
    assert state_of(server.folder, 1)["sealed"] is None
    with pytest.raises(SecureRefused, match="No set-up of this run"):
        manifest_of(server.folder, 1)


# ---- without an allow-list ----


def test_without_an_allow_list_the_first_identities_are_trusted_and_no_others_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = enrolled(tmp_path / "nodes", FRC, first_use=True)
    first = Server(tmp_path / "nodes", body).run(range(1, 8))
    assert "trusts the identities that the server shows it first" in caplog.text
    second = Server(first.folder, body, epoch=2)
    refuses_a_stranger(second, tmp_path / "strangers")
    second.lead()
    assert len({second.confirm(worker) for worker in ALL}) == 1  # worker 0 is new, and welcome
    twice = tuple(replace(hello, identity=second.shown[0].identity) for hello in second.shown[:2])
    refused(
        second, 3, Request(Setup("run-1", 2, second.setup.body), "confirm", (*twice, *second.shown[2:])), "other keys"
    )


def test_first_identities_stay_trusted_under_the_next_body(tmp_path: Path) -> None:
    body = enrolled(tmp_path / "nodes", FRC, first_use=True)
    server = Server(tmp_path / "nodes", body).run()
    named: dict[str, Any] = {"arrays": [("w", "float32", (3,))], "colluders": 0}
    other = make_body(FRC, **named)
    for worker in ALL:
        agree(server.folder / f"node-{worker}", other.text, None)
    second = Server(server.folder, other)
    refuses_a_stranger(second, tmp_path / "strangers")
    second.lead()
    assert len({second.confirm(worker) for worker in ALL}) == 1


def test_no_run_is_ever_forgotten_so_that_its_first_epoch_begins_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.say_hello([1])
    file = StateFile(server.folder / "node-1")
    many = {name_of_run(replace(server.setup, run=f"run {number}")): 1 for number in range(1500)}
    file.write(replace(file.read(), last={**file.read().last, **many}, pending=None))
    refused(server, 1, Request(server.setup, "hello"), "Epoch 1 of this run is over")
    Server(server.folder, server.body, "another").say_hello([1])
    refused(server, 1, Request(server.setup, "hello"), "Epoch 1 of this run is over")
    monkeypatch.setattr(node, "_RUNS", 1502)
    refused(server, 1, Request(Setup("one more", 1, server.setup.body), "hello"), "has taken part in 1502 runs")
    Server(server.folder, server.body, "another", epoch=2).say_hello([1])  # a run that it knows goes on


def test_a_run_s_own_name_in_an_earlier_version_s_file_counts(server: Server) -> None:
    server.say_hello([1])
    path = server.folder / "node-1" / "secagg-setup.json"
    values = json.loads(path.read_text())
    assert [*values["last"]] == [name_of_run(server.setup)]
    path.write_text(json.dumps({**values, "last": {"run-1": 1}, "pending": None}))
    refused(server, 1, Request(server.setup, "hello"), "Epoch 1 of this run is over")


def test_a_message_that_is_answered_while_the_owner_agrees_draws_no_keys_of_the_body_before(server: Server) -> None:
    node = server.node(1)  # it has read the body, and then waits for the lock
    named: dict[str, Any] = {"arrays": [("w", "float32", (3,))], "identities": server.body.identities, "colluders": 0}
    agree(server.folder / "node-1", make_body(FRC, **named).text, server.body.identities)
    with pytest.raises(SecureRefused, match="has just agreed to another body"):
        node.answer(Request(server.setup, "hello"), {})
    assert state_of(server.folder, 1)["pending"] is None


def test_all_files_of_an_agreement_are_written_under_one_lock(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[str] = []

    def look(path: Path, *content: Any, **how: Any) -> None:
        replaced.append(path.name)
        with open(path.parent / ".secagg-setup.json.lock", "ab") as file:
            assert isinstance(lock(file), BlockingIOError)
        write(path, *content, **how)

    write: Any = vars(agreement)["replace_file"]
    monkeypatch.setattr(agreement, "replace_file", look)
    agree(server.folder / "node-1", server.body.text, server.body.identities)
    assert replaced == ["secagg-body.json", "secagg-body-digest"]


def test_without_an_allow_list_two_workers_with_one_identity_are_refused(tmp_path: Path) -> None:
    body = enrolled(tmp_path / "nodes", FRC, first_use=True)
    server = Server(tmp_path / "nodes", body)
    server.say_hello(ALL)
    identity = replace(read_identity(server.folder / "node-6"), worker=7)
    server.hellos[7] = Hello.signed(server.setup, identity, bytes(31) + b"\x09")
    refused(server, 1, server.lead_request(), "Two workers say hello with one identity")


# ---- whatever the server does ----

ACTIONS = st.tuples(
    st.integers(0, 7), st.integers(1, 2), st.sampled_from(["hello", "lead", "confirm"]), st.integers(0, 2**16)
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, min_size=10, max_size=40))
def test_whatever_the_server_asks_an_epoch_has_one_hello_one_key_and_one_manifest(
    made: tuple[Path, ManifestBody], tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[int, int, str, int]]
) -> None:
    folder = Path(shutil.copytree(made[0], tmp_path_factory.mktemp("any") / "nodes"))
    servers = {epoch: Server(folder, made[1], epoch=epoch) for epoch in (1, 2)}
    said: dict[Any, set[Any]] = defaultdict(set)
    for epoch in (1, 2):  # an honest beginning, of which the server keeps all
        servers[epoch].say_hello(ALL)
        servers[epoch].lead()
    boxes = [box for server in servers.values() for one in server.boxes.values() for box in one.values()]
    for worker, epoch, step, number in actions:
        server, rng = servers[epoch], random.Random(number)
        pools = [*server.shown], [*server.keys], {**server.boxes.get(worker, {})}
        if rng.random() < 0.5:
            other = servers[3 - epoch]
            pools[0][rng.randrange(8)] = rng.choice([*other.shown, *server.shown])
        if rng.random() < 0.3:
            pools[0].pop(rng.randrange(8))
        if rng.random() < 0.3:
            pools[1][rng.randrange(4)] = rng.choice([*servers[3 - epoch].keys, *server.keys])
        if rng.random() < 0.3 and pools[2]:
            pools[2][min(pools[2])] = rng.choice(boxes)
        request = Request(server.setup, step, tuple(pools[0]), tuple(pools[1]), pools[2])  # type: ignore[arg-type]
        try:
            answer = server.ask(worker, request)
        except FlGradcodeError:
            continue
        if answer.hello is not None:
            said[worker, epoch, "hello"].add(answer.hello)
        for key in answer.classes:
            said[worker, epoch, key.number].add(key)
        for (c, to), box in answer.wraps.items():
            said[worker, epoch, c, to].add(box)
        if answer.confirmation is not None:
            said["manifest", epoch].add(answer.confirmation.manifest)
    assert all(len(one) == 1 for one in said.values())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), sign=st.sampled_from("0123456789abcdef"))
def test_any_changed_digit_of_the_third_message_is_refused(
    made: tuple[Path, ManifestBody], tmp_path_factory: pytest.TempPathFactory, place: int, sign: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "third"
    if not folder.exists():
        shutil.copytree(made[0], folder)
        to_confirm(Server(folder, made[1]))
    server = Server(folder, made[1])
    server.say_hello(ALL)  # the same bytes again
    server.lead()
    text = str(server.confirm_request(5).content()["fl-gradcode.setup"]["json"])
    values = json.loads(text)
    secret = json.dumps([values["hellos"], values["classes"], values["wraps"]])
    words = re.finditer(r'"[0-9a-f]+"', secret)  # keys, signatures, commitments and wraps
    digits = [i for word in words for i in range(word.start() + 1, word.end() - 1) if secret[i] != sign]
    where = digits[place % len(digits)]
    hellos, classes, wraps = json.loads(f"{secret[:where]}{sign}{secret[where + 1 :]}")
    content = server.confirm_request(5).content()
    changed: dict[str, Any] = dict(content["fl-gradcode.setup"])
    changed["json"] = json.dumps({**values, "hellos": hellos, "classes": classes, "wraps": wraps})
    content["fl-gradcode.setup"] = ConfigRecord(changed)
    with pytest.raises(SecureRefused):
        server.ask(5, Request.find_in(content))
    assert state_of(folder, 5)["sealed"] is None
