"""A rehearsal: holders compare keyed tags of what they compute, and differ before any vector has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

from fl_gradcode import fractional_repetition
from fl_gradcode.codes import reed_solomon
from fl_gradcode.errors import RoundFailed, SecureRefused
from fl_gradcode.latency import Latency, constant, lognormal, scaled
from fl_gradcode.protocol import Plan
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
    wrong = {fellows[0]: plan.tags[fellows[0]], fellows[1]: "00" * 32}
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
