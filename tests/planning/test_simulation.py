"""The fast simulation of rounds against the library itself, path by path: strategy, stop rules and virtual clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from experiments import rounds as experiment
from fl_gradcode import EarlyStopGrid, GradientCode, GradientCoding, Shards, VirtualGrid, cyclic_repetition
from fl_gradcode.codes import fractional_repetition
from fl_gradcode.grid.virtual import Job
from fl_gradcode.latency import (
    Latency,
    Law,
    bimodal,
    bursty,
    constant,
    device_classes,
    exponential,
    lognormal,
    pareto,
    scaled,
    trace,
)
from fl_gradcode.latency.populations import virtual_machines
from fl_gradcode.planning.schemes import (
    Scheme,
    any_code,
    drop_slowest,
    over_selection,
    partial_work,
    repetition,
    wait_for_all,
)
from fl_gradcode.planning.simulation import RoundTimes, idle_rounds, steady_rounds
from fl_gradcode.testing import InProcessGrid

N, ROUNDS, FOREVER = 12, 14, 1e9
ORDER = [3, 8, 1, *(i for i in range(N) if i not in (3, 8, 1))]


@dataclass(frozen=True)
class Case:
    """A scheme of the planner, and how the library is told to do it."""

    scheme: Scheme
    code: GradientCode | None = None
    send: Any = "coded"


def _shards(s: int, patience: Any, order: list[int] | None = None) -> Case:
    return Case(partial_work(N, s, patience=patience, order=order), fractional_repetition(N, s, order=order), "shards")


CASES = {
    "wait for all": Case(wait_for_all(N)),
    "cyclic": Case(any_code(N, 2), cyclic_repetition(N, 2, rng=np.random.default_rng(0))),
    "repetition": Case(repetition(N, 2), fractional_repetition(N, 2)),
    "uneven": Case(repetition(N, 4), fractional_repetition(N, 4)),
    "uneven, other order": Case(repetition(N, 4, order=ORDER), fractional_repetition(N, 4, order=ORDER)),
    "m = 2": Case(repetition(N, 2, m=2), fractional_repetition(N, 2, m=2)),
    "m = 2, uneven": Case(repetition(N, 3, m=2), fractional_repetition(N, 3, m=2)),
    "partial work": _shards(2, 0.0),
    "partial work, patience .5": _shards(2, 0.5),
    "partial work, patience 2": _shards(2, 2.0),
    "partial work, learned": _shards(2, "learned"),
    "partial work, uneven": _shards(4, 2.0),
    "partial work, other order": _shards(4, 0.0, ORDER),
}
LAWS = {
    "exponential": Latency(compute=exponential()),
    "load-independent": Latency(fixed=exponential()),
    "mixed": Latency(lognormal(0.3, 0.5), scaled(lognormal(1.0, 0.3), {0: 8.0, 1: 3.0, 5: 20.0}), slowdown=lognormal()),
    "constant": Latency(compute=constant(0.7)),
    "bursty": virtual_machines(),
    "short bursts": Latency(compute=bursty(0.2, 0.3, 10.0, jitter=0.05)),
    "heavy": Latency(0.2, 0.8, slowdown=pareto(1.2, 0.5)),
    "devices": Latency(0.1, device_classes([0.3, 1.0, 4.0]), slowdown=lognormal(1.0, 0.05)),
}


def some_laws_each(names: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Each name with `count` laws, taken in turn so that all laws come about as often: all pairs show no more."""
    laws = itertools.cycle(LAWS)
    return [(name, next(laws)) for name in names for _ in range(count)]


def library(case: Case, latency: Latency, rounds: int = ROUNDS, *, seed: int = 0, numbers: int = 1) -> Any:
    """Seconds of each round, and the jobs: as `experiments.rounds` does it, on a model of so many numbers."""
    arrays = ArrayRecord([np.zeros(numbers, np.float32)])
    fedavg = FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0)
    with InProcessGrid(experiment.app, N) as inner:
        grid = VirtualGrid(inner, latency, seed=seed)
        if case.code is None:
            scheme = case.scheme
            waiting = grid if scheme.enough == N else EarlyStopGrid(grid, stop_after=scheme.enough)
            times: list[float] = []

            def clock(server_round: int, arrays: ArrayRecord) -> None:
                times.append(grid.now())

            fedavg.start(waiting, arrays, rounds, timeout=FOREVER, evaluate_fn=clock)
            return np.diff(times), grid.jobs
        send = Shards(case.scheme.patience) if case.send == "shards" else case.send
        strategy = GradientCoding(fedavg, case.code, send=send, verify=0)
        strategy.start(grid, arrays, rounds, timeout=FOREVER)
        return np.array([row["train"]["seconds"]["waiting"] for row in strategy.ledger.rows]), grid.jobs


