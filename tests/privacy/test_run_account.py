"""A private run as the server sees it: what travels, what is charged, what ends it, and how it goes on."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from opacus.accountants import RDPAccountant

from fl_gradcode import (
    GradientCode,
    GradientCoding,
    Ledger,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    gradient_coding_mod,
)
from fl_gradcode.errors import InvalidSetting, UnsuitableApp
from fl_gradcode.latency import Latency, Law
from fl_gradcode.privacy import BudgetLedger, CentralNoise, Spent, read_keys
from fl_gradcode.privacy.run_account import RunAccount
from fl_gradcode.testing import InProcessGrid
from tests.privacy.private_app import initial, keys_for, private_app, settings, train_privately

CODES: dict[str, GradientCode] = {
    "fractional": fractional_repetition(6, 2),
    "cyclic": cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
}
ANY_CODE = pytest.mark.parametrize("name", CODES)


@lru_cache
def hand_computed(rounds: int, releases: int = 1) -> float:
    """Epsilon at delta 1e-5 of `settings()`, by Opacus' own accountant."""
    accountant = RDPAccountant()
    for _ in range(rounds * 3 * releases):
        accountant.step(noise_multiplier=1.0, sample_rate=0.2)
    return float(accountant.get_epsilon(1e-5))


def private(code: GradientCode, **kwargs: Any) -> GradientCoding:
    inner = kwargs.pop("inner", None) or FedAvg(fraction_evaluate=0.0)
    return GradientCoding(inner, code, **{"privacy": settings(), **kwargs})


def clients(code: GradientCode, folder: Path, app: ClientApp | None = None, **kwargs: Any) -> InProcessGrid:
    if not (folder / "node-0").exists():
        keys_for(code, folder)
    config = {"privacy-dir": str(folder)}
    return InProcessGrid(app or private_app(), code.n, run_config=config, **kwargs)


def start(strategy: GradientCoding, grid: InProcessGrid, rounds: int, latency: Latency | None = None) -> Any:
    random.seed(0)  # which shards are sampled
    with grid:
        virtual = VirtualGrid(grid, latency or Latency(compute=1.0))
        return strategy.start(virtual, initial(), num_rounds=rounds, timeout=1000.0)


def rounds_of(folder: Path, worker: int, shard: int) -> list[int]:
    return sorted(e.round for e in BudgetLedger(folder / f"node-{worker}" / "spent").entries(shard))


# What travels


def everything_in(content: RecordDict) -> Iterator[bytes]:
    for name, record in content.items():
        yield name.encode()
        for key, value in record.items():
            yield key.encode()
            yield (
                value.data if isinstance(value, Array) else value if isinstance(value, bytes) else repr(value).encode()
            )


