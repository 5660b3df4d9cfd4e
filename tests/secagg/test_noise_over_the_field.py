"""Noise under masks where replies mix shards: codes over the prime field, and overlapping shards one by one."""

from __future__ import annotations

import itertools
import math
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCode, GradientCoding, VirtualGrid, cyclic_repetition
from fl_gradcode.codes import reed_solomon
from fl_gradcode.errors import InvalidSetting, OutOfRange, SecureRefused
from fl_gradcode.latency import Latency, lognormal
from fl_gradcode.masking import INTEGERS, RoundedSum, discrete_gaussian
from fl_gradcode.privacy import SHARDS_SPENT, BudgetLedger, CentralNoise, IntegerNoise
from fl_gradcode.secagg import (
    SecureAggregation,
    ShardClasses,
    choose_graph,
    classes_for,
    counted_shards,
    decode,
    encode,
    leakage,
    read_manifest,
    sensitivity,
)
from fl_gradcode.secagg.keys import dither_key, noise_key
from tests.conftest import flat, initial_arrays
from tests.enrolment import fleet
from tests.secagg.rounds import copy_of, dealt, grid_of, known_app, start, update_for
from tests.secagg.samples import REQUEST, body_of, keys_of, results_for, sealed, seed_of
from tests.secagg.test_votes import LIES, first, lying

NOISE = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0)
NOISY: dict[str, Any] = {"metrics": [], "privacy": NOISE}
FIELD = reed_solomon(6, 1)
HALVES = reed_solomon(6, 2, m=2)
CYCLIC = cyclic_repetition(6, 1, rng=np.random.default_rng(0))
CODES = [(FIELD, "coded"), (HALVES, "coded"), (CYCLIC, "shardwise"), (FIELD, "shardwise")]
NAMES = ["field", "field, m = 2", "cyclic, one shard a message", "field, one shard a message"]


# ---- what is decoded ----


@pytest.mark.parametrize("code", [reed_solomon(5, 1), reed_solomon(5, 2), reed_solomon(5, 2, m=2)], ids=str)
def test_every_decodable_set_gives_the_integers_with_the_noise_of_every_shard(code: GradientCode) -> None:
    manifest = sealed(body_of(code, metrics=0, colluders=0, privacy=NOISE))
    body, results = manifest.body, results_for(manifest.body)
    expected = np.zeros(body.size, np.int64)
    for j in range(code.k):  # each shard is a class
        rounded = RoundedSum(body.quantiser, body.size)
        assert rounded.add(results[j].update, 1.0)
        integers, _, _ = rounded.finish(dither_key(seed_of(j), REQUEST, j))
        noise = discrete_gaussian(noise_key(seed_of(j), REQUEST, j, integers), body.quantiser.noise, body.size)
        expected += integers + noise.astype(np.int64)
    assert np.abs(expected).max() > body.quantiser.noise
    replies = [encode(keys_of(manifest, i), REQUEST, {j: results[j] for j in code.shards_of(i)}) for i in range(code.n)]
    enough = code.n - code.s
    for some in itertools.chain.from_iterable(itertools.combinations(replies, size) for size in (enough, code.n)):
        (total,) = decode(manifest, list(some))
        assert (total.integers == expected).all()


