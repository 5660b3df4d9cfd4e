"""Decoded sums are the unmasked integers, exactly, for every set of replies that decodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, islice, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode.codes import GradientCode, cyclic_repetition, fractional_repetition, reed_solomon, uncoded
from fl_gradcode.errors import NotDecodable
from fl_gradcode.masking.quantiser import RoundedSum
from fl_gradcode.secagg import ManifestBody, MaskedReply, ShardResult, decode
from fl_gradcode.secagg.keys import dither_key
from tests.secagg.samples import REQUEST, body_of, replies_of, results_for, sealed, seed_of

SMALL: list[tuple[GradientCode, dict[str, Any]]] = [
    (fractional_repetition(6, 1), {}),
    (fractional_repetition(7, 1, k=10), {"colluders": 1}),
    (fractional_repetition(8, 1), {"colluders": 2}),
    (fractional_repetition(8, 3), {"colluders": 0, "min_classes": 2}),
    (fractional_repetition(8, 1), {"cohorts": 2, "colluders": 0, "min_classes": 2}),
    (uncoded(5), {"colluders": 2}),
    (reed_solomon(5, 1), {}),
    (reed_solomon(7, 2), {}),
    (reed_solomon(8, 3), {"colluders": 0}),
    (reed_solomon(6, 2, k=4), {"colluders": 0, "min_classes": 2}),
    (reed_solomon(6, 1, m=2), {"colluders": 0}),
    (reed_solomon(7, 2, m=2), {"colluders": 0}),
]
SHARDWISE: list[tuple[GradientCode, dict[str, Any]]] = [
    (fractional_repetition(6, 1), {}),
    (reed_solomon(5, 1), {}),
    (reed_solomon(5, 1, m=2), {"colluders": 0}),
    (cyclic_repetition(5, 1, rng=np.random.default_rng(0)), {}),
]


def integers_of(body: ManifestBody, results: dict[int, ShardResult], shards: Sequence[int]) -> NDArray[np.int64]:
    """The sum of the shards' integers as the quantiser makes them, without masks, rings and codes."""
    total = np.zeros(body.size, np.int64)
    for c, members in enumerate(body.classes.members):
        if not {*members} <= {*shards}:
            continue
        made = RoundedSum(body.quantiser, body.size)
        for j in members:
            assert made.add(results[j].update, results[j].weight)
        integers, _, failed = made.finish(dither_key(seed_of(c), REQUEST, members[0]))
        assert not failed
        total += integers
    return total


def check(body: ManifestBody, results: dict[int, ShardResult], replies: list[MaskedReply]) -> None:
    manifest = sealed(body)
    for found in decode(manifest, replies):
        assert (found.integers == integers_of(body, results, found.shards)).all()
        assert found.weight == sum(results[j].weight for j in found.shards)
        expected = sum(results[j].metrics for j in found.shards)
        np.testing.assert_allclose(found.metrics, expected, rtol=0, atol=len(found.shards) * 2.0**-31)


@pytest.mark.parametrize(("code", "settings"), SMALL, ids=str)
def test_every_decodable_set_gives_the_sum(code: GradientCode, settings: dict[str, Any]) -> None:
    body = body_of(code, largest_weight=4.0, **settings)
    results = results_for(body, weight=3.0)
    replies = replies_of(sealed(body), results)
    early = 0
    for count in range(1, code.n + 1):
        for survivors in combinations(range(code.n), count):
            arrived = [replies[i] for i in reversed(survivors)]
            if code.decodable(survivors):
                early += count < code.n - code.s
                check(body, results, arrived)
            else:
                with pytest.raises(NotDecodable):
                    decode(sealed(body), arrived)
    assert early or code.groups is None or code.s == 0


@pytest.mark.parametrize(("code", "settings"), SHARDWISE, ids=str)
def test_every_complete_set_of_single_shards_gives_the_sum(code: GradientCode, settings: dict[str, Any]) -> None:
    body = body_of(code, sending="shardwise", **settings)
    results = results_for(body)
    replies = replies_of(sealed(body), results)
    rng = np.random.default_rng(0)
    complete = 0
    for _ in range(400):
        some = [replies[i] for i in rng.permutation(len(replies))[: rng.integers(1, len(replies) + 1)]]
        if {reply.number for reply in some} == {*range(code.k)}:
            complete += 1
            check(body, results, some)
        else:
            with pytest.raises(NotDecodable, match="No reply of shard"):
                decode(sealed(body), some)
    assert 20 < complete < 380


