"""Mean round times in virtual time against figures that were simulated elsewhere; `experiments.rounds` prints them all.

An independent oracle: the same laws and protocols in a few lines of NumPy, which knows nothing of grids and messages.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from experiments.rounds import LATENCIES, REFERENCE, N, round_seconds, schemes
from fl_gradcode.latency import Latency, Law, Parts, constant, lognormal
from fl_gradcode.planning.schemes import any_code, partial_work, repetition, wait_for_all
from fl_gradcode.planning.simulation import idle_rounds, steady_rounds

pytestmark = pytest.mark.slow

EXP, SHIFTED, BIMODAL = "Exp(1), all compute", "1 + Exp(0.5), all compute", "bimodal 5 % x 10, all compute"
PLANNED = {
    "uncoded": wait_for_all(N),
    "any-(n-s)": any_code(N, 3),
    "repetition": repetition(N, 3),
    "partial work": partial_work(N, 3, patience=0.0),
    "partial work, patience 2": partial_work(N, 3, patience=2.0),
    "repetition, r = 2": repetition(N, 1),
    "partial work, r = 2": partial_work(N, 1, patience=0.0),
}
GROUPS = PLANNED["partial work"].groups
#: Means under an infinite variance say nothing, and published partial work is of a fixed order (see below).
FIGURES = [
    (law, scheme)
    for law, scheme in REFERENCE
    if "Pareto" not in law and (not scheme.startswith("partial") or law == SHIFTED)
]


@cache
def parts(law: str) -> Parts:
    """1500 rounds."""
    return LATENCIES[law].parts(seed=0, n=N, rounds=1500)


def test_every_compared_scheme_has_a_plan() -> None:
    assert PLANNED.keys() == schemes().keys()


@pytest.mark.parametrize("name", PLANNED)
def test_the_library_takes_the_times_of_the_simulation_that_the_figures_are_compared_with(name: str) -> None:
    latency = LATENCIES[SHIFTED]
    steady = steady_rounds(PLANNED[name], latency.parts(seed=0, n=N, rounds=6)).seconds
    np.testing.assert_allclose(round_seconds(schemes()[name], latency, rounds=6, idle=False), steady, rtol=1e-9)
    idle = [idle_rounds(PLANNED[name], latency.parts(seed=seed, n=N, rounds=1)).seconds[0] for seed in range(3)]
    np.testing.assert_allclose(round_seconds(schemes()[name], latency, rounds=3, idle=True), idle, rtol=1e-9)


@pytest.mark.parametrize(("law", "name"), FIGURES)
def test_rounds_from_an_idle_start_take_the_published_time(law: str, name: str) -> None:
    rounds = idle_rounds(PLANNED[name], parts(law)).seconds
    error = rounds.std() / math.sqrt(len(rounds))
    assert error < 0.025 * rounds.mean()
    # Figures of two or three digits, simulated too: a hundredth for them, and three standard errors of ours.
    figure = float(REFERENCE[law, name][0])
    assert abs(rounds.mean() - figure) < 0.01 * figure + 3 * error


def fixed_order(times: Sequence[float]) -> float:
    """When four workers that go round four shards, each from its own on, have done all; each takes times[c] a shard."""
    return max(min(t * (1 + (shard - c) % 4) for c, t in enumerate(times)) for shard in range(4))


def as_they_become_free(times: Sequence[float]) -> float:
    """The same where a free worker takes the uncovered shard that fewest are working on."""
    covered: set[int] = set()
    working = dict(enumerate(range(4)))
    ends = sorted((t, c) for c, t in enumerate(times))
    while True:
        now, worker = heapq.heappop(ends)
        covered.add(working.pop(worker))
        if len(covered) == 4:
            return now
        left = [shard for shard in range(4) if shard not in covered]
        busy = list(working.values())
        working[worker] = min(left, key=lambda shard: (busy.count(shard), (shard - worker) % 4))
        heapq.heappush(ends, (now + times[worker], worker))


def draws(law: str, seed: int) -> list[list[float]]:
    """What the members of each group take for a shard: the compute stream, training in round 1."""
    rule = LATENCIES[law].compute
    assert isinstance(rule, Law)
    return [[rule.draw(seed * 3 + 1, worker, 2) for worker in group] for group in GROUPS]


@pytest.mark.parametrize("law", [EXP, SHIFTED, BIMODAL, "Pareto(1.5), all compute"])
def test_partial_work_from_an_idle_start_is_what_the_rule_says(law: str) -> None:
    actual = round_seconds(schemes()["partial work"], LATENCIES[law], rounds=4, idle=True)
    for seed, seconds in enumerate(actual):
        assert seconds == pytest.approx(max(map(as_they_become_free, draws(law, seed))))


@pytest.mark.parametrize("law", [EXP, SHIFTED, BIMODAL, "Pareto(1.5), all compute"])
def test_the_published_times_of_partial_work_are_of_a_fixed_order_which_is_slower(law: str) -> None:
    groups_of_round = [[seconds[list(group)].tolist() for group in GROUPS] for seconds in parts(law).compute]
    fixed = [max(map(fixed_order, groups)) for groups in groups_of_round]
    free = [max(map(as_they_become_free, groups)) for groups in groups_of_round]
    assert np.mean(fixed) == pytest.approx(float(REFERENCE[law, "partial work"][0]), rel=0.03)
    assert 0.9 < np.mean(free) / np.mean(fixed) < 0.99


@pytest.mark.parametrize(("law", "name"), [*FIGURES, (EXP, "partial work"), (EXP, "partial work, r = 2")])
def test_rounds_in_steady_state_take_the_published_time(law: str, name: str) -> None:
    mean = steady_rounds(PLANNED[name], parts(law)).mean
    low, *high = (float(part) for part in REFERENCE[law, name][1].split(" to "))
    assert 0.9 * low <= mean <= 1.1 * (high[0] if high else low)


def test_repetition_from_an_idle_start_is_the_slowest_groups_fastest_worker() -> None:
    law = LATENCIES[EXP].compute
    assert isinstance(law, Law)
    seconds = round_seconds(schemes()["repetition"], LATENCIES[EXP], rounds=8, idle=True)
    for seed, actual in enumerate(seconds):
        # The stream of the compute part, in round 1 of training: seed * 3 + 1, tick 2.
        time = [4 * law.draw(seed * 3 + 1, worker, 2) for worker in range(N)]
        assert actual == pytest.approx(max(min(time[i] for i in group) for group in GROUPS))


def test_partial_work_is_never_slower_than_repetition_on_the_same_draws() -> None:
    for law in (EXP, SHIFTED, BIMODAL):
        coded, shards = (idle_rounds(PLANNED[name], parts(law)).seconds for name in ("repetition", "partial work"))
        assert (shards <= coded + 1e-9).all()


def test_partial_work_that_waits_before_it_doubles_costs_nothing_where_all_are_alike() -> None:
    alike = Latency(compute=lognormal(1.0, 0.1)).parts(seed=0, n=N, rounds=300)
    uncoded, at_once, patient = (
        steady_rounds(PLANNED[name], alike).mean for name in ("uncoded", "partial work", "partial work, patience 2")
    )
    assert patient == pytest.approx(uncoded, rel=0.02)
    assert at_once > 1.3 * uncoded


def test_without_stragglers_partial_work_lasts_one_shard_and_repetition_all_of_them() -> None:
    even = Latency(compute=constant(1.0))
    assert round_seconds(schemes()["uncoded"], even, rounds=2, idle=False) == [1.0, 1.0]
    assert round_seconds(schemes()["partial work"], even, rounds=2, idle=False) == [1.0, 1.0]
    assert round_seconds(schemes()["repetition"], even, rounds=2, idle=False) == [4.0, 4.0]
