"""Whole rounds under shorter replies, field codes, approximate codes, limits of noise and filled-in updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import Coded, GradientCode, GradientCoding, VirtualGrid, cyclic_repetition, fractional_repetition
from fl_gradcode import gradient_coding_mod as mod
from fl_gradcode.codes import bernoulli, for_assignment, reed_solomon, stochastic
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, Law, lognormal, scaled
from fl_gradcode.strategy.options import Approximation
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, relative, run_plain, toy_app, update_of

HELD = [[0, 1, 4], [0, 1, 2, 4], [0, 3, 4], [1, 2, 3], [0, 2, 3], [2, 4], [3, 4, 1]]  # 7 workers, 5 shards
CODES: dict[str, GradientCode] = {
    "groups, m=2": fractional_repetition(7, 1, m=2),
    "groups, m=3": fractional_repetition(8, 1, k=5, m=3),
    "universal, m=2": for_assignment(HELD, s=2, m=2),
    "universal, m=3": for_assignment(HELD, s=1, m=3),
    "field, m=1": reed_solomon(6, 2),
    "field, m=2": reed_solomon(6, 2, m=2),
    "field, m=3, k=4": reed_solomon(6, 1, m=3, k=4),
}
CYCLIC = cyclic_repetition(6, 2, rng=np.random.default_rng(0))
SAME = Latency(compute=1.0)
COUNTING = ArrayRecord([np.zeros(4, np.float32), np.array([7], np.int64)])


def silent(*workers: int, tick: int | None = None) -> Latency:
    """Some never answer; with `tick`, only then: 2 r is training, 2 r + 1 evaluation of round r."""
    law = Law("", lambda s, worker, t: float("inf") if worker in workers and tick in (None, t) else 1.0 + worker / 100)
    return Latency(compute=law)


def run(code: GradientCode, latency: Latency, **kwargs: Any) -> tuple[Any, list[dict[str, Any]]]:
    rounds, inner, app = (
        kwargs.pop("rounds", 1),
        kwargs.pop("inner", FedAvg(fraction_evaluate=0.0)),
        kwargs.pop("app", None) or toy_app(),
    )
    arrays, tamper = kwargs.pop("arrays", None) or initial_arrays(), kwargs.pop("tamper", None)
    # Some read off the metrics by a function of their own what was decoded.
    kwargs.setdefault("sees", None if "send" in kwargs else "mean")
    strategy = GradientCoding(inner, code, **{"verify": 0, **kwargs})
    with InProcessGrid(app, code.n, tamper=tamper) as grid:
        result = strategy.start(VirtualGrid(grid, latency), arrays, num_rounds=rounds, timeout=50.0)
    return result, strategy.ledger.rows


def app_with(update: Callable[[int, int], Any]) -> ClientApp:
    """Moves the model by `update(node, shard)`, and a counter by 3; shard j has j + 1 examples."""
    app = ClientApp(mods=[mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content: Any = message.content
        model, counter = content["arrays"].to_numpy_ndarrays()
        arrays = ArrayRecord([(model + update(context.node_id, shard)).astype(np.float32), counter + 3])
        metrics = MetricRecord({"num-examples": shard + 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def node_of(worker: int, n: int) -> int:
    return {w: node for node, w in InProcessGrid(ClientApp(), n).known_workers().items()}[worker]


@pytest.mark.parametrize("name", CODES)
def test_the_model_and_the_metrics_are_those_of_fedavg_whoever_is_silent(name: str) -> None:
    code = CODES[name]
    plain = run_plain(toy_app(), code.k)
    for missing in itertools.combinations(range(code.n), code.s):
        latency = Latency(compute=scaled(lognormal(), dict.fromkeys(missing, float("inf"))))
        result, rows = run(code, latency, inner=FedAvg(), rounds=3)
        entries = [row[kind] for row in rows for kind in ("train", "evaluate")]
        assert all(entry["outcome"] == "exact" and not set(missing) & set(entry["used"]) for entry in entries)
        if name.startswith("field"):
            rounding = code.k * 2.0**-17 / sum(range(1, code.k + 1))
            assert rows[0]["train"]["quantisation-error"] == pytest.approx(rounding)
            assert np.abs(flat(result.arrays) - flat(plain.arrays)).max() < 3 * rounding + 1e-6
        else:
            kappa = max(row["train"]["kappa"] for row in rows)
            assert relative(result.arrays, plain.arrays) < 1e-6 * max(1.0, kappa)
        for phase in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
            for key, value in getattr(plain, phase)[3].items():
                assert getattr(result, phase)[3][key] == pytest.approx(value, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", CODES)
def test_replies_are_m_times_shorter(name: str) -> None:
    def measure(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content["fl-gradcode.update"]
        lengths.add(record["arrays"].numpy().size)
        return reply

    lengths: set[int] = set()
    run(CODES[name], SAME, tamper=measure)
    assert lengths == {-(-11 // CODES[name].m)}


@pytest.mark.parametrize("name", CODES)
def test_counters_stay_whole_and_the_weight_is_exact(name: str) -> None:
    seen: list[Any] = []

    def look(records: list[RecordDict], key: str) -> MetricRecord:
        seen.extend(record["metrics"][key] for record in records)
        return MetricRecord()

    code = CODES[name]
    app = app_with(lambda node, shard: np.full(4, 0.1 * shard))
    inner = FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=look)
    result, _ = run(code, SAME, inner=inner, app=app, arrays=COUNTING, rounds=2)
    model, counter = result.arrays.to_numpy_ndarrays()
    assert counter.dtype == np.int64 and counter.tolist() == [13]
    assert np.abs(model - 2 * sum(0.1 * j * (j + 1) for j in range(code.k)) / sum(range(1, code.k + 1))).max() < 1e-5
    assert seen == [sum(range(1, code.k + 1))] * 2


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_what_does_not_fit_a_field_rejects_that_worker_alone(value: float) -> None:
    bad = node_of(3, 6)
    app = app_with(lambda node, shard: np.full(4, value if node == bad else 0.5))
    result, rows = run(reed_solomon(6, 2), SAME, app=app, arrays=COUNTING, rounds=2)
    assert np.abs(result.arrays.to_numpy_ndarrays()[0] - 1.0).max() < 1e-4
    for server_round, row in enumerate(rows, 1):
        (one,) = row["train"]["rejected"]
        assert one["node"] == str(bad) and 3 not in row["train"]["used"]
        assert f"Shard 3, train {server_round}: An entry of size {value * 4:.4g}" in one["reason"]
        assert "there is room up to 2731" in one["reason"]  # (2^30 - 1) / 6 / 2^16
        assert one["reason"].endswith(".") and not one["reason"].endswith("..")


def test_holders_that_differ_by_more_than_decoding_can_bear_make_no_model() -> None:
    code, bad = cyclic_repetition(12, 4, rng=np.random.default_rng(0)), node_of(5, 12)
    assert code.kappa([i for i in range(12) if i > 3]) > 3
    for apart, outcome in ((1e-4, "exact"), (8e-3, "skipped")):  # both below 1e-2, until decoding amplifies them
        scale = {bad: 0.5 * (1 + apart)}
        app = app_with(lambda node, shard, scale=scale: np.full(4, scale.get(node, 0.5)))  # type: ignore[misc]
        _, (row,) = run(code, silent(0, 1, 2, 3), app=app, arrays=COUNTING)
        assert row["train"]["outcome"] == outcome


def test_replicas_that_differ_by_one_bit_under_a_field_make_no_model() -> None:
    bad = node_of(0, 5)  # shard 0, with one example, is on workers 0 and 4
    app = app_with(lambda node, shard: np.full(4, 0.5 + (2.0**-16 if node == bad and shard == 0 else 0.0)))
    result, (row,) = run(reed_solomon(5, 1), silent(2), app=app, arrays=COUNTING)
    assert row["train"]["outcome"] == "skipped" and row["train"]["replica-disagreement"] > 1e-2
    assert flat(result.arrays).tolist() == [0, 0, 0, 0, 7]
    result, (row,) = run(reed_solomon(5, 1), silent(4), app=app, arrays=COUNTING)  # one copy alone is as good as any
    assert row["train"]["outcome"] == "exact"
    assert np.abs(result.arrays.to_numpy_ndarrays()[0] - 0.5).max() < 1e-4


def kappa_of(code: GradientCode, survivors: Sequence[int]) -> float:
    """Noise amplification of the shortest decoding vector of `survivors`."""
    rows = code.B[list(survivors)]
    a = np.linalg.lstsq(rows.T, np.ones(code.k), rcond=None)[0]
    return float(np.sqrt(a**2 @ np.square(rows).sum(axis=1) / code.k))


def test_waits_for_more_replies_while_noise_is_amplified_too_much() -> None:
    code = cyclic_repetition(7, 3, rng=np.random.default_rng(2))
    plain = run_plain(toy_app(), 7, rounds=1)
    kappas = {replies: kappa_of(code, range(replies)) for replies in (4, 5, 6, 7)}
    assert kappas[4] > 1.1 * kappas[5] > 1.2 * kappas[6], "the code of this test is too tame"
    cases = (
        (silent(), float("inf"), 4, "decoded"),
        (silent(), kappas[5] * 1.01, 5, "decoded"),
        (silent(), kappas[6] * 1.01, 6, "decoded"),
        (silent(), 0.01, 7, "answered"),
        (silent(6), 0.01, 6, "timed out"),
    )
    for latency, kappa_max, replies, ended in cases:
        result, (row,) = run(code, latency, send=Coded(kappa_max=kappa_max))
        entry = row["train"]
        assert (entry["outcome"], entry["ended"], entry["used"]) == ("exact", ended, [*range(replies)])
        assert entry["kappa"] == pytest.approx(kappas[replies], rel=1e-6)
        assert entry["seconds"]["waiting"] == pytest.approx(50.0 if ended == "timed out" else 4 + (replies - 1) / 25)
        assert relative(result.arrays, plain.arrays) < 1e-5


@pytest.mark.parametrize("family", [bernoulli, stochastic])
def test_an_approximate_code_stops_after_n_minus_s_replies_and_says_what_they_cover(family: Any) -> None:
    estimates = 0
    for seed in range(5):
        code = family(8, 3, k=13, rng=np.random.default_rng(seed))
        loads = [len(code.shards_of(i)) * (1 + i / 100) for i in range(8)]
        late = sorted(i for i in range(8) if loads[i])[-2:]
        first = sorted((i for i in range(8) if loads[i] and i not in late), key=lambda i: loads[i])
        result, (row,) = run(code, silent(*late), on_undecodable="approximate")
        entry, enough = row["train"], len(first) + 2 - 3
        assert entry["seconds"]["waiting"] <= loads[first[enough - 1]] + 1e-9
        if entry["outcome"] == "exact":
            continue
        estimates += 1
        assert sorted(entry["answered"]) == sorted(first[:enough]) and entry["ended"] == "decoded"
        a = np.linalg.lstsq(code.B[entry["answered"]].T, np.ones(13), rcond=None)[0]
        coverage = a @ code.B[entry["answered"]]
        assert entry["coverage"] == pytest.approx(coverage, abs=1e-5)
        assert entry["decoding-error"] == pytest.approx(np.abs(coverage - 1).max())
        weights = coverage * np.arange(1, 14)
        mean = sum(w * update_of(1, j, 11) for j, w in enumerate(weights)) / weights.sum()
        assert np.abs(flat(result.arrays) - flat(initial_arrays()) - mean).max() < 1e-5
    assert estimates > 2, "the codes of this test are too good"


@pytest.mark.parametrize("send", ["coded", "shards"])
@pytest.mark.parametrize("fill_in", [False, True])
def test_a_dead_group_is_filled_in_with_what_it_last_sent(send: Any, fill_in: bool) -> None:
    # Workers 0 and 2, with shards 0 and 2, answer in round 1 only.
    policy = Approximation(fill_in=fill_in)
    result, rows = run(fractional_repetition(4, 1), silent(0, 2, tick=4), rounds=2, send=send, on_undecodable=policy)
    entry = rows[1]["train"]
    first, second = ([(j + 1) * update_of(r, j, 11) for j in range(4)] for r in (1, 2))
    after_one = flat(initial_arrays()) + sum(first) / 10
    step = (first[0] + second[1] + first[2] + second[3]) / 10 if fill_in else (second[1] + second[3]) / 6
    assert np.abs(flat(result.arrays) - after_one - step).max() < 1e-6
    assert (entry["outcome"], entry["ended"], entry["coverage"]) == ("approximate", "timed out", [0, 1, 0, 1])
    blocks = [[0, 2]] if send == "coded" else [[0], [2]]
    assert entry["filled-in"] == [{"shards": block, "round": 1} for block in blocks if fill_in]
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(2.0 if fill_in else (2 * 1 + 4 * 3) / 6)


def test_remembers_no_more_updates_than_there_are_shards() -> None:
    # A group sends other shards with each sample: none of them may be kept for ever, at a model's size each.
    inner = FedAvg(fraction_train=0.5, fraction_evaluate=0.0)
    strategy = GradientCoding(inner, fractional_repetition(4, 1, k=8), on_undecodable=Approximation(fill_in=True))
    with InProcessGrid(toy_app(), 4) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=40)
    assert strategy._run is not None and len(strategy._run.stale_updates["train"]._known) <= 8


def test_ridge_trades_coverage_for_less_noise() -> None:
    code = for_assignment(HELD, s=2)
    kappas = []
    for ridge in (0.0, 0.05):
        _, (row,) = run(code, silent(0, 2, 5), on_undecodable=Approximation(ridge=ridge))
        entry, rows = row["train"], code.B[[1, 3, 4, 6]]
        lengths = np.square(rows).sum(axis=1)
        a = np.linalg.solve(rows @ rows.T + ridge * np.diag(lengths), rows.sum(axis=1))
        assert entry["coverage"] == pytest.approx(a @ rows, abs=1e-5)
        assert entry["kappa"] == pytest.approx(np.sqrt(a**2 @ lengths / 5), rel=1e-5)
        kappas.append(entry["kappa"])
    assert kappas[1] < kappas[0]


@pytest.mark.parametrize("send", ["coded", "shards"])
def test_a_run_may_only_evaluate_and_be_started_again_on_other_nodes(send: Any) -> None:
    strategy = GradientCoding(FedAvg(fraction_train=0.0), CYCLIC, send=send)
    for seed in (0, 1):
        with InProcessGrid(toy_app(), 6, seed=seed) as grid:
            strategy.start(grid, initial_arrays(), num_rounds=2)
    assert [(row["train"], row["evaluate"]["outcome"]) for row in strategy.ledger.rows] == [(None, "exact")] * 4


REFUSED: list[tuple[GradientCode, dict[str, Any], str]] = [
    (fractional_repetition(6, 1, m=2), {"send": "shards"}, r"divides them by m=2\. Use a code with m = 1\."),
    (reed_solomon(6, 2), {"send": "shards"}, r"a code over a prime field codes them\. Choose one\."),
    (CYCLIC, {"send": "shards"}, r"run the strategy by its start\(\)\."),  # somebody else's loop
    (CYCLIC, {"send": "both"}, r"send='both' must be one of coded, shards, adaptive, or a Coded"),
    (CYCLIC, {"on_undecodable": "retry"}, "'retry' must be one of skip, approximate, raise or an"),
    (stochastic(6, 2, rng=np.random.default_rng(0)), {}, "stochastic code promises no exact sum: pass on_undecodable="),
    (reed_solomon(6, 2), {"on_undecodable": "approximate"}, "Over a prime field a sum is exact or unknown"),
    (CYCLIC, {"on_undecodable": Approximation(fill_in=True)}, "a cyclic repetition code mixes them"),
    (fractional_repetition(6, 1, m=2), {"on_undecodable": Approximation(fill_in=True)}, "mixes them. Use fractional"),
]


@pytest.mark.parametrize(("code", "options", "sentence"), REFUSED)
def test_what_makes_no_sense_is_refused_in_one_sentence(code: Any, options: dict[str, Any], sentence: str) -> None:
    with InProcessGrid(toy_app(), 6) as grid, pytest.raises(InvalidSetting, match=sentence) as caught:
        GradientCoding(FedAvg(), code, **options).configure_train(1, initial_arrays(), ConfigRecord(), grid)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_ridge_is_a_number_of_at_least_0() -> None:
    for ridge in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidSetting, match=f"ridge={ridge} must be a number of at least 0."):
            Approximation(ridge=ridge)
