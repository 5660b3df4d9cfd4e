"""Intervals of measured rounds: they cover the truth as often as they say, and parts that differ are found."""

from __future__ import annotations

import numpy as np
import pytest

from fl_gradcode.latency import Latency, lognormal, replay
from fl_gradcode.planning import make_plan, repetition, wait_for_all
from fl_gradcode.planning.compute_share import SHARES, range_of
from fl_gradcode.planning.simulation import coded_rounds
from fl_gradcode.planning.uncertainty import block_length, interval_of, resampled_means
from tests.planning.coverage import coverage


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    # 60 traces: a coverage of 0.9 has a standard error of 0.04; `python -m tests.planning.coverage` draws 200.
    found = coverage("lognormal", rounds=80, traces=60)
    assert min(found.values()) >= 0.78 and sum(found.values()) < 2.97, found


def test_blocks_are_as_long_as_rounds_are_alike() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4000)
    slow = np.zeros(4000)
    for t in range(1, 4000):
        slow[t] = 0.9 * slow[t - 1] + noise[t]
    assert block_length(10 + noise) <= 4
    # For an autoregression, the best length is (2 G^2 / D)^(1/3) N^(1/3) with G = 2 r / (1 - r)^2 per sigma^2, ...
    g, d = 2 * 0.9 / (1 - 0.9) ** 2 / (1 - 0.9**2), 4 / 3 * (1 / (1 - 0.9) ** 2) ** 2
    assert block_length(10 + slow) == pytest.approx((2 * g**2 / d * 4000) ** (1 / 3), rel=0.5)
    assert block_length(np.ones(100)) == block_length(np.arange(5.0)) == 1


def test_resampled_means_spread_as_the_mean_of_independent_rounds_does() -> None:
    x = np.random.default_rng(1).exponential(size=(1, 400))
    drawn = resampled_means(x, 1, np.random.default_rng(2))[0]
    assert drawn.mean() == pytest.approx(x.mean(), rel=0.01)
    assert drawn.std() == pytest.approx(x.std() / 20, rel=0.15)
    low, high = interval_of(float(x.mean()), drawn, 400)
    assert (high - low) / 2 == pytest.approx(1.645 * x.std() / 20, rel=0.15)


def test_runs_together_take_what_they_take_alone() -> None:
    parts = [Latency(compute=lognormal(1.0, 0.8)).parts(seed=seed, n=6, rounds=40) for seed in range(3)]
    for scheme in (wait_for_all(6), repetition(6, 2), repetition(6, 1, m=2)):
        durations = np.stack([one.seconds(scheme.loads.astype(float), 0.0) for one in parts])
        together = coded_rounds(scheme, durations)
        for one, duration in zip(together, durations, strict=True):
            alone = coded_rounds(scheme, duration[None])[0]
            assert one.seconds.tolist() == alone.seconds.tolist()
            assert (one.computed, one.messages) == (alone.computed, alone.messages)


def test_a_trace_whose_halves_differ_says_so_and_one_that_is_alike_does_not() -> None:
    rng = np.random.default_rng(3)
    alike = rng.lognormal(0, 0.05, (200, 6))
    later = alike.copy()
    later[100:, 2] *= 12
    parts = []
    for table in (alike, later):
        plan = make_plan(Latency(0.2, 0.0, slowdown=replay(table)), 6, tolerances=[1])
        assert plan.evidence is not None
        parts.append(" ".join(plan.evidence.parts))
    assert parts[0] == "The beginning, the end and both halves of the trace get the same advice."
    assert parts[1].startswith("The halves differ: waiting for all takes ")
    assert 'the first half (rounds 1 to 100) would get "do not code"' in parts[1]


def test_the_range_of_shares_ends_where_something_else_is_right() -> None:
    instead = ["do not code"] * 3 + ["code"] * 6 + ["other"] * 3
    holds = [one == "code" for one in instead]
    found = range_of(0.5, holds, instead)
    assert found is not None and (found.low, found.high) == (SHARES[3], SHARES[8])
    assert (found.below, found.above) == ("do not code", "other")
    assert range_of(0.0, holds, instead) is None
