"""Private training and noise on the server under masks: the same release as without, and nothing beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, VirtualGrid, fractional_repetition, gradient_coding_mod
from fl_gradcode.codes import GradientCode, reed_solomon
from fl_gradcode.errors import InvalidSetting, PrivacyRefused, SecureRefused
from fl_gradcode.latency import Latency, lognormal
from fl_gradcode.privacy import SPENT, BudgetLedger, CentralNoise, privacy_to_json
from fl_gradcode.protocol import Plan
from fl_gradcode.secagg import SecureAggregation, read_manifest
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays
from tests.privacy.private_app import initial, private_app, settings
from tests.secagg.rounds import ask, copy_of, dealt, known_app, update_for
from tests.secagg.rounds import start as start_known
from tests.secagg.test_node_rules import changed, words_in
from tests.secagg.test_rounds import transcript

FRC = fractional_repetition(6, 1)
LAYOUT = [(name, str(array.dtype), tuple(array.shape)) for name, array in initial().items()]
PRIVATE: dict[str, Any] = {"arrays": LAYOUT, "metrics": [], "largest_weight": 128.0, "bound": 16.0}


def node_of(folder: Path, worker: int) -> dict[str, Any]:
    own = str(folder / f"node-{worker}")
    return {"partition-id": worker, "num-partitions": 6, "secagg-dir": own, "privacy-dir": own}


def start(
    folder: Path,
    *,
    masked: bool = True,
    rounds: int = 1,
    app: Any = None,
    tamper: Any = None,
    owner: dict[str, Any] | None = None,
    latency: bool = False,
    code: GradientCode = FRC,
    **options: Any,
) -> tuple[GradientCoding, np.ndarray[Any, Any], Any]:
    """Private rounds, masked or in the clear; returns the strategy, how far the model moved, and the result."""

    def node_config(worker: int) -> dict[str, Any]:
        config = {**node_of(folder, worker), **(owner or {})}
        return config if masked else {key: value for key, value in config.items() if key != "secagg-dir"}

    secure = SecureAggregation(read_manifest(folder / "node-0")) if masked else None
    named: dict[str, Any] = {"privacy": settings(), "run": "r", "give_up_rounds": None, **options}
    if secure is not None:
        named |= {"secure": secure, "send": secure.send}
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, **named)
    with InProcessGrid(app or private_app(), 6, node_config=node_config, tamper=tamper) as inner:
        grid = VirtualGrid(inner, Latency(compute=lognormal(1.0, 0.6)), seed=3) if latency else inner
        result = strategy.start(grid, initial(), num_rounds=rounds)
    return strategy, flat(result.arrays) - flat(initial()), result


@pytest.mark.parametrize("sending", ["coded", "shardwise"])
def test_masks_change_nothing_of_the_private_update_but_its_rounding(tmp_path: Path, sending: Any) -> None:
    dealt(tmp_path / "nodes", FRC, sending=sending, **PRIVATE)
    copy_of(tmp_path / "nodes", tmp_path / "clear")
    sent: list[Message] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        sent.append(reply)
        return reply

    strategy, moved, result = start(tmp_path / "nodes", tamper=keep, latency=True)
    _, plain, _ = start(tmp_path / "clear", masked=False, send="shards" if sending == "shardwise" else "coded")
    (row,) = strategy.ledger.rows
    train, privacy = row["train"], row["train"]["privacy"]
    assert train["outcome"] == "exact" and train["secure"]["clipped"] == 0
    assert 0 < np.abs(moved - plain).max() < train["quantisation-error"] + 1e-6 < 1e-4 and np.abs(plain).max() > 0.1
    assert privacy["unit"] == "record" and privacy["epsilon"] == pytest.approx(settings().epsilon(1))
    assert privacy["epsilon-told"] is None  # nodes tell nothing beside the sum
    assert all(name.startswith("fl-gradcode.") for name in result.train_metrics_clientapp[1])
    for reply in sent:
        told: Any = reply.content["fl-gradcode.reply"]
        assert {*reply.content} == {"fl-gradcode.reply", "fl-gradcode.update"}
        assert {*json.loads(told["json"])} == {
            *("run", "round", "kind", "worker", "outcome", "shards", "manifest", "request", "simulated", "tags"),
        }


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, Any]:
    """Fresh nodes, a worker, and what it is sent in round 1 of a private run."""
    folder = tmp_path_factory.mktemp("nodes")
    dealt(folder / "used", FRC, **PRIVATE)
    copy_of(folder / "used", folder / "fresh")
    sent: dict[int, Any] = {}

    def keep(worker: int, message: Message, reply: Message) -> Message:
        sent[worker] = message.content
        return reply

    start(folder / "used", tamper=keep)
    worker = min(sent)
    return folder / "fresh", worker, sent[worker]


def charges(folder: Path, worker: int) -> list[tuple[int, int]]:
    shards = FRC.shards_of(worker)
    ledger = BudgetLedger(folder / f"node-{worker}" / SPENT)
    return [(shard, one.round) for shard in shards for one in ledger.entries(shard)]


def test_a_retry_is_charged_once_and_holders_send_the_same(asked: tuple[Path, int, Any], tmp_path: Path) -> None:
    nodes, worker, content = asked
    folder = copy_of(nodes, tmp_path / "nodes")
    app, shards = private_app(), FRC.shards_of(worker)
    first = ask(app, folder, worker, content, node_config=node_of(folder, worker))
    again = ask(app, folder, worker, content, node_config=node_of(folder, worker))
    assert transcript([(0, first)]) == transcript([(0, again)])
    answered = folder / f"node-{worker}" / "answered"  # the node died between its charge and its answer
    for path in (*answered.iterdir(), answered.with_name("answered-head.json")):
        path.unlink()
    third = ask(app, folder, worker, content, node_config=node_of(folder, worker))
    assert transcript([(0, first)]) == transcript([(0, third)])
    assert charges(folder, worker) == [(shard, 1) for shard in shards]
    plan = Plan.find_in(content)
    assert plan is not None
    other = worker + 3  # the other holder
    theirs = changed(content, rows={other: plan.rows[worker]})
    reply = ask(private_app(), folder, other, theirs, node_config=node_of(folder, other))
    assert (words_in(reply) == words_in(first)).all()


def test_the_owner_s_limit_ends_it_with_a_sentence(asked: tuple[Path, int, Any], tmp_path: Path) -> None:
    nodes, worker, content = asked
    folder = copy_of(nodes, tmp_path / "nodes")
    limit = {**node_of(folder, worker), "max-epsilon": settings().epsilon(1) + 1e-3}
    ask(private_app(), folder, worker, content, node_config=limit)
    with pytest.raises(PrivacyRefused, match="above the budget"):
        ask(private_app(), folder, worker, changed(content, round=2), node_config=limit)
    with pytest.raises(PrivacyRefused, match="trains with noise only"):
        ask(private_app(), folder, worker, changed(content, round=2, privacy=""), node_config=limit)
    central = privacy_to_json(CentralNoise(noise_multiplier=1.0, clipping_norm=16.0))
    with pytest.raises((PrivacyRefused, SecureRefused)):
        ask(private_app(), folder, worker, changed(content, round=2, privacy=central), node_config=limit)
    assert {number for _, number in charges(folder, worker)} == {1}


def test_an_app_that_fails_after_its_private_training_shows_at_no_node(
    asked: tuple[Path, int, Any], tmp_path: Path
) -> None:
    """Without masks the server is told of it; under masks the reply has the form of any other."""
    nodes, worker, content = asked
    folder = copy_of(nodes, tmp_path / "nodes")

    def failing(message: Message, context: Context, call_next: Any) -> Message:
        call_next(message, context)
        raise ValueError("a record of John Smith")

    apps = [private_app(), private_app(mods=[gradient_coding_mod, failing])]
    replies: list[Message] = []
    for app in apps:
        nodes = copy_of(folder, tmp_path / f"nodes-{len(replies)}")
        replies.append(ask(app, nodes, worker, content, node_config=node_of(nodes, worker)))
    good, bad = replies
    assert words_in(good).shape == words_in(bad).shape and (words_in(good) != words_in(bad)).any()
    assert transcript([(0, good)])[0][:3] == transcript([(0, bad)])[0][:3]


def test_in_a_simulation_the_run_config_names_both_folders_and_the_app_sees_neither(tmp_path: Path) -> None:
    manifest = dealt(tmp_path, FRC, **PRIVATE)
    seen: list[dict[str, Any]] = []

    def look(message: Message, context: Context, call_next: Any) -> Message:
        seen.append({**context.run_config, **context.node_config})
        reply: Message = call_next(message, context)
        return reply

    strategy = GradientCoding(FedAvg(), FRC, secure=SecureAggregation(manifest), privacy=settings(), verify=0)
    config = {"secagg-dir": str(tmp_path), "privacy-dir": str(tmp_path), "rate": 0.1}
    with InProcessGrid(private_app(mods=[gradient_coding_mod, look]), 6, run_config=config) as grid:
        strategy.start(grid, initial(), num_rounds=1)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"
    assert seen and all(set(one) == {"rate", "partition-id", "num-partitions"} for one in seen)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metrics": [("loss", -1)]}, "metrics of training, which would leave without noise"),
        ({"evaluation": [("accuracy", -1)]}, "an evaluation, which would leave without noise"),
    ],
    ids=str,
)
def test_what_would_leave_without_noise_is_refused(
    asked: tuple[Path, int, Any], tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    _, worker, content = asked
    manifest = dealt(tmp_path, FRC, **{**PRIVATE, **changes})
    with pytest.raises(InvalidSetting, match=match):
        GradientCoding(FedAvg(), FRC, secure=SecureAggregation(manifest), privacy=settings())
    with pytest.raises(SecureRefused, match=match):
        ask(private_app(), tmp_path, worker, changed(content, secure=manifest.digest.hex()))


def test_independent_noise_is_refused(tmp_path: Path) -> None:
    for number, code in enumerate((FRC, reed_solomon(6, 1))):
        secure = SecureAggregation(dealt(tmp_path / str(number), code, **PRIVATE))
        with pytest.raises(InvalidSetting, match="difference would show noise in clear"):
            GradientCoding(FedAvg(), code, secure=secure, privacy=settings(noise="independent"))


# ---- noise on the server ----

CENTRAL: dict[str, Any] = {"metrics": [], "clip": "norm", "bound": 1.0, "largest_weight": 1.0}


def test_central_noise_is_added_to_the_sum_of_the_clipped_updates(tmp_path: Path) -> None:
    dealt(tmp_path / "quiet", FRC, **CENTRAL)
    quiet = CentralNoise(noise_multiplier=1e-7, clipping_norm=1.0)
    strategy, models, _ = start_known(FRC, tmp_path / "quiet", privacy=quiet, rounds=2, latency=Latency())
    clipped = [update_for(1, j).astype(np.float64) for j in range(6)]
    mean = np.mean([one * min(1.0, 1.0 / float(np.linalg.norm(one))) for one in clipped], axis=0)
    row = strategy.ledger.rows[0]["train"]
    assert np.abs(flat(models[1]) - flat(initial_arrays()) - mean).max() < row["quantisation-error"] + 1e-6
    assert row["outcome"] == "exact" and row["secure"]["clipped"] is None and row["privacy"]["noise"] == "central"

    size, noisy = 3000, CentralNoise(noise_multiplier=3.0, clipping_norm=1.0)
    body = dealt(tmp_path / "noisy", FRC, **CENTRAL, arrays=[("0", "float32", (size,))]).body
    app = known_app(lambda server_round, shard: np.zeros(size, np.float32))
    secure = SecureAggregation(read_manifest(tmp_path / "noisy" / "node-0"))
    strategy = GradientCoding(FedAvg(), FRC, privacy=noisy, secure=secure)
    with InProcessGrid(app, 6, node_config=lambda worker: node_of(tmp_path / "noisy", worker)) as grid:
        result = strategy.start(grid, ArrayRecord([np.zeros(size, np.float32)]), num_rounds=1)
    deviation = 3.0 * (1.0 + math.sqrt(size) * 2.0**-body.quantiser.fraction_bits) / 6
    found = float(flat(result.arrays).std())
    assert abs(found - deviation) < 7 * deviation / math.sqrt(2 * size)  # drawn anew each time: one run in 10^11 is off
    assert strategy.ledger.rows[0]["train"]["privacy"]["epsilon"] == pytest.approx(noisy.epsilon(1), rel=0.01)


def test_weights_and_metrics_of_shards_do_not_leave_under_central_noise(tmp_path: Path) -> None:
    """Whatever train() says of them, replies are the same."""
    seen: list[list[tuple[int, Message]]] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        seen[-1].append((worker, reply))
        return reply

    dealt(tmp_path / "one", FRC, **CENTRAL)
    copy_of(tmp_path / "one", tmp_path / "two")
    privacy = CentralNoise(noise_multiplier=1.0, clipping_norm=1.0)
    for name, app in (("one", known_app()), ("two", known_app(weight=lambda j: 99.0, loss=lambda j: -7.0))):
        seen.append([])
        start_known(FRC, tmp_path / name, app, privacy=privacy, tamper=keep)
    assert transcript(seen[0]) == transcript(seen[1])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"clip": "entries"}, "--clip norm --bound 1 --largest-weight 1"),
        ({"bound": 2.0}, "--clip norm --bound 1 --largest-weight 1"),
        ({"largest_weight": 2.0}, "--clip norm --bound 1 --largest-weight 1"),
        ({"metrics": [("loss", -1)]}, "metrics of training"),
        ({"arrays": [("bn.running_var", "float32", (3,))]}, "running statistics 'bn.running_var'"),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_clip_as_central_noise_needs_is_refused(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    secure = SecureAggregation(dealt(tmp_path, FRC, **{**CENTRAL, **changes}))
    with pytest.raises(InvalidSetting, match=match):
        GradientCoding(FedAvg(), FRC, secure=secure, privacy=CentralNoise(noise_multiplier=1.0, clipping_norm=1.0))


def test_evaluations_are_masked_beside_central_noise(tmp_path: Path) -> None:
    """The server is trusted there; masks still hide single shards from it."""
    dealt(tmp_path, FRC, **CENTRAL, evaluation=[("accuracy", -1)])
    app = known_app(evaluated=lambda shard, message: MetricRecord({"num-examples": 2, "accuracy": 0.1 * shard}))
    _, _, result = start_known(FRC, tmp_path, app, privacy=CentralNoise(noise_multiplier=1.0, clipping_norm=1.0))
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.25)
