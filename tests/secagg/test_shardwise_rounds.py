"""Secure rounds with one shard a message: each shard is a class, and the first copy of each counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Error, Message
from flwr.serverapp.strategy import FedAvg, FedMedian

from fl_gradcode import GradientCode, GradientCoding, cyclic_repetition, fractional_repetition
from fl_gradcode.codes import reed_solomon, uncoded
from fl_gradcode.errors import IncompatibleStrategy, InvalidSetting, SecureRefused
from fl_gradcode.latency import Latency, constant, lognormal, scaled
from fl_gradcode.protocol import Plan, Row
from fl_gradcode.secagg import AnsweredRequests, SecureAggregation
from fl_gradcode.strategy import Shards
from fl_gradcode.strategy.reply_groups import Decoded, MaskedReplies
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays
from tests.secagg.rounds import ask, copy_of, dealt, known_app, mean_of_integers, start
from tests.secagg.samples import body_of, replies_of, results_for, sealed

FRC = fractional_repetition(8, 1)
CODES = [FRC, reed_solomon(6, 2), cyclic_repetition(6, 1, rng=np.random.default_rng(0))]


def shardwise(folder: Path, code: GradientCode = FRC, **settings: Any) -> Path:
    dealt(folder, code, sending="shardwise", **settings)
    return folder


def assert_exact(folder: Path, code: GradientCode, strategy: GradientCoding, models: dict[int, Any]) -> None:
    for row in strategy.ledger.rows:
        train, number = row["train"], row["round"]
        assert train["outcome"] == "exact"
        expected = mean_of_integers(folder, code, models[number - 1], number, train["secure"]["request"])
        assert (flat(models[number]).astype(np.float32) == expected).all()


@pytest.mark.parametrize("code", CODES, ids=str)
def test_the_model_is_the_mean_of_the_unmasked_integers(tmp_path: Path, code: GradientCode) -> None:
    strategy, models, result = start(code, shardwise(tmp_path, code), rounds=2)
    assert_exact(tmp_path, code, strategy, models)
    loss = sum((j + 1) * j for j in range(code.k)) / sum(j + 1 for j in range(code.k))
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(loss, abs=1e-8)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_rounds_end_early_in_virtual_time_whoever_sends_a_shard(tmp_path: Path, code: GradientCode) -> None:
    latency = Latency(compute=lognormal(1.0, 0.8))
    strategy, models, _ = start(code, shardwise(tmp_path, code), rounds=4, latency=latency, send=Shards(patience=0.5))
    assert_exact(tmp_path, code, strategy, models)
    assert len({frozenset(row["train"]["used"]) for row in strategy.ledger.rows}) > 1


def test_late_and_lost_replies_change_nothing(tmp_path: Path) -> None:
    slow = Latency(compute=scaled(constant(1.0), {0: 1e6}))
    strategy, models, _ = start(FRC, shardwise(tmp_path / "late"), rounds=3, latency=slow)
    assert_exact(tmp_path / "late", FRC, strategy, models)
    assert all(0 not in row["train"]["used"] for row in strategy.ledger.rows)

    def dies(worker: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, "killed"), reply_to=message) if worker == 1 else reply

    strategy, models, _ = start(FRC, shardwise(tmp_path / "dies"), rounds=2, tamper=dies)
    assert_exact(tmp_path / "dies", FRC, strategy, models)
    assert all(1 not in row["train"]["used"] for row in strategy.ledger.rows)


def test_second_copies_that_differ_are_named_and_nothing_is_used() -> None:
    body = body_of(FRC, sending="shardwise")
    manifest, results = sealed(body), results_for(body)
    for changed, why in ((False, ""), (True, "workers 3 and 7 hold the same shards and sent different integers")):
        held = MaskedReplies(uncoded(8), "request", manifest, ("arrays", "metrics"))
        for reply in replies_of(manifest, results):
            assert reply.number is not None
            if changed and (reply.worker, reply.number) == (7, 3):
                reply.parts["update"] = reply.parts["update"] ^ np.uint32(1)
            assert held.add(reply.number, (reply.worker, reply.worker), reply) == (reply.worker < 4)
        before = ArrayRecord([np.zeros(7, np.float32)])
        before = ArrayRecord({"w": before["0"]})
        vector = held.decoder.vector()
        assert vector is not None
        decoded = held.decode(uncoded(8), vector, before)
        assert isinstance(decoded, Decoded) if not changed else decoded == why


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[int, ...], Any]]:
    """Nodes that have answered nothing, and what is sent for each shard of worker 2, which holds shards 2 and 6."""
    folder = tmp_path_factory.mktemp("nodes")
    shardwise(folder / "fresh")
    copy_of(folder / "fresh", folder / "used")
    sent: list[Any] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        sent.append(message.content)
        return reply

    start(FRC, folder / "used", tamper=keep, verify=0)
    plan = Plan.find_in(sent[0])
    assert plan is not None
    rest = Plan.remove_from(sent[0])

    def message_for(*shards: int) -> Any:
        row = Row(shards, tuple((1.0,) for _ in shards))
        values = {**vars(plan), "rows": {2: row}}
        return Plan(**values).add_to(rest)

    asked_for: list[tuple[int, ...]] = [(2,), (6,), (2, 6), (1,), ()]
    return folder / "fresh", {shards: message_for(*shards) for shards in asked_for}


def test_a_node_answers_one_of_its_shards_at_a_time_and_never_computes_one_twice(
    tmp_path: Path, asked: tuple[Path, dict[Any, Any]]
) -> None:
    folder, messages = copy_of(asked[0], tmp_path / "nodes"), asked[1]
    trained: list[int] = []
    app = known_app(before=lambda shard, message, context: trained.append(shard))
    limit = {"secagg-max-requests": 1}

    def words(shards: tuple[int, ...]) -> Any:
        record: Any = ask(app, folder, 2, messages[shards], node_config=limit).content["fl-gradcode.update"]
        return record["masked"].numpy()

    first, second = words((2,)), words((6,))  # one request, whose shards are sent one by one
    assert trained == [2, 6] and (first != second).any()
    assert (words((2,)) == first).all() and (words((6,)) == second).all() and trained == [2, 6]
    rows = AnsweredRequests(folder / "node-2" / "answered").rows()
    assert [row.number for row in rows] == [2, 6] and len({row.request for row in rows}) == 1
    assert len(list((folder / "node-2" / "answered").glob("reply-*.bin"))) == 2
    for shards in ((2, 6), (1,), ()):
        with pytest.raises(SecureRefused, match="not asked for one of its shards"):
            ask(app, folder, 2, messages[shards])
    other = Plan.find_in(messages[2,])
    assert other is not None
    changed = Plan(**{**vars(other), "seed": other.seed + 1}).add_to(Plan.remove_from(messages[6,]))
    with pytest.raises(SecureRefused, match="Another request for round 1"):
        ask(app, folder, 2, changed)
    assert trained == [2, 6]


def test_a_shard_whose_training_fails_shows_only_in_the_sum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(shard: int, message: Message, context: Context) -> None:
        if shard == 3:
            raise RuntimeError("no")

    sizes: set[int] = set()

    def measure(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content["fl-gradcode.update"]
        sizes.add(record["masked"].numpy().size)
        return reply

    strategy, models, _ = start(FRC, shardwise(tmp_path), known_app(before=fails), tamper=measure)
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "skipped" and "1 of 8 shards failed" in caplog.text and len(sizes) == 1
    assert (flat(models[1]) == flat(initial_arrays())).all()


def test_what_single_shards_do_not_combine_with_is_refused(tmp_path: Path) -> None:
    secure = SecureAggregation(dealt(tmp_path / "one", FRC, sending="shardwise"))
    with pytest.raises(InvalidSetting, match="has a manifest for send='shards'.*--send coded"):
        GradientCoding(FedAvg(), FRC, secure=secure)
    with pytest.raises(InvalidSetting, match="choose send='shards'"):
        GradientCoding(FedAvg(), FRC, secure=secure, send="adaptive")
    with pytest.raises(IncompatibleStrategy, match="secure= reveals only the mean"):
        GradientCoding(FedMedian(), FRC, secure=secure, send="shards")
    halved = reed_solomon(6, 1, m=2)
    secure = SecureAggregation(dealt(tmp_path / "two", halved, sending="shardwise"))
    with pytest.raises(InvalidSetting, match="divides them by m=2"):
        GradientCoding(FedAvg(), halved, secure=secure, send="shards")
    with pytest.raises(InvalidSetting, match="plain updates"):
        GradientCoding(FedAvg(), reed_solomon(6, 2), send="shards")


def test_the_engine_s_unknown_nodes_find_their_first_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InProcessGrid, "known_workers", lambda grid: {})
    strategy, models, _ = start(FRC, shardwise(tmp_path), rounds=2)
    assert_exact(tmp_path, FRC, strategy, models)
