"""Simulated rounds with bounded staleness are those of a run on a virtual grid."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, Shards, VirtualGrid, fractional_repetition
from fl_gradcode.latency import Latency, bimodal, device_classes, exponential, lognormal, named, pareto, scaled
from fl_gradcode.planning import make_plan, partial_work, steady_rounds
from fl_gradcode.planning.stale_rounds import stale_rounds
from fl_gradcode.staleness import StalenessRule
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app

LAWS = {
    "exponential": Latency(fixed=0.1, compute=exponential()),
    "Pareto": Latency(compute=pareto(1.2)),
    "bimodal": Latency(compute=bimodal(0.2, 10.0)),
    "devices": Latency(fixed=0.2, compute=device_classes([1.0, 4.0])),
    "one slow": Latency(compute=scaled(lognormal(1.0, 0.1), {0: 12.0})),
}


@pytest.mark.parametrize(
    "send",
    [
        Shards(staleness=3),
        Shards(staleness=1, fresh=0.4, grace=0.2),
        Shards(1.0, 2, 1.0),
        Shards("learned", 3),
    ],
)
@pytest.mark.parametrize("law", LAWS)
def test_times_and_ages_are_those_of_a_run(law: str, send: Shards) -> None:
    n, s, rounds = 8, 3, 40
    logging.disable(logging.WARNING)
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(n, s), send=send, verify=0)
    with InProcessGrid(toy_app(examples=lambda shard: 1), n) as clients:
        strategy.start(VirtualGrid(clients, LAWS[law], seed=4), initial_arrays(), num_rounds=rounds)
    rows = [row["train"] for row in strategy.ledger.rows]
    told, rule = [row["ages"] for row in rows], send.rule
    assert rule is not None
    scheme = partial_work(n, s, patience=send.patience)
    run = stale_rounds(scheme, LAWS[law].parts(seed=4, n=n, rounds=rounds), rule)
    # Nodes that are free at the same moment choose one after the other, and the order is not the same in both.
    waited, ages = [row["seconds"]["waiting"] for row in rows], [np.average(range(len(a)), weights=a) for a in told]
    assert waited[0] == pytest.approx(run.seconds[0]) and ages[0] == run.ages[0] == 0
    assert np.mean(waited) == pytest.approx(run.seconds.mean(), rel=0.08)
    assert np.mean(ages) == pytest.approx(run.ages.mean(), abs=0.1)


def test_a_bound_of_zero_and_all_fresh_is_partial_work() -> None:
    parts = named("phones").parts(seed=1, n=12, rounds=40)
    scheme = partial_work(12, 2)
    exact, stale = steady_rounds(scheme, parts), stale_rounds(scheme, parts, StalenessRule(0, 1.0, 0.0))
    assert np.allclose(exact.seconds, stale.seconds) and not stale.ages.any()


def test_a_plan_tells_the_time_and_the_age_and_never_recommends_it() -> None:
    plan = make_plan(named("phones"), 12, populations=4, rounds=30)
    stale = plan.stale
    assert stale is not None and stale.bound == 3 and 0 < stale.age < 1
    assert stale.steady < stale.exact
    assert "stale" not in plan.verdict and plan.recommended.scheme.exact
    alike = make_plan(named("none"), 12, populations=2, rounds=30).stale
    assert alike is not None and alike.age == 0