@pytest.mark.parametrize(("code", "sending"), CODES, ids=NAMES)
def test_the_decoded_noise_has_the_stated_variance_and_every_node_charges_once(
    tmp_path: Path, code: GradientCode, sending: Any
) -> None:
    size, rounds = 3000, 2
    body = dealt_noisy(tmp_path, code, sending=sending, arrays=[("0", "float32", (size,))]).body
    app = known_app(lambda server_round, shard: np.zeros(size, np.float32))
    models = [np.zeros(size)]
    strategy = GradientCoding(
        FedAvg(),
        code,
        privacy=NOISE,
        secure=SecureAggregation(read_manifest(tmp_path / "node-0")),
        send="shards" if sending == "shardwise" else "coded",
        on_round_end=lambda number, arrays, row: models.append(flat(arrays)),
        verify=0,
    )
    with grid_of(app, tmp_path, code.n) as inner:
        grid = VirtualGrid(inner, Latency(compute=lognormal(1.0, 0.5)), seed=3)
        strategy.start(grid, ArrayRecord([np.zeros(size, np.float32)]), num_rounds=rounds)
    moved = np.concatenate([after - before for before, after in itertools.pairwise(models)])
    largest_change = 2.0 + math.sqrt(size) * 2.0**-body.quantiser.fraction_bits
    variance = code.k * (4.0 * largest_change / code.k) ** 2
    # Keys are drawn anew each time: one run in 10^11 is off.
    assert abs(float(moved.var()) / variance - 1) < 7 * math.sqrt(2 / moved.size)
    assert abs(float(moved.mean())) < 7 * math.sqrt(variance / moved.size)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * rounds
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(NOISE.epsilon(rounds))
    for worker in range(code.n):
        ledger = BudgetLedger(tmp_path / f"node-{worker}" / SHARDS_SPENT)
        for shard in code.shards_of(worker):
            spent = [(one.round, one.spend.steps) for one in ledger.entries(shard)]
            assert spent == sorted({*spent}) and {steps for _, steps in spent} <= {1}


def dealt_noisy(folder: Path, code: GradientCode, **settings: Any) -> Any:
    return dealt(folder, code, **{**NOISY, "bound": 1.0, "largest_weight": 1.0, **settings})


def test_an_untrusted_server_costs_a_release_for_each_holder_of_a_shard(tmp_path: Path) -> None:
    dealt_noisy(tmp_path, HALVES)
    owner = {"honest-server": False}
    strategy, _, _ = start(HALVES, tmp_path, privacy=NOISE, owner=owner, verify=0)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"
    holders = len([i for i in range(HALVES.n) if 0 in HALVES.shards_of(i)])
    assert holders == 4
    for worker in range(HALVES.n):
        ledger = BudgetLedger(tmp_path / f"node-{worker}" / SHARDS_SPENT)
        for shard in HALVES.shards_of(worker):
            assert all(one.spend.steps == holders for one in ledger.entries(shard))


# ---- what a server and colluders learn ----


@pytest.mark.parametrize(
    ("code", "sending", "colluders"),
    [
        (reed_solomon(5, 1), "coded", 1),
        (reed_solomon(5, 2, m=2), "coded", 0),
        (reed_solomon(6, 2, m=2), "coded", 1),
        (CYCLIC, "shardwise", 1),
    ],
    ids=str,
)
def test_a_shard_of_honest_holders_enters_at_most_one_sum_a_holder_whoever_is_asked_what(
    code: GradientCode, sending: Any, colluders: int
) -> None:
    """The server splits the honest workers among requests in every way. Parts of sums count, too: with m = 2, fewer
    replies than decode may give a combination of the two halves."""
    classes = classes_for(code, sending)
    graph, _ = choose_graph(classes, colluders=colluders, min_classes=2)
    parts = False
    for number in range(colluders + 1):
        for colluding in itertools.combinations(range(code.n), number):
            honest = [i for i in range(code.n) if i not in colluding]
            known = {c for i in colluding for c in classes.supports[i]}
            fewest = min(len(classes.holders[c]) for c in range(len(classes)) if c not in known)

            @cache
            def learnt(asked: tuple[int, ...], colluding: tuple[int, ...] = colluding) -> int:
                missing = {*range(code.n)} - {*asked} - {*colluding}
                found = leakage(classes, graph, colluders=colluding, missing=missing)
                assert found.protects and found.dimensions <= classes.m
                return found.dimensions

            for requests in itertools.product(range(fewest + 1), repeat=len(honest)):
                asked = [tuple(i for i, its in zip(honest, requests, strict=True) if its == r) for r in {*requests}]
                found = [learnt(one) for one in asked]
                parts = parts or 1 in found
                assert sum(dimensions > 0 for dimensions in found) <= fewest
    assert parts


