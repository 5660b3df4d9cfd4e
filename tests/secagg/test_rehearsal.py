"""A rehearsal: holders compare keyed tags of what they compute, and differ before any vector has left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

from fl_gradcode import fractional_repetition
from fl_gradcode.checkpoints import Checkpoint
from fl_gradcode.codes import reed_solomon
from fl_gradcode.errors import InvalidSetting, RoundFailed, SecureRefused
from fl_gradcode.latency import Latency, constant, lognormal, scaled
from fl_gradcode.protocol import Plan, Reply, Row
from tests.conftest import flat
from tests.secagg.rounds import ask, copy_of, dealt, known_app, start, update_for

FRC = fractional_repetition(6, 2)  # two groups of three
TRIPLES: dict[str, Any] = {"min_classes": 2, "rehearsal": True}


class Sent:
    """What reached the server, by kind."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.messages: list[tuple[int, Any]] = []

    def __call__(self, worker: int, message: Message, reply: Message) -> Message:
        plan = Plan.find_in(message.content)
        assert plan is not None
        self.messages.append((worker, message.content))
        if not reply.has_error():
            self.kinds.append(plan.kind)
        return reply


@pytest.mark.parametrize(
    ("code", "sending"), [(FRC, "coded"), (FRC, "shardwise"), (reed_solomon(5, 1), "coded")], ids=str
)
def test_holders_that_agree_go_on_as_without(tmp_path: Path, code: Any, sending: Any) -> None:
    settings: dict[str, Any] = {"min_classes": 2, "sending": sending}
    dealt(tmp_path / "plain", code, **settings)
    dealt(tmp_path / "nodes", code, rehearsal=True, **settings)
    latency = Latency(compute=lognormal(1.0, 0.5))
    sent = Sent()
    strategy, models, _ = start(code, tmp_path / "nodes", rounds=2, latency=latency, tamper=sent)
    _, others, _ = start(code, tmp_path / "plain", rounds=2, latency=latency)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    assert np.abs(flat(models[2]) - flat(others[2])).max() < 1e-4  # other manifests have other dithers
    first = sent.kinds.index("train")
    assert sent.kinds[:first].count("rehearse") == sent.kinds[:first].count("compare") == code.n
    assert {*sent.kinds[first:]} == {"train"}


@pytest.mark.parametrize("code", [FRC, reed_solomon(5, 1)], ids=str)
def test_holders_that_differ_are_named_before_a_vector_leaves(tmp_path: Path, code: Any) -> None:
    dealt(tmp_path, code, **TRIPLES)
    calls: list[int] = []

    def update(server_round: int, shard: int) -> Any:
        calls.append(shard)
        return update_for(server_round, shard) + np.float32(1e-5 * (shard == 0 and calls.count(0) == 2))

    sent = Sent()
    with pytest.raises(RoundFailed, match=r"no vector was sent: .*Workers \d and \d compute different integers"):
        start(code, tmp_path, known_app(update), tamper=sent)
    assert {*sent.kinds} <= {"rehearse", "compare"}


def test_a_majority_of_each_class_is_needed_and_enough(tmp_path: Path) -> None:
    dealt(tmp_path / "one", FRC, **TRIPLES)

    def gone(*workers: int) -> Any:
        return lambda worker, message, reply: (
            Message(Error(2, "killed"), reply_to=message) if worker in workers else reply
        )

    strategy, _, _ = start(FRC, tmp_path / "one", rounds=2, tamper=gone(0))
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    dealt(tmp_path / "two", FRC, **TRIPLES)
    group = next(one for one in FRC.groups or () if 0 in one)
    with pytest.raises(RoundFailed, match="no vector was sent"):
        start(FRC, tmp_path / "two", tamper=gone(*group[:2]))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, Any]]]:
    """Nodes that have answered nothing, and all messages of a run."""
    folder = tmp_path_factory.mktemp("nodes")
    dealt(folder / "fresh", FRC, **TRIPLES)
    copy_of(folder / "fresh", folder / "used")
    sent = Sent()
    start(FRC, folder / "used", tamper=sent)
    return folder / "fresh", sent.messages


