"""What a run learns of its jobs' times, and the second copies that are started by it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, Shards, VirtualGrid, fractional_repetition
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, bimodal, constant, exponential, lognormal, named, scaled
from fl_gradcode.planning import JobTimes, clairvoyant_rounds, partial_work, steady_rounds
from fl_gradcode.runlog import RoundRow
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app


def learned(n: int, jobs: list[tuple[int, float]]) -> JobTimes:
    times = JobTimes(n)
    for worker, seconds in jobs:
        times.saw(worker, seconds)
    return times


def by_hand(relative: list[float], typical: float, elapsed: float) -> float:
    """Mean of what jobs take longer that took longer than this one yet, and of half as long again."""
    still = [typical * one - elapsed for one in relative if typical * one > elapsed]
    return (sum(still) + 0.5 * elapsed) / (len(still) + 1)


def test_a_worker_s_typical_time_follows_it() -> None:
    times = learned(2, [(0, 1.0), (0, 2.0)])
    assert times.typical(0) == pytest.approx(0.7 * 1.0 + 0.3 * 2.0) and times.typical(1) is None
    times.saw(0, math.inf)
    times.saw(0, 0.0)
    assert times.typical(0) == pytest.approx(1.3)  # neither is a time


def test_what_remains_is_the_mean_over_longer_jobs() -> None:
    rng = np.random.default_rng(0)
    jobs = [(int(rng.integers(5)), float(rng.lognormal())) for _ in range(60)]
    times, typical, relative = JobTimes(5), dict[int, float](), []
    for worker, seconds in jobs:
        if worker in typical:
            relative.append(seconds / typical[worker])
        typical[worker] = seconds if worker not in typical else 0.7 * typical[worker] + 0.3 * seconds
        times.saw(worker, seconds)
    for worker, elapsed in [(0, 0.0), (1, 0.3), (2, 1.0), (3, 2.5), (4, 50.0)]:
        assert times.remaining(worker, elapsed) == pytest.approx(by_hand(relative, typical[worker], elapsed))
    assert JobTimes(5).remaining(0, 3.0) == 1.5  # of an unknown worker


@pytest.mark.parametrize("seed", range(30))
def test_a_second_copy_is_due_when_it_is_worth_it_and_not_before(seed: int) -> None:
    draw = random.Random(seed)
    times = learned(3, [(draw.randrange(3), draw.lognormvariate(0, 0.5)) for _ in range(draw.choice([0, 2, 5, 40]))])
    own, worker, elapsed = draw.uniform(0.2, 4.0), draw.randrange(3), draw.choice([0.0, 0.5, 1.1])
    if times.is_worth(own, times.remaining(worker, elapsed)):
        return
    due = times.worth_after(own, worker, elapsed)
    assert due > elapsed and times.is_worth(own, times.remaining(worker, due * (1 + 1e-9)))
    for early in np.linspace(elapsed, due * (1 - 1e-6), 50):
        assert not times.is_worth(own, times.remaining(worker, float(early)))


def test_jobs_of_long_ago_are_forgotten() -> None:
    times = learned(1, [(0, 1.0)] + [(0, 5.0)] * 30 + [(0, 1.0)] * 400)
    assert times.remaining(0, 2.0) == pytest.approx(1.0)  # no job of five times as long is left


LIGHT = {
    "exponential": Latency(compute=exponential()),
    "shifted": named("shifted-exponential"),
    "phones": named("phones"),
}


@pytest.mark.parametrize(
    ("law", "r", "most"),
    [
        *((name, 2, 1.15) for name in LIGHT),
        *((name, 4, 1.35) for name in LIGHT),
        ("bimodal", 2, 1.5),  # whoever is late is busy for rounds, which the bound does not know
        ("bimodal", 4, 1.5),
    ],
)
def test_rounds_come_near_the_clairvoyant_bound(law: str, r: int, most: float) -> None:
    latency = {**LIGHT, "bimodal": Latency(compute=bimodal(0.05, 10.0))}[law]
    draws = [latency.parts(seed=seed, n=24, rounds=60) for seed in range(100, 106)]
    seconds = {}
    for patience in (0.0, 2.0, "learned"):
        scheme = partial_work(24, r - 1, patience=patience)
        seconds[patience] = sum(steady_rounds(scheme, parts).seconds[10:].mean() for parts in draws)
    bound = sum(found[10:].mean() for parts in draws if (found := clairvoyant_rounds(scheme, parts)) is not None)
    assert seconds["learned"] <= most * bound
    assert seconds["learned"] < min(1.05 * seconds[0.0], seconds[2.0])


def test_where_all_are_alike_there_are_no_second_copies() -> None:
    found = steady_rounds(partial_work(12, 2, patience="learned"), named("none").parts(seed=0, n=12, rounds=30))
    assert found.messages == pytest.approx(12, rel=0.02)


def rows_of(
    strategy: GradientCoding, latency: Latency, rounds: int, checkpoint: bool = False
) -> list[dict[str, object]]:
    with InProcessGrid(toy_app(), 6) as clients:
        strategy.start(VirtualGrid(clients, latency, seed=3), initial_arrays(), num_rounds=rounds)
    return strategy.ledger.rows


def test_a_slow_holder_is_not_waited_for_once_it_is_known() -> None:
    slow = Latency(compute=scaled(lognormal(1.0, 0.02), {0: 10.0}))
    strategy = GradientCoding(
        FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 1), send=Shards(patience="learned")
    )
    rows = rows_of(strategy, slow, 8)
    assert [RoundRow.from_json(row).to_json() for row in rows] == rows
    assert rows[-1]["way"] == {"send": "shards", "patience": None, "load": 1, "learned": True}
    first, last = (row["train"]["seconds"]["waiting"] for row in (rows[0], rows[-1]))  # type: ignore[index]
    assert first > 2.15 and last < 2.1  # a second copy of its shard begins as soon as its partner is free


def test_patience_is_a_number_or_learned() -> None:
    for wrong in (-1.0, float("nan"), float("inf"), "learnt"):
        with pytest.raises(InvalidSetting, match="must be a number of at least 0, or 'learned'"):
            Shards(patience=wrong)  # type: ignore[arg-type]
    assert Shards(patience="learned").patience == "learned"


def test_an_alike_fleet_keeps_its_rounds() -> None:
    strategy = GradientCoding(
        FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 1), send=Shards(patience="learned"), verify=0
    )
    rows = rows_of(strategy, Latency(compute=constant(1.0)), 4)
    assert all(row["train"]["seconds"]["waiting"] == pytest.approx(1.0) for row in rows)  # type: ignore[index]
