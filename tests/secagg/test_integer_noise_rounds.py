"""Runs with integer noise under masks: what the server decodes, what nodes charge, and what shows of a shard."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from typer.testing import CliRunner

from fl_gradcode import GradientCoding, VirtualGrid, cyclic_repetition, fractional_repetition
from fl_gradcode.cli.app import app as command_line
from fl_gradcode.client.masked_call import check_body
from fl_gradcode.enrolment import agree, make_identity
from fl_gradcode.errors import InvalidSetting, PrivacyRefused, SecureRefused
from fl_gradcode.latency import Latency, lognormal
from fl_gradcode.masking import RoundedSum, discrete_gaussian
from fl_gradcode.privacy import (
    DPSGD,
    SHARDS_SPENT,
    SPENT,
    BudgetLedger,
    CentralNoise,
    IntegerNoise,
    Request,
    Spend,
    privacy_to_json,
    read_keys,
    write_keys,
)
from fl_gradcode.protocol import Plan
from fl_gradcode.secagg import (
    ClassIntegers,
    Manifest,
    SecureAggregation,
    ShardResult,
    counted_shards,
    deal,
    encode,
    make_body,
    read_manifest,
    seeds_of,
    sensitivity,
)
from fl_gradcode.secagg.keys import dither_key, noise_key
from tests.conftest import flat, initial_arrays
from tests.enrolment import fleet
from tests.privacy.test_audit import DELTA, least_epsilon
from tests.secagg.rounds import ARRAYS, SIZE, ask, copy_of, grid_of, known_app, start, update_for
from tests.secagg.samples import REQUEST, body_of, keys_of, results_for, sealed, seed_of
from tests.secagg.test_node_rules import changed
from tests.secagg.test_rounds import transcript

FRC = fractional_repetition(8, 1)
CYCLIC = cyclic_repetition(6, 1, rng=np.random.default_rng(0))
NOISE = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0)
SUMMED = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0, scope="sum")
SUM: dict[str, Any] = {"identities": [f"{i:064x}" for i in range(8)], "rehearsal": True}


def dealt(folder: Path, privacy: IntegerNoise = NOISE, **settings: Any) -> Manifest:
    """Keys that are the same each time, and a manifest with integer noise."""
    write_keys(folder, [FRC.shards_of(worker) for worker in range(FRC.n)])
    for path in folder.glob("node-*/keys.json"):
        content = json.loads(path.read_text())
        content["secrets"] = {j: hashlib.sha256(f"shard {j}".encode()).hexdigest() for j in content["secrets"]}
        path.write_text(json.dumps(content))
    return deal(folder, make_body(FRC, **{"arrays": ARRAYS, "colluders": 1, "privacy": privacy, **settings}))


def by_hand(multiplier: float, rounds: int, delta: float) -> float:
    """Epsilon of Gaussian releases by their Renyi divergence, alpha rounds / (2 z^2), over a fine grid of orders.

    References:
        Canonne, Kamath, Steinke, proposition 12, for the conversion.
    """
    alpha = 1 + np.geomspace(1e-3, 1e4, 200_000)
    found = (
        alpha * rounds / (2 * multiplier**2) + np.log1p(-1 / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)
    )
    return float(found.min())


def entries(folder: Path, worker: int, shard: int) -> list[tuple[str, int, int]]:
    ledger = BudgetLedger(folder / f"node-{worker}" / SHARDS_SPENT)
    return [(one.run, one.round, one.spend.steps) for one in ledger.entries(shard)]


# ---- what the server decodes ----


def test_the_noise_that_the_server_decodes_has_the_stated_variance_and_its_epsilon_is_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Updates of zero, in virtual time: the model moves by the noise alone, and holders send the same."""
    size, rounds = 4000, 2
    body = dealt(tmp_path, arrays=[("0", "float32", (size,))]).body
    app = known_app(lambda server_round, shard: np.zeros(size, np.float32))
    models = [np.zeros(size)]
    sent: dict[tuple[int, int], set[bytes]] = {}

    def keep(worker: int, message: Message, reply: Message) -> Message:
        plan, record = Plan.find_in(message.content), reply.content["fl-gradcode.update"]
        assert plan is not None and isinstance(record, ArrayRecord)
        sent.setdefault((plan.round, worker % 4), set()).add(record["masked"].data)
        return reply

    strategy = GradientCoding(
        FedAvg(),
        FRC,
        privacy=NOISE,
        secure=SecureAggregation(read_manifest(tmp_path / "node-0")),
        on_round_end=lambda number, arrays, row: models.append(flat(arrays)),
        run="run-1",
        ledger=tmp_path / "ledger.jsonl",
    )
    with grid_of(app, tmp_path, 8, keep) as inner:
        grid = VirtualGrid(inner, Latency(compute=lognormal(1.0, 0.5)), seed=3)
        strategy.start(grid, ArrayRecord([np.zeros(size, np.float32)]), num_rounds=rounds)

    # The clipping norm is 2 and there are 8 shards: each adds N(0, (4 S)^2) units, and the sum is divided by 8.
    largest_change = 2.0 + math.sqrt(size) * 2.0**-body.quantiser.fraction_bits
    variance = 8 * (4.0 * largest_change / 8) ** 2
    moved = np.concatenate([after - before for before, after in itertools.pairwise(models)])
    assert abs(float(moved.var()) - variance) < 3 * variance * math.sqrt(2 / moved.size)
    assert abs(float(moved.mean())) < 3 * math.sqrt(variance / moved.size)
    assert len(sent) == 4 * rounds and all(len(one) == 1 for one in sent.values())
    assert "failed" not in caplog.text
    for number, row in enumerate(strategy.ledger.rows, start=1):
        train, privacy = row["train"], row["train"]["privacy"]
        assert train["outcome"] == "exact" and train["secure"]["clipped"] is None
        assert (privacy["unit"], privacy["noise"], privacy["noise-multiplier"]) == ("shard", "integer", 4.0)
        hand = by_hand(4.0, number, 1e-5)
        assert hand <= privacy["epsilon"] < 1.01 * hand
    told = CliRunner().invoke(command_line, ["status", str(tmp_path / "ledger.jsonl")]).stdout
    assert f"epsilon {privacy['epsilon']:.3g}" in told


