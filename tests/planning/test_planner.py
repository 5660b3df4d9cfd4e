"""Plans: when they say to code, whom they find slow, and what they print."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

import fl_gradcode
import fl_gradcode.codes as codes
from fl_gradcode import Coded, EarlyStopGrid, GradientCoding, Shards
from fl_gradcode._text import seconds_text
from fl_gradcode.codes import fractional_repetition
from fl_gradcode.errors import FlGradcodeError
from fl_gradcode.latency import Latency, exponential, lognormal, pareto, scaled, trace
from fl_gradcode.latency.populations import POPULATIONS, named
from fl_gradcode.planning.closed_forms import idle_mean
from fl_gradcode.planning.planner import GAIN, Line, RoundPlan, candidates, make_plan, spread
from fl_gradcode.planning.schemes import Scheme, any_code, drop_slowest, partial_work, repetition, wait_for_all
from fl_gradcode.planning.simulation import steady_rounds
from fl_gradcode.planning.verdicts import recommend
from fl_gradcode.testing import InProcessGrid
from tests.conftest import toy_app

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
    return make_plan(LIGHT.get(name) or named(name), BIG, tolerances=(1, 3), populations=8)


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
    assert found.verdict.startswith(f"code: {best.scheme.phrase} takes {seconds_text(best.steady)} a round, ")
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
    assert re.search(r"the best code \(any n - s \(cyclic\), s = 1\) takes \d+% longer\.$", found.verdict)
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
    assert best is plain and verdict.endswith("(repetition, s = 3) takes only 4% less.")


def test_a_scheme_that_loses_data_is_never_recommended() -> None:
    lines = [line(wait_for_all(12), 10.0), line(drop_slowest(12, 3), 1.0), line(repetition(12, 1), 5.0)]
    assert recommend(lines)[0] is lines[2]
    assert recommend(lines[:2])[1] == "do not code: none of the compared codes tolerates a missing worker."


def test_infinite_rounds_are_told_from_finite_ones() -> None:
    never = math.inf
    lines = [line(wait_for_all(12), never), line(repetition(12, 1), never), line(repetition(12, 3), 7.0)]
    best, verdict = recommend(lines)
    assert best is lines[2]
    assert verdict.startswith("code: repetition (s = 3) takes 7 s a round, and waiting for all never ends,")
    best, verdict = recommend(lines[:2])
    assert best is lines[0]
    assert verdict == "do not code: more workers never answer than any of the compared codes tolerates."
    lines = [line(wait_for_all(12), 7.0), line(repetition(12, 1), never), line(any_code(12, 1), 6.9)]
    assert recommend(lines)[1].endswith("(any n - s (cyclic), s = 1) takes only 1% less.")


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
        with InProcessGrid(toy_app(), n) as inner:
            public = {name: getattr(face, name) for face in (fl_gradcode, codes) for name in face.__all__}
            names: dict[str, Any] = {**public, "np": np, "strategy": FedAvg(), "grid": inner}
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
        assert strategy.options.send == (Shards(scheme.patience) if scheme.shardwise else Coded())
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


def test_every_population_has_a_plan() -> None:
    for name in POPULATIONS:
        found = make_plan(named(name), 5, rounds=20, populations=2, tolerances=(1,))
        assert all(math.isfinite(one.steady) and one.idle > 0 for one in found.lines)
    assert replace(found, n=7).n == 7
    assert make_plan(Latency(compute=pareto(1.1)), 4, rounds=20, populations=1).lines[0].steady > 0