@pytest.mark.parametrize(("code", "settings"), SHARDWISE, ids=str)
def test_whoever_sends_each_single_shard_the_sum_is_the_same(code: GradientCode, settings: dict[str, Any]) -> None:
    """All choices of a holder for each shard, and none of them is decodable without one of its shards."""
    body = body_of(code, sending="shardwise", size=3, **settings)
    results = results_for(body)
    of_shard: list[list[MaskedReply]] = [[] for _ in range(code.k)]
    for reply in replies_of(sealed(body), results):
        assert reply.number is not None
        of_shard[reply.number].append(reply)
    for copies in of_shard:
        assert len({reply.payload() for reply in copies}) == 1
    for chosen in islice(product(*of_shard), 300):
        check(body, results, list(chosen))
        with pytest.raises(NotDecodable):
            decode(sealed(body), chosen[1:])


def test_a_thousand_choices_of_two_hundred_workers_single_shards_give_the_sum() -> None:
    code = fractional_repetition(200, 3)
    body = body_of(code, sending="shardwise", colluders=0, size=3, metrics=0)
    results = results_for(body)
    manifest = sealed(body)
    of_shard: list[list[MaskedReply]] = [[] for _ in range(code.k)]
    for reply in replies_of(manifest, results):
        assert reply.number is not None
        of_shard[reply.number].append(reply)
    expected = integers_of(body, results, range(200))
    rng = np.random.default_rng(1)
    for _ in range(1000):
        chosen = [copies[rng.integers(len(copies))] for copies in of_shard]
        rng.shuffle(chosen)
        (found,) = decode(manifest, chosen)
        assert (found.integers == expected).all()


@pytest.mark.parametrize(
    ("code", "colluders"),
    [(fractional_repetition(200, 3), 2), (reed_solomon(200, 3), 0), (reed_solomon(200, 3, m=2), 0)],
    ids=str,
)
def test_a_thousand_sets_of_two_hundred_workers_give_the_sum(code: GradientCode, colluders: int) -> None:
    body = body_of(code, colluders=colluders, size=4, metrics=0)
    results = results_for(body)
    manifest = sealed(body)
    replies = replies_of(manifest, results)
    expected = integers_of(body, results, range(200))
    rng = np.random.default_rng(1)
    for _ in range(1000 if code.m == 1 else 100):
        order, count = rng.permutation(200).tolist(), 200 - int(rng.integers(0, code.s + 1))
        if code.groups is not None:  # as early as it decodes
            decoder = code.incremental()
            count = next(number for number, worker in enumerate(order, start=1) if decoder.add(worker))
        (found,) = decode(manifest, [replies[i] for i in order[:count]])
        assert (found.integers == expected).all()


def test_replies_of_two_attempts_go_together() -> None:
    body = body_of(fractional_repetition(6, 1))
    results = results_for(body)
    replies = replies_of(sealed(body), results)
    check(body, results, [replies[0], replies[1], replies[0], replies[1], replies[5]])


def test_replies_travel_as_bytes() -> None:
    body = body_of(reed_solomon(6, 1, m=2), colluders=0, size=5)
    manifest, results = sealed(body), results_for(body_of(reed_solomon(6, 1, m=2), colluders=0, size=5))
    received = [
        MaskedReply.from_payload(
            body, one.payload(), worker=one.worker, manifest=one.manifest, request=one.request, number=one.number
        )
        for one in replies_of(manifest, results)
    ]
    check(body, results, received[1:])
    given: dict[str, Any] = {"worker": 0, "manifest": manifest.digest, "request": REQUEST, "number": None}
    with pytest.raises(ValueError, match="words, not"):
        MaskedReply.from_payload(body, received[0].payload()[4:], **given)
    with pytest.raises(ValueError, match="outside its ring"):
        MaskedReply.from_payload(body, b"\xff" * len(received[0].payload()), **given)


def test_the_mean_is_that_of_the_clipped_updates() -> None:
    body = body_of(fractional_repetition(8, 1), largest_weight=100.0, size=50)
    results = {j: ShardResult(one.update * 4, float(10 + j), one.metrics) for j, one in results_for(body).items()}
    (found,) = decode(sealed(body), replies_of(sealed(body), results))
    weights = sum(one.weight for one in results.values())
    expected = sum(one.weight * np.clip(one.update.astype(float), -1, 1) for one in results.values()) / weights
    error = 4 * 2.0**-body.quantiser.fraction_bits * 100 / weights  # one unit for each of the 4 classes
    np.testing.assert_allclose(found.mean(), expected, rtol=0, atol=error)
    assert found.clipped == sum(int((np.abs(one.update.astype(float)) > 1).sum()) for one in results.values())
