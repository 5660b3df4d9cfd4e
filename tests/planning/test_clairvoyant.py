"""The clairvoyant bound against brute force, and below every scheme."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fl_gradcode.latency import Latency, Parts, exponential, named
from fl_gradcode.planning import clairvoyant_rounds, partial_work, repetition, steady_rounds, wait_for_all
from fl_gradcode.planning.schemes import Scheme, any_code, drop_slowest

LATENCIES = {
    "exponential": Latency(compute=exponential(1.0)),
    "fixed parts": Latency(fixed=exponential(0.5), compute=0.5, transfer=0.1),
    "virtual-machines": named("virtual-machines"),
}


@pytest.mark.parametrize("latency", LATENCIES.values(), ids=LATENCIES)
@pytest.mark.parametrize(("n", "s"), [(4, 1), (6, 2), (5, 1)])
def test_it_is_what_the_best_division_of_each_block_takes(latency: Latency, n: int, s: int) -> None:
    scheme, parts = repetition(n, s), latency.parts(seed=3, n=n, rounds=6)
    by_load = [parts.seconds(float(load), 2.0) for load in range(n + 1)]
    expected = []
    for t in range(6):
        blocks = []
        for group in scheme.groups:
            load = len(scheme.blocks[group[0]])
            divisions = (c for c in itertools.product(range(load + 1), repeat=len(group)) if sum(c) == load)
            ways = [max(by_load[j][t, i] for i, j in zip(group, c, strict=True) if j) for c in divisions]
            blocks.append(min(ways))
        expected.append(max(blocks))
    bound = clairvoyant_rounds(scheme, parts, model_megabytes=1.0)
    assert bound is not None
    np.testing.assert_allclose(bound, np.array(expected))


@pytest.mark.parametrize("latency", LATENCIES.values(), ids=LATENCIES)
@pytest.mark.parametrize(
    "scheme",
    [wait_for_all(8), repetition(8, 1), repetition(8, 3), repetition(8, 2, m=2), partial_work(8, 3, patience=0.0)],
    ids=lambda scheme: scheme.name,
)
def test_no_round_is_shorter(latency: Latency, scheme: Scheme) -> None:
    parts = latency.parts(seed=1, n=8, rounds=40)
    bound = clairvoyant_rounds(scheme, parts)
    assert bound is not None
    assert (steady_rounds(scheme, parts).seconds >= bound - 1e-9).all()


def test_waiting_for_all_reaches_it() -> None:
    parts = LATENCIES["exponential"].parts(seed=2, n=5, rounds=10)
    bound = clairvoyant_rounds(wait_for_all(5), parts)
    assert bound is not None
    np.testing.assert_allclose(bound, steady_rounds(wait_for_all(5), parts).seconds)


def test_it_is_not_known_without_groups_and_of_schemes_that_lose_data() -> None:
    parts = LATENCIES["exponential"].parts(seed=2, n=5, rounds=10)
    assert clairvoyant_rounds(any_code(5, 1), parts) is None
    assert clairvoyant_rounds(drop_slowest(5, 1), parts) is None


def test_a_worker_that_never_answers_is_done_without() -> None:
    fixed, compute = np.array([[np.inf, 1.0]]), np.array([[1.0, 2.0]])
    bound = clairvoyant_rounds(repetition(2, 1), Parts(fixed, compute, np.zeros((1, 2))))
    assert bound is not None
    np.testing.assert_allclose(bound, np.array([5.0]))
