"""Plans: when they say to code, whom they find slow, what they print, and what they learn from a ledger."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import fl_gradcode
import fl_gradcode.codes as codes
from fl_gradcode import EarlyStopGrid, GradientCode, GradientCoding, VirtualGrid, gradient_coding_mod
from fl_gradcode.codes import cyclic_repetition, fractional_repetition, uncoded
from fl_gradcode.errors import FlGradcodeError, InvalidSetting
from fl_gradcode.history import History, Timing
from fl_gradcode.latency import Latency, Law, constant, exponential, lognormal, pareto, scaled, trace
from fl_gradcode.ledger import Ledger
from fl_gradcode.order_statistics import idle_mean
from fl_gradcode.planner import GAIN, Line, RoundPlan, candidates, make_plan, spread
from fl_gradcode.planner import _recommend as recommend
from fl_gradcode.populations import POPULATIONS, named
from fl_gradcode.round_times import steady_rounds
from fl_gradcode.schemes import (
    Scheme,
    any_code,
    drop_slowest,
    partial_work,
    repetition,
    wait_for_all,
)
from fl_gradcode.testing import InProcessGrid

N, BIG = 12, 16
LIGHT = {
    "none": named("none"),
    "lognormal": named("lognormal"),
    "steady": Latency(compute=lognormal(1.0, 0.05)),
    "all compute": Latency(compute=1.0),
}
HEAVY = ("exponential", "pareto", "bimodal", "serverless", "virtual-machines", "phones")


@cache
def plan(name: str) -> RoundPlan:
    return make_plan(LIGHT.get(name) or named(name), BIG, tolerances=(1, 3), populations=20)


# The verdict.


@pytest.mark.parametrize("name", list(LIGHT))
def test_light_tails_are_not_coded(name: str) -> None:
    found = plan(name)
    assert found.verdict.startswith("do not code: waiting for all takes ")
    assert not found.codes and found.recommended is found.lines[0]
    assert found.recommended.scheme == wait_for_all(BIG)


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_tails_are_coded(name: str) -> None:
    found = plan(name)
    best = found.recommended
    assert found.codes and best.scheme.exact
    assert found.speedup(best) > 1 / (1 - GAIN)
    assert found.verdict.startswith(f"code: {best.scheme.name} takes {best.steady:.3g} s a round, ")
    assert f"{found.speedup(best):.2f}x faster than waiting for all ({found.lines[0].steady:.3g} s)" in found.verdict
    assert f"each worker stores {best.storage} shards, and {best.computed:.2f} times as much is" in found.verdict


@pytest.mark.parametrize("name", [*HEAVY, *LIGHT])
def test_what_is_recommended_is_close_to_the_best_exact_line(name: str) -> None:
    found = plan(name)
    best = min(line.steady for line in found.lines if line.scheme.exact)
    assert found.recommended.steady <= best / (1 - GAIN)
    others = [line for line in found.lines[1:] if line.scheme.exact and line.steady <= found.recommended.steady]
    if found.codes:  # what is faster stores more, or computes more
        key = (found.recommended.storage, found.recommended.computed)
        assert all((line.storage, line.computed) >= key for line in others)


def test_a_code_for_any_s_stragglers_loses_where_load_is_what_is_slow() -> None:
    schemes = [any_code(24, s) for s in (1, 3, 7)]
    found = make_plan(Latency(compute=exponential()), 24, schemes=schemes)
    assert not found.codes
    assert re.search(r"with the best code \(any n - s \(cyclic\), s = 1\) a round is \d+% longer\.$", found.verdict)
    assert make_plan(Latency(fixed=exponential()), 24, schemes=schemes).codes


@pytest.mark.parametrize("name", ["exponential", "bimodal"])
def test_lines_say_what_independent_runs_do(name: str) -> None:
    found, latency = plan(name), named(name)
    parts = [latency.parts(seed=900 + number, n=BIG, rounds=300) for number in range(3)]
    for line in found.lines:
        runs = [steady_rounds(line.scheme, one) for one in parts]
        mean, spread_of_runs = np.mean([run.mean for run in runs]), max(run.error for run in runs)
        assert line.steady == pytest.approx(mean, rel=0.03, abs=4 * math.hypot(line.error, spread_of_runs))
        assert line.computed * BIG == pytest.approx(np.mean([run.computed for run in runs]), rel=0.05)
        assert line.storage == line.scheme.loads.max()
        assert line.closed_form == (not line.scheme.shardwise)
        if line.closed_form:
            assert line.idle == idle_mean(line.scheme, latency)
        assert line.steady >= 0.97 * line.idle - 3 * line.error


def test_upload_counts_each_reply_and_what_it_is_of_the_model() -> None:
    found = make_plan(Latency(fixed=1.0, transfer=0.1), 12, model_megabytes=10.0, tolerances=(2,))
    by_name = {line.scheme.name: line for line in found.lines}
    assert by_name["wait for all"].upload == 120.0 and by_name["wait for all"].steady == 3.0
    halved = by_name["repetition, s = 2, m = 2"]
    assert halved.upload == 60.0 and halved.steady == 2.5
    assert found.recommended is halved  # a sixth faster: all that a reply of half the length gains


def line(scheme: Scheme, steady: float, computed: float = 1.0) -> Line:
    return Line(scheme, steady, False, steady, 0.0, computed, 0.0, int(scheme.loads.max()))


def test_less_storage_is_preferred_only_where_it_is_still_faster_than_no_code() -> None:
    plain, small, large = line(wait_for_all(12), 100.0), repetition(12, 1), repetition(12, 3)
    best, _ = recommend([plain, line(small, 97.0), line(large, 94.0)])
    assert best.scheme is large
    best, _ = recommend([plain, line(small, 82.0), line(large, 80.0)])
    assert best.scheme is small
    best, _ = recommend([plain, line(small, 84.0), line(large, 80.0)])
    assert best.scheme is large
    best, verdict = recommend([plain, line(small, 98.0), line(large, 96.0)])
    assert best is plain and verdict.endswith("(repetition, s = 3) a round is only 4% shorter.")


def test_a_scheme_that_loses_data_is_never_recommended() -> None:
    lines = [line(wait_for_all(12), 10.0), line(drop_slowest(12, 3), 1.0), line(repetition(12, 1), 5.0)]
    assert recommend(lines)[0] is lines[2]
    assert recommend(lines[:2])[1] == "do not code: no code was compared that any worker may miss."


def test_infinite_rounds_are_told_from_finite_ones() -> None:
    never = math.inf
    lines = [line(wait_for_all(12), never), line(repetition(12, 1), never), line(repetition(12, 3), 7.0)]
    best, verdict = recommend(lines)
    assert best is lines[2]
    assert verdict.startswith("code: repetition, s = 3 takes 7 s a round, where nothing else ends: some never answer;")
    best, verdict = recommend(lines[:2])
    assert best is lines[0]
    assert verdict == "do not code: more workers never answer than any code that was compared tolerates."
    lines = [line(wait_for_all(12), 7.0), line(repetition(12, 1), never), line(any_code(12, 1), 6.9)]
    assert recommend(lines)[1].endswith("(any n - s (cyclic), s = 1) a round is only 1% shorter.")


@pytest.mark.parametrize("silent", [1, 3, 9, 11])
def test_a_plan_with_silent_workers(silent: int) -> None:
    latency = Latency(fixed=0.1, compute=scaled(lognormal(1.0, 0.2), dict.fromkeys(range(silent), math.inf)))
    found = make_plan(latency, N, tolerances=(1, 3, 5), rounds=20, populations=2)
    assert found.lines[0].steady == math.inf and found.lines[0].computed == 1.0
    assert set(found.slow) == set(range(silent))
    if silent < 11:
        assert found.codes and found.recommended.steady < 10
        assert found.speedup(found.recommended) == math.inf
    else:
        assert not found.codes and "more workers never answer" in found.verdict


@pytest.mark.parametrize("latency", [Latency(), Latency(transfer=3.0), Latency(fixed=1.0, slowdown=0.0)])
def test_rounds_that_take_no_time_are_not_coded(latency: Latency) -> None:
    found = make_plan(latency, 6)
    assert found.verdict == "do not code: a round takes no time as it is."
    assert not found.codes and found.slow == () and math.isnan(found.speedup(found.lines[1]))


# Who is slow for good.


def test_workers_that_are_slow_for_good_are_found_and_spread() -> None:
    slow = {0: 9.0, 4: 7.0, 8: 5.0}  # all in one group of 12 with s = 2
    found = make_plan(Latency(compute=scaled(lognormal(1.0, 0.2), slow)), N, tolerances=(2,))
    assert found.slow == (0, 4, 8)  # slowest first
    scheme = next(one.scheme for one in found.lines if one.scheme.name == "repetition, s = 2")
    assert [len(set(group) & set(slow)) for group in scheme.groups] == [1, 1, 1, 0]
    assert "order=[0, 4, 8, 1, 2, 3, 5, 6, 7, 9, 10, 11]" in scheme.python
    unspread = make_plan(
        Latency(compute=scaled(lognormal(1.0, 0.2), slow)), N, schemes=[repetition(N, 2), partial_work(N, 2)]
    )
    by_name = {one.scheme.name: one.steady for one in unspread.lines}
    for one in found.lines:
        if one.scheme.name in ("repetition, s = 2", "partial work, s = 2"):
            assert one.steady < 0.6 * by_name[one.scheme.name]


def test_no_order_is_printed_where_the_natural_one_spreads_them() -> None:
    found = make_plan(Latency(compute=scaled(lognormal(1.0, 0.2), {0: 9.0, 1: 7.0, 2: 5.0})), N, tolerances=(2,))
    assert found.slow == (0, 1, 2)
    assert not any("order" in one.scheme.python for one in found.lines)
    assert not any("order" in one.scheme.python for one in plan("virtual-machines").lines)  # slow, but not for good
    assert plan("virtual-machines").slow == plan("phones").slow == plan("pareto").slow == ()


@pytest.mark.parametrize(("n", "m"), [(5, 1), (5, 2), (7, 1), (7, 2), (12, 1), (17, 1)])
def test_slow_workers_are_spread_as_evenly_as_can_be(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    for s in range(1, n - m + 1):
        for count in range(n + 1):
            slow = rng.permutation(n)[:count].tolist()
            order = spread(slow, n, s, m=m)
            groups = fractional_repetition(n, s, m=m, order=order).groups
            assert groups is not None
            inside = [len(set(group) & set(slow)) for group in groups]
            assert max(inside) == -(-count // len(groups))
            if order is not None:
                natural = fractional_repetition(n, s, m=m).groups or ()
                assert max(len(set(group) & set(slow)) for group in natural) > max(inside)


# What is compared, and what is printed.


@pytest.mark.parametrize("n", [2, 3, 4, 9, 12])
def test_every_line_of_python_makes_the_code_that_it_stands_for(n: int) -> None:
    slow = [0, 2, 1][: n - 1] if n < 9 else [0, 4, 8]
    for scheme in candidates(n, slow=slow, m=True):
        with InProcessGrid(app(), n) as inner:
            names: dict[str, Any] = {**vars(fl_gradcode), **vars(codes), "np": np, "strategy": FedAvg(), "grid": inner}
            exec(scheme.python, names)
        if not scheme.exact:
            assert isinstance(names["grid"], EarlyStopGrid) and names["grid"].stop_after == scheme.enough
            continue
        strategy = names["strategy"]
        assert isinstance(strategy, GradientCoding)
        code = strategy.code
        assert (code.n, code.k, code.s, code.m) == (n, n, scheme.s, scheme.m)
        assert tuple(code.shards_of(i) for i in range(n)) == scheme.blocks
        assert (code.groups or ()) == scheme.groups
        assert strategy.options.send == ("shards" if scheme.shardwise else "coded")
        if scheme.shardwise:
            patience = strategy.options.patience
            assert scheme.patience == (2.0 if patience is None else patience)
        if scheme.enough is not None:
            assert scheme.enough == n - code.s


def test_candidates_have_names_of_their_own_and_as_many_as_were_asked() -> None:
    for n in (2, 5, 30):
        names = [scheme.name for scheme in candidates(n, m=True)]
        assert len(set(names)) == len(names)
    assert {scheme.s for scheme in candidates(30, (4, 2, 4)) if scheme.exact} == {2, 4}
    assert not any(scheme.m > 1 for scheme in candidates(30))
    assert candidates(30, ()) == candidates(30, [])
    assert max(scheme.s for scheme in candidates(30) if scheme.exact) <= 10


def test_waiting_for_all_is_the_first_line_and_is_not_there_twice() -> None:
    found = make_plan(Latency(fixed=1.0), 6, schemes=[wait_for_all(6), drop_slowest(6, 0), repetition(6, 1)])
    assert [one.scheme.name for one in found.lines] == ["wait for all", "repetition, s = 1"]
    assert [one.scheme for one in make_plan(Latency(fixed=1.0), 6, schemes=[]).lines] == [wait_for_all(6)]


@pytest.mark.parametrize(
    ("n", "options", "sentence"),
    [
        (1, {}, "n=1: one worker has nobody to share its work with; planning needs at least 2."),
        (0, {}, "n=0 must be a whole number of at least 1."),
        (2.5, {}, "n=2.5 must be a whole number of at least 1."),
        (math.nan, {}, "n=nan must be a whole number of at least 1."),
        (6, {"model_megabytes": -1.0}, "model_megabytes=-1.0 must be a number of at least 0."),
        (6, {"model_megabytes": math.nan}, "model_megabytes=nan must be a number of at least 0."),
        (6, {"model_megabytes": math.inf}, "model_megabytes=inf must be a number of at least 0."),
        (6, {"rounds": 19}, "rounds=19 must be a whole number of at least 20."),
        (6, {"rounds": 20.5}, "rounds=20.5 must be a whole number of at least 20."),
        (6, {"rounds": math.nan}, "rounds=nan must be a whole number of at least 20."),
        (6, {"populations": 0}, "populations=0 must be a whole number of at least 1."),
        (6, {"populations": 1.5}, "populations=1.5 must be a whole number of at least 1."),
        (6, {"seed": -1}, "seed=-1 must be a whole number of at least 0."),
        (6, {"tolerances": [0]}, "s=0: with n=6 workers a tolerance lies in 1..5."),
        (6, {"tolerances": [2, 6]}, "s=6: with n=6 workers a tolerance lies in 1..5."),
        (6, {"tolerances": [1.5]}, "s=1.5 stragglers of n=6 workers: s must be a whole number in 0..n-1."),
        (6, {"schemes": [repetition(8, 1)]}, "The scheme 'repetition, s = 1' is for 8 workers; planned is for n=6."),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(n: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FlGradcodeError, match=f"^{re.escape(sentence)}$"):
        make_plan(Latency(fixed=exponential()), n, **options)


def test_a_plan_is_of_its_seed() -> None:
    one, same, other = (make_plan(named("bimodal"), 8, tolerances=(1,), seed=seed) for seed in (3, 3, 4))
    assert [x.steady for x in one.lines] == [x.steady for x in same.lines] != [x.steady for x in other.lines]


def test_measured_times_are_replayed_to_their_end() -> None:
    # Slow for one round in 50, of which plans of 20 rounds would see none.
    table = np.ones((100, 8))
    table[2 * 45 : 2 * 45 + 2, 3] = 500.0
    found = make_plan(Latency(fixed=trace(table)), 8, tolerances=(1,), rounds=25, populations=40)
    assert found.lines[0].steady == pytest.approx((49 + 500) / 50, rel=0.05)
    assert found.codes and math.isnan(found.lines[0].error)  # one run: how others would go cannot be told


# History.


def app() -> ClientApp:
    clients = ClientApp(mods=[gradient_coding_mod])

    @clients.train()
    def train(message: Message, context: Context) -> Message:
        assert context.node_config["partition-id"] is not None
        content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    @clients.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        assert context.node_config["partition-id"] is not None
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return clients


def run(
    code: GradientCode, latency: Latency, rounds: int = 60, *, seed: int = 0, evaluate: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """The ledger's rows of a run."""
    fedavg = FedAvg() if evaluate else FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0)
    with InProcessGrid(app(), code.n) as inner:
        strategy = GradientCoding(fedavg, code, **options)
        strategy.start(VirtualGrid(inner, latency, seed=seed), ArrayRecord([np.zeros(1, np.float32)]), rounds, 1e9)
    return [json.loads(json.dumps(row)) for row in strategy.ledger.rows]


