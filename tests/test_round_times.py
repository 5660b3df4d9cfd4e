"""Mean round times in virtual time against figures that were simulated elsewhere; `experiments.rounds` prints them all.

An independent oracle: the same laws and protocols in a few lines of NumPy, which knows nothing of grids and messages.
"""

from __future__ import annotations

import numpy as np
import pytest

from experiments.rounds import LATENCIES, REFERENCE, N, mean_seconds, round_seconds, schemes
from fl_gradcode.latency import Latency, Law, constant

pytestmark = pytest.mark.slow

EXP, SHIFTED, BIMODAL = "Exp(1), all compute", "1 + Exp(0.5), all compute", "bimodal 5 % x 10, all compute"


@pytest.mark.parametrize(
    ("law", "scheme", "rounds"),
    [
        (EXP, "uncoded", 1200),
        (EXP, "repetition", 600),
        (EXP, "partial work", 250),
        ("Exp(1), load-independent", "repetition", 600),
        (SHIFTED, "repetition", 250),
        (SHIFTED, "partial work", 100),
        (BIMODAL, "partial work", 250),
    ],
)
def test_rounds_from_an_idle_start_take_the_published_time(law: str, scheme: str, rounds: int) -> None:
    mean, error = mean_seconds(schemes()[scheme], LATENCIES[law], rounds=rounds, idle=True)
    assert error < 0.025 * mean
    assert mean == pytest.approx(float(REFERENCE[law, scheme][0]), rel=0.03)


@pytest.mark.parametrize(
    ("law", "scheme", "rounds"),
    [(EXP, "repetition", 600), (EXP, "partial work", 300), (SHIFTED, "partial work", 150)],
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
            np.array(round_seconds(schemes()[name], LATENCIES[law], rounds=30, idle=True))
            for name in ("repetition", "partial work")
        )
        assert (shards <= coded + 1e-9).all()


def test_without_stragglers_partial_work_lasts_one_shard_and_repetition_all_of_them() -> None:
    even = Latency(compute=constant(1.0))
    assert round_seconds(schemes()["uncoded"], even, rounds=2, idle=False) == [1.0, 1.0]
    assert round_seconds(schemes()["partial work"], even, rounds=2, idle=False) == [1.0, 1.0]
    assert round_seconds(schemes()["repetition"], even, rounds=2, idle=False) == [4.0, 4.0]
