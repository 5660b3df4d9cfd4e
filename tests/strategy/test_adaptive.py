"""send="adaptive": the way of each round follows from what the last ones took, and every way is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.serverapp.strategy import FedAvg

from experiments.rounds import Scheme, round_seconds
from experiments.switching import SCENARIOS, over_plain
from fl_gradcode import (
    EarlyStopGrid,
    GradientCode,
    GradientCoding,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
)
from fl_gradcode.codes import for_assignment, reed_solomon
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, Law, constant, exponential, lognormal, scaled
from fl_gradcode.latency.populations import named
from fl_gradcode.planning.schemes import wait_for_all
from fl_gradcode.planning.simulation import steady_rounds
from fl_gradcode.runlog.rows import JobLine, PhaseSeconds
from fl_gradcode.strategy.adaptive import AdaptiveModes, regrouped
from fl_gradcode.strategy.options import Approximation
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, run_plain, toy_app
from tests.strategy.rows import round_row

NETWORK = Latency(fixed=exponential(1.0))
SLOW = Latency(fixed=0.2, compute=0.8, slowdown=scaled(lognormal(1.0, 0.3), {0: 10, 1: 10}))


def adaptive(latency: Latency, code: GradientCode, *, rounds: int, seed: int = 0, **grid: Any) -> tuple[Any, Any]:
    with InProcessGrid(toy_app(), code.n, **grid) as inner:
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0), code, send="adaptive")
        virtual = VirtualGrid(inner, latency, seed=seed)
        return strategy.start(virtual, initial_arrays(), rounds, timeout=1e6), strategy


@pytest.mark.parametrize(
    "code",
    [fractional_repetition(9, 2), fractional_repetition(8, 3), cyclic_repetition(6, 2, rng=np.random.default_rng(0))],
)
@pytest.mark.parametrize("latency", [NETWORK, SLOW], ids=["network", "slow workers"])
def test_every_round_is_exact_whatever_way_it_took(code: GradientCode, latency: Latency) -> None:
    result, strategy = adaptive(latency, code, rounds=14)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 14
    assert relative(result.arrays, run_plain(toy_app(), code.n, rounds=14).arrays) < 1e-6
    ways = {(row["way"]["send"], row["way"]["load"]) for row in strategy.ledger.rows}
    assert len(ways) > 1 or latency is SLOW


def test_where_load_costs_nothing_it_sends_coded_vectors_and_where_it_does_shards() -> None:
    code = fractional_repetition(12, 2)
    _, network = adaptive(NETWORK, code, rounds=12)
    assert network.ledger.rows[-1]["way"]["send"] == "coded"
    _, slow = adaptive(SLOW, code, rounds=12)
    assert slow.ledger.rows[-1]["way"]["send"] == "shards"


@pytest.mark.parametrize(
    "law", ["none", "lognormal", "shifted-exponential", "serverless", "virtual-machines", "phones"]
)
def test_it_is_never_more_than_two_percent_slower_than_no_code(law: str) -> None:
    latency, n, rounds, seed = named(law), 18, 40, 0
    way = Scheme(fractional_repetition(n, 2), "adaptive")
    ours = sum(round_seconds(way, latency, rounds=rounds, idle=False, seed=seed, n=n))
    plain = steady_rounds(wait_for_all(n), latency.parts(seed=seed, n=n, rounds=rounds)).seconds.sum()
    assert ours <= 1.02 * plain


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.35])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nor_under_loads_that_change_or_that_no_replay_can_tell(scenario: str, sigma: float, seed: int) -> None:
    assert over_plain(SCENARIOS[scenario], sigma, seed=seed) <= 1.02


def test_it_still_tries_coded_vectors_where_they_save_what_they_may_lose() -> None:
    """Half a run of strong noise that no load adds to, and then the opposite."""
    before_compute = over_plain(SCENARIOS["noise, all compute after round 20"], 0.6)
    before_noise = over_plain(SCENARIOS["all compute, noise after round 20"], 0.6)
    assert before_compute < 0.85 and before_noise < 0.8


def test_one_round_of_coded_vectors_that_takes_much_longer_than_a_plain_one_is_the_last_for_long() -> None:
    ways = AdaptiveModes(fractional_repetition(6, 2))
    modes = []
    for number in range(1, 40):
        mode = ways.choose(complete=True)
        modes.append(mode.send)
        # Noise in whatever does not depend on the load, until the sixth round of coded vectors.
        thrashes = modes.count("coded") > 5
        noise = np.random.default_rng(number).exponential(1.0, 6)
        computing = 30.0 if thrashes and mode.send == "coded" else 0.0
        jobs = [
            JobLine(worker, "train", number, mode.load, float(noise[worker]) + computing, computing)
            for worker in range(6)
        ]
        # Second copies save a third, and coded vectors more.
        waiting = float(noise.max() / 1.5 if mode.send == "shards" else noise.reshape(2, 3).min(axis=1).max())
        waiting += computing
        row = round_row("r", number, outcome="exact")
        assert row.train is not None
        train = replace(row.train, timings=tuple(jobs), seconds=PhaseSeconds(waiting, 0.0))
        ways.learn(replace(row, train=train, way=mode.line))
    first = modes.index("coded")
    assert modes[first : first + 6] == ["coded"] * 6
    assert set(modes[first + 6 : first + 22]) == {"shards"}


def test_a_worker_that_dies_takes_the_smaller_groups_with_it_but_not_the_run() -> None:
    """Two of three holders are enough while all answer; when one dies at last, the stored third is asked again."""
    code = fractional_repetition(6, 2)
    dead: set[int] = set()

    def dies(worker: int, message: Message, reply: Message) -> Message:
        if worker in dead:
            return Message(Error(2, "gone"), reply_to=message)
        return reply

    def kill(server_round: int, arrays: Any, row: Any) -> None:
        if server_round == 10:
            dead.update({0, 2})  # of one group

    with InProcessGrid(toy_app(), 6, tamper=dies) as inner:
        strategy = GradientCoding(
            FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0), code, send="adaptive", on_round_end=kill
        )
        grid = VirtualGrid(inner, Latency(fixed=0.9, compute=0.1, slowdown=lognormal(1.0, 0.5)))
        strategy.start(grid, initial_arrays(), 24, timeout=1e6)
    outcomes = [row["train"]["outcome"] for row in strategy.ledger.rows]
    assert outcomes.count("skipped") <= 1
    assert outcomes[11:] == ["exact"] * 13


def lost_group(policy: str) -> list[dict[str, Any]]:
    """Both workers of a group of two are silent from round 5 on; four hold their shards."""
    code = fractional_repetition(12, 3)
    gone: set[int] = set()
    law = lognormal(1.0, 0.8)

    def slowdown(seed: int, worker: int, tick: int) -> float:
        return float("inf") if worker in gone else law.draw(seed, worker, tick)

    def lose(server_round: int, arrays: Any, row: Any) -> None:
        if server_round == 4:
            gone.update(next(iter(strategy._run.mode.code.groups))[:2])

    with InProcessGrid(toy_app(), 12) as inner:
        strategy: Any = GradientCoding(
            FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0),
            code,
            send="adaptive",
            on_undecodable=policy,  # type: ignore[arg-type]
            on_round_end=lose,
        )
        grid = VirtualGrid(inner, Latency(fixed=0.65, compute=0.35, slowdown=Law("lossy", slowdown)))
        strategy.start(grid, initial_arrays(), 12, timeout=100)
    return list(strategy.ledger.rows)


def test_losing_all_that_compute_a_shard_costs_one_round_at_most_and_none_under_raise() -> None:
    rows = lost_group("skip")
    assert rows[3]["way"]["load"] == 2, "a smaller way was wanted for this test"
    assert [row["train"]["outcome"] for row in rows].count("skipped") <= 1
    rows = lost_group("raise")
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * 12
    assert {row["way"]["load"] for row in rows if row["way"]["send"] == "coded"} <= {4}


class Thrashing(VirtualGrid):
    """Jobs of more than one shard take 20 times as long: what no replay of single shards can tell."""

    def shards_of(self, message: Message, worker: int) -> float:
        shards = super().shards_of(message, worker)
        return shards if shards <= 1 else 20 * shards


def test_a_way_that_turns_out_slower_than_the_one_before_is_left_again() -> None:
    latency = Latency(fixed=0.9, compute=0.1, slowdown=lognormal(1.0, 1.0))
    seconds: dict[str, float] = {}
    for send in ("shards", "adaptive"):
        with InProcessGrid(toy_app(), 12) as inner:
            grid = Thrashing(inner, latency)
            strategy = GradientCoding(
                FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0),
                fractional_repetition(12, 2),
                send=send,
            )
            strategy.start(grid, initial_arrays(), 60, timeout=1e6)
            seconds[send] = grid.now()
    tried = [row["round"] for row in strategy.ledger.rows if row["way"]["send"] == "coded"]
    assert 1 <= len(tried) <= 8
    assert seconds["adaptive"] < 1.5 * seconds["shards"]


def test_replies_that_nodes_owed_an_earlier_run_are_not_this_run_s_times() -> None:
    slow = Latency(fixed=0.9, compute=0.1, slowdown=scaled(exponential(1.0), {0: 30.0}))
    with InProcessGrid(toy_app(), 9) as inner:
        grid = EarlyStopGrid(VirtualGrid(inner, slow))
        strategy = GradientCoding(
            FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0), fractional_repetition(9, 2), send="adaptive"
        )
        for _ in range(2):
            strategy.start(grid, initial_arrays(), 20, timeout=1e6)
    ways = [row["way"]["send"] for row in strategy.ledger.rows]
    assert "coded" in ways[:20] and "coded" in ways[20:]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_regrouping_computes_less_of_the_same_stored_shards(size: int) -> None:
    code = fractional_repetition(12, 3)
    smaller = regrouped(code, size, np.arange(12.0))
    assert smaller.groups is not None and smaller.s >= size - 1
    assert ((smaller.B != 0) <= (code.B != 0)).all()
    assert all(smaller.decodable([i for i in range(12) if i != lost]) for lost in range(12) if size > 1)
    # Slow ones (high numbers) are spread over the new groups.
    assert all(len({9, 10, 11} & set(group)) <= 1 for group in smaller.groups)


def test_regrouping_where_shards_are_not_the_members_own() -> None:
    code = fractional_repetition(9, 2, k=4)
    smaller = regrouped(code, 2, np.ones(9))
    assert ((smaller.B != 0) <= (code.B != 0)).all()
    assert (smaller.B != 0).any(axis=0).all()


def test_it_does_not_change_for_a_gain_that_is_noise() -> None:
    _, strategy = adaptive(Latency(compute=constant(1.0)), fractional_repetition(9, 2), rounds=12)
    assert len({str(row["way"]) for row in strategy.ledger.rows}) == 1


def test_a_second_start_begins_without_what_the_first_one_learnt() -> None:
    code = fractional_repetition(9, 2)
    with InProcessGrid(toy_app(), 9) as inner:
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0), code, send="adaptive")
        for _ in range(2):
            strategy.start(VirtualGrid(inner, NETWORK), initial_arrays(), 8, timeout=1e6)
    assert strategy.ledger.rows[7]["way"]["send"] == "coded"
    assert strategy.ledger.rows[8]["way"] == {"send": "shards", "patience": 2.0, "load": 1}


def test_nothing_is_learnt_from_a_skipped_round_but_that_it_failed() -> None:
    ways = AdaptiveModes(fractional_repetition(6, 2))
    ways.learn(round_row("r", 1))
    ways.learn(round_row("r", 2, outcome="skipped"))
    assert ways.choose(complete=True).send == "shards"


@pytest.mark.parametrize(
    ("code", "options", "sentence"),
    [
        (fractional_repetition(6, 1, m=2), {}, "divides them by m=2"),
        (reed_solomon(6, 2), {}, "prime field"),
        (fractional_repetition(6, 2), {"on_undecodable": Approximation(fill_in=True)}, "fill_in works in one mode"),
    ],
)
def test_what_does_not_go_with_it_is_refused(code: GradientCode, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidSetting, match=sentence):
        GradientCoding(FedAvg(), code, send="adaptive", **options)


def test_any_assignment_can_be_run_adaptively() -> None:
    held = np.zeros((6, 4), bool)
    for shard in range(4):
        held[[shard, shard + 1, (shard + 3) % 6], shard] = True
    code = for_assignment(held, s=1)
    result, _ = adaptive(NETWORK, code, rounds=8)
    with InProcessGrid(toy_app(), 4) as grid:
        plain = FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0).start(grid, initial_arrays(), num_rounds=8)
    assert relative(result.arrays, plain.arrays) < 1e-5


def test_with_many_workers_it_decides_less_often_since_a_decision_takes_the_server_longer_than_a_round() -> None:
    every = {n: AdaptiveModes(fractional_repetition(n, 2)).every for n in (12, 300, 999, 1599, 4998)}
    assert every == {12: 3, 300: 3, 999: 9, 1599: 15, 4998: 16}