def waited(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([row["train"]["seconds"]["waiting"] for row in rows]))


def predicted(rows: list[dict[str, Any]], scheme: Scheme) -> float:
    latency = History.of_ledger(rows).latency()
    parts = latency.parts(seed=0, n=scheme.n, rounds=len(rows))
    return float(steady_rounds(scheme, parts).seconds.mean())


CODES: dict[str, tuple[GradientCode, dict[str, Any], Scheme]] = {
    "wait for all": (uncoded(N), {}, wait_for_all(N)),
    "cyclic": (cyclic_repetition(N, 2, rng=np.random.default_rng(0)), {}, any_code(N, 2)),
    "repetition": (fractional_repetition(N, 3), {}, repetition(N, 3)),
    "m = 2": (fractional_repetition(N, 2, m=2), {}, repetition(N, 2, m=2)),
    "partial work": (
        fractional_repetition(N, 3),
        {"send": "shards", "patience": 0.0},
        partial_work(N, 3, patience=0.0),
    ),
    "patient": (fractional_repetition(N, 3), {"send": "shards", "patience": 2.0}, partial_work(N, 3)),
}
MEMORYLESS = ("exponential", "bimodal", "serverless")


@cache
def rows_of(name: str, law: str) -> list[dict[str, Any]]:
    code, options, _ = CODES[name]
    return run(code, named(law), **options)


