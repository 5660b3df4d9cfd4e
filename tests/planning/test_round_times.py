"""Mean round times in virtual time against figures that were simulated elsewhere; `experiments.rounds` prints them all.

An independent oracle: the same laws and protocols in a few lines of NumPy, which knows nothing of grids and messages.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import pytest

from experiments.rounds import LATENCIES, REFERENCE, N, Scheme, mean_seconds, round_seconds, schemes
from fl_gradcode.codes import fractional_repetition
from fl_gradcode.latency import Latency, Law, constant, lognormal

pytestmark = pytest.mark.slow

EXP, SHIFTED, BIMODAL = "Exp(1), all compute", "1 + Exp(0.5), all compute", "bimodal 5 % x 10, all compute"


@pytest.mark.parametrize(
    ("law", "scheme", "rounds"),
    [
        (EXP, "uncoded", 600),
        (EXP, "repetition", 250),
        (SHIFTED, "repetition", 60),
        (SHIFTED, "partial work", 60),
    ],
)
def test_rounds_from_an_idle_start_take_the_published_time(law: str, scheme: str, rounds: int) -> None:
    mean, error = mean_seconds(schemes()[scheme], LATENCIES[law], rounds=rounds, idle=True)
    assert error < 0.025 * mean
    assert mean == pytest.approx(float(REFERENCE[law, scheme][0]), rel=0.03)


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
    code = schemes()["partial work"].code
    assert isinstance(rule, Law) and code is not None and code.groups is not None
    return [[rule.draw(seed * 3 + 1, worker, 2) for worker in group] for group in code.groups]


@pytest.mark.parametrize("law", [EXP, SHIFTED, BIMODAL, "Pareto(1.5), all compute"])
def test_partial_work_from_an_idle_start_is_what_the_rule_says(law: str) -> None:
    actual = round_seconds(schemes()["partial work"], LATENCIES[law], rounds=10, idle=True)
    for seed, seconds in enumerate(actual):
        assert seconds == pytest.approx(max(map(as_they_become_free, draws(law, seed))))


@pytest.mark.parametrize("law", [EXP, SHIFTED, BIMODAL, "Pareto(1.5), all compute"])
def test_the_published_times_of_partial_work_are_of_a_fixed_order_which_is_slower(law: str) -> None:
    rounds = [draws(law, seed) for seed in range(1500)]
    fixed = [max(map(fixed_order, groups)) for groups in rounds]
    free = [max(map(as_they_become_free, groups)) for groups in rounds]
    assert np.mean(fixed) == pytest.approx(float(REFERENCE[law, "partial work"][0]), rel=0.03)
    assert 0.9 < np.mean(free) / np.mean(fixed) < 0.99


@pytest.mark.parametrize(
    ("law", "scheme", "rounds"),
    [(EXP, "repetition", 240), (EXP, "partial work", 120), (SHIFTED, "partial work", 80)],
)
def test_rounds_in_steady_state_take_the_published_time(law: str, scheme: str, rounds: int) -> None:
    mean, _ = mean_seconds(schemes()[scheme], LATENCIES[law], rounds=rounds, idle=False)
    low, *high = (float(part) for part in REFERENCE[law, scheme][1].split(" to "))
    assert 0.9 * low <= mean <= 1.1 * (high[0] if high else low)


def test_repetition_from_an_idle_start_is_the_slowest_groups_fastest_worker() -> None:
    law = LATENCIES[EXP].compute
    assert isinstance(law, Law)
    seconds = round_seconds(schemes()["repetition"], LATENCIES[EXP], rounds=20, idle=True)
    groups = schemes()["repetition"].code.groups  # type: ignore[union-attr]
    for seed, actual in enumerate(seconds):
        # The stream of the compute part, in round 1 of training: seed * 3 + 1, tick 2.
        time = [4 * law.draw(seed * 3 + 1, worker, 2) for worker in range(N)]
        assert actual == pytest.approx(max(min(time[i] for i in group) for group in groups or ()))


def test_partial_work_is_never_slower_than_repetition_on_the_same_draws() -> None:
    for law in (EXP, SHIFTED, BIMODAL):
        coded, shards = (
            np.array(round_seconds(schemes()[name], LATENCIES[law], rounds=10, idle=True))
            for name in ("repetition", "partial work")
        )
        assert (shards <= coded + 1e-9).all()


def test_partial_work_that_waits_before_it_doubles_costs_nothing_where_all_are_alike() -> None:
    alike = Latency(compute=lognormal(1.0, 0.1))
    at_once, patient = (Scheme(fractional_repetition(N, 3), "shards", patience) for patience in (0.0, 2.0))
    uncoded = mean_seconds(Scheme(), alike, rounds=60, idle=False)[0]
    assert mean_seconds(patient, alike, rounds=40, idle=False)[0] == pytest.approx(uncoded, rel=0.02)
    assert mean_seconds(at_once, alike, rounds=40, idle=False)[0] > 1.3 * uncoded


def test_without_stragglers_partial_work_lasts_one_shard_and_repetition_all_of_them() -> None:
    even = Latency(compute=constant(1.0))
    assert round_seconds(schemes()["uncoded"], even, rounds=2, idle=False) == [1.0, 1.0]
    assert round_seconds(schemes()["partial work"], even, rounds=2, idle=False) == [1.0, 1.0]
    assert round_seconds(schemes()["repetition"], even, rounds=2, idle=False) == [4.0, 4.0]
