"""Votes through masks: masked copies are equal exactly if the integers are, so that liars are outvoted and named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fl_gradcode import GradientCoding, VirtualGrid, fractional_repetition
from fl_gradcode.codes import GradientCode, P, PrimeField, for_assignment, locate_wrong_replies, reed_solomon
from fl_gradcode.copies import Ballots
from fl_gradcode.errors import InvalidSetting, SecureRefused
from fl_gradcode.latency import Latency, Law, constant, scaled
from fl_gradcode.protocol import Plan, Row
from fl_gradcode.secagg import MaskedReply, SecureAggregation
from fl_gradcode.strategy.reply_groups import MaskedReplies, same_words
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, toy_app
from tests.secagg.rounds import ask, dealt, known_app, mean_of_integers, start, update_for
from tests.secagg.samples import body_of, replies_of, results_for, sealed

Lie = Callable[[NDArray[np.uint32], int], NDArray[np.uint32]]


def _changed(words: NDArray[np.uint32], by: Any) -> NDArray[np.uint32]:
    changed: NDArray[np.uint32] = ((words.astype(np.int64) + by) % P).astype(np.uint32)
    return changed


#: What a liar sends instead of the words that it computed, by its worker number. All are elements of both rings.
LIES: dict[str, Lie] = {
    "random": lambda x, who: np.random.default_rng(who).integers(0, P, x.size).astype(np.uint32),
    "one common error": lambda x, who: _changed(x, 7 + np.arange(x.size)),
    "one entry": lambda x, who: x ^ (np.arange(x.size) == 3).astype(np.uint32),
    "check words": lambda x, who: x ^ (np.arange(x.size) == x.size - 2).astype(np.uint32),
}


def lying(liars: tuple[int, ...], lie: Lie) -> Callable[[int, Message, Message], Message]:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        if worker in liars and reply.has_content() and "fl-gradcode.update" in reply.content:
            record = reply.content["fl-gradcode.update"]
            assert isinstance(record, ArrayRecord)
            record["masked"] = Array(lie(record["masked"].numpy(), worker))
        return reply

    return tamper


def first(workers: tuple[int, ...], gone: tuple[int, ...]) -> Latency:
    """These workers answer at once, and some never do."""
    times = {**dict.fromkeys(workers, 0.01), **dict.fromkeys(gone, float("inf"))}
    return Latency(compute=Law("", lambda seed, worker, tick: times.get(worker, 1.0 + 0.01 * worker)))


CODES: dict[str, tuple[Callable[[int], GradientCode], str]] = {
    "groups": (lambda e: fractional_repetition(2 * (2 * e + 2), 2 * e + 1), "coded"),
    "shards": (lambda e: fractional_repetition(2 * e + 2, 2 * e + 1), "shardwise"),  # everybody holds all
    "field": (lambda e: reed_solomon(2 * e + 5, 2 * e + 1), "coded"),
    "field, m=2": (lambda e: reed_solomon(2 * e + 6, 2 * e + 1, m=2), "coded"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", CODES)
def test_liars_are_named_and_the_sum_is_that_of_the_honest(tmp_path: Path, name: str, lie: str) -> None:
    make, sending = CODES[name]
    e = 2 if lie in ("one common error", "one entry") else 1
    code = make(e)
    dealt(tmp_path, code, sending=sending, min_classes=2)
    random = np.random.default_rng((e, len(lie), len(name)))
    *liars, gone = random.choice(code.n, e + 1, replace=False).tolist()
    strategy, models, _ = start(
        code,
        tmp_path,
        rounds=2,
        votes=e,
        verify=0,
        tamper=lying(tuple(liars), LIES[lie]),
        latency=first(tuple(liars), (gone,)),
    )
    rows = [row["train"] for row in strategy.ledger.rows]
    assert [row["outcome"] for row in rows] == ["exact", "exact"]
    for number, row in enumerate(rows, start=1):
        expected = mean_of_integers(tmp_path, code, models[number - 1], number, row["secure"]["request"])
        assert (flat(models[number]).astype(np.float32) == expected).all()
    assert {(one["worker"], one["kind"]) for row in rows for one in row["rejected"]} == {
        (liar, "wrong-value") for liar in liars
    }
    assert not {*liars} & {worker for row in rows for worker in row["used"]}
    assert not {*liars} & {*rows[1]["asked"]}


# ---- exhaustively, at small n ----


def arrivals(holders: list[int], liars: tuple[int, ...], gone: tuple[int, ...]) -> Iterator[list[int]]:
    """Orders in which the holders answer: the liars are first, last and in between."""
    honest = [i for i in holders if i not in liars and i not in gone]
    lying_ones = [i for i in liars if i not in gone]
    yield [*lying_ones, *honest]
    yield [*honest, *lying_ones]
    yield [i for i in holders if i not in gone]
    yield [i for i in reversed(holders) if i not in gone]
    yield [*lying_ones[:1], *honest[:1], *lying_ones[1:], *honest[1:]]


@pytest.mark.parametrize(("s", "e"), [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2)])
def test_whoever_lies_and_is_missing_the_group_s_honest_vector_counts(s: int, e: int) -> None:
    r = s + 2 * e + 1
    code = fractional_repetition(2 * r, r - 1)
    manifest, replies = sample_of(code)
    others = [i for i in range(code.n) if i not in (group := list((code.groups or ())[0]))]
    right = replies[group[0]]
    lies = ("one common error", "random")
    cases = 0
    for liars in itertools.chain.from_iterable(itertools.combinations(group, size) for size in range(e + 1)):
        for gone in itertools.combinations(group, s):
            for lie, order in itertools.product(lies, arrivals(group, liars, gone)):
                held = MaskedReplies(code, "R", manifest, ("a", "m"), Ballots(e + 1, same_words))
                for i in order:
                    copy = altered(replies[i], LIES[lie]) if i in liars else replies[i]
                    held.add(i, (100 + i, i), copy)
                (used,) = held.copies.values()
                assert same_words(used, right)
                assert held.ballots is not None
                assert {who for who, _ in held.ballots.wrong().values()} == {*liars} - {*gone}
                cases += 1
    for i in others[: e + 1]:
        held.add(i, (100 + i, i), replies[i])
    assert held.decoder.decodable and cases >= 10


@pytest.mark.parametrize(("n", "s", "m", "e"), [(5, 2, 1, 1), (6, 3, 1, 1), (7, 3, 2, 1), (7, 4, 1, 2), (8, 5, 1, 2)])
def test_over_the_field_whoever_lies_and_is_missing_the_liars_are_located(n: int, s: int, m: int, e: int) -> None:
    code = reed_solomon(n, s, m=m)
    _, replies = sample_of(code)
    random = np.random.default_rng((n, s))
    for gone in itertools.combinations(range(n), s - 2 * e):
        there = [i for i in range(n) if i not in gone]
        for liars in itertools.chain.from_iterable(itertools.combinations(there, size) for size in range(e + 1)):
            for lie in ("one common error", "random"):
                vectors = [
                    [*(altered(replies[i], LIES[lie]) if i in liars else replies[i]).parts.values()] for i in there
                ]
                found = locate_wrong_replies(code, vectors, there, e, lambda size: random.integers(0, P, size))
                assert found == liars, (gone, liars, lie)


def sample_of(code: GradientCode) -> tuple[Any, dict[int, MaskedReply]]:
    """A manifest, and the masked replies of all workers to one request."""
    manifest = sealed(body_of(code, colluders=0, min_classes=2))
    return manifest, {reply.worker: reply for reply in replies_of(manifest, results_for(manifest.body))}


def altered(reply: MaskedReply, lie: Lie) -> MaskedReply:
    return replace(reply, parts={part: lie(words, reply.worker) for part, words in reply.parts.items()})


# ---- other ways to harm a round ----


def asked_another_request(worker: int, message: Message, reply: Message) -> Message:
    told = reply.content["fl-gradcode.reply"]
    assert isinstance(told, ConfigRecord)
    values = {**json.loads(str(told["json"])), "request": "ab" * 32}
    reply.content["fl-gradcode.reply"] = ConfigRecord({**told, "json": json.dumps(values)})
    return reply


def sent_too_little(worker: int, message: Message, reply: Message) -> Message:
    reply.content["fl-gradcode.update"] = ArrayRecord({"masked": Array(np.zeros(3, np.uint32))})
    return reply


@pytest.mark.parametrize("how", [asked_another_request, sent_too_little])
@pytest.mark.parametrize("name", CODES)
def test_a_liar_of_another_request_or_form_costs_no_more_than_another_one(
    tmp_path: Path, name: str, how: Callable[..., Message]
) -> None:
    """It is the first to answer everything, one worker never does, and another one lies in the usual way."""
    make, sending = CODES[name]
    code = make(2)
    dealt(tmp_path, code, sending=sending, min_classes=2)
    usual = lying((1,), LIES["one common error"])

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        if worker == 0 and not reply.has_error():
            return how(worker, message, reply)
        return usual(worker, message, reply)

    strategy, models, _ = start(
        code, tmp_path, rounds=1, votes=2, verify=0, tamper=tamper, latency=first((0, 1), (code.n - 1,))
    )
    (row,) = [row["train"] for row in strategy.ledger.rows]
    assert row["outcome"] == "exact" and {0, 1} == {one["worker"] for one in row["rejected"]}
    expected = mean_of_integers(tmp_path, code, models[0], 1, row["secure"]["request"])
    assert (flat(models[1]).astype(np.float32) == expected).all()


@pytest.mark.parametrize("useless", [asked_another_request, sent_too_little])
def test_a_node_of_no_use_may_be_honest_and_leaves_room_for_all_liars(
    tmp_path: Path, useless: Callable[..., Message]
) -> None:
    """Of a node that counts as the one liar instead, the round would be decided before the real one is noticed."""
    code = reed_solomon(7, 3)  # one liar, and one that is missing
    dealt(tmp_path, code, min_classes=2)
    lie = lying((1,), LIES["one entry"])

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        if worker == 0 and not reply.has_error():
            return useless(worker, message, reply)
        return lie(worker, message, reply)

    strategy, models, _ = start(code, tmp_path, votes=1, verify=0, tamper=tamper, latency=first((0, 1), ()))
    (row,) = [row["train"] for row in strategy.ledger.rows]
    assert row["outcome"] == "exact" and {0, 1} == {one["worker"] for one in row["rejected"]}
    expected = mean_of_integers(tmp_path, code, models[0], 1, row["secure"]["request"])
    assert (flat(models[1]).astype(np.float32) == expected).all()


def test_a_group_of_one_liar_that_was_the_first_makes_no_round_hopeless(tmp_path: Path) -> None:
    """It answers once and then fails; one honest holder has answered all, and the last one nothing yet."""
    code = for_assignment(np.ones((3, 3), bool), s=1, rng=np.random.default_rng(0))
    dealt(tmp_path, code, sending="shardwise", min_classes=2)

    times: list[int] = []

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        times.extend([0] * (worker == 0))
        if worker == 0 and len(times) > 1:
            return Message(Error(2, "gone"), reply_to=message)
        return asked_another_request(worker, message, reply) if worker == 0 else reply

    slow = Latency(compute=scaled(constant(1.0), {0: 0.01, 1: 1.0, 2: 100.0}))
    strategy, _, _ = start(code, tmp_path, votes=1, verify=0, tamper=tamper, latency=slow)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


def voted_round(folder: Path, code: GradientCode, lie: Any, *, secure: bool) -> Any:
    """A round of training with one shard per message and votes=1, in which worker 0 is the first to answer."""
    if secure:
        dealt(folder, code, sending="shardwise", min_classes=2)
        strategy, _, _ = start(code, folder, votes=1, verify=0, tamper=lie, latency=first((0,), ()))
    else:
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, send="shards", votes=1, verify=0)
        with InProcessGrid(toy_app(), code.n, tamper=lie) as grid:
            strategy.start(VirtualGrid(grid, first((0,), ())), initial_arrays(), num_rounds=1)
    (row,) = [row["train"] for row in strategy.ledger.rows]
    return row


@pytest.mark.parametrize("secure", [True, False])
def test_a_shard_that_a_liar_was_right_about_still_counts(tmp_path: Path, secure: bool) -> None:
    """It lies about one shard alone, and is the first to answer all."""
    code = fractional_repetition(6, 2)  # three shards a worker
    wrong = code.shards_of(0)[-1]

    def lie(worker: int, message: Message, reply: Message) -> Message:
        plan = Plan.find_in(message.content)
        if worker != 0 or plan is None or plan.rows[0].shards != (wrong,):
            return reply
        for record in reply.content.array_records.values():
            for key in record:
                values = record[key].numpy()
                record[key] = Array(LIES["one common error"](values, 0) if secure else values + np.float32(1))
        return reply

    row = voted_round(tmp_path, code, lie, secure=secure)
    assert row["outcome"] == "exact" and 0 not in row["used"]
    assert [one["worker"] for one in row["rejected"]] == [0]


@pytest.mark.parametrize("secure", [True, False])
def test_a_liar_has_one_vote_on_a_shard(tmp_path: Path, secure: bool) -> None:
    """Whatever it is asked for, it answers with the same lie about one shard."""
    code = fractional_repetition(6, 2)
    target = code.shards_of(0)[0]

    def lie(worker: int, message: Message, reply: Message) -> Message:
        if worker == 0 and reply.has_content():
            told: Any = reply.content["fl-gradcode.reply"]
            values = {**json.loads(str(told["json"])), "shards": [target]}
            reply.content["fl-gradcode.reply"] = ConfigRecord({**told, "json": json.dumps(values)})
            for record in reply.content.array_records.values():
                for key in record:
                    record[key] = Array(np.full_like(record[key].numpy(), 7))
        return reply

    row = voted_round(tmp_path, code, lie, secure=secure)
    assert row["outcome"] == "exact" and 0 not in row["used"]
    assert {one["worker"] for one in row["rejected"]} == {0}


def test_more_liars_than_votes_are_said_and_nothing_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = reed_solomon(9, 4)
    dealt(tmp_path, code, min_classes=2)
    strategy, models, _ = start(code, tmp_path, votes=1, tamper=lying((2, 5), LIES["random"]))
    assert strategy.ledger.rows[0]["train"]["outcome"] == "skipped" and "more than votes=1" in caplog.text
    assert (flat(models[1]) == flat(initial_arrays())).all()


def test_liars_who_win_the_vote_do_not_get_past_the_check_words(tmp_path: Path) -> None:
    """The documented limit: e + 1 holders of a shard who agree on a lie. One that breaks the masks is still seen."""
    code = fractional_repetition(6, 2)
    pair = (code.groups or ())[0][:2]
    for lie, outcome in (("check words", "skipped"), ("one common error", "skipped"), ("one entry", "exact")):
        dealt(tmp_path / lie, code, min_classes=2)
        strategy, _, _ = start(
            code, tmp_path / lie, votes=1, tamper=lying(tuple(pair), LIES[lie]), latency=first(tuple(pair), ())
        )
        assert strategy.ledger.rows[0]["train"]["outcome"] == outcome


def test_a_shard_s_failure_has_no_culprit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = fractional_repetition(6, 2)
    dealt(tmp_path, code, min_classes=2)
    app = known_app(loss=lambda shard: float("inf") if shard == 1 else 1.0, weight=lambda j: -1 if j == 2 else 1)
    strategy, _, _ = start(code, tmp_path, app, votes=1)
    train = strategy.ledger.rows[0]["train"]
    assert (train["outcome"], train["rejected"]) == ("skipped", [])
    assert "1 of 6 shards failed on their holders" in caplog.text


def test_evaluations_are_voted_on_too(tmp_path: Path) -> None:
    from flwr.app import MetricRecord

    code = fractional_repetition(6, 2)
    dealt(tmp_path, code, min_classes=2, evaluation=[("accuracy", -1)])
    app = known_app(evaluated=lambda shard, message: MetricRecord({"num-examples": 2, "accuracy": shard / 10}))
    lie = lying((0,), LIES["one common error"])

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        plan = Plan.find_in(message.content)
        return lie(worker, message, reply) if plan is not None and plan.kind == "evaluate" else reply

    strategy, _, result = start(code, tmp_path, app, votes=1, tamper=tamper, latency=first((0,), ()))
    row = strategy.ledger.rows[0]["evaluate"]
    assert row["outcome"] == "exact" and [one["worker"] for one in row["rejected"]] == [0]
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.25)


# ---- settings ----


@pytest.mark.parametrize(
    ("code", "votes", "sentence"),
    [
        (fractional_repetition(6, 1), 1, "needs 3 holders of each shard"),
        (fractional_repetition(6, 2), 2, "needs 5 holders of each shard"),
        (reed_solomon(6, 1), 1, "takes two of the code's s=1 stragglers"),
    ],
    ids=str,
)
def test_too_few_holders_are_refused(tmp_path: Path, code: GradientCode, votes: int, sentence: str) -> None:
    secure = SecureAggregation(dealt(tmp_path, code, min_classes=2))
    with pytest.raises(InvalidSetting, match=sentence):
        GradientCoding(FedAvg(), code, secure=secure, votes=votes)


# ---- together with holders that compare what they compute ----


def test_a_holder_that_differs_later_sends_no_further_vector_and_the_others_go_on(tmp_path: Path) -> None:
    """As if the library of one holder were updated between the rounds."""
    code = fractional_repetition(6, 2)
    dealt(tmp_path, code, min_classes=2, rehearsal=True)
    group = (code.groups or ())[0]
    turns: list[int] = []

    def update(server_round: int, shard: int) -> Any:
        turns.extend([server_round] * (shard == code.shards_of(group[0])[0]))
        wrong = shard == code.shards_of(group[0])[0] and server_round == 2 and turns.count(2) == 2
        return update_for(server_round, shard) + np.float32(1e-3 * wrong)

    sent: list[Any] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        sent.append(message.content)
        return reply

    # All holders of the group are read: the second one differs from the first, and the third one decides.
    slow = Latency(compute=scaled(constant(1.0), {worker: 1.0 + worker / 100 for worker in range(6)}))
    strategy, _, _ = start(code, tmp_path, known_app(update), rounds=3, votes=1, verify=0, tamper=keep, latency=slow)
    rows = [row["train"] for row in strategy.ledger.rows]
    assert [row["outcome"] for row in rows] == ["exact"] * 3
    ((named, kind),) = {(one["worker"], one["kind"]) for row in rows for one in row["rejected"]}
    assert named in group and kind == "wrong-value"
    content = next(one for one in sent if (plan := Plan.find_in(one)) is not None and plan.label == "train 3")
    plan = Plan.find_in(content)
    assert plan is not None and {*group} <= {*plan.tags} and plan.tagged.startswith("train 2 ")
    asked = replace(plan, rows={w: Row(code.shards_of(w), ()) for w in range(6)}).add_to(Plan.remove_from(content))
    refused = []
    for worker in group:
        try:
            ask(known_app(), tmp_path, worker, asked)
        except SecureRefused:
            refused.append(worker)
    assert refused == [named]


def test_a_liar_in_a_rehearsal_stops_nobody(tmp_path: Path) -> None:
    code = fractional_repetition(6, 2)
    dealt(tmp_path, code, min_classes=2, rehearsal=True)
    lies = lying((1,), LIES["random"])  # in its tags too
    strategy, _, _ = start(code, tmp_path, votes=1, tamper=lies, latency=first((1,), ()))
    row = strategy.ledger.rows[0]["train"]
    assert row["outcome"] == "exact" and [one["worker"] for one in row["rejected"]] == [1]


def test_with_votes_a_holder_that_differs_in_the_rehearsal_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = fractional_repetition(6, 2)
    dealt(tmp_path, code, min_classes=2, rehearsal=True)
    turns: list[int] = []

    def update(server_round: int, shard: int) -> Any:
        turns.extend([server_round] * (shard == 0))
        return update_for(server_round, shard) + np.float32(1e-5 * (shard == 0 and len(turns) == 2))

    strategy, _, _ = start(code, tmp_path, known_app(update), votes=1, verify=0)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"
    assert "compute different integers from the same data" in caplog.text
    assert "The other holders of its shards go on without it" in caplog.text


def test_a_field_code_s_checks_hold_for_masked_replies() -> None:
    for code in (reed_solomon(6, 2), reed_solomon(7, 3, m=2)):
        assert isinstance(code.numbers, PrimeField)
        _, replies = sample_of(code)
        vectors = [[*replies[i].parts.values()] for i in range(code.n)]
        assert locate_wrong_replies(code, vectors, range(code.n), 1, lambda size: np.arange(1, size + 1)) == ()