@pytest.mark.parametrize("law", ["exponential", "pareto", "bimodal", "virtual-machines", "phones"])
@pytest.mark.parametrize("name", list(CODES))
def test_a_ledger_predicts_the_run_that_wrote_it(name: str, law: str) -> None:
    rows, scheme = rows_of(name, law), CODES[name][2]
    assert predicted(rows, scheme) == pytest.approx(waited(rows), rel=0.01)


@pytest.mark.parametrize("law", [*MEMORYLESS, "pareto", "virtual-machines", "phones"])
def test_a_ledger_of_partial_work_predicts_repetition(law: str) -> None:
    really = waited(rows_of("repetition", law))
    assert predicted(rows_of("patient", law), repetition(N, 3)) == pytest.approx(really, rel=0.1)


@pytest.mark.parametrize("law", MEMORYLESS)
@pytest.mark.parametrize("name", ["repetition", "patient"])
def test_a_slow_moment_counts_once_however_many_rounds_it_kept_a_worker(name: str, law: str) -> None:
    """Else waiting for all would look up to three times as slow as it is, and a code would be recommended for it."""
    really = predicts = 0.0
    for seed in range(2):
        code, options, _ = CODES[name]
        predicts += predicted(run(code, named(law), seed=seed, **options), wait_for_all(N))
        really += steady_rounds(wait_for_all(N), named(law).parts(seed=seed, n=N, rounds=60)).seconds.mean()
    assert predicts == pytest.approx(really, rel=0.3 if law == "serverless" else 0.15)