def of_kind(messages: list[tuple[int, Any]], kind: str, worker: int | None = None) -> tuple[int, Any]:
    for who, content in messages:
        plan = Plan.find_in(content)
        if plan is not None and plan.kind == kind and worker in (None, who):
            return who, content
    raise AssertionError(kind)


def test_a_node_that_has_not_compared_sends_nothing(tmp_path: Path, told: tuple[Path, list[tuple[int, Any]]]) -> None:
    folder, messages = copy_of(told[0], tmp_path / "nodes"), told[1]
    worker, train = of_kind(messages, "train")
    _, rehearse = of_kind(messages, "rehearse", worker)
    _, compare = of_kind(messages, "compare", worker)
    trained: list[int] = []
    app = known_app(before=lambda shard, message, context: trained.append(shard))
    with pytest.raises(SecureRefused, match="have not compared"):
        ask(app, folder, worker, train)
    with pytest.raises(SecureRefused, match="has not rehearsed"):
        ask(app, folder, worker, compare)
    assert not trained
    ask(app, folder, worker, rehearse)
    ask(app, folder, worker, rehearse)
    assert len(trained) == len(FRC.shards_of(worker))  # the second time from its cache
    plan = Plan.find_in(compare)
    assert plan is not None
    rest = Plan.remove_from(compare)

    def with_tags(tags: dict[int, str]) -> Any:
        return Plan(**{**vars(plan), "tags": tags}).add_to(rest)

    own = plan.tags[worker]
    fellows = [w for w in next(one for one in FRC.groups or () if worker in one) if w != worker]
    with pytest.raises(SecureRefused, match="more than half"):
        ask(app, folder, worker, with_tags({worker: own}))
    with pytest.raises(SecureRefused, match="different integers"):  # its own tag shown back to it as a fellow's
        ask(app, folder, worker, with_tags(dict.fromkeys(fellows, own)))
    wrong = {fellows[0]: "11" * 32, fellows[1]: "00" * 32}
    with pytest.raises(SecureRefused, match="different integers"):
        ask(app, folder, worker, with_tags(wrong))
    with pytest.raises(SecureRefused, match="have not compared"):
        ask(app, folder, worker, train)
    ask(app, folder, worker, compare)
    reply = ask(app, folder, worker, train)
    assert not reply.has_error()
    other = Plan.find_in(train)
    assert other is not None
    with pytest.raises(SecureRefused, match="have not compared"):  # another run
        ask(app, folder, worker, Plan(**{**vars(other), "run": "another"}).add_to(Plan.remove_from(train)))


def test_a_manifest_without_a_rehearsal_has_none(tmp_path: Path, told: tuple[Path, list[tuple[int, Any]]]) -> None:
    manifest = dealt(tmp_path, FRC, min_classes=2)
    worker, rehearse = of_kind(told[1], "rehearse")
    plan = Plan.find_in(rehearse)
    assert plan is not None
    content = Plan(**{**vars(plan), "secure": manifest.digest.hex()}).add_to(Plan.remove_from(rehearse))
    with pytest.raises(SecureRefused, match="no rehearsal"):
        ask(known_app(), tmp_path, worker, content)


def test_a_slow_node_is_waited_for_no_longer_than_the_others_took_twice(tmp_path: Path) -> None:
    dealt(tmp_path, FRC, **TRIPLES)
    slow = Latency(compute=scaled(constant(1.0), {0: 1e6}))
    strategy, _, _ = start(FRC, tmp_path, latency=slow)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


# ---- after the rehearsal ----