def test_the_mean_is_that_of_the_clipped_updates_with_the_noise_of_all_shards(tmp_path: Path) -> None:
    """Divided by k, whatever train() says of weights; metrics are not told."""
    body = dealt(tmp_path).body
    strategy, models, result = start(FRC, tmp_path, privacy=NOISE)
    request = bytes.fromhex(strategy.ledger.rows[0]["train"]["secure"]["request"])
    unit = 2.0**-body.quantiser.fraction_bits
    total = np.zeros(SIZE)
    for c in range(4):
        seed = seeds_of(read_keys(tmp_path / f"node-{c}"), body.classes)[c]
        for shard in body.classes.members[c]:
            moves = (flat(initial_arrays()).astype(np.float32) + update_for(1, shard)) - flat(initial_arrays())
            rounded = RoundedSum(body.quantiser, SIZE)
            rounded.add(moves.astype(np.float32), 1.0)
            integers, _, _ = rounded.finish(dither_key(seed, request, shard))
            clipped = moves * min(1.0, 2.0 / float(np.linalg.norm(moves)))
            assert np.abs(integers * unit - clipped).max() < unit
            noise = discrete_gaussian(noise_key(seed, request, shard, integers), body.quantiser.noise, SIZE)
            total += clipped + unit * noise
    moved = flat(models[1]) - flat(initial_arrays())
    assert np.abs(moved - total / 8).max() < strategy.ledger.rows[0]["train"]["quantisation-error"] + 1e-5
    assert all(name.startswith("fl-gradcode.") for name in result.train_metrics_clientapp[1])


def test_a_model_that_is_not_the_manifest_s_is_refused_before_every_shard_fails_unseen(tmp_path: Path) -> None:
    dealt(tmp_path, arrays=[("w", "float32", (SIZE,))])
    with pytest.raises(InvalidSetting, match=r"array 'w' of shape \(11,\).*no such array"):
        start(FRC, tmp_path, privacy=NOISE)
    dealt(tmp_path / "other", arrays=[("0", "float32", (2, 3))])
    with pytest.raises(InvalidSetting, match=r"array '0' of shape \(2, 3\).*has shape \(3, 2\)"):
        start(FRC, tmp_path / "other", privacy=NOISE)