def test_a_ledger_says_who_is_slow() -> None:
    latency = Latency(0.2, scaled(lognormal(0.8, 0.1), {1: 10.0, 5: 6.0}))
    for name in ("repetition", "patient"):
        code, options, _ = CODES[name]
        history = History.of_ledger(run(code, latency, 40, **options))
        assert make_plan(history.latency(), N, tolerances=(2,)).slow == (1, 5)


def test_late_replies_that_come_in_while_evaluating_are_learnt_from() -> None:
    latency = Latency(compute=scaled(constant(1.0), {0: 1.2}), evaluation=5.0)
    rows = run(fractional_repetition(N, 3), latency, 6, evaluate=True)
    assert any(one["kind"] == "train" for row in rows for one in row["evaluate"]["timings"])
    _, compute = History.of_ledger(rows).tables()
    assert compute[:, 0] == pytest.approx(1.2) and compute[:, 1:] == pytest.approx(1.0)


def test_the_split_is_what_clients_say() -> None:
    assert History.of_ledger(rows_of("repetition", "exponential")).split() == pytest.approx(0.8)
    assert History.of_ledger(rows_of("patient", "phones")).split() > 0.5
    fixed = History.of_ledger(run(fractional_repetition(N, 3), Latency(fixed=exponential()), 20))
    assert fixed.split() == 0.0  # a client that computes for no time says so
    assert fixed.tables()[1].max() == 0.0