def answered(
    node: Path, told: tuple[Path, list[tuple[int, Any]]], worker: int, app: Any = None, **owner: Any
) -> tuple[Any, Any, Any]:
    """A node that has passed the rehearsal and answered round 1: its next plan, the other records, and its fellows."""
    _, train = of_kind(told[1], "train")
    for kind in ("rehearse", "compare"):
        ask(known_app(), node, worker, of_kind(told[1], kind, worker)[1], node_config=owner)
    plan = Plan.find_in(train)
    assert plan is not None
    rest = Plan.remove_from(train)
    rows = {w: Row(FRC.shards_of(w), ()) for w in range(6)}
    plan = replace(plan, rows=rows)
    ask(app or known_app(), node, worker, plan.add_to(rest), node_config=owner)
    fellows = [w for w in next(one for one in FRC.groups or () if worker in one) if w != worker]
    return plan, rest, fellows


def told_by(node: Path, worker: int, plan: Any, rest: Any) -> Reply:
    reply = Reply.find_in(ask(known_app(), node, worker, plan.add_to(rest)).content)
    assert reply is not None
    return reply


def test_the_tags_of_a_round_are_checked_before_the_next_vector(
    tmp_path: Path, told: tuple[Path, list[tuple[int, Any]]]
) -> None:
    def node(name: str) -> Path:
        return copy_of(told[0], tmp_path / name)

    app = known_app()
    plan, rest, (one, two) = answered(folder := node("first"), told, 0)
    others = {}
    for worker in (one, two):
        answered(folder, told, worker)
        others[worker] = told_by(folder, worker, plan, rest).tags
    mine = told_by(folder, 0, plan, rest)
    assert len(mine.tags) == 64 and len({mine.tags, *others.values()}) == 3
    tagged = f"train 1 {mine.request}"
    after = replace(plan, round=2, tags=others, tagged=tagged)
    copy_of(folder, tmp_path / "kept")
    cases: list[dict[str, Any]] = [{}, {"tags": {one: others[one]}}, {"tags": {}, "tagged": ""}]
    replies = [
        told_by(copy_of(tmp_path / "kept", tmp_path / str(number)), 0, replace(after, **changed), rest)
        for number, changed in enumerate(cases)
    ]
    assert len({(reply.request, reply.tags) for reply in replies}) == 1  # tags are no part of the request
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tags": {one: others[one], two: "00" * 32}}, ""),  # most agree: the other one has to stop
        ({"tags": {one: "00" * 32}}, "Workers 0 and 2 compute different integers"),
        ({"tags": {one: mine.tags, two: mine.tags}}, "compute different integers"),  # its own, shown back
        ({"tags": {one: others[two], two: others[one]}}, "compute different integers"),
        ({"tagged": f"train 1 {'ab' * 32}"}, "another request of train 1 than this node"),
    ]
    again: dict[str, Any]
    for number, (changed, match) in enumerate(wrong):
        where = copy_of(tmp_path / "kept", tmp_path / f"wrong-{number}")
        if not match:
            ask(app, where, 0, replace(after, **changed).add_to(rest))
            continue
        with pytest.raises(SecureRefused, match=match):
            ask(app, where, 0, replace(after, **changed).add_to(rest))
        for again in ({}, {"tags": {}, "tagged": ""}, {"round": 3}):  # whatever the server shows from then on
            with pytest.raises(SecureRefused, match="have not compared"):
                ask(app, where, 0, replace(after, **again).add_to(rest))
        with pytest.raises(SecureRefused, match="have not compared"):
            ask(app, where, 0, plan.add_to(rest))