@pytest.mark.parametrize("failure", ["raises", "nan", "layout", "weight", "metrics"])
def test_a_failed_shard_sends_bit_for_bit_what_a_shard_without_an_update_does(tmp_path: Path, failure: str) -> None:
    dealt(tmp_path / "failing")
    copy_of(tmp_path / "failing", tmp_path / "still")
    seen: list[list[tuple[int, Message]]] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        seen[-1].append((worker, reply))
        return reply

    def update(server_round: int, shard: int) -> NDArray[np.float32]:
        moves = update_for(server_round, shard)
        if shard == 2 and failure in ("raises", "nan", "layout"):
            if failure == "raises":
                raise RuntimeError("a record of shard 2")
            moves[4] = np.nan
            return moves[:6] if failure == "layout" else moves
        return moves

    def weight(shard: int) -> float:
        return -math.inf if shard == 2 and failure == "weight" else shard + 1.0

    def loss(shard: int) -> float:
        return math.nan if shard == 2 and failure == "metrics" else 0.5

    seen.append([])
    failing, models, _ = start(
        FRC, tmp_path / "failing", known_app(update, weight=weight, loss=loss), privacy=NOISE, tamper=keep
    )
    still = known_app(lambda r, j: np.zeros(SIZE, np.float32) if j == 2 else update_for(r, j))
    if failure in ("weight", "metrics"):  # neither is looked at
        still = known_app()
    seen.append([])
    _, others, _ = start(FRC, tmp_path / "still", still, privacy=NOISE, tamper=keep)
    assert failing.ledger.rows[0]["train"]["outcome"] == "exact" and not failing.ledger.rows[0]["train"]["rejected"]
    assert transcript(seen[0]) == transcript(seen[1]) and (flat(models[1]) == flat(others[1])).all()


def test_holders_that_differ_show_no_difference_without_noise() -> None:
    """Training may fail on one holder alone, which a server brings about where it has less memory than the other. Both
    replies have the same mask: with the same noise too, their difference would be the update."""
    body = body_of(FRC, size=400, metrics=0, privacy=NOISE)
    results, sigma = results_for(body), body.quantiser.noise
    manifest = sealed(body)
    good = encode(keys_of(manifest, 0), REQUEST, {j: results[j] for j in (0, 4)})
    failed = encode(keys_of(manifest, 4), REQUEST, {0: None, 4: results[4]})
    apart = (good.parts["update"] - failed.parts["update"]).view(np.int32).astype(np.float64)
    assert abs(float(apart.std()) / (math.sqrt(2) * sigma) - 1) < 4 / math.sqrt(2 * 400)
    same = encode(keys_of(manifest, 4), REQUEST, {j: results[j] for j in (0, 4)})
    assert good.payload() == same.payload()
    assert body.classes.members[0] == (0, 4)


def test_one_shard_a_message_has_the_same_noise_and_one_charge_a_shard(tmp_path: Path) -> None:
    dealt(tmp_path, sending="shardwise")
    strategy, models, _ = start(FRC, tmp_path, privacy=NOISE, rounds=2, latency=Latency(compute=lognormal(1.0, 0.5)))
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    moved = (flat(models[1]) - flat(initial_arrays())) / (8.0 / math.sqrt(8))  # standard normal, and small updates
    assert 0.2 < float(np.square(moved).mean()) < 4
    for worker in range(8):
        for shard in FRC.shards_of(worker):
            numbers = [number for _, number, _ in entries(tmp_path, worker, shard)]
            assert numbers == sorted({*numbers})


# ---- what nodes charge and refuse ----


@pytest.fixture
def asked(tmp_path: Path) -> tuple[Path, int, Any]:
    """Fresh nodes, a worker, and what it is sent in round 1."""
    dealt(tmp_path / "used")
    fresh = copy_of(tmp_path / "used", tmp_path / "fresh")
    sent: dict[int, Any] = {}

    def keep(worker: int, message: Message, reply: Message) -> Message:
        sent[worker] = message.content
        return reply

    start(FRC, tmp_path / "used", privacy=NOISE, tamper=keep)
    worker = min(sent)
    return fresh, worker, sent[worker]