def test_without_a_word_of_the_clients_all_is_compute() -> None:
    rows = json.loads(json.dumps(rows_of("repetition", "bimodal")))
    for row in rows:
        for one in row["train"]["timings"]:
            one["computing"] = None
    history = History.of_ledger(rows)
    assert history.split() == 1.0
    fixed, compute = history.tables()
    assert not fixed.any() and compute.min() > 0
    # Some say so: the others are split alike.
    rows[0]["train"]["timings"][0]["computing"] = 0.5 * rows[0]["train"]["timings"][0]["seconds"]
    assert History.of_ledger(rows).split() == pytest.approx(0.5 / 4 / (0.5 + 0.5 / 4))  # of four shards, for one


def test_workers_that_owe_a_reply_count_as_slow() -> None:
    latency = Latency(compute=scaled(constant(1.0), {2: math.inf}))
    for name in ("repetition", "patient", "cyclic"):
        code, options, _ = CODES[name]
        _, compute = History.of_ledger(run(code, latency, 10, **options)).tables()
        assert compute[:, 2].min() > 5.0
        assert np.delete(compute, 2, axis=1) == pytest.approx(1.0)


def test_a_worker_that_falls_silent_is_no_longer_as_fast_as_it_was() -> None:
    dies = Law("dies", lambda seed, worker, tick: math.inf if worker == 2 and tick >= 10 else 1.0)
    for name in ("repetition", "patient"):
        code, options, _ = CODES[name]
        _, compute = History.of_ledger(run(code, Latency(compute=dies), 25, **options)).tables()
        assert compute[:3, 2] == pytest.approx(1.0) and compute[8:, 2].min() > 4.0


