"""Votes, noise and masks together: holders' noisy copies are equal, so a liar is outvoted and nothing costs twice."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fl_gradcode import fractional_repetition
from fl_gradcode.copies import Ballots
from fl_gradcode.masking import RoundedSum, discrete_gaussian
from fl_gradcode.privacy import SHARDS_SPENT, BudgetLedger, CentralNoise, IntegerNoise
from fl_gradcode.protocol import Plan
from fl_gradcode.secagg import Manifest, MaskedReply, decode, encode
from fl_gradcode.secagg.keys import dither_key, noise_key
from fl_gradcode.strategy.reply_groups import MaskedReplies, same_words
from tests.conftest import flat, initial_arrays
from tests.enrolment import fleet
from tests.secagg.rounds import copy_of, dealt, known_app, start, update_for
from tests.secagg.samples import REQUEST, body_of, keys_of, results_for, sealed, seed_of
from tests.secagg.test_votes import LIES, altered, arrivals, first, lying

NOISE = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0)
NOISY: dict[str, Any] = {"metrics": [], "privacy": NOISE, "min_classes": 2}


# ---- exhaustively, at small n ----


def copies_of(manifest: Manifest, worker: int) -> dict[str, MaskedReply]:
    """The honest copy of a holder, and lies of one that knows the keys of its class, as every holder does."""
    body, results = manifest.body, results_for(manifest.body)
    (c,) = body.classes.sent_by(worker)
    ours = {j: results[j] for j in body.classes.members[c]}
    honest = encode(keys_of(manifest, worker), REQUEST, ours)
    bare = honest.parts["update"].copy()
    for j, result in ours.items():
        rounded = RoundedSum(body.quantiser, body.size)
        assert rounded.add(result.update, 1.0)
        integers, _, _ = rounded.finish(dither_key(seed_of(c), REQUEST, j))
        noise = discrete_gaussian(noise_key(seed_of(c), REQUEST, j, integers), body.quantiser.noise, body.size)
        bare -= noise.astype(np.int32).view(np.uint32)
    some, *_ = ours
    return {
        "honest": honest,
        "without noise": replace(honest, parts={**honest.parts, "update": bare}),
        "as if a shard had failed": encode(keys_of(manifest, worker), REQUEST, {**ours, some: None}),
        "another request": encode(keys_of(manifest, worker), bytes(32), ours),
        "one entry": altered(honest, LIES["one entry"]),
    }


@pytest.mark.parametrize(("s", "e"), [(0, 1), (1, 1), (0, 2)])
def test_whoever_lies_and_is_missing_only_the_noisy_copy_of_the_honest_is_decoded(s: int, e: int) -> None:
    r = s + 2 * e + 1
    code = fractional_repetition(2 * r, r - 1)
    manifest = sealed(body_of(code, metrics=0, colluders=0, min_classes=2, privacy=NOISE))
    copies = {i: copies_of(manifest, i) for i in range(code.n)}
    group, other = (list(one) for one in code.groups or ())
    (expected,) = decode(manifest, [copies[group[0]]["honest"], copies[other[0]]["honest"]])
    assert np.abs(expected.integers).max() > manifest.body.quantiser.noise  # there is noise in it
    cases = 0
    for liars in itertools.chain.from_iterable(itertools.combinations(group, size) for size in range(e + 1)):
        for gone in itertools.combinations(group, s):
            for lie, order in itertools.product([*copies[0]][1:], arrivals(group, liars, gone)):
                held = MaskedReplies(code, "R", manifest, ("a", "m"), Ballots(e + 1, same_words))
                for i in [*order, *other[: e + 1]]:
                    held.add(i, (100 + i, i), copies[i][lie if i in liars else "honest"])
                assert held.decoder.decodable and held.ballots is not None
                (total,) = decode(manifest, [*held.copies.values()])
                assert (total.integers == expected.integers).all()
                assert {who for who, _ in held.ballots.wrong().values()} == {*liars} - {*gone}
                cases += 1
    assert cases >= 20


def test_honest_copies_of_a_class_are_one_release() -> None:
    """All holders send the same bits, in both ways of sending, so that several copies tell what one tells."""
    code = fractional_repetition(6, 2)
    manifest = sealed(body_of(code, metrics=0, colluders=0, min_classes=2, privacy=NOISE))
    for group in code.groups or ():
        assert len({copies_of(manifest, i)["honest"].payload() for i in group}) == 1
    single = sealed(body_of(code, metrics=0, colluders=0, min_classes=2, privacy=NOISE, sending="shardwise"))
    results = results_for(single.body)
    for shard in range(code.k):
        holders = [i for i in range(code.n) if shard in code.shards_of(i)]
        sent = {encode(keys_of(single, i), REQUEST, {shard: results[shard]}, shard=shard).payload() for i in holders}
        assert len(holders) == 3 and len(sent) == 1


# ---- runs ----


@pytest.mark.parametrize(
    ("sending", "lie"), [("coded", "random"), ("coded", "check words"), ("shardwise", "one entry")]
)
def test_a_liar_changes_no_bit_of_the_noisy_model_and_each_round_costs_one_release(
    tmp_path: Path, sending: Any, lie: str
) -> None:
    code = fractional_repetition(8, 3)  # two groups of four
    dealt(tmp_path / "lied", code, sending=sending, **NOISY)
    copy_of(tmp_path / "lied", tmp_path / "honest")
    group = (code.groups or ())[0]
    options: dict[str, Any] = {"rounds": 2, "privacy": NOISE, "votes": 1, "verify": 0}
    _, expected, _ = start(code, tmp_path / "honest", **options)
    liar, gone = group[:2]
    strategy, models, _ = start(
        code, tmp_path / "lied", tamper=lying((liar,), LIES[lie]), latency=first((liar,), (gone,)), **options
    )
    trains = [row["train"] for row in strategy.ledger.rows]
    assert [train["outcome"] for train in trains] == ["exact"] * 2
    assert {(one["worker"], one["kind"]) for train in trains for one in train["rejected"]} == {(liar, "wrong-value")}
    for number in (1, 2):
        assert (flat(models[number]) == flat(expected[number])).all()
        assert trains[number - 1]["privacy"]["epsilon"] == pytest.approx(NOISE.epsilon(number))
    moved = (flat(models[1]) - flat(initial_arrays())) / (8.0 / math.sqrt(8))  # about standard normal
    assert 0.1 < float(np.square(moved).mean()) < 5
    for worker in range(code.n):
        ledger = BudgetLedger(tmp_path / "lied" / f"node-{worker}" / SHARDS_SPENT)
        for shard in code.shards_of(worker):
            entries = ledger.entries(shard)
            assert len({one.round for one in entries}) == len(entries) <= 2
            assert all(one.spend.steps == 1 for one in entries)


def test_a_holder_whose_training_fails_alone_counts_among_the_wrong_ones(tmp_path: Path) -> None:
    """It sends a zero update with noise of its own. The others outvote it, and the shard counts with its update."""
    code = fractional_repetition(6, 2)
    dealt(tmp_path / "failing", code, **NOISY)
    copy_of(tmp_path / "failing", tmp_path / "whole")
    calls: list[int] = []

    def update(server_round: int, shard: int) -> Any:
        calls.extend([shard] * (shard == 0))
        if len(calls) == 1 and shard == 0:
            raise MemoryError
        return update_for(server_round, shard)

    options: dict[str, Any] = {"privacy": NOISE, "votes": 1, "verify": 0}
    strategy, models, _ = start(code, tmp_path / "failing", known_app(update), **options)
    _, expected, _ = start(code, tmp_path / "whole", **options)
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "exact" and (flat(models[1]) == flat(expected[1])).all()
    named = [(one["worker"], one["kind"]) for one in train["rejected"]]
    assert not named or (named[0][1] == "wrong-value" and named[0][0] in (code.groups or ())[0])
    assert len(calls) == 3


def test_noise_on_the_server_is_added_once_to_the_sum_that_was_voted(tmp_path: Path) -> None:
    code = fractional_repetition(6, 2)
    privacy = CentralNoise(noise_multiplier=1e-3, clipping_norm=1.0)
    dealt(tmp_path, code, metrics=[], min_classes=2, clip="norm", bound=1.0, largest_weight=1.0)
    strategy, models, _ = start(
        code,
        tmp_path,
        rounds=2,
        votes=1,
        verify=0,
        privacy=privacy,
        tamper=lying((0,), LIES["one common error"]),
        latency=first((0,), ()),
    )
    trains = [row["train"] for row in strategy.ledger.rows]
    assert [train["outcome"] for train in trains] == ["exact"] * 2
    assert trains[1]["privacy"]["epsilon"] == pytest.approx(privacy.epsilon(2))
    assert {one["worker"] for train in trains for one in train["rejected"]} == {0}
    updates = [update_for(1, shard) for shard in range(code.k)]
    mean = np.mean([one * min(1.0, 1.0 / float(np.linalg.norm(one))) for one in updates], axis=0)
    off = flat(models[1]) - flat(initial_arrays()) - mean
    assert 0 < float(np.abs(off).max()) < 8 * 1e-3 / code.k


def test_a_liar_among_nodes_that_train_privately_changes_no_bit(tmp_path: Path) -> None:
    """Noise in training is the same at all holders of a shard, so masked copies of it are equal."""
    pytest.importorskip("opacus")
    from tests.privacy.private_app import settings
    from tests.secagg import test_private_training_masked as private

    code = fractional_repetition(6, 2)
    dealt(tmp_path / "lied", code, min_classes=2, **private.PRIVATE)
    copy_of(tmp_path / "lied", tmp_path / "honest")
    lie = lying((0,), LIES["one entry"])
    strategy, moved, _ = private.start(tmp_path / "lied", code=code, votes=1, verify=0, tamper=lie)
    _, expected, _ = private.start(tmp_path / "honest", code=code, votes=1, verify=0)
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "exact" and (moved == expected).all() and np.abs(moved).max() > 0.1
    assert train["privacy"]["epsilon"] == pytest.approx(settings().epsilon(1))
    assert {one["worker"] for one in train["rejected"]} <= {0}


def test_the_sum_s_noise_is_whole_though_a_liar_sends_none(tmp_path: Path) -> None:
    """Without votes, the first holder of a class decides whether its part of the noise is there."""
    code = fractional_repetition(8, 3)
    summed = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0, scope="sum")
    settings: dict[str, Any] = {"colluders": 0, "min_classes": 2, "rehearsal": True, "metrics": []}
    body = fleet.enrolled(tmp_path, code, privacy=summed, **settings)
    strategy, _, _ = fleet.start(
        code, tmp_path, privacy=summed, votes=1, verify=0, tamper=silenced(body), latency=first((0,), ())
    )
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "exact" and 0 not in train["used"]
    assert [(one["worker"], one["kind"]) for one in train["rejected"]] == [(0, "wrong-value")]
    assert train["privacy"]["epsilon"] == pytest.approx(summed.epsilon(1))


def silenced(body: Any) -> Any:
    """Worker 0 subtracts some noise from its vectors of training."""
    noise = discrete_gaussian(bytes(32), body.quantiser.noise, body.size).astype(np.int32).view(np.uint32)

    def lie(words: Any, who: int) -> Any:
        changed = words.copy()
        changed[: noise.size] -= noise
        return changed

    tampered = lying((0,), lie)

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        plan = Plan.find_in(message.content)
        return tampered(worker, message, reply) if plan is not None and plan.kind == "train" else reply

    return tamper
