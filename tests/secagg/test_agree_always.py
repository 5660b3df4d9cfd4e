"""agree="always": a vector leaves once a majority of the holders has shown the same integers, in every round."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from typer.testing import CliRunner

from fl_gradcode import fractional_repetition
from fl_gradcode.cli.app import app as command_line
from fl_gradcode.client.rehearsal import ComparedHolders
from fl_gradcode.codes import reed_solomon
from fl_gradcode.errors import InvalidSetting, SecureRefused
from fl_gradcode.latency import Latency, constant, lognormal, scaled
from fl_gradcode.privacy import SHARDS_SPENT, BudgetLedger, IntegerNoise
from fl_gradcode.protocol import Plan, Reply
from fl_gradcode.secagg import make_body
from tests.conftest import flat
from tests.secagg.rounds import ARRAYS, ask, copy_of, dealt, known_app, start, update_for
from tests.secagg.samples import REQUEST, body_of, keys_of, results_for, sealed
from tests.secagg.samples import class_integers as integers_of
from tests.secagg.test_votes import LIES, lying

FRC = fractional_repetition(6, 2)  # two groups of three
#: All answer within a tenth of the first ones' time, for which the server waits on.
CLOSE = Latency(compute=scaled(constant(1.0), {worker: 1.0 + worker / 100 for worker in range(6)}))
ALWAYS: dict[str, Any] = {"min_classes": 2, "agree": "always"}


class Seen:
    """What reached the server: (worker, plan, whether its reply has a vector, the reply)."""

    def __init__(self, then: Any = lambda worker, message, reply: reply) -> None:
        self.replies: list[tuple[int, Plan, bool, Message]] = []
        self.messages: dict[int, list[Any]] = {}
        self._then = then

    def __call__(self, worker: int, message: Message, reply: Message) -> Message:
        plan = Plan.find_in(message.content)
        assert plan is not None
        self.messages.setdefault(worker, []).append(message.content)
        answer: Message = self._then(worker, message, reply)
        vector = answer.has_content() and "fl-gradcode.update" in answer.content
        self.replies.append((worker, plan, vector, answer))
        return answer

    def vectors(self, server_round: int) -> set[int]:
        return {worker for worker, plan, vector, _ in self.replies if vector and plan.round == server_round}


# ---- runs ----


@pytest.mark.parametrize("code", [FRC, reed_solomon(6, 2)], ids=str)
def test_holders_that_agree_go_on_as_without_and_train_once(tmp_path: Path, code: Any) -> None:
    dealt(tmp_path / "plain", code, min_classes=2)
    dealt(tmp_path / "nodes", code, **ALWAYS)
    latency, seen = Latency(compute=lognormal(1.0, 0.5)), Seen()
    trained: Counter[tuple[int, int]] = Counter()

    def update(server_round: int, shard: int) -> Any:
        trained[server_round, shard] += 1
        return update_for(server_round, shard)

    strategy, models, _ = start(code, tmp_path / "nodes", known_app(update), rounds=3, latency=latency, tamper=seen)
    plain, others, _ = start(code, tmp_path / "plain", rounds=3, latency=latency)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 3
    assert np.abs(flat(models[3]) - flat(others[3])).max() < 1e-4  # other manifests have other dithers
    assert max(trained.values()) <= len(code.holders_of(0))
    for row, other in zip(strategy.ledger.rows, plain.ledger.rows, strict=True):  # the ledger counts both exchanges
        train, once = row["train"], other["train"]
        assert train["bytes-down"] > once["bytes-down"] and train["bytes-up"] > once["bytes-up"]
        assert train["seconds"]["waiting"] >= min(job["seconds"] for job in train["timings"]) > 0.5
    for worker, plan, vector, _ in seen.replies:
        assert vector <= bool(plan.tagged), worker  # no vector before the tags have been shown
    for content in itertools.chain.from_iterable(seen.messages.values()):
        found = Plan.find_in(content)
        assert found is not None and bool(found.tagged) != ("arrays" in content)  # the model is sent once


def test_a_holder_that_differs_sends_no_vector_and_the_majority_goes_on(tmp_path: Path) -> None:
    """From round 2 on, the first one of a group to train shard 0 gets another update than the others."""
    dealt(tmp_path, FRC, **ALWAYS)
    group = next(one for one in FRC.groups or () if 0 in FRC.shards_of(one[0]))
    turns: Counter[int] = Counter()

    def update(server_round: int, shard: int) -> Any:
        turns[server_round] += shard == 0
        wrong = server_round == 2 and shard == 0 and turns[2] == 1
        return update_for(server_round, shard) + np.float32(1e-3 * wrong)

    seen = Seen()
    strategy, _, _ = start(FRC, tmp_path, known_app(update), rounds=3, latency=CLOSE, tamper=seen)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 3
    refused = {
        worker
        for worker, plan, _, reply in seen.replies
        if plan.round == 2 and reply.has_error() and "different integers" in str(reply.error.reason)
    }
    assert len(refused) == 1 and refused < {*group} and not refused & seen.vectors(2)


def test_two_holders_that_differ_lose_the_round_and_show_nothing(tmp_path: Path) -> None:
    code = fractional_repetition(6, 1)
    dealt(tmp_path, code, agree="always")
    turns: Counter[int] = Counter()

    def update(server_round: int, shard: int) -> Any:
        turns[shard] += 1
        return update_for(server_round, shard) + np.float32(1e-3 * (shard == 0 and turns[0] == 1))

    seen = Seen()
    strategy, _, _ = start(code, tmp_path, known_app(update), tamper=seen)
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "skipped"
    assert any("compute different integers" in (one["reason"] or "") for one in train["rejected"])
    holders = {worker for worker in range(code.n) if 0 in code.shards_of(worker)}
    assert not holders & seen.vectors(1)


@pytest.mark.parametrize(("gone", "outcome"), [((0,), "exact"), ((0, 2), "skipped")])
def test_more_than_half_of_the_holders_have_to_answer(tmp_path: Path, gone: tuple[int, ...], outcome: str) -> None:
    dealt(tmp_path, FRC, **ALWAYS)
    assert {*gone} <= {*next(one for one in FRC.groups or () if 0 in one)}

    def lose(worker: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, "killed"), reply_to=message) if worker in gone else reply

    seen = Seen(lose)
    strategy, _, _ = start(FRC, tmp_path, tamper=seen)
    assert strategy.ledger.rows[0]["train"]["outcome"] == outcome
    if outcome == "skipped":
        assert not seen.vectors(1) & {*next(one for one in FRC.groups or () if 0 in one)}


def test_evaluations_are_compared_first_too(tmp_path: Path) -> None:
    dealt(tmp_path, FRC, evaluation=[("accuracy", -1)], **ALWAYS)
    app = known_app(evaluated=lambda shard, message: MetricRecord({"num-examples": 2, "accuracy": shard / 10}))
    seen = Seen()
    strategy, _, result = start(FRC, tmp_path, app, tamper=seen)
    assert strategy.ledger.rows[0]["evaluate"]["outcome"] == "exact"
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.25)
    assert {bool(plan.tagged) for _, plan, vector, _ in seen.replies if plan.kind == "evaluate" and vector} == {True}


def another_request(worker: int, message: Message, reply: Message) -> Message:
    if worker == 0 and reply.has_content():
        told: Any = reply.content["fl-gradcode.reply"]
        text = str(told["json"])
        at = text.index('"request": "') + len('"request": "')
        reply.content["fl-gradcode.reply"] = ConfigRecord({**told, "json": text[:at] + "ab" * 32 + text[at + 64 :]})
    return reply


def other_tags(worker: int, message: Message, reply: Message) -> Message:
    reply = lying((0,), LIES["random"])(worker, message, reply)
    if worker == 0 and reply.has_content():
        told: Any = reply.content["fl-gradcode.reply"]
        text = str(told["json"])
        at = text.index('"tags": "') + len('"tags": "')
        reply.content["fl-gradcode.reply"] = ConfigRecord({**told, "json": text[:at] + "ab" * 32 + text[at + 64 :]})
    return reply


@pytest.mark.parametrize("lie", [another_request, other_tags])
def test_a_liar_among_the_holders_is_outvoted(tmp_path: Path, lie: Any) -> None:
    dealt(tmp_path / "lied", FRC, **ALWAYS)
    copy_of(tmp_path / "lied", tmp_path / "honest")
    strategy, models, _ = start(FRC, tmp_path / "lied", votes=1, verify=0, latency=CLOSE, tamper=lie)
    _, expected, _ = start(FRC, tmp_path / "honest", verify=0)
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "exact" and 0 not in train["used"]
    assert (flat(models[1]) == flat(expected[1])).all()


def test_integer_noise_is_charged_once_a_round(tmp_path: Path) -> None:
    noise = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0)
    dealt(tmp_path, FRC, metrics=[], privacy=noise, **ALWAYS)
    strategy, _, _ = start(FRC, tmp_path, rounds=2, privacy=noise)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(noise.epsilon(2))
    for worker in range(FRC.n):
        ledger = BudgetLedger(tmp_path / f"node-{worker}" / SHARDS_SPENT)
        for shard in FRC.shards_of(worker):
            rounds = [one.round for one in ledger.entries(shard)]
            assert rounds == sorted({*rounds}) and {*rounds} <= {1, 2}


# ---- what a node does, whatever the server sends ----


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Any, dict[int, Reply]]:
    """Fresh nodes, a plan for all of them with its other records, and the tags of worker 0 and its fellows."""
    folder = tmp_path_factory.mktemp("nodes")
    dealt(folder / "fresh", FRC, **ALWAYS)
    copy_of(folder / "fresh", folder / "used")
    seen = Seen()
    start(FRC, folder / "used", tamper=seen)
    content = seen.messages[0][0]
    plan = Plan.find_in(content)
    assert plan is not None and not plan.tagged
    rows = {worker: replace(plan.rows[0], shards=FRC.shards_of(worker)) for worker in range(FRC.n)}
    plan, rest = replace(plan, rows=rows), Plan.remove_from(content)
    tags = {w: _reply(ask(known_app(), folder / "used", w, plan.add_to(rest))) for w in range(FRC.n)}
    return folder / "fresh", plan, rest, tags


def _reply(message: Message) -> Reply:
    reply = Reply.find_in(message.content)
    assert reply is not None
    return reply


def test_a_vector_leaves_only_for_the_true_tags_of_a_majority(
    tmp_path: Path, told: tuple[Path, Plan, Any, dict[int, Reply]]
) -> None:
    folder, plan, rest, tags = copy_of(told[0], tmp_path / "nodes"), told[1], told[2], told[3]
    one, two = (worker for worker in next(group for group in FRC.groups or () if 0 in group) if worker)
    trained: list[int] = []
    app = known_app(before=lambda shard, message, context: trained.append(shard))
    right = replace(plan, tags={one: tags[one].tags}, tagged=f"train 1 {tags[one].request}")
    with pytest.raises(SecureRefused, match="computed nothing for the request of train 1"):
        ask(app, folder, 0, right.add_to(rest))
    for _ in range(2):  # the second time from what it has kept
        reply = ask(app, folder, 0, plan.add_to(rest))
        mine = _reply(reply)
        assert {*reply.content} == {"fl-gradcode.reply"}
        assert (mine.request, len(mine.tags)) == (tags[one].request, 64)
    assert len(trained) == len(FRC.shards_of(0))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tags": {}}, "1 of the 3 holders"),
        ({"tags": {0: mine.tags}}, "1 of the 3 holders"),
        ({"tags": {one: mine.tags, two: mine.tags}}, "different integers"),  # its own, shown back
        ({"tags": {one: tags[two].tags, two: tags[one].tags}}, "different integers"),
        ({"tags": {one: "." * 64}}, "1 of the 3 holders"),
        ({"tagged": f"train 1 {'ab' * 32}"}, "computed nothing"),
        ({"tagged": f"train 2 {mine.request}"}, "computed nothing"),
        ({"tagged": "train 1 "}, "computed nothing"),
        ({"tagged": "x"}, "computed nothing"),
        ({"round": 2, "tagged": f"train 2 {mine.request}"}, "computed nothing"),
        ({"run": "another"}, "computed nothing"),
        ({"kind": "rehearse", "number": 1, "tags": {}, "tagged": ""}, "no rehearsal"),
        ({"kind": "compare"}, "has not rehearsed"),
        ({"seed": 5, "tags": {}, "tagged": ""}, "Another request"),
    ]
    for changed, match in wrong:
        with pytest.raises(SecureRefused, match=match):
            ask(app, folder, 0, replace(right, **changed).add_to(rest))
    first = ask(app, folder, 0, right.add_to(rest))
    again = ask(app, folder, 0, replace(right, tags={two: tags[two].tags}).add_to(rest))
    words = [_words(reply) for reply in (first, again)]
    assert (words[0] == words[1]).all() and len(trained) == len(FRC.shards_of(0))


def _words(reply: Message) -> Any:
    record = reply.content["fl-gradcode.update"]
    assert isinstance(record, ArrayRecord)
    masked: Array = record["masked"]
    return masked.numpy()


def test_an_answer_that_another_process_has_computed_needs_its_own_tags(
    tmp_path: Path, told: tuple[Path, Plan, Any, dict[int, Reply]]
) -> None:
    """Two processes compute a request at once, with different integers; the answer of one is kept, the tags of both."""
    folder, plan, rest, tags = copy_of(told[0], tmp_path / "nodes"), told[1], told[2], told[3]
    one = next(worker for worker in next(group for group in FRC.groups or () if 0 in group) if worker)
    ask(known_app(), folder, 0, plan.add_to(rest))
    copy_of(folder, tmp_path / "other")
    state = folder / "node-0" / "comparisons.json"
    text, own = state.read_text(), tags[0].tags
    assert text.count(own) == 1
    right = replace(plan, tags={one: tags[one].tags}, tagged=f"train 1 {tags[one].request}")
    assert _words(ask(known_app(), tmp_path / "other", 0, right.add_to(rest))).size
    state.write_text(text.replace(own, "ab" * 32))
    with pytest.raises(SecureRefused, match="no answer to train 1 of which it is shown the tags"):
        ask(known_app(), folder, 0, right.add_to(rest))


def shown_in_all_ways(issued: list[str]) -> Iterator[dict[int, str]]:
    """Whatever a server can show of three holders: for each one nothing, or any tag that it has seen."""
    for choice in itertools.product(["", *issued], repeat=3):
        yield {worker: tag for worker, tag in enumerate(choice) if tag}


@pytest.mark.parametrize("pattern", ["AAA", "AAB", "ABC", "AAF", "ABF", "AFF", "FFF"])
def test_answers_that_differ_never_leave_together_whatever_tags_are_shown(tmp_path: Path, pattern: str) -> None:
    """Three holders with integers A, B or C, or a failed training F; the server has seen all their tags."""
    code = fractional_repetition(6, 2)
    manifest = sealed(body_of(code, colluders=0, min_classes=2, agree="always"))
    (group, _) = code.groups or ()
    (c,) = manifest.body.classes.sent_by(group[0])
    results = results_for(manifest.body)
    holders, issued = [], []
    for place, letter in enumerate(pattern):
        (folder := tmp_path / str(place)).mkdir()
        holder = ComparedHolders(folder, keys_of(manifest, group[place]), "run")
        known: dict[int, Any] = {j: results[j] for j in manifest.body.classes.members[c]}
        if letter == "F":
            known[next(iter(known))] = None
        parts = integers_of(manifest.body, c, known)
        parts["update"][0] += np.uint32({"B": 1, "C": 2}.get(letter, 0))
        holders.append(holder)
        issued.append(holder.note("train 1", REQUEST, {c: parts}).hex())
    left = set()
    for place, shown in itertools.product(range(3), shown_in_all_ways(issued)):
        try:
            holders[place].agreed("train 1", {group[i]: tag for i, tag in shown.items()}, f"train 1 {REQUEST.hex()}")
        except SecureRefused:
            continue
        left.add(place)
    most = Counter(pattern).most_common(1)[0]
    assert left == ({i for i, letter in enumerate(pattern) if letter == most[0]} if most[1] > 1 else set())


@pytest.mark.parametrize("place", range(3))
def test_a_majority_is_needed_for_each_class_of_a_worker(tmp_path: Path, place: int) -> None:
    """Worker 0 of a Reed-Solomon code computes one of its three classes otherwise than all others."""
    code = reed_solomon(6, 2)
    manifest = sealed(body_of(code, colluders=0, agree="always"))
    results, own = results_for(manifest.body), manifest.body.classes.sent_by(0)
    assert len(own) == 3
    holders, tags = [], {}
    for worker in range(code.n):
        (folder := tmp_path / str(worker)).mkdir()
        holders.append(ComparedHolders(folder, keys_of(manifest, worker), "run"))
        parts = {c: integers_of(manifest.body, c, results) for c in manifest.body.classes.sent_by(worker)}
        if worker == 0:
            parts[own[place]]["update"][0] += np.uint32(1)
        tags[worker] = holders[worker].note("train 1", REQUEST, parts).hex()
    with pytest.raises(SecureRefused, match="Workers 0 and . compute different integers"):
        holders[0].agreed("train 1", tags, f"train 1 {REQUEST.hex()}")
    for holder in holders[1:]:
        holder.agreed("train 1", tags, f"train 1 {REQUEST.hex()}")


# ---- manifests ----


def test_manifests_that_cannot_compare_in_each_round_are_not_made(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sending": "shardwise", "agree": "always"}, "needs coded vectors"),
        ({"rehearsal": True, "agree": "always"}, "leave rehearsal= out"),
        ({"agree": "sometimes"}, "agree='sometimes' must be 'always'"),
    ]
    for settings, match in cases:
        with pytest.raises(InvalidSetting, match=match):
            make_body(FRC, arrays=ARRAYS, min_classes=2, colluders=0, **settings)
    body = make_body(FRC, arrays=ARRAYS, min_classes=2, colluders=0, agree="always")
    assert (body.always, body.rehearsal) == (True, False)
    with pytest.raises(InvalidSetting, match="its rehearsal is 3"):
        type(body).from_bytes(body.text.replace(b'"rehearsal":2', b'"rehearsal":3'))


def test_noise_in_the_sum_goes_with_a_comparison_in_each_round() -> None:
    settings: dict[str, Any] = {"identities": [f"{i:064x}" for i in range(6)], "min_classes": 2, "colluders": 0}
    noise = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0, scope="sum")
    assert make_body(FRC, arrays=ARRAYS, privacy=noise, agree="always", **settings).scope == "sum"


def test_the_command_line_makes_and_shows_it(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text('{"arrays": [["w", "float32", [3]]]}')
    make = f"secure make {tmp_path / 'keys'} --layout {tmp_path / 'layout.json'} -n 6 -s 2 --largest-weight 3"
    found = CliRunner().invoke(command_line, f"{make} --min-classes 2 --colluders 0 --agree-always".split())
    assert found.exit_code == 0 and "compared    before the vectors of each round" in found.output
    shown = CliRunner().invoke(command_line, ["secure", "check", str(tmp_path / "keys" / "node-0")])
    assert "compared    before the vectors of each round" in shown.output