def test_who_owes_a_second_shard_is_slow_although_the_first_came() -> None:
    history = History(2)
    history.add([Timing(1, 0, 1, 2.0), Timing(1, 1, 1, 2.0), Timing(1, 0, 1, 300.0, owing=True)])
    history.add([Timing(2, 1, 1, 2.0)])
    _, compute = history.tables()
    assert compute[:, 0].min() > 100 and compute[:, 1].tolist() == [2.0, 2.0]


def test_what_was_owed_and_has_come_counts_once() -> None:
    history = History(2)
    history.add([Timing(1, 1, 1, 1.0), Timing(1, 0, 1, 1.0, owing=True)])
    history.add([Timing(2, 1, 1, 1.0), Timing(1, 0, 1, 2.0, owing=True)])
    assert history.tables()[1].tolist() == [[2.0, 1.0], [2.0, 1.0]]  # so far: the last word
    history.add([Timing(3, 1, 1, 1.0), Timing(1, 0, 1, 2.5), Timing(3, 0, 1, 0.7)])
    assert history.tables()[1].tolist() == [[2.5, 1.0], [0.7, 1.0], [0.7, 1.0]]


def test_who_has_been_silent_for_longer_than_the_window_is_not_forgotten() -> None:
    history = History(2, window=4)
    for number in range(1, 20):
        history.add([Timing(number, 1, 1, 1.0)])
        history.add([Timing(1, 0, 1, float(number), owing=True)])
        assert history.rounds <= 4
        assert history.tables()[1][:, 0].max() == number
    assert len(history._timings) <= 4 + 5  # nothing piles up
    history.add([Timing(20, 0, 1, 1.0), Timing(20, 1, 1, 1.0)])
    for number in range(21, 25):
        history.add([Timing(number, worker, 1, 1.0) for worker in (0, 1)])
    assert history.tables()[1].tolist() == [[1.0, 1.0]] * 4


def test_gaps_take_the_next_time_and_after_the_last_one_that() -> None:
    history = History(3)
    history.add([Timing(1, 0, 1, 1.0), Timing(2, 1, 1, 2.0), Timing(5, 0, 2, 8.0), Timing(7, 1, 1, 3.0)])
    _, compute = history.tables()  # rounds 1, 2, 5 and 7
    assert compute[:, 0].tolist() == [1.0, 4.0, 4.0, 4.0]
    assert compute[:, 1].tolist() == [2.0, 2.0, 3.0, 3.0]
    assert compute[:, 2].tolist() == [2.5] * 4  # the median of what is known


def test_a_window_forgets_and_nonsense_is_not_learnt() -> None:
    history = History(2, window=2)
    history.add([Timing(number, 0, 1, float(number)) for number in range(1, 6)])
    assert history.rounds == 2 and history.tables()[1][:, 0].tolist() == [4.0, 5.0]
    history.add([Timing(9, 0, 0, 1.0), Timing(9, 2, 1, 1.0), Timing(9, -1, 1, 1.0), Timing(2, 1, 1, 7.0)])
    assert history.rounds == 2 and history.tables()[1][:, 0].tolist() == [4.0, 5.0]
    with pytest.raises(InvalidSetting, match=r"^There are no times to plan with\.$"):
        History(2).tables()