@ANY_CODE
def test_only_the_weight_leaves_and_neither_secret_nor_loss(name: str, tmp_path: Path) -> None:
    code, seen, replies = CODES[name], bytearray(), list[dict[str, Any]]()
    keys_for(code, tmp_path)

    def look(worker: int, message: Message, reply: Message) -> Message:
        for content in (message.content, reply.content):
            seen.extend(b"\0".join(everything_in(content)))
        record: Any = reply.content["fl-gradcode.reply"]
        told = json.loads(str(record["json"]))
        if told["kind"] == "train":
            replies.append(told)
            vectors: Any = reply.content["fl-gradcode.update"]
            assert vectors["metrics"].numpy().size == 1
            assert list(reply.content) == ["fl-gradcode.reply", "fl-gradcode.update"]
        return reply

    strategy = private(code, inner=FedAvg())
    result = start(strategy, clients(code, tmp_path, tamper=look), 2)
    secrets = [s for i in range(6) for s in read_keys(tmp_path / f"node-{i}").secrets.values()]
    assert len(secrets) == 18
    for secret in secrets:
        assert secret not in seen and secret.hex().encode() not in seen
    assert b"num-examples" in seen and b"secret-loss" not in seen
    assert str(tmp_path).encode() not in seen
    for told in replies:
        assert told["metrics_layout"] == [["num-examples", -1, True]]
        assert [one[0] for one in told["spent"]] == list(told["shards"])
        assert len(told["figures"]) == (len(told["shards"]) if name == "cyclic" else 0)  # only where it mixes shards
    assert "secret-loss" not in result.train_metrics_clientapp[1]
    # Evaluation is none of it.
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == pytest.approx(0.5)
    assert [row["evaluate"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    assert all(row["evaluate"]["privacy"] is None for row in strategy.ledger.rows)


@ANY_CODE
def test_epsilon_is_in_the_row_and_among_the_metrics(name: str, tmp_path: Path) -> None:
    strategy = private(CODES[name], ledger=str(tmp_path / "ledger.jsonl"))
    result = start(strategy, clients(CODES[name], tmp_path / "keys"), 3)
    for server_round, row in enumerate(Ledger.read(tmp_path / "ledger.jsonl"), 1):
        entry, oracle = row["train"]["privacy"], hand_computed(server_round)
        assert entry["epsilon"] == pytest.approx(oracle, rel=1e-9)  # three holders, one release
        assert entry["epsilon-told"] == entry["epsilon-told-all-runs"] == pytest.approx(oracle, rel=1e-9)
        assert result.train_metrics_clientapp[server_round]["fl-gradcode.epsilon"] == entry["epsilon"]
        expected = {"unit": "record", "noise": "shared", "delta": 1e-5, "steps": 3, "sample-rate": 0.2}
        assert {key: entry[key] for key in expected} == expected and entry["other-requests"] == {}


def test_independent_noise_counts_every_holder_and_sends_no_figures(tmp_path: Path) -> None:
    def look(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content["fl-gradcode.reply"]
        told = json.loads(str(record["json"]))
        assert told["figures"] == [] and all(digest == "" for _, digest, _, _ in told["spent"])
        return reply

    strategy = private(CODES["cyclic"], privacy=settings(noise="independent"))
    start(strategy, clients(CODES["cyclic"], tmp_path, tamper=look), 2)
    for server_round, row in enumerate(strategy.ledger.rows, 1):
        assert row["train"]["outcome"] == "exact" and row["train"]["replica-disagreement"] is None
        assert row["train"]["privacy"]["noise"] == "independent"
        assert row["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(server_round, 3), rel=1e-9)


def test_a_server_that_is_not_trusted_costs_a_release_by_each_holder(tmp_path: Path) -> None:
    strategy = private(CODES["fractional"], privacy=settings(honest_server=False))
    start(strategy, clients(CODES["fractional"], tmp_path), 2)
    assert strategy.ledger.rows[1]["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(2, 3), rel=1e-9)


# Apps that forget


def forgetful(which: str, shards: Sequence[int] = range(6)) -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        reply = train_privately(message, context)
        content: Any = reply.content
        if shard not in shards:
            return reply
        spent = Spent.find_in(content)
        assert spent is not None
        if which == "none":
            del content["privacy"]
        elif which == "another shard":
            content["privacy"] = Spent(shard + 1, spent.round, spent.context, 1.0, 1.0, 1e-5).to_record()
        elif which == "another round":
            content["privacy"] = Spent(shard, spent.round + 1, spent.context, 1.0, 1.0, 1e-5).to_record()
        elif which == "nonsense":
            content["privacy"] = ConfigRecord({"fl-gradcode.privacy": json.dumps({"shard": shard, "x": []})})
        elif which == "infinite":
            content["privacy"] = Spent(shard, spent.round, spent.context, float("inf"), 1.0, 1e-5).to_record()
        return reply

    return app


RECORDS = ["none", "another shard", "another round", "nonsense", "infinite"]


@pytest.mark.parametrize("which", RECORDS)
def test_an_update_without_its_record_is_not_sent_and_the_run_ends(which: str, tmp_path: Path) -> None:
    sent: list[Message] = []

    def look(worker: int, message: Message, reply: Message) -> Message:
        sent.append(reply)
        return reply

    strategy = private(CODES["cyclic"])
    grid = clients(CODES["cyclic"], tmp_path, forgetful(which), tamper=look)
    with pytest.raises(UnsuitableApp, match=r"No client can take part: .*without the record of private_training"):
        start(strategy, grid, 3)
    assert len(sent) == 6 and all(reply.has_error() for reply in sent)
    assert len(strategy.ledger.rows) == 1


def test_an_app_that_forgets_for_one_shard_costs_its_holders_alone(tmp_path: Path) -> None:
    code = CODES["fractional"]  # the whole group of shard 0 cannot answer: skipped, with the reason
    strategy = private(code)
    start(strategy, clients(code, tmp_path, forgetful("none", [0])), 1)
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "skipped"
    assert all("Shard 0, train 1: the server asks" in one["reason"] for one in row["train"]["rejected"])
    assert row["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(1), rel=1e-9)  # asked is spent


# Sampling, and who missed what


@ANY_CODE
def test_rounds_in_which_a_shard_was_not_asked_cost_it_nothing(name: str, tmp_path: Path) -> None:
    code, rounds = CODES[name], 6
    strategy = private(code, inner=FedAvg(fraction_train=0.5, fraction_evaluate=0.0))
    # Worker 1 is busy for three rounds, and then the fastest.
    law = Law("", lambda s, worker, t: 1.0 if worker != 1 else 3.2 if t == 2 else 0.5)
    start(strategy, clients(code, tmp_path), rounds, Latency(compute=law))
    asked = [row["train"]["shards"] for row in strategy.ledger.rows]
    assert [len(one) for one in asked] == [3] * rounds and len({tuple(one) for one in asked}) > 2
    for number, row in enumerate(strategy.ledger.rows, 1):
        most = max(sum(shard in one for one in asked[:number]) for shard in range(6))
        assert row["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(most), rel=1e-9)
    # Holders have equal ledgers up to the last round that they were asked and answered in.
    caught_up = 0
    for shard in range(6):
        mine = [number for number, one in enumerate(asked, 1) if shard in one]
        for worker in code.holders_of(shard):
            found = rounds_of(tmp_path, worker, shard)
            assert found == [r for r in mine if r <= max(found, default=0)], (worker, shard)
            entries = BudgetLedger(tmp_path / f"node-{worker}" / "spent").entries(shard)
            caught_up += sum(not entry.context for entry in entries)
    assert caught_up or name == "fractional", "nobody learnt of what it missed"


def test_holders_that_missed_rounds_charge_them_when_they_are_back(tmp_path: Path) -> None:
    code = CODES["cyclic"]
    strategy = private(code, verify=0)
    # Workers 0 and 1 are busy until round 4, and needed there; what they were busy with nobody waits for.
    law = Law("", lambda s, w, t: {(0, 2): 3.2, (1, 2): 3.2, (2, 8): 99.0, (3, 8): 99.0}.get((w, t), 1.0))
    start(strategy, clients(code, tmp_path), 4, Latency(compute=law))
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 4
    for worker in (0, 1):
        for shard in code.shards_of(worker):
            entries = BudgetLedger(tmp_path / f"node-{worker}" / "spent").entries(shard)
            assert [e.round for e in entries] == [1, 2, 3, 4]
            assert [bool(e.context) for e in entries] == [False, False, False, True]
    assert strategy.ledger.rows[3]["train"]["privacy"]["epsilon-told"] == pytest.approx(hand_computed(4), rel=1e-9)


# Budgets


@pytest.mark.parametrize(("noise", "releases"), [("shared", 1), ("independent", 3)])
def test_a_run_over_budget_does_not_start_and_says_how_many_rounds_fit(
    noise: str, releases: int, tmp_path: Path
) -> None:
    most = hand_computed(4, releases) + 1e-6
    strategy = private(CODES["fractional"], privacy=settings(noise=noise, max_epsilon=most))
    grid = clients(CODES["fractional"], tmp_path)
    said = (
        rf"10 rounds would spend epsilon {hand_computed(10, releases):.3g} .*Run 4 rounds at most.*fl-gradcode privacy"
    )
    with pytest.raises(InvalidSetting, match=said):
        start(strategy, grid, 10)
    assert grid.calls == [0] * 6 and not list(tmp_path.glob("*/spent"))
    start(strategy, clients(CODES["fractional"], tmp_path), 4)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 4


def test_a_budget_below_one_round_is_told_apart() -> None:
    strategy = private(CODES["fractional"], privacy=settings(max_epsilon=0.5))
    with InProcessGrid(private_app(), 6) as grid, pytest.raises(InvalidSetting, match="One round alone would spend"):
        strategy.start(grid, initial(), num_rounds=3)


def test_a_node_whose_own_budget_is_exhausted_is_a_straggler(tmp_path: Path) -> None:
    code = CODES["cyclic"]
    budget = hand_computed(2) + 1e-6

    def node_config(worker: int) -> dict[str, Any]:
        own: dict[str, Any] = {"max-epsilon": budget, "privacy-dir": str(tmp_path / f"node-{worker}")}
        own = own if worker in (2, 5) else {}
        return {"partition-id": worker, "num-partitions": 6, **own}

    strategy = private(code)
    start(strategy, clients(code, tmp_path, node_config=node_config), 4)
    rows = [row["train"] for row in strategy.ledger.rows]
    assert [row["outcome"] for row in rows] == ["exact"] * 4
    assert all(not {2, 5} & {*row["used"]} for row in rows[2:])
    reasons = [one["reason"] for row in rows[2:] for one in row["rejected"]]
    assert reasons and all("above the budget of" in one and "PrivacyRefused: Shard" in one for one in reasons)
    for worker in (2, 5):
        for shard in code.shards_of(worker):
            assert set(rounds_of(tmp_path, worker, shard)) <= {1, 2}


def test_the_run_says_at_the_start_what_it_will_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fl_gradcode")
    start(private(CODES["cyclic"]), clients(CODES["cyclic"], tmp_path / "a"), 2)
    said = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("Privacy: "))
    assert f"all 2 rounds spend at most epsilon {hand_computed(2):.3g}, delta 1e-05" in said
    assert not [r for r in caplog.records if "INDEPENDENT" in r.getMessage()]
    caplog.clear()
    start(private(CODES["cyclic"], privacy=settings(noise="independent")), clients(CODES["cyclic"], tmp_path / "b"), 2)
    loud = next(r for r in caplog.records if "INDEPENDENT NOISE" in r.getMessage())
    assert loud.levelno == logging.WARNING
    spends = f"spends epsilon {hand_computed(2, 3):.3g}, where shared noise spends {hand_computed(2):.3g}"
    assert spends in loud.getMessage()


def test_each_draw_of_noise_on_the_server_counts_also_a_second_one_of_a_round() -> None:
    central = CentralNoise(noise_multiplier=5.0, clipping_norm=1.0, accountant="rdp")
    account = RunAccount(central, CODES["fractional"], "r")
    for _ in range(3):
        account.charge_draw(1, [0, 2])
    spent = account.line(None, {}).to_json()
    assert spent["epsilon"] == pytest.approx(central.epsilon(3))