def check_counts(found: RoundTimes, jobs: list[Job], rounds: int = ROUNDS) -> None:
    assert found.messages == pytest.approx(len(jobs) / rounds)
    assert found.computed == pytest.approx(sum(job.shards for job in jobs) / rounds)


@pytest.mark.parametrize(("name", "law"), some_laws_each(CASES, 3))
def test_a_run_is_simulated_as_the_library_runs_it(name: str, law: str) -> None:
    case = CASES[name]
    found = steady_rounds(case.scheme, LAWS[law].parts(seed=0, n=N, rounds=ROUNDS))
    seconds, jobs = library(case, LAWS[law])
    np.testing.assert_allclose(found.seconds, seconds, rtol=1e-9, atol=1e-9)
    check_counts(found, jobs)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("cyclic", "mixed"),
        ("m = 2, uneven", "short bursts"),
        ("partial work, patience .5", "exponential"),
        ("partial work, uneven", "mixed"),
        *(("partial work, learned", law) for law in ("exponential", "mixed", "bursty", "devices", "heavy")),
    ],
)
def test_a_longer_run_of_another_seed_too(name: str, law: str) -> None:
    case = CASES[name]
    found = steady_rounds(case.scheme, LAWS[law].parts(seed=7, n=N, rounds=30))
    seconds, jobs = library(case, LAWS[law], 30, seed=7)
    np.testing.assert_allclose(found.seconds, seconds, rtol=1e-9, atol=1e-9)
    check_counts(found, jobs, 30)


@pytest.mark.parametrize(("name", "law"), some_laws_each(CASES, 1))
def test_rounds_from_an_idle_start_are_simulated_as_the_library_runs_them(name: str, law: str) -> None:
    case = CASES[name]
    told = experiment.Scheme(case.code, case.send, case.scheme.patience)
    seconds = experiment.round_seconds(told, LAWS[law], rounds=2, idle=True, n=N)
    for seed, one in enumerate(seconds):  # a run each, of one round
        found = idle_rounds(case.scheme, LAWS[law].parts(seed=seed, n=N, rounds=1))
        assert found.seconds[0] == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("name", ["repetition", "m = 2", "partial work", "partial work, patience .5"])
def test_each_round_from_an_idle_start_is_a_run_of_its_own(name: str) -> None:
    scheme, parts = CASES[name].scheme, LAWS["mixed"].parts(seed=0, n=N, rounds=ROUNDS)
    together = idle_rounds(scheme, parts)
    for t in range(ROUNDS):
        alone = type(parts)(*(part[t : t + 1] for part in (parts.fixed, parts.compute, parts.transfer)))
        assert together.seconds[t] == steady_rounds(scheme, alone).seconds[0] == idle_rounds(scheme, alone).seconds[0]


DROPPING = {scheme.name: scheme for scheme in (drop_slowest(N, 1), drop_slowest(N, 4), over_selection(N))}


@pytest.mark.parametrize(("name", "law"), some_laws_each(DROPPING, 3))
def test_dropping_the_slowest_is_simulated_as_a_grid_that_stops_early_does_it(name: str, law: str) -> None:
    scheme = DROPPING[name]
    found = steady_rounds(scheme, LAWS[law].parts(seed=0, n=N, rounds=ROUNDS))
    seconds, jobs = library(Case(scheme), LAWS[law])
    np.testing.assert_allclose(found.seconds, seconds, rtol=1e-9, atol=1e-9)
    check_counts(found, jobs)


# Bytes.


@pytest.mark.parametrize("name", ["wait for all", "cyclic", "repetition", "m = 2", "m = 2, uneven", "partial work"])
def test_the_transfer_of_a_model_is_charged_as_the_library_does(name: str) -> None:
    case, numbers = CASES[name], 250_000  # a megabyte
    latency = Latency(lognormal(0.1, 0.3), 0.2, scaled(lognormal(1.0, 0.5), {2: 6.0}))
    seconds, jobs = library(case, latency, 8, numbers=numbers)
    found = steady_rounds(case.scheme, latency.parts(seed=0, n=N, rounds=8), model_megabytes=1.0)
    np.testing.assert_allclose(found.seconds, seconds, rtol=2e-3)  # of the message, the plan is not the model
    check_counts(found, jobs, 8)
    for job in jobs:
        assert job.megabytes_down == pytest.approx(1.0, rel=5e-3)
        assert job.megabytes_up == pytest.approx(1.0 / case.scheme.m, rel=5e-3)
        assert job.megabytes_down >= job.megabytes_up * case.scheme.m