def test_a_shard_of_the_ledger_counts_as_what_it_is_of_a_workers_own() -> None:
    latency = Latency(0.5, 1.0)
    halves = fractional_repetition(N, 3, k=2 * N)  # a worker's own are two shards, of which each takes a second
    fixed, compute = History.of_ledger(run(halves, latency, 3)).tables()
    assert fixed == pytest.approx(0.5) and compute == pytest.approx(2.0)


def test_runs_that_were_appended_to_one_file_follow_each_other() -> None:
    one, other = (run(fractional_repetition(N, 3), named("bimodal"), 30, seed=seed) for seed in (0, 1))
    both = History.of_ledger([*one, *other])
    assert both.rounds == 60
    alone = [History.of_ledger(rows).tables()[1] for rows in (one, other)]
    known = both.tables()[1]
    np.testing.assert_allclose(known[30:], alone[1])
    assert (known[:30] == alone[0]).mean() > 0.9  # but for gaps at the end, which now are followed by something
    again = [*one, *json.loads(json.dumps(one))]  # the same strategy, started twice
    assert History.of_ledger(again).rounds == 60


def test_a_ledger_that_was_written_to_a_file_is_read_back(tmp_path: Any) -> None:
    path = tmp_path / "ledger.jsonl"
    with InProcessGrid(app(), 6) as inner:
        strategy = GradientCoding(FedAvg(), fractional_repetition(6, 1), ledger=Ledger(path))
        strategy.start(VirtualGrid(inner, named("pareto")), ArrayRecord([np.zeros(1, np.float32)]), 5)
    history = History.of_ledger(Ledger.read(path))
    assert history.n == 6 and history.rounds == 5
    assert np.array_equal(history.tables(), History.of_ledger(strategy.ledger.rows).tables())


def strip(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As an older version wrote them."""
    return [
        {**row, "train": {key: value for key, value in row["train"].items() if key not in ("timings", "owing")}}
        for row in rows
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: [], "The ledger has no rounds yet; let the run finish at least one."),
        (strip, "The ledger has no training times: it was written by an older version, or by no round."),
        (
            lambda rows: [{**row, "train": None} for row in rows],
            "The ledger has no training times: it was written by an older version, or by no round.",
        ),
        (
            lambda rows: [*rows, {**rows[0], "code": {**rows[0]["code"], "n": 5}}],
            "The ledger has codes for [5, 12] workers; give one that is of one run.",
        ),
        (lambda rows: [{"round": 1}], "The ledger has no rounds yet; let the run finish at least one."),
    ],
)
def test_a_ledger_without_times_is_refused_in_one_sentence(change: Callable[[Any], Any], sentence: str) -> None:
    with pytest.raises(InvalidSetting, match=f"^{re.escape(sentence)}$"):
        History.of_ledger(change(rows_of("repetition", "bimodal")))


def test_a_replay_is_the_rounds_as_they_were() -> None:
    history = History.of_ledger(rows_of("repetition", "bimodal"))
    parts, fixed = history.replay(100), history.tables()[0]
    np.testing.assert_array_equal(parts.fixed, np.concatenate([fixed, fixed])[:100])
    assert not parts.transfer.any()
    drawn = history.latency().parts(seed=5, n=N, rounds=100)
    np.testing.assert_array_equal(drawn.fixed, parts.fixed)
    np.testing.assert_array_equal(drawn.compute, parts.compute)


def test_a_plan_from_a_ledger_finds_what_the_law_would_have_said() -> None:
    for law, pays in (("none", False), ("virtual-machines", True), ("phones", True)):
        rows = rows_of("patient", law)
        found = make_plan(History.of_ledger(rows).latency(), N, tolerances=(3,), populations=5)
        assert found.codes == pays


def test_every_population_has_a_plan() -> None:
    for name in POPULATIONS:
        found = make_plan(named(name), 5, rounds=20, populations=2, tolerances=(1,))
        assert all(math.isfinite(one.steady) and one.idle > 0 for one in found.lines)
    assert replace(found, n=7).n == 7
    assert make_plan(Latency(compute=pareto(1.1)), 4, rounds=20, populations=1).lines[0].steady > 0