def test_the_owner_bounds_how_many_vectors_leave_unconfirmed(
    tmp_path: Path, told: tuple[Path, list[tuple[int, Any]]]
) -> None:
    owner = {"secagg-max-unconfirmed": 2}
    folder = copy_of(told[0], tmp_path / "nodes")
    plan, rest, (one, two) = answered(folder, told, 0, **owner)
    answered(folder, told, one)
    other, mine = told_by(folder, one, plan, rest).tags, told_by(folder, 0, plan, rest)
    app = known_app()
    ask(app, folder, 0, replace(plan, round=2).add_to(rest), node_config=owner)
    for asked in (
        replace(plan, round=3),
        replace(plan, round=3, tags={two: "." * 64}, tagged=f"train 1 {mine.request}"),
    ):
        with pytest.raises(SecureRefused, match="No majority of the holders .* with 2 answers"):
            ask(app, folder, 0, asked.add_to(rest), node_config=owner)
    # Of three holders, two are more than half.
    shown = replace(plan, round=3, tags={one: other}, tagged=f"train 1 {mine.request}")
    ask(app, folder, 0, shown.add_to(rest), node_config=owner)
    with pytest.raises(
        SecureRefused, match="No majority"
    ):  # that of round 2 still counts, and round 1 is confirmed once
        ask(app, folder, 0, replace(shown, round=4).add_to(rest), node_config=owner)


def test_a_rehearsal_is_repeated_in_the_same_round_under_another_model(tmp_path: Path) -> None:
    dealt(tmp_path, FRC, **TRIPLES)

    def fails(worker: int, message: Message, reply: Message) -> Message:
        plan = Plan.find_in(message.content)
        return Message(Error(2, "gone"), reply_to=message) if plan and plan.kind == "compare" else reply

    with pytest.raises(RoundFailed, match="no vector was sent"):
        start(FRC, tmp_path, tamper=fails)
    changed = known_app(lambda server_round, shard: 2 * update_for(server_round, shard))
    strategy, _, _ = start(FRC, tmp_path, changed, seed=5)  # the seed is in the request
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


def test_what_is_kept_of_rehearsals_does_not_grow(tmp_path: Path) -> None:
    dealt(tmp_path, FRC, **TRIPLES)
    (tmp_path / "node-0" / f"rehearsed-{'ab' * 16}").touch()  # of an earlier version
    for number in range(6):
        start(FRC, tmp_path, run=f"run-{number}")
    names = sorted(path.name for path in (tmp_path / "node-0").iterdir() if "rehears" in path.name)
    states = [json.loads((tmp_path / f"node-{worker}" / "comparisons.json").read_text()) for worker in range(6)]
    assert names == [] and {len(state["runs"]) for state in states} == {4}
    assert max(len(state["answers"]) for state in states) == 4  # of a holder that was the first


def test_a_holder_whose_training_fails_once_differs_from_nobody(
    tmp_path: Path, told: tuple[Path, list[tuple[int, Any]]]
) -> None:
    """What failed is poisoned, so that the difference shows nothing: holders go on after the lost round."""

    def before(shard: int, message: Message, context: Any) -> None:
        raise MemoryError

    folder = copy_of(told[0], tmp_path / "nodes")
    plan, rest, (one, two) = answered(folder, told, 0, app=known_app(before=before))
    for worker in (one, two):
        answered(folder, told, worker)
    tags = {worker: told_by(folder, worker, plan, rest) for worker in (0, one, two)}
    after = replace(plan, round=2, tagged=f"train 1 {tags[0].request}")
    for worker, fellow in ((0, one), (one, 0)):
        where = copy_of(folder, tmp_path / str(worker))
        told_by(where, worker, replace(after, tags={fellow: tags[fellow].tags}), rest)
    with pytest.raises(SecureRefused, match="different integers"):
        told_by(tmp_path / str(one), one, replace(after, round=3, tags={two: "00" * 32}), rest)


# ---- another rehearsal within a run ----


