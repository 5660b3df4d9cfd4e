"""Noise on the server: clipped, encoded, decoded, and then noised once, whoever answers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import (
    Approximation,
    GradientCode,
    GradientCoding,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    gradient_coding_mod,
    uncoded,
)
from fl_gradcode.codes import bernoulli, for_assignment, reed_solomon
from fl_gradcode.errors import InvalidSetting, PrivacyRefused, UnsuitableApp
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.privacy import BudgetLedger, CentralNoise
from fl_gradcode.protocol import packing as pack
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat
from tests.strategy.test_types import bfloat16, moving_app

HELD = [[0, 1, 2, 5], [1, 2, 3], [2, 3, 4], [3, 4, 5, 0], [4, 5, 0], [5, 0, 1, 3]]
CODES: dict[str, GradientCode] = {
    "uncoded": uncoded(6),
    "fractional": fractional_repetition(6, 2),
    "fractional, m=2": fractional_repetition(6, 2, m=2),
    "cyclic": cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
    "universal": for_assignment(HELD, s=1),
    "field": reed_solomon(6, 2),
    "field, m=2": reed_solomon(6, 2, m=2),
}
ENTRIES, NOISE, CLIP = 50_001, 5.0, 0.5
ROUNDING = 2.0**-17  # of an entry over a field, with 16 bits behind the point


def settings(**changes: Any) -> CentralNoise:
    values: dict[str, Any] = {"noise_multiplier": NOISE, "clipping_norm": CLIP, "accountant": "rdp"}
    return CentralNoise(**{**values, **changes})


def updates(entries: int = ENTRIES) -> Any:
    """The shards' updates before clipping, of norms 0.1, 0.2, 0.4, 0.8, 1.6 and 3.2: three of them are too long."""
    drawn = np.random.default_rng(3).standard_normal((6, entries))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * 0.1 * 2.0 ** np.arange(6)[:, None]


def clipped(given: Any, norm: float = CLIP) -> Any:
    return given * np.minimum(1, norm / np.linalg.norm(given, axis=1))[:, None]


def app(moves: Any) -> ClientApp:
    """Shard j's model moves by `moves[j]`; its data have very unequal sizes, and a loss."""
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content: Any = message.content
        (old,) = content["arrays"].to_numpy_ndarrays()
        metrics = MetricRecord({"num-examples": 10**shard, "secret-loss": 0.5})
        arrays = ArrayRecord([(old + moves[shard]).astype(np.float32)])
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def run(
    code: GradientCode, moves: Any = None, silent: tuple[int, ...] = (), rounds: int = 1, **kwargs: Any
) -> tuple[Any, list[dict[str, Any]]]:
    moves = updates() if moves is None else moves
    client, tamper = kwargs.pop("app", None) or app(moves), kwargs.pop("tamper", None)
    arrays = kwargs.pop("arrays", None) or ArrayRecord([np.zeros(len(moves[0]), np.float32)])
    strategy = GradientCoding(
        kwargs.pop("inner", None) or FedAvg(fraction_evaluate=0.0), code, **{"privacy": settings(), **kwargs}
    )
    latency = Latency(compute=scaled(lognormal(), dict.fromkeys(silent, float("inf"))))
    with InProcessGrid(client, code.n, tamper=tamper) as clients:
        result = strategy.start(VirtualGrid(clients, latency), arrays, num_rounds=rounds, timeout=1000.0)
    return result, strategy.ledger.rows