def test_the_same_request_is_charged_once_and_a_second_one_is_refused(asked: tuple[Path, int, Any]) -> None:
    folder, worker, content = asked
    shards = FRC.shards_of(worker)
    first = ask(known_app(), folder, worker, content)
    again = ask(known_app(), folder, worker, content)
    assert transcript([(0, first)]) == transcript([(0, again)])
    assert all(entries(folder, worker, shard) == [("run-1", 1, 1)] for shard in shards)
    # A node that died after the charge and before its answer is not charged again for the same, and refuses another.
    answered = folder / f"node-{worker}" / "answered"
    for path in (*answered.iterdir(), answered.with_name("answered-head.json")):
        path.unlink()
    with pytest.raises(PrivacyRefused, match="answered before"):
        ask(known_app(), folder, worker, changed(content, seed=5))
    assert transcript([(0, ask(known_app(), folder, worker, content))]) == transcript([(0, first)])
    assert all(entries(folder, worker, shard) == [("run-1", 1, 1)] for shard in shards)


def test_rounds_in_which_other_holders_were_asked_count(asked: tuple[Path, int, Any]) -> None:
    folder, worker, content = asked
    shard, other = FRC.shards_of(worker)
    plan = Plan.find_in(content)
    assert plan is not None
    ask(known_app(), folder, worker, changed(content, round=5, releases={shard: (2, ((1, 3),)), other: (2, ())}))
    assert [number for _, number, _ in entries(folder, worker, shard)] == [1, 2, 3, 5]
    assert [number for _, number, _ in entries(folder, worker, other)] == [5]


def test_an_untrusted_server_costs_a_release_for_each_holder(asked: tuple[Path, int, Any]) -> None:
    folder, worker, content = asked
    (shard, _) = FRC.shards_of(worker)
    ask(known_app(), folder, worker, changed(content, round=3), node_config={"honest-server": False})
    assert [(number, steps) for _, number, steps in entries(folder, worker, shard)] == [(1, 2), (2, 2), (3, 2)]
    distrusting = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0, honest_server=False)
    assert distrusting.epsilon(3, holders=2) == pytest.approx(NOISE.epsilon(6))


def test_the_owner_s_limit_ends_it_before_training(asked: tuple[Path, int, Any]) -> None:
    folder, worker, content = asked
    limit = {"max-epsilon": (NOISE.epsilon(2) + NOISE.epsilon(3)) / 2}
    trained: list[int] = []
    app = known_app(before=lambda shard, message, context: trained.append(shard))
    for number in (1, 2):
        ask(app, folder, worker, changed(content, round=number), node_config=limit)
    assert len(trained) == 4
    with pytest.raises(PrivacyRefused, match="above the budget"):
        ask(app, folder, worker, changed(content, round=3), node_config=limit)
    assert len(trained) == 4 and len(entries(folder, worker, FRC.shards_of(worker)[0])) == 2
    ask(app, folder, worker, changed(content, round=2), node_config=limit)  # the kept bytes cost nothing
    # Under a manifest that covers evaluations, which one with integer noise never does.
    deal(folder, make_body(FRC, arrays=ARRAYS, evaluation=[("accuracy", -1)], colluders=1))
    digest = read_manifest(folder / f"node-{worker}").digest.hex()
    evaluate = changed(content, kind="evaluate", privacy="", arrays_key="", secure=digest)
    with pytest.raises(PrivacyRefused, match="evaluation has no noise"):
        ask(known_app(), folder, worker, evaluate, message_type="evaluate", node_config=limit)


