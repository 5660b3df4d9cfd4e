"""When all is lost: nodes that have not said who they are may be missing workers, but each of them only one."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_gradcode import GradientCode, GradientCoding, cyclic_repetition, fractional_repetition, uncoded
from fl_gradcode.codes.covering import may_cover
from fl_gradcode.copies import Comparisons
from fl_gradcode.roster import WorkerRegistry
from fl_gradcode.strategy.mode_choice import mode_chooser
from fl_gradcode.strategy.options import Options, send_of
from fl_gradcode.strategy.phase import Phase, Scrutiny
from fl_gradcode.strategy.plan_messages import MessageFactory, make_plan
from fl_gradcode.strategy.stop_rules import open_phase
from fl_gradcode.testing import inside_a_run
from tests.conftest import initial_arrays, toy_app
from tests.strategy.living import LivingGrid

CODES = {
    "fractional": fractional_repetition(6, 1),
    "cyclic": cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
    "uncoded": uncoded(3),
}


def phase(code: GradientCode, registry: WorkerRegistry, send: Any) -> Phase:
    options = Options(send=send_of(send))
    plan = make_plan(
        code,
        range(code.k),
        options,
        k=code.k,
        run="r",
        server_round=1,
        kind="train",
        weight_key="num-examples",
        arrays_key="arrays",
    )
    factory = MessageFactory(plan, RecordDict(), message_type="train", ttl=None)
    mode = mode_chooser(options, code).choose(complete=True)
    return open_phase(
        mode,
        factory,
        code,
        range(code.k),
        None,
        registry,
        Scrutiny(Comparisons(0)),
        kappa_max=float("inf"),
    )


@pytest.mark.parametrize("send", ["coded", "shards"])
@pytest.mark.parametrize("name", CODES)
def test_so_many_strangers_are_so_many_workers_and_no_more(name: str, send: str) -> None:
    code = CODES[name]
    for known in range(code.n + 1):
        for workers in itertools.combinations(range(code.n), known):
            others = [i for i in range(code.n) if i not in workers]
            for strangers in range(len(others) + 1):
                registry = WorkerRegistry()
                for worker in workers:
                    registry.claim(100 + worker, worker, 0)
                nodes = [100 + i for i in workers] + [200 + i for i in range(strangers)]
                every = [{*workers, *few} for few in itertools.combinations(others, strangers)]
                if send == "coded":
                    hope = any(code.decodable(some) for some in every)
                else:
                    hope = any(len({j for i in some for j in code.shards_of(i)}) == code.k for some in every)
                assert phase(code, registry, send).hopeless(nodes) is not hope


@settings(max_examples=200, deadline=None)
@given(st.lists(st.frozensets(st.integers(0, 7), max_size=4), max_size=7), st.frozensets(st.integers(0, 7)), st.data())
def test_covering_is_told_as_by_trying_all(
    sets: list[frozenset[int]], wanted: frozenset[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(sets)))
    found = any(wanted <= frozenset().union(*some) for some in itertools.combinations(sets, count))
    assert may_cover(wanted, sets, count) is found


def test_covering_that_takes_long_to_tell_is_not_denied() -> None:
    sets = [{j, 7 * j % 300, (j + 11) ** 2 % 300} for j in range(300)]
    assert may_cover(set(range(300)), sets, 120)
    assert may_cover(set(range(300)), sets, 101)
    groups = [{2 * j, 2 * j + 1} for j in range(40)]
    assert not may_cover(set(range(80)), groups, 39) and may_cover(set(range(80)), [*groups, *groups], 40)


@pytest.mark.parametrize("code", [uncoded(1100), fractional_repetition(1000, 1)], ids=["uncoded", "fractional"])
@pytest.mark.parametrize("send", ["coded", "shards"])
def test_with_a_thousand_strangers_it_is_told_at_once(code: GradientCode, send: str) -> None:
    one = phase(code, WorkerRegistry(), send)
    began = time.process_time()
    assert [one.hopeless(range(count)) for count in (code.n, code.n - 1)] == [False, code.s == 0]
    assert one.hopeless(range(code.n // 3))
    assert time.process_time() - began < 20


def test_after_an_outage_the_first_node_that_is_back_does_not_end_the_wait() -> None:
    grid = LivingGrid(toy_app(), 4)
    looks: list[int] = []

    def between(server_round: int, *_: Any) -> None:
        if server_round == 1:
            assert strategy._run is not None
            for node, one in grid.nodes.items():  # whoever was too late to be heard
                strategy._run.registry.claim(node, one.worker, 1)
            for worker in range(4):
                grid.kill(worker)
            grid.start(0)  # alone, and under another id
            grid.look = back

    def back() -> None:
        looks.append(len(looks))
        if len(looks) == 4:
            grid.start(1)

    strategy = GradientCoding(
        FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1), on_round_end=between, node_timeout=30
    )
    with inside_a_run():
        strategy.start(grid, initial_arrays(), num_rounds=2, timeout=60)
    # The second that is back may be of the other group: that is worth a try. 30 seconds of waiting are 60 looks.
    assert len(looks) < 10
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