@pytest.mark.parametrize("name", CODES)
def test_the_sum_of_clipped_updates_gets_noise_of_std_zc_whoever_answers(name: str) -> None:
    code, ratios = CODES[name], []
    exact = clipped(updates()).sum(0)
    grid_step = ROUNDING if name.startswith("field") else 0.0
    theory = NOISE * (CLIP + grid_step * np.sqrt(ENTRIES))
    for silent in [*itertools.combinations(range(6), code.s)][::3]:
        result, (row,) = run(code, silent=silent)
        assert row["train"]["outcome"] == "exact" and not {*row["train"]["used"]} & {*silent}
        noise = flat(result.arrays) * 6 - exact  # all weigh the same, however many examples they have
        ratios.append(noise.var() / theory**2)
        assert abs(noise.mean()) < 5 * theory / np.sqrt(ENTRIES)
        assert abs(np.corrcoef(noise, exact)[0, 1]) < 5 / np.sqrt(ENTRIES)
    print(f"\n{name}: variance over theory {min(ratios):.4f} to {max(ratios):.4f}")
    assert max(np.abs(np.array(ratios) - 1)) < 0.03


def test_noise_covers_what_rounding_to_a_field_adds_to_the_sensitivity() -> None:
    rounding = 2.0**-9  # of each of so many entries: as much as the clipping norm
    result, _ = run(reed_solomon(6, 2, fraction_bits=8))
    theory = NOISE * (CLIP + rounding * np.sqrt(ENTRIES))
    assert theory > 1.8 * NOISE * CLIP
    assert (flat(result.arrays) * 6 - clipped(updates()).sum(0)).std() == pytest.approx(theory, rel=0.015)


@pytest.fixture
def same_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's generator repeats itself: two runs have the same noise, and their difference none."""
    monkeypatch.setattr(os, "urandom", lambda n: b"\x07" * n)


@pytest.mark.usefixtures("same_draw")
@pytest.mark.parametrize("name", CODES)
def test_one_shard_changes_the_decoded_sum_by_the_clipping_norm_at_most(name: str) -> None:
    entries, code = 2_001, CODES[name]
    given = updates(entries)
    rounding = ROUNDING * np.sqrt(entries) if name.startswith("field") else 0.0

    def total(moves: Any, silent: tuple[int, ...]) -> Any:
        # Little noise, so that float32 holds the sum.
        privacy = settings(noise_multiplier=0.05)
        return flat(run(code, moves, silent, privacy=privacy)[0].arrays) * 6

    for silent in [(), tuple(range(code.s))]:
        before = total(given, silent)
        for shard, other in [(5, 0.0), (0, 1e3), (3, 1e-3), (5, -1.0)]:
            changed = given.copy()
            changed[shard] *= other
            without = given.copy()
            without[shard] = 0
            # Present or not: at most C. One for another is a removal and an addition.
            absent, most = total(without, silent), CLIP * (1 + 1e-4) + rounding
            assert np.linalg.norm(before - absent) <= most
            assert np.linalg.norm(total(changed, silent) - absent) <= most


def test_no_noise_and_no_metric_travels() -> None:
    sent: list[tuple[Any, str]] = []

    def look(worker: int, message: Message, reply: Message) -> Message:
        content: Any = reply.content
        sent.append((content["fl-gradcode.update"]["arrays"].numpy().copy(), str(content["fl-gradcode.reply"]["json"])))
        assert "secret" not in str(content["fl-gradcode.reply"]["json"])
        assert content["fl-gradcode.update"]["metrics"].numpy().tolist() in ([1.0], [2.0], [3.0])  # how many shards
        return reply

    code = CODES["fractional"]
    result, (row,) = run(code, tamper=look)
    each = clipped(updates())
    sums = [each[list(group)].sum(0) for group in {tuple(code.shards_of(i)) for i in range(6)}]
    for vector, _ in sent:
        assert min(float(np.linalg.norm(vector - one)) for one in sums) < 1e-5
    metrics = result.train_metrics_clientapp[1]
    assert "secret-loss" not in metrics
    assert row["train"]["privacy"]["unit"] == "shard" and row["train"]["privacy"]["noise"] == "central"
    assert metrics["fl-gradcode.epsilon"] == row["train"]["privacy"]["epsilon"]