def test_half_a_reply_takes_three_quarters_of_the_bytes() -> None:
    parts = Latency(transfer=2.0).parts(seed=0, n=N, rounds=4)
    assert steady_rounds(repetition(N, 1), parts, model_megabytes=5.0).seconds.tolist() == [20.0] * 4
    assert steady_rounds(repetition(N, 1, m=2), parts, model_megabytes=5.0).seconds.tolist() == [15.0] * 4
    assert idle_rounds(partial_work(N, 1), parts, model_megabytes=5.0).seconds.tolist() == [20.0] * 4


# Workers that never answer.


@pytest.mark.parametrize("where", ["fixed", "compute"])
@pytest.mark.parametrize(
    "name",
    ["cyclic", "repetition", "uneven", "m = 2", "partial work", "partial work, patience .5", "partial work, uneven"],
)
def test_silent_workers_are_left_behind_as_the_library_does(name: str, where: str) -> None:
    case = CASES[name]
    part: dict[str, Law] = {where: scaled(exponential(), {0: math.inf, 5: math.inf})}
    latency = Latency(**part)  # type: ignore[arg-type]
    found = steady_rounds(case.scheme, latency.parts(seed=1, n=N, rounds=ROUNDS))
    seconds, jobs = library(case, latency, seed=1)
    assert np.isfinite(seconds).all() and seconds.max() < FOREVER
    np.testing.assert_allclose(found.seconds, seconds, rtol=1e-9)
    check_counts(found, jobs)
    assert sum(job.worker in (0, 5) for job in jobs) == 2  # asked once, and never again


def test_who_waits_for_a_silent_worker_waits_for_ever() -> None:
    latency = Latency(fixed=scaled(exponential(), {3: math.inf}))
    parts = latency.parts(seed=0, n=N, rounds=4)
    seconds, _ = library(CASES["wait for all"], latency, 1)
    assert seconds.tolist() == [FOREVER]  # the timeout
    for scheme in (wait_for_all(N), any_code(N, 0), partial_work(N, 0)):
        found = steady_rounds(scheme, parts)
        assert np.isinf(found.seconds).all() and found.mean == math.inf and math.isnan(found.error)
        assert found.messages >= N and found.computed >= N  # of the one round that was begun


def test_a_group_that_is_silent_as_a_whole_ends_the_run_in_the_round_where_it_falls_silent() -> None:
    group = repetition(N, 2).groups[1]
    dead = dict.fromkeys(group, math.inf)
    fine, silent = exponential(), scaled(exponential(), dead)
    law = Law("later", lambda seed, worker, tick: (silent if tick >= 8 else fine).draw(seed, worker, tick))
    parts = Latency(fixed=law).parts(seed=0, n=N, rounds=10)
    for scheme in (repetition(N, 2), partial_work(N, 2), partial_work(N, 2, patience=0.0)):
        for found in (steady_rounds(scheme, parts), idle_rounds(scheme, parts)):
            assert np.isfinite(found.seconds[:3]).all() and np.isinf(found.seconds[4:]).all()
    for name in ("repetition", "partial work, patience 2"):
        seconds, _ = library(CASES[name], Latency(fixed=law), 4)
        np.testing.assert_allclose(steady_rounds(CASES[name].scheme, parts).seconds[:3], seconds[:3], rtol=1e-9)


def test_a_round_that_never_ends_from_an_idle_start_does_not_spoil_the_next() -> None:
    law = Law("second", lambda seed, worker, tick: math.inf if tick == 4 else 1.0)
    parts = Latency(fixed=law).parts(seed=0, n=N, rounds=3)
    for scheme in (repetition(N, 2), partial_work(N, 2), wait_for_all(N)):
        assert idle_rounds(scheme, parts).seconds.tolist() == [1.0, math.inf, 1.0]


# By hand.


def by_hand(rows: list[list[float]]) -> Any:
    """Seconds of four workers a round; the part is fixed."""
    return Latency(fixed=trace(np.repeat(np.roll(rows, 1, axis=0), 2, axis=0))).parts(seed=0, n=4, rounds=len(rows))