@pytest.mark.parametrize(
    ("privacy", "match"),
    [
        (None, "counted by privacy=IntegerNoise"),
        (
            IntegerNoise(noise_multiplier=4.5, clipping_norm=2.0),
            "noise_multiplier=4, clipping_norm=2 and",
        ),
        (IntegerNoise(noise_multiplier=4.0, clipping_norm=1.0), "noise_multiplier=4, clipping_norm=2"),
        (IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0, scope="sum"), "scope='shard'"),
        (CentralNoise(noise_multiplier=4.0, clipping_norm=2.0), "counted by privacy=IntegerNoise"),
        (DPSGD(noise_multiplier=1, max_grad_norm=1, sample_rate=0.1, steps=1), "counted by privacy=IntegerNoise"),
    ],
    ids=str,
)
def test_server_and_node_both_refuse_a_promise_that_is_not_the_manifest_s(
    asked: tuple[Path, int, Any], privacy: Any, match: str
) -> None:
    folder, worker, content = asked
    with pytest.raises(InvalidSetting, match=match):
        GradientCoding(FedAvg(), FRC, secure=SecureAggregation(read_manifest(folder / "node-0")), privacy=privacy)
    plan = changed(content, privacy="" if privacy is None else privacy_to_json(privacy))
    with pytest.raises(SecureRefused, match=match):
        ask(known_app(), folder, worker, plan)
    assert not entries(folder, worker, FRC.shards_of(worker)[0])


def test_one_folder_counts_in_one_unit(asked: tuple[Path, int, Any]) -> None:
    folder, worker, content = asked
    shard = FRC.shards_of(worker)[0]
    node = folder / f"node-{worker}"
    BudgetLedger(node / SPENT).charge(Request(shard, "r", 1, "c", Spend(1.0, 0.1, 1)), delta=1e-5, accountant="rdp")
    with pytest.raises(PrivacyRefused, match="one max-epsilon cannot bound together"):
        ask(known_app(), folder, worker, content, node_config={"max-epsilon": 100.0})


def test_without_masks_integer_noise_is_refused(asked: tuple[Path, int, Any]) -> None:
    folder, worker, content = asked
    with pytest.raises(InvalidSetting, match="added under masks"):
        GradientCoding(FedAvg(), FRC, privacy=NOISE)
    with pytest.raises(PrivacyRefused, match="asks for none"):
        ask(known_app(), folder, worker, changed(content, secure=""), node_config={"secagg-dir": ""})


def test_the_run_does_not_start_beyond_its_budget(tmp_path: Path) -> None:
    dealt(tmp_path)
    small = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0, max_epsilon=NOISE.epsilon(3) + 1e-6)
    with pytest.raises(InvalidSetting, match="Run 3 rounds at most"):
        start(FRC, tmp_path, privacy=small, rounds=5)
    found = IntegerNoise.for_epsilon(2.0, rounds=10, clipping_norm=2.0)
    assert 1.95 < by_hand(found.noise_multiplier, 10, 1e-5) <= 2.0 and found.max_epsilon == 2.0


class Killed(BaseException):
    pass


def test_a_killed_server_asks_the_round_again_and_nobody_is_charged_twice(tmp_path: Path) -> None:
    dealt(tmp_path / "nodes")
    kept: dict[str, Any] = {"checkpoint": tmp_path / "run.ckpt", "ledger": tmp_path / "ledger.jsonl", "run": None}
    lost = [0]

    def kill(server_round: int) -> None:
        if server_round == 2:
            raise Killed

    def lose(worker: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, "killed"), reply_to=message) if worker == lost[0] else reply

    with pytest.raises(Killed):
        start(FRC, tmp_path / "nodes", rounds=3, kill=kill, tamper=lose, privacy=NOISE, **kept)
    lost[0] = 2
    strategy, _, _ = start(FRC, tmp_path / "nodes", rounds=3, tamper=lose, privacy=NOISE, **kept)
    assert [row["round"] for row in strategy.ledger.rows][-2:] == [2, 3]
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(NOISE.epsilon(3))
    for worker in range(8):
        for shard in FRC.shards_of(worker):
            numbers = [number for _, number, _ in entries(tmp_path / "nodes", worker, shard)]
            assert numbers == sorted({*numbers}) and {*numbers} <= {1, 2, 3}


# ---- manifests ----


@pytest.mark.parametrize(
    ("code", "settings", "match"),
    [
        (FRC, {"metrics": [("loss", -1)]}, "no metric leaves a node"),
        (FRC, {"evaluation": [("loss", -1)]}, "no metric leaves a node"),
        (FRC, {"privacy": SUMMED, **SUM, "cohorts": 2, "min_classes": 2, "colluders": 0}, "there are 2 cohorts"),
        (FRC, {"privacy": SUMMED, **SUM, "rehearsal": False}, "needs a rehearsal or agree='always'"),
        (FRC, {"privacy": IntegerNoise(noise_multiplier=1e4, clipping_norm=2.0**20)}, "do not fit the ring"),
    ],
    ids=str,
)
def test_manifests_that_would_leave_something_without_noise_are_not_made(
    code: Any, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidSetting, match=match):
        make_body(code, **{"arrays": ARRAYS, "privacy": NOISE, **settings})