def test_two_runs_draw_different_noise() -> None:
    one, other = (flat(run(CODES["fractional"])[0].arrays) for _ in range(2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_thirty_rounds_spend_the_known_epsilon() -> None:
    privacy = settings(accountant="prv")
    _, rows = run(CODES["fractional"], updates(5), rounds=30, privacy=privacy)
    spent = [row["train"]["privacy"]["epsilon"] for row in rows]
    assert spent == sorted(spent) and spent[0] > 0
    assert spent[-1] == pytest.approx(4.87, abs=0.02)  # dp-accounting's PLD

    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    oracle = PLDAccountant()
    oracle.compose(dp_event.GaussianDpEvent(NOISE), 30)
    assert oracle.get_epsilon(1e-5) <= spent[-1] <= oracle.get_epsilon(1e-5) + 0.02


def test_sampled_shards_alone_are_charged_and_weigh_the_same(tmp_path: Path) -> None:
    inner = FedAvg(fraction_train=0.5, fraction_evaluate=0.0)
    privacy = settings(folder=str(tmp_path))
    _, rows = run(CODES["fractional"], updates(5), rounds=4, inner=inner, privacy=privacy)
    ledger = BudgetLedger(tmp_path)
    asked = [row["train"]["shards"] for row in rows]
    for shard in range(6):
        assert [e.round for e in ledger.entries(shard)] == [r for r in range(1, 5) if shard in asked[r - 1]]
    most = max(sum(shard in one for one in asked) for shard in range(6))
    assert rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(privacy.epsilon(most))


def test_a_skipped_round_releases_and_charges_nothing(tmp_path: Path) -> None:
    privacy = settings(folder=str(tmp_path))
    result, rows = run(CODES["fractional"], updates(5), (0, 1, 2, 3, 4, 5), privacy=privacy)
    assert rows[0]["train"]["outcome"] == "skipped" and rows[0]["train"]["privacy"]["epsilon"] == 0
    assert BudgetLedger(tmp_path).shards == [] and flat(result.arrays).tolist() == [0.0] * 5


@pytest.mark.parametrize("same_name", [True, False])
def test_the_ledger_outlives_the_server_and_its_budget_ends_the_run(same_name: bool, tmp_path: Path) -> None:
    budget = settings().epsilon(5) + 1e-6
    privacy = settings(folder=str(tmp_path / "spent"), max_epsilon=budget)
    code = CODES["cyclic"]
    _, first = run(code, updates(5), rounds=3, privacy=privacy, run="a")
    assert first[-1]["train"]["privacy"]["epsilon"] == pytest.approx(settings().epsilon(3))
    # Another process would find the same: three rounds more are too many, two are not.
    again = "a" if same_name else "b"
    with pytest.raises(InvalidSetting, match=r"3 rounds would spend epsilon .* Run 2 rounds at most"):
        run(code, updates(5), rounds=3, privacy=privacy, run=again)
    _, rows = run(code, updates(5), rounds=2, privacy=privacy, run=again)
    assert rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(budget)
    assert [len(BudgetLedger(tmp_path / "spent").entries(j)) for j in range(6)] == [5] * 6


def test_a_release_over_budget_does_not_happen(tmp_path: Path) -> None:
    # Two servers at once on one ledger: what begin() found free is gone when the noise is to be drawn.
    privacy = settings(folder=str(tmp_path), max_epsilon=settings().epsilon(3) + 1e-6)
    code = CODES["fractional"]
    seen: list[Any] = []

    def another(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        seen.append(flat(arrays))
        if server_round == 1:
            run(code, updates(5), rounds=1, privacy=privacy, run="other")

    with pytest.raises(PrivacyRefused, match="above the budget"):
        run(code, updates(5), rounds=3, privacy=privacy, run="mine", on_round_end=another)
    assert len(seen) == 2
    assert [len(BudgetLedger(tmp_path).entries(j)) for j in range(6)] == [3] * 6


@pytest.mark.parametrize("policy", ["approximate", Approximation(ridge=0.1)])
def test_estimates_are_refused(policy: Any) -> None:
    with pytest.raises(InvalidSetting, match="an estimate may hold a shard several times"):
        GradientCoding(FedAvg(), CODES["cyclic"], privacy=settings(), on_undecodable=policy)


def test_codes_that_are_not_exact_are_refused() -> None:
    code = bernoulli(6, 2, rng=np.random.default_rng(0))
    with pytest.raises(InvalidSetting, match="Use an exact code"):
        GradientCoding(FedAvg(), code, privacy=settings(), on_undecodable="approximate")


@pytest.mark.parametrize("name", ["fractional", "fractional, m=2", "cyclic", "field"])
def test_counters_and_bfloat16_keep_their_types(name: str) -> None:
    start = {
        "w": bfloat16([1.0, 2.0]),
        "b": Array(np.zeros(3, np.float32)),
        "steps": Array(np.asarray(7, np.int64)),
        "small": Array(np.zeros(50, np.uint8)),
    }
    privacy = settings(noise_multiplier=1e-2, clipping_norm=1e3)  # of std 10, 1.7 on the mean
    result, rows = run(CODES[name], updates(1), app=moving_app(), arrays=ArrayRecord(start), rounds=2, privacy=privacy)
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * 2
    arrays = result.arrays
    assert {key: one.dtype for key, one in arrays.items()} == {key: one.dtype for key, one in start.items()}
    # They would get no noise, and could tell of the data: they stay what they were.
    assert int(arrays["steps"].numpy()) == 7 and not arrays["small"].numpy().any()
    assert np.abs(np.asarray(pack.view(arrays["w"]), np.float32) - [8, 9]).max() < 15
    assert np.abs(arrays["b"].numpy() - 7).max() < 15


def app_of(arrays: Callable[[Any], dict[str, Any]]) -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.node_config["partition-id"]
        content: Any = message.content
        old = {name: array.numpy() for name, array in content["arrays"].items()}
        reply = ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays(old).items()})
        return Message(RecordDict({"arrays": reply, "metrics": MetricRecord({"num-examples": 5})}), reply_to=message)

    return app


def test_a_counter_takes_nothing_of_the_clipping_norm() -> None:
    start = ArrayRecord({"w": Array(np.zeros(2, np.float32)), "steps": Array(np.asarray(0, np.int64))})
    moving = app_of(lambda old: {"w": old["w"] + np.array([0.6, 0.8], np.float32), "steps": old["steps"] + 1000})
    privacy = settings(noise_multiplier=1e-9, clipping_norm=1.0)
    result, (row,) = run(CODES["fractional"], updates(1), app=moving, arrays=start, privacy=privacy)
    assert row["train"]["outcome"] == "exact"
    assert np.allclose(result.arrays["w"].numpy(), [0.6, 0.8], rtol=1e-4) and result.arrays["steps"].numpy() == 0


@pytest.mark.parametrize("name", ["1.running_mean", "norm.running_var", "bn/moving_variance", "batch_stats/norm/var"])
def test_running_statistics_are_refused_with_what_to_use_and_may_be_left_out(name: str) -> None:
    start = ArrayRecord({"w": Array(np.zeros(2, np.float32)), name: Array(np.ones(2, np.float32))})
    with pytest.raises(UnsuitableApp, match=rf"holds the running statistics '{name}'.* Use GroupNorm or LayerNorm"):
        run(CODES["fractional"], updates(1), app=app_of(lambda old: old), arrays=start)
    kept = app_of(lambda old: {"w": old["w"] + np.float32(0.1)})
    result, (row,) = run(CODES["fractional"], updates(1), app=kept, arrays=start)
    assert row["train"]["outcome"] == "exact" and (result.arrays["w"].numpy() != 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_counts_as_a_straggler(value: float) -> None:
    moves = updates(5)
    moves[2, 1] = value
    _, (row,) = run(CODES["uncoded"], moves)
    assert row["train"]["outcome"] == "skipped"
    (one,) = row["train"]["rejected"]
    assert one["worker"] == 2 and "not finite (NaN or infinity), and cannot be clipped" in one["reason"]