def test_a_busy_worker_joins_the_round_when_it_is_free() -> None:
    # Groups (0, 2) and (1, 3). Worker 0 is busy until 5; worker 2 alone is slow in round 2: 0 begins at 5 and helps.
    parts = by_hand([[5.0, 1, 1, 5], [1, 1, 9, 9]])
    found = steady_rounds(repetition(4, 1), parts)
    assert found.seconds.tolist() == [1.0, 5.0]  # 1: by 2 and 1; then 0 from 5 to 6, before 2 is ready at 10
    assert found.messages == (4 + 4) / 2 and found.computed == (8 + 8) / 2
    late = steady_rounds(repetition(4, 1), by_hand([[5.0, 1, 1, 5], [1, 1, 3, 9]]))
    assert late.seconds.tolist() == [1.0, 3.0] and late.messages == (4 + 2) / 2


def test_a_worker_that_is_free_as_the_round_ends_is_asked_at_that_moment() -> None:
    found = steady_rounds(repetition(4, 1), by_hand([[3.0, 1, 1, 9], [1, 2, 2, 1], [1, 1, 1, 1]]))
    # Round 2 ends at 3, the moment at which worker 0 is free: it is asked, and busy until 4, the end of round 3.
    assert found.seconds.tolist() == [1.0, 2.0, 1.0]
    assert found.messages == (4 + 3 + 3) / 3


@pytest.mark.parametrize("law", ["constant", "devices"])
@pytest.mark.parametrize("patience", [0.0, 0.5, 2.0])
def test_ties_are_broken_as_the_library_does_for_equal_speeds(law: str, patience: float) -> None:
    latency = {"constant": Latency(compute=1.0), "devices": Latency(compute=device_classes([1.0, 2.0, 4.0]))}[law]
    for s in (1, 2, 4):
        case = _shards(s, patience)
        found = steady_rounds(case.scheme, latency.parts(seed=3, n=N, rounds=6))
        seconds, _ = library(case, latency, 6, seed=3)
        np.testing.assert_allclose(found.seconds, seconds, rtol=1e-9)


# What the mean and its error say.


def test_the_mean_leaves_out_the_first_twentieth() -> None:
    seconds = np.r_[np.full(10, 100.0), np.full(190, 2.0)]
    assert RoundTimes(seconds, 0, 0).mean == 2.0
    assert RoundTimes(seconds[:19], 0, 0).mean == pytest.approx(seconds[:19].mean())


def test_the_error_is_that_of_batches() -> None:
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((400, 2000))
    independent = np.array([RoundTimes(one, 0, 0).error for one in steps])
    assert independent.mean() == pytest.approx(1 / math.sqrt(1900), rel=0.05)
    alike = np.repeat(rng.standard_normal((400, 200)), 10, axis=1)  # ten rounds in a row are one
    assert np.mean([RoundTimes(one, 0, 0).error for one in alike]) == pytest.approx(1 / math.sqrt(190), rel=0.06)
    assert math.isnan(RoundTimes(np.ones(9), 0, 0).error)
    assert RoundTimes(np.ones(40), 0, 0).error == 0.0


@pytest.mark.parametrize("make", [lambda: repetition(N, 2), lambda: partial_work(N, 2), lambda: any_code(N, 2)])
def test_a_run_is_not_shorter_than_rounds_from_an_idle_start(make: Callable[[], Scheme]) -> None:
    for law in ("exponential", "heavy", "short bursts"):
        parts = LAWS[law].parts(seed=2, n=N, rounds=200)
        assert steady_rounds(make(), parts).mean >= 0.999 * idle_rounds(make(), parts).mean


def test_two_speeds_in_steady_state_where_every_second_round_is_free() -> None:
    # Two workers in one group. Worker 1 always takes 3, worker 0 always 1: rounds last 1, and worker 1 is asked in
    # every third round only.
    parts = Latency(fixed=trace([[1.0, 3.0], [1.0, 3.0]])).parts(seed=0, n=2, rounds=30)
    found = steady_rounds(repetition(2, 1), parts)
    assert found.seconds.tolist() == [1.0] * 30
    assert found.messages == pytest.approx(1 + 11 / 30)  # when it becomes free as a round ends, it is asked at once


def test_bimodal_draws_meet_all_schemes_alike() -> None:
    parts = Latency(compute=bimodal(0.1, 10.0)).parts(seed=0, n=N, rounds=100)
    assert (
        idle_rounds(partial_work(N, 2, patience=0.0), parts).seconds <= idle_rounds(repetition(N, 2), parts).seconds
    ).all()
    assert (idle_rounds(repetition(N, 2), parts).seconds <= idle_rounds(any_code(N, 2), parts).seconds).all()