def test_no_set_of_colluders_knows_the_noise_of_more_shards_than_are_left_out_of_the_count() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        n, number = random.integers(1, 6, 2).tolist()
        ends = np.cumsum([0, *random.integers(1, 4, number)]).tolist()
        members = tuple(tuple(range(*pair)) for pair in itertools.pairwise(ends))
        given = random.random((n, number)) < random.choice([0.3, 0.6])
        holders = tuple(tuple(np.flatnonzero(column).tolist()) for column in given.T)
        classes = ShardClasses(members, given[:, :, None].astype(np.int64), holders, "shardwise", INTEGERS, 0)
        for colluders in range(n + 1):
            least = min(
                classes.k - sum(len(members[c]) for c in {c for i in some for c in classes.supports[i]})
                for some in itertools.combinations(range(n), colluders)
            )
            assert 0 <= counted_shards(classes, colluders) <= least


# ---- holders that differ ----


def test_replies_of_holders_that_differ_show_a_difference_with_two_noises() -> None:
    """Training fails at one holder alone. What the code's check then tells is the failed shard's part alone."""
    size = 400
    code = reed_solomon(4, 1)
    manifest = sealed(body_of(code, size=size, metrics=0, privacy=NOISE))
    results, p = results_for(manifest.body), 2**31 - 1

    def replies(failed: int | None) -> list[Any]:
        return [
            encode(keys_of(manifest, i), REQUEST, {j: None if (i, j) == (0, failed) else results[j] for j in held})
            for i, held in ((i, code.shards_of(i)) for i in range(code.n))
        ]

    shard = code.shards_of(0)[0]
    good, bad = replies(None)[0].parts["update"], replies(shard)[0].parts["update"]
    place = int(manifest.body.classes.matrix[0, shard].item())
    apart = [(int(a) - int(b)) * pow(place, -1, p) % p for a, b in zip(good, bad, strict=True)]
    signed = np.array([one - p if one > p // 2 else one for one in apart], float)
    sigma = manifest.body.quantiser.noise
    assert abs(float(signed.std()) / (math.sqrt(2) * sigma) - 1) < 5 / math.sqrt(2 * size)


@pytest.mark.parametrize("code", [reed_solomon(4, 1), reed_solomon(5, 2)], ids=str)
def test_without_votes_a_reply_that_differs_decides_alone_or_loses_the_sum(code: GradientCode) -> None:
    """Training fails at one holder alone, for each holder and shard, whichever replies decode. If its coefficients
    give it the share a of the shard's sum, that sum is a times its integers and 1 - a times the others'."""
    p, seen = 2**31 - 1, set()
    manifest = sealed(body_of(code, size=40, metrics=0, colluders=0, privacy=NOISE))
    classes, results = manifest.body.classes, results_for(manifest.body)
    limit = manifest.body.quantiser.limit(code.k)

    def reply(worker: int, failed: int | None) -> Any:
        own = {j: None if j == failed else results[j] for j in code.shards_of(worker)}
        return encode(keys_of(manifest, worker), REQUEST, own)

    def integers(replies: list[Any]) -> Any:
        return decode(manifest, replies)[0].integers.astype(object)

    replies = [reply(i, None) for i in range(code.n)]
    whole = integers(replies)
    for differs, shard in ((i, j) for i in range(code.n) for j in code.shards_of(i)):
        failed = integers([reply(i, shard if shard in code.shards_of(i) else None) for i in range(code.n)])
        sent = [*replies[:differs], reply(differs, shard), *replies[differs + 1 :]]
        for some in itertools.combinations(range(code.n), code.n - code.s):
            vector = np.asarray(classes.code.decoding_vector(list(some))).reshape(-1)
            share = int(vector[differs]) * int(classes.matrix[differs, shard, 0]) % p
            mixed = (whole + share * (failed - whole)) % p
            mixed -= p * (mixed > p // 2)
            if np.abs(mixed).max() > limit:
                with pytest.raises(OutOfRange):
                    decode(manifest, [sent[i] for i in some])
                seen.add("lost")
            else:
                assert share in (0, 1), "holders' integers were mixed"
                assert (integers([sent[i] for i in some]) == (failed if share else whole)).all()
                seen.add("its own" if share else "the others")
    assert seen == {"lost", "the others", "its own"}


def test_a_round_in_which_one_holder_fails_alone_is_its_own_the_others_or_lost(tmp_path: Path) -> None:
    code, shard = reed_solomon(4, 1), 1
    dealt_noisy(tmp_path / "whole", code, headroom=8)  # eleven random entries are in range once in 10^15 runs
    for name in ("failed", *(f"{holder}, {away}" for holder in code.holders_of(shard) for away in range(code.n))):
        copy_of(tmp_path / "whole", tmp_path / name)

    def run(name: str, away: int, failing: tuple[int, ...]) -> tuple[str, Any]:
        """Training of the shard fails at some workers, and the reply of one worker is away."""

        asked = ContextVar[int]("asked")  # training is not told for which worker it trains

        def before(trained: int, message: Message, context: Context) -> None:
            if trained == shard and asked.get() in failing:
                raise MemoryError

        inner = known_app(before=before)

        def app(message: Message, context: Context) -> Message:
            asked.set(int(context.node_config["partition-id"]))
            return inner(message, context)

        options: dict[str, Any] = {"privacy": NOISE, "verify": 0, "latency": first((), (away,))}
        strategy, models, _ = start(code, tmp_path / name, cast("ClientApp", app), **options)
        return strategy.ledger.rows[0]["train"]["outcome"], flat(models[1])

    (_, whole), (_, failed) = run("whole", 3, ()), run("failed", 3, code.holders_of(shard))
    assert (whole != failed).any()
    for holder, away in itertools.product(code.holders_of(shard), range(code.n)):
        outcome, model = run(f"{holder}, {away}", away, (holder,))
        if away in code.holders_of(shard):  # the other holder, or the one itself, decides alone
            assert outcome == "exact" and (model == (whole if away == holder else failed)).all()
        else:
            assert outcome == "skipped" and (model == flat(initial_arrays())).all()


def test_a_vote_names_a_holder_whose_training_fails_alone(tmp_path: Path) -> None:
    code = reed_solomon(7, 3)  # four holders: one straggler and one that is wrong
    dealt_noisy(tmp_path / "whole", code)
    copy_of(tmp_path / "whole", tmp_path / "voting")
    calls: list[int] = []

    def failing_once(server_round: int, shard: int) -> Any:
        calls.append(shard)
        if shard == 0 and calls.count(0) == 1:
            raise MemoryError
        return update_for(server_round, shard)

    options: dict[str, Any] = {"privacy": NOISE, "verify": 0}
    _, expected, _ = start(code, tmp_path / "whole", **options)
    strategy, models, _ = start(code, tmp_path / "voting", known_app(failing_once), votes=1, **options)
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "exact" and (flat(models[1]) == flat(expected[1])).all()


def test_a_shard_that_fails_everywhere_counts_as_zero_with_noise(tmp_path: Path) -> None:
    dealt_noisy(tmp_path / "failing", FIELD)
    copy_of(tmp_path / "failing", tmp_path / "zero")

    def failing(server_round: int, shard: int) -> Any:
        if shard == 2:
            raise RuntimeError("a record of shard 2")
        return update_for(server_round, shard)

    def zero(server_round: int, shard: int) -> Any:
        return 0 * update_for(server_round, shard) if shard == 2 else update_for(server_round, shard)

    options: dict[str, Any] = {"privacy": NOISE, "verify": 0}
    strategy, models, _ = start(FIELD, tmp_path / "failing", known_app(failing), **options)
    _, expected, _ = start(FIELD, tmp_path / "zero", known_app(zero), **options)
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "exact" and (flat(models[1]) == flat(expected[1])).all()


# ---- votes, noise in the sum, noise on the server, private training ----


def test_a_liar_is_named_by_the_code_s_checks_and_changes_no_bit(tmp_path: Path) -> None:
    code = reed_solomon(7, 3)
    dealt_noisy(tmp_path / "lied", code)
    copy_of(tmp_path / "lied", tmp_path / "honest")
    options: dict[str, Any] = {"privacy": NOISE, "votes": 1, "verify": 0, "rounds": 2}
    _, expected, _ = start(code, tmp_path / "honest", **options)
    lie = lying((0,), LIES["one entry"])
    strategy, models, _ = start(code, tmp_path / "lied", tamper=lie, latency=first((0,), (3,)), **options)
    trains = [row["train"] for row in strategy.ledger.rows]
    assert [train["outcome"] for train in trains] == ["exact"] * 2
    assert {one["worker"] for train in trains for one in train["rejected"]} == {0}
    assert all((flat(models[number]) == flat(expected[number])).all() for number in (1, 2))


def test_noise_in_the_sum_needs_that_holders_are_compared(tmp_path: Path) -> None:
    summed = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0, scope="sum")
    with pytest.raises(InvalidSetting, match="needs a rehearsal"):
        dealt_noisy(tmp_path / "refused", FIELD, privacy=summed)
    settings: dict[str, Any] = {"colluders": 1, "rehearsal": True, "metrics": []}
    body = fleet.enrolled(tmp_path, FIELD, privacy=summed, **settings)
    found = body.noise()
    assert found is not None and found.noise_multiplier == pytest.approx(4.0)
    # One colluder holds two of the six shards, and the other four have the noise together.
    assert body.quantiser.noise == pytest.approx(4.0 * sensitivity(body.quantiser, body.size) / math.sqrt(4))
    strategy, _, _ = fleet.start(FIELD, tmp_path, privacy=summed, rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(NOISE.epsilon(2))


@pytest.mark.parametrize(("code", "sending"), CODES, ids=NAMES)
def test_noise_on_the_server_is_added_to_the_sum_of_clipped_updates(
    tmp_path: Path, code: GradientCode, sending: Any
) -> None:
    quiet = CentralNoise(noise_multiplier=1e-7, clipping_norm=1.0)
    dealt(tmp_path, code, sending=sending, metrics=[], clip="norm", bound=1.0, largest_weight=1.0)
    strategy, models, _ = start(code, tmp_path, privacy=quiet, latency=Latency(), verify=0)
    row = strategy.ledger.rows[0]["train"]
    clipped = [update_for(1, j).astype(np.float64) for j in range(code.k)]
    mean = np.mean([one * min(1.0, 1.0 / float(np.linalg.norm(one))) for one in clipped], axis=0)
    assert np.abs(flat(models[1]) - flat(initial_arrays()) - mean).max() < row["quantisation-error"] + 1e-6
    assert row["outcome"] == "exact" and row["privacy"]["noise"] == "central"


@pytest.mark.parametrize(("code", "sending"), CODES, ids=NAMES)
def test_private_training_under_masks_is_that_without_them(tmp_path: Path, code: GradientCode, sending: Any) -> None:
    pytest.importorskip("opacus")
    from tests.privacy.private_app import settings
    from tests.secagg import test_private_training_masked as private

    dealt(tmp_path / "nodes", code, sending=sending, **private.PRIVATE)
    copy_of(tmp_path / "nodes", tmp_path / "clear")
    strategy, moved, _ = private.start(tmp_path / "nodes", code=code, latency=True, verify=0)
    holders = len([i for i in range(code.n) if 0 in code.shards_of(i)])
    same = cyclic_repetition(code.n, holders - 1, rng=np.random.default_rng(0))
    assert {same.shards_of(i) for i in range(code.n)} == {code.shards_of(i) for i in range(code.n)}
    _, plain, _ = private.start(tmp_path / "clear", code=same, masked=False, send="shards", verify=0)
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "exact" and train["secure"]["clipped"] == 0
    assert 0 < np.abs(moved - plain).max() < train["quantisation-error"] + 1e-6 < 1e-4 < np.abs(plain).max()
    assert train["privacy"]["epsilon"] == pytest.approx(settings().epsilon(1))
    with pytest.raises((InvalidSetting, SecureRefused), match="difference would show noise in clear"):
        private.start(tmp_path / "nodes", code=code, privacy=settings(noise="independent"))