@pytest.mark.parametrize("lost", [1, 2])
def test_holders_rehearse_again_after_a_round_that_was_lost(
    tmp_path: Path, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Worker 0 has not rehearsed, and its fellows are away from round 2 on, for so many rounds."""
    dealt(tmp_path, FRC, **TRIPLES)
    fellows = [worker for worker in next(one for one in FRC.groups or () if 0 in one) if worker]

    def away(worker: int, plan: Plan) -> bool:
        return worker in fellows and 1 < plan.round <= 1 + lost

    kinds: list[tuple[int, str]] = []

    def lose(worker: int, message: Message, reply: Message) -> Message:
        plan = Plan.find_in(message.content)
        assert plan is not None
        kinds.append((plan.round, plan.kind))
        return Message(Error(2, "gone"), reply_to=message) if away(worker, plan) else reply

    def forget(server_round: int) -> None:
        if server_round == 1:
            (tmp_path / "node-0" / "comparisons.json").unlink()

    strategy, _, _ = start(FRC, tmp_path, rounds=4, tamper=lose, kill=forget)
    rows = [row["train"] for row in strategy.ledger.rows]
    assert [row["outcome"] for row in rows] == ["exact", *["skipped"] * lost, *["exact"] * (3 - lost)]
    assert {number for number, kind in kinds if kind == "rehearse"} == {1, *range(3, 3 + lost)}
    assert ("The rehearsal of round 3 failed" in caplog.text) == (lost == 2)
    assert not any(one["worker"] == 0 for one in rows[-1]["rejected"])


# ---- after the server was killed ----


class Killed(BaseException):
    pass


def test_tags_that_wait_for_comparison_outlive_the_server(tmp_path: Path) -> None:
    """In round 2, one of three holders computes something else; the server is killed before the next plan says so."""
    dealt(tmp_path / "nodes", FRC, **TRIPLES)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "run.ckpt", "ledger": tmp_path / "ledger.jsonl", "run": None}
    # All holders are read: the second one differs from the first, and the third one decides.
    slow = Latency(compute=scaled(constant(1.0), {worker: 1.0 + worker / 100 for worker in range(6)}))
    options: dict[str, Any] = {"rounds": 3, "votes": 1, "verify": 0, "latency": slow, **kept}
    turns: list[int] = []

    def update(server_round: int, shard: int) -> Any:
        turns.extend([server_round] * (shard == 0))
        wrong = shard == 0 and server_round == 2 and turns.count(2) == 2
        return update_for(server_round, shard) + np.float32(1e-3 * wrong)

    def kill(server_round: int) -> None:
        if server_round == 3:
            raise Killed

    with pytest.raises(Killed):
        start(FRC, tmp_path / "nodes", known_app(update), kill=kill, **options)
    seen: list[tuple[int, Plan, Message]] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        plan = Plan.find_in(message.content)
        assert plan is not None
        seen.append((worker, plan, reply))
        return reply

    strategy, _, _ = start(FRC, tmp_path / "nodes", known_app(update), tamper=keep, **options)
    rows = [row["train"] for row in strategy.ledger.rows]
    ((named, _),) = {(one["worker"], one["kind"]) for one in rows[1]["rejected"]}
    asked = {worker: (plan, reply) for worker, plan, reply in seen if plan.label == "train 3"}
    assert all(plan.tagged == f"train 2 {rows[1]['secure']['request']}" for plan, _ in asked.values())
    refusing = {worker for worker, (_, reply) in asked.items() if reply.has_error()}
    assert refusing == {named} and "different integers" in str(asked[named][1].error.reason)
    assert rows[-1]["outcome"] == "exact"


def test_damaged_tags_in_a_checkpoint_are_told(tmp_path: Path) -> None:
    dealt(tmp_path / "nodes", FRC, **TRIPLES)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "run.ckpt", "ledger": tmp_path / "ledger.jsonl", "run": None}
    start(FRC, tmp_path / "nodes", **kept)
    checkpoint = Checkpoint(tmp_path / "run.ckpt")
    saved = checkpoint.load()
    assert saved is not None and saved.tags is not None
    for damaged in ({"tags": {"x": ""}, "tagged": ""}, {"tags": {"1": 5}, "tagged": ""}, {"tagged": ""}, {"tags": 3}):
        checkpoint.save(replace(saved, tags=damaged))
        with pytest.raises(InvalidSetting, match="damaged .tags of masks"):
            start(FRC, tmp_path / "nodes", rounds=2, **kept)