def test_a_body_whose_clip_does_not_bound_a_shard_is_refused() -> None:
    body = make_body(FRC, arrays=ARRAYS, privacy=NOISE)
    for wrong, match in ((b'["norm",', "clip='norm'"), (b'"noise-scope":"shard"', "noise-scope")):
        text = body.text.replace(wrong, {b'["norm",': b'["entries",'}.get(wrong, b'"noise-scope":"all"'))
        assert text != body.text
        with pytest.raises(InvalidSetting, match=match):
            type(body).from_bytes(text)


def test_the_sensitivity_bounds_what_rounding_may_make_of_a_clipped_update() -> None:
    """Half-way values and norms at the bound, in few and many dimensions."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 300):
        body = body_of(
            FRC, size=size, metrics=0, privacy=IntegerNoise(noise_multiplier=2.0**-9, clipping_norm=2.0**-18)
        )
        bound = sensitivity(body.quantiser, size)
        for trial in range(20):
            update = (rng.standard_normal(size) * 2.0 ** rng.integers(-24, 3)).astype(np.float32)
            rounded = RoundedSum(body.quantiser, size)
            assert rounded.add(update, 1.0)
            integers, _, failed = rounded.finish(dither_key(seed_of(trial), REQUEST, 0))
            assert not failed and math.sqrt(int(np.square(integers.astype(np.int64)).sum())) <= bound


# ---- noise in the sum ----


def test_noise_in_the_sum_is_shared_by_the_shards_that_no_colluder_holds(tmp_path: Path) -> None:
    """Four classes of two shards and one colluder: six shards have the noise together."""
    settings: dict[str, Any] = {"colluders": 1, "rehearsal": True, "metrics": []}
    body = fleet.enrolled(tmp_path, FRC, privacy=SUMMED, **settings)
    assert counted_shards(body.classes, 1) == 6 and counted_shards(body.classes, 4) == 0
    whole = make_body(FRC, arrays=ARRAYS, privacy=NOISE, headroom=body.quantiser.headroom).quantiser
    assert body.quantiser.noise == pytest.approx(whole.noise / math.sqrt(6))
    found = body.noise()
    assert found is not None and found.noise_multiplier == pytest.approx(4.0) and found.scope == "sum"
    more = body.noise(colluders=2)  # an owner who fears two colluders counts less noise
    assert more is not None and more.noise_multiplier == pytest.approx(4.0 * math.sqrt(4 / 6))
    strategy, models, _ = fleet.start(FRC, tmp_path, privacy=SUMMED, rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    line = strategy.ledger.rows[-1]["train"]["privacy"]
    assert line["noise"] == "integer-sum" and line["epsilon"] == pytest.approx(NOISE.epsilon(2))
    assert np.abs(flat(models[1]) - flat(initial_arrays())).max() < 8.0  # 2 sqrt(8 / 6) / 8 is a standard deviation
    with pytest.raises(InvalidSetting, match="hold all 8 shards"):
        body.noise(colluders=4)


def test_noise_in_the_sum_with_the_keys_of_a_dealer(tmp_path: Path) -> None:
    """The same release as with an allow-list; identities that come first are not enough."""
    body = dealt(tmp_path, SUMMED, rehearsal=True).body
    assert body.quantiser.noise == make_body(FRC, arrays=ARRAYS, privacy=SUMMED, **SUM).quantiser.noise
    strategy, models, _ = start(FRC, tmp_path, privacy=SUMMED, rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    line = strategy.ledger.rows[-1]["train"]["privacy"]
    assert line["noise"] == "integer-sum" and line["epsilon"] == pytest.approx(NOISE.epsilon(2))
    # Eight shards have the sixth part of the variance each, so that a standard deviation is 4 * 2 sqrt(8 / 6) / 8.
    moved = (flat(models[1]) - flat(initial_arrays())) / (4.0 * 2.0 * math.sqrt(8 / 6) / 8)
    assert 0.1 < float(np.square(moved).mean()) < 5
    with pytest.raises(InvalidSetting, match="keys come from a dealer, or with an allow-list"):
        SecureAggregation(body)
    node = tmp_path / "node-0"
    make_identity(node, 0)
    with pytest.raises(InvalidSetting, match="cannot be agreed to without an allow-list"):
        agree(node, body.text, None)


def test_a_node_takes_no_part_with_noise_in_the_sum_on_first_use(tmp_path: Path) -> None:
    """Were its body exchanged for one that it would not agree to by itself."""
    fleet.enrolled(tmp_path, FRC, first_use=True, privacy=NOISE, rehearsal=True, metrics=[], colluders=1)
    body = make_body(FRC, arrays=ARRAYS, privacy=SUMMED, rehearsal=True, colluders=1)
    with pytest.raises(SecureRefused, match="cannot be used without an allow-list"):
        check_body(tmp_path / "node-0", body, {})


def test_a_round_whose_keys_may_be_others_after_a_restart_is_not_asked_again(tmp_path: Path) -> None:
    """Nodes that draw keys anew draw other noise: another answer to the round would be a release that nobody counts."""
    fleet.enrolled(tmp_path, FRC, privacy=NOISE, colluders=1, metrics=[])
    kept: dict[str, Any] = {"checkpoint": tmp_path / "run.ckpt", "ledger": tmp_path / "ledger.jsonl", "run": None}

    def kill(server_round: int) -> None:
        if server_round == 2:
            raise Killed

    with pytest.raises(Killed):
        fleet.start(FRC, tmp_path, privacy=NOISE, rounds=3, kill=kill, **kept)
    strategy, _, _ = fleet.start(FRC, tmp_path, privacy=NOISE, rounds=3, **kept)
    assert [row["round"] for row in strategy.ledger.rows] == [1, 3]  # round 2 is spent, and counts
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(NOISE.epsilon(3))


# ---- an audit: whoever knows all but one shard guesses whether it is there ----


def scores(privacy: IntegerNoise, repetitions: int) -> Callable[[bool], NDArray[np.float64]]:
    """Along the shard's update, what is left of the sum when all is subtracted that others may know: with noise in the
    sum, of three shards the one that a colluder holds; else all but the shard itself."""
    code, size = fractional_repetition(3, 0), 4
    summed = {"identities": SUM["identities"][:3], "rehearsal": True} if privacy.scope == "sum" else {}
    body = body_of(code, size=size, metrics=0, privacy=privacy, **summed)
    update = np.zeros(size, np.float32)
    update[3] = 1.0

    def released(present: bool, repetition: int) -> float:
        total = 0.0
        for shard in (0, 1) if privacy.scope == "sum" else (0,):
            seed = hashlib.sha256(f"{repetition} {present} {shard}".encode()).digest()
            ours = ClassIntegers(body, shard, seed, REQUEST)
            ours.add(shard, ShardResult(update, 1.0, np.zeros(0)) if present and shard == 0 else None)
            total += float(ours.parts()["update"].view(np.int32)[3])
        return total

    return lambda present: np.array([released(present, i) for i in range(repetitions)])


@pytest.mark.parametrize("scope", ["shard", "sum"])
def test_a_round_leaks_less_than_is_claimed(scope: Any) -> None:
    privacy = IntegerNoise(noise_multiplier=0.7, clipping_norm=1.0, scope=scope, delta=DELTA)
    there, not_there = (scores(privacy, 250)(present) for present in (True, False))
    assert 0.1 < least_epsilon(there, not_there) < privacy.epsilon(1)


def test_noise_ten_times_too_small_is_caught() -> None:
    """100 scores judge; if all are told apart, they prove an epsilon of 3.1."""
    claimed = IntegerNoise(noise_multiplier=2.0, clipping_norm=1.0, delta=DELTA).epsilon(1)
    weak = IntegerNoise(noise_multiplier=0.2, clipping_norm=1.0, delta=DELTA)
    there, not_there = (scores(weak, 200)(present) for present in (True, False))
    assert least_epsilon(there, not_there) > claimed
