"""One shard a message: the first copy of each shard wins, whoever is free does what is missing."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import (
    Adaptive,
    Coded,
    GradientCode,
    GradientCoding,
    Shards,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    uncoded,
)
from fl_gradcode.codes import for_assignment
from fl_gradcode.errors import InvalidSetting, RoundFailed
from fl_gradcode.grid.arrivals import Arrival, ArrivalSource, ForwardingGrid
from fl_gradcode.latency import Latency, Law, lognormal, scaled
from fl_gradcode.protocol.records import Plan
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, relative, run_plain, toy_app, update_of
from tests.strategy.test_bad_replies import hide, put, with_reply, with_update

HELD = [[0, 1, 4], [0, 1, 2], [0, 3, 4], [1, 2, 3], [0, 2, 3], [2, 4], [3, 4, 1]]  # 7 workers, 5 shards
CODES: dict[str, GradientCode] = {
    "fractional": fractional_repetition(6, 2),
    "fractional, k=8": fractional_repetition(6, 2, k=8),
    "cyclic": cyclic_repetition(6, 2, rng=np.random.default_rng(1)),
    "universal": for_assignment(HELD, s=2),
}
SAME = Latency(compute=1.0)
ANY_CODE = pytest.mark.parametrize("code", CODES.values(), ids=list(CODES))
BOTH = pytest.mark.parametrize("deployed", [False, True], ids=["virtual", "deployed"])


class Engine(ForwardingGrid):
    """What an engine of Flower offers."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        raise AssertionError("waited for everyone")


class Watched(Engine, ArrivalSource):
    """A virtual clock; `deployed`: replies come with their arrival, and only clients know who they are.

    Remembers who was asked for what (worker, phase, shard or -1), and how many messages a node had at once.
    """

    fixed_nodes = True

    def __init__(self, virtual: VirtualGrid, deployed: bool) -> None:
        super().__init__(virtual)
        self.virtual, self.workers, self.immediate = virtual, virtual.known_workers(), deployed
        self.asked: list[tuple[int, str, int]] = []
        self.outstanding, self.most, self.computed = Counter[int](), 0, 0

    def now(self) -> float:
        return self.virtual.now()

    def known_workers(self) -> dict[int, int]:
        return {} if self.immediate else self.workers

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        for message in messages:
            plan, node = Plan.find_in(message.content), message.metadata.dst_node_id
            assert plan is not None
            shard = next(iter(plan.rows.values())).shards[0] if len(plan.rows) == 1 else -1
            self.asked.append((self.workers[node], plan.label, shard))
            self.outstanding[node] += 1
        self.most = max([self.most, *self.outstanding.values()])
        return self.virtual.push(messages)

    def next_arrival(self, deadline: float | None) -> Arrival | None:
        arrival = self.virtual.next_arrival(deadline)
        if arrival is None:
            return None
        self.outstanding[arrival.node] -= 1
        return replace(arrival, reply=self.virtual.fetch([arrival])[0]) if self.immediate else arrival

    def fetch(self, arrivals: Sequence[Arrival]) -> list[Message | None]:
        return [arrival.reply for arrival in arrivals] if self.immediate else self.virtual.fetch(arrivals)

    def forget(self, token: str) -> None:
        self.virtual.forget(token)


def table(times: dict[int, float]) -> Latency:
    """Seconds a shard of some workers; 1 of the others."""
    return Latency(compute=Law("table", lambda seed, worker, tick: times.get(worker, 1.0)))


def run(code: GradientCode, latency: Latency, **kwargs: Any) -> tuple[Any, list[dict[str, Any]], Watched]:
    seed, tamper, deployed = kwargs.pop("seed", 0), kwargs.pop("tamper", None), kwargs.pop("deployed", False)
    rounds, inner = kwargs.pop("rounds", 1), kwargs.pop("inner", FedAvg(fraction_evaluate=0.0))
    # Second copies at once, unless a test says otherwise: what most of them are about.
    patience = kwargs.pop("patience", 0.0)
    options: dict[str, Any] = {"send": "shards", **kwargs}
    if options["send"] == "shards":
        options["send"] = Shards(patience=patience)
    strategy = GradientCoding(inner, code, **{"verify": 0, **options})
    with InProcessGrid(toy_app(), code.n, tamper=tamper) as clients:
        grid = Watched(VirtualGrid(clients, latency, seed=seed), deployed)
        result = strategy.start(grid, initial_arrays(), num_rounds=rounds)
        grid.computed = sum(clients.calls)
    return result, strategy.ledger.rows, grid


def waiting(code: GradientCode, latency: Latency, **kwargs: Any) -> float:
    """Virtual seconds of a first round: everybody is idle when it begins."""
    _, (row,), _ = run(code, latency, **kwargs)
    return float(row["train"]["seconds"]["waiting"]) if row["train"]["outcome"] == "exact" else float("nan")


def broken(*workers: int) -> Any:
    return lambda w, message, reply: Message(Error(2, "broken"), reply_to=message) if w in workers else reply


def off(arrays: Any, shards: Sequence[int], more: float = 0.0) -> float:
    """How far a model is from the initial one plus the mean of these shards' updates of round 1."""
    mean = sum((j + 1) * update_of(1, j, 11) for j in shards) / sum(j + 1 for j in shards)
    return float(np.abs(flat(arrays) - flat(initial_arrays()) - mean - more).max())


@pytest.mark.parametrize("engine", ["virtual", "deployed", "in process", "polling"])
@ANY_CODE
def test_the_model_is_that_of_fedavg_whoever_is_missing(code: GradientCode, engine: str) -> None:
    plain = run_plain(toy_app(), code.k, rounds=2)
    patterns = list(itertools.combinations(range(code.n), code.s))
    for missing in patterns[:: 1 if engine == "virtual" else 4]:  # who decodes what is the same behind every engine
        if engine in ("in process", "polling"):  # no time: they fail
            with InProcessGrid(toy_app(), code.n, tamper=broken(*missing)) as clients:
                grid = Engine(clients) if engine == "polling" else clients
                result = GradientCoding(FedAvg(), code, send="shards").start(grid, initial_arrays(), num_rounds=2)
        else:
            latency = Latency(compute=scaled(lognormal(), dict.fromkeys(missing, float("inf"))))
            result, _, _ = run(code, latency, inner=FedAvg(), rounds=2, deployed=engine == "deployed")
        assert relative(result.arrays, plain.arrays) < 1e-6
        for key, value in plain.evaluate_metrics_clientapp[2].items():
            assert result.evaluate_metrics_clientapp[2][key] == pytest.approx(value)


def test_nodes_that_are_not_known_at_first_get_further_shards_where_replies_are_read_later() -> None:
    # They are free before their reply is read, which tells who they are.
    strategy = GradientCoding(FedAvg(), fractional_repetition(4, 1, k=8), send="shards")
    with InProcessGrid(toy_app(), 4) as grid:
        hide(grid)
        strategy.start(grid, initial_arrays(), num_rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact", "exact"]


@BOTH
@pytest.mark.parametrize("family", [fractional_repetition, cyclic_repetition])
def test_at_equal_speeds_a_round_lasts_one_shard_as_without_a_code(family: Any, deployed: bool) -> None:
    # Chosen greedily, in the order of node ids, first shards of a cyclic assignment would coincide.
    for n, s in ((4, 1), (6, 2), (9, 2), (8, 3)):
        code = family(n, s, rng=np.random.default_rng(0))
        assert waiting(code, SAME, deployed=deployed) == 1.0
        both = [waiting(code, Latency(fixed=2.0), send=send, deployed=deployed) for send in ("shards", "coded")]
        assert both == [2.0, 2.0]  # and where only sending takes time, as long as coded vectors


def test_one_worker_alive_in_each_group_does_all_its_shards() -> None:
    for alive in itertools.product((0, 2, 4), (1, 3, 5)):
        dead = dict.fromkeys({*range(6)} - {*alive}, float("inf"))
        assert waiting(fractional_repetition(6, 2), table(dead)) == 3.0


@ANY_CODE
def test_never_slower_than_coded_vectors_where_only_computing_takes_time(code: GradientCode) -> None:
    latency = Latency(compute=lognormal(sigma=1.0))
    pairs = [[waiting(code, latency, send=send, seed=seed) for send in ("shards", "coded")] for seed in range(40)]
    assert all(partial <= coded * (1 + 1e-9) for partial, coded in pairs)
    assert sum(partial < 0.9 * coded for partial, coded in pairs) > 20


@BOTH
def test_the_first_copy_of_a_shard_wins_and_a_second_changes_nothing(deployed: bool) -> None:
    # Shard 0 comes from worker 0 at 1.0, shard 1 from worker 1 at 1.6 (and from 0 at 2.0), shard 2 from 0 at 3.0.
    def mark(worker: int, message: Message, reply: Message) -> Message:
        return with_update(lambda x: x + np.float32(worker + 1))(reply)

    times = table({0: 1.0, 1: 1.6, 2: 10.0})
    result, (row,), grid = run(fractional_repetition(3, 2), times, tamper=mark, deployed=deployed, sees="mean")
    entry = row["train"]
    assert off(result.arrays, [0, 1, 2], more=(1 + 2 + 1) / 6) < 1e-6
    assert [(w, shard) for w, _, shard in grid.asked][-3:] == [(0, 1), (1, 2), (0, 2)]
    assert Counter(w for w in entry["asked"] if w in (0, 1)) == {0: 3, 1: 2}
    assert entry["answered"] == ([0, 1, 0, 0] if deployed else [0, 1, 0])
    assert (entry["used"], entry["stragglers"], entry["coverage"], entry["kappa"]) == ([0, 1], [2], [1, 1, 1], 1)
    assert entry["decodable-after-seconds"] == entry["seconds"]["waiting"] == pytest.approx(3.0)


@BOTH
@ANY_CODE
def test_a_node_has_one_message_at_a_time_and_first_copies_alone_are_computed(code: Any, deployed: bool) -> None:
    latency = Latency(compute=scaled(lognormal(sigma=0.8), {0: 7.0, 3: 3.0}))
    _, rows, grid = run(code, latency, inner=FedAvg(), rounds=6, deployed=deployed)
    assert all(row[kind]["outcome"] == "exact" for row in rows for kind in ("train", "evaluate"))
    assert grid.most == 1
    assert any(row["train"]["late"] for row in rows), "the latencies of this test are too tame"
    assert grid.computed == 2 * 6 * code.k or deployed


BAD: dict[str, tuple[Any, str]] = {
    "NaN": (with_update(put(3, np.nan)), "not finite"),
    "dtype": (with_update(lambda x: x.astype(np.float64)), "expected float32"),
    "error": (None, "error 2: broken"),
    "other shard": (with_reply(shards=[3]), r"combines shards \[3\], asked was one of \[0, 2, 4"),
    "other round": (with_reply(round=7), "wrong round"),
}


@BOTH
@pytest.mark.parametrize("case", BAD)
def test_a_bad_copy_is_replaced_by_another_holders(case: str, deployed: bool) -> None:
    change, reason = BAD[case]
    bad = (lambda w, message, reply: reply if w else change(reply)) if change else broken(0)
    options: dict[str, Any] = {"rounds": 3, "deployed": deployed, "tamper": bad, "sees": "mean"}
    result, rows, grid = run(CODES["fractional, k=8"], table({0: 0.6, 1: 1.1}), **options)
    assert relative(result.arrays, run_plain(toy_app(), 8, FedAvg(fraction_evaluate=0.0)).arrays) < 1e-6
    rejected = [one for row in rows for one in row["train"]["rejected"]]
    assert rejected and all(one["worker"] in (0, None) and re.search(reason, one["reason"]) for one in rejected)
    if deployed:  # read at once: from then on it gets nothing in this phase
        assert [label for worker, label, _ in grid.asked if worker == 0] == ["train 1", "train 2", "train 3"]


def test_a_node_that_is_first_with_another_dtype_does_not_hold_up_the_round() -> None:
    # Once the others outnumber it, those that had nothing left to do are needed again.
    wide, latency = with_update(lambda x: x.astype(np.float64)), table({1: 0.9})
    layout = with_reply(layout=[["0", "float64", [3, 2]], ["1", "float64", [5]]])
    lie = lambda w, message, reply: reply if w else layout(wide(reply))  # noqa: E731
    result, (row,), _ = run(fractional_repetition(2, 1, k=3), latency, tamper=lie, sees="mean")
    assert row["train"]["ended"] == "decoded"
    assert off(result.arrays, [0, 1, 2]) < 1e-6


@BOTH
def test_a_node_whose_copy_does_not_count_is_not_asked_for_it_again(deployed: bool) -> None:
    # Worker 0 alone is left for shards 0 and 3, and answers in another dtype than the four others.
    wide = with_reply(layout=[["0", "float64", [3, 2]], ["1", "float64", [5]]])
    lie = lambda w, message, reply: reply if w else wide(with_update(lambda x: x.astype(np.float64))(reply))  # noqa: E731
    latency = table({3: float("inf")})
    _, (row,), _ = run(fractional_repetition(6, 1), latency, tamper=lie, deployed=deployed, sees="mean")
    assert row["train"]["outcome"] == "skipped"
    assert row["train"]["asked"].count(0) <= 2
    assert row["train"]["asked"].count(None) == (1 if deployed else 0)  # worker 3 has never said who it is


@BOTH
def test_a_shard_whose_holders_all_fail_leaves_it_to_the_policy(deployed: bool) -> None:
    code, how = fractional_repetition(4, 1), {"tamper": broken(0, 2), "deployed": deployed}
    result, (row,), _ = run(code, SAME, **how)
    assert row["train"]["ended"] == "hopeless"
    assert relative(result.arrays, initial_arrays()) == 0
    with pytest.raises(RoundFailed, match=r"Round 1, train: undecodable \(hopeless\).*error 2: broken"):
        run(code, SAME, on_undecodable="raise", **how)
    result, (row,), _ = run(code, SAME, on_undecodable="approximate", **how)
    assert row["train"]["outcome"] == "approximate" and row["train"]["coverage"] == [0, 1, 0, 1]
    assert off(result.arrays, [1, 3]) < 1e-6


@BOTH
def test_a_node_that_was_held_back_gets_what_nobody_works_on(deployed: bool) -> None:
    # Worker 0 does all of round 1, until 3.0. At 4.5, when worker 1 has sent what it owes, 0 works on shard 1, the one
    # that worker 1 would have begun with.
    law = Law("", lambda seed, worker, tick: 4.5 if (worker, tick) == (1, 2) else 1.0)
    _, rows, grid = run(fractional_repetition(2, 1, k=3), Latency(compute=law), rounds=2, deployed=deployed)
    entry = rows[1]["train"]
    assert entry["held-back"] == [1] and [one["from"] for one in entry["late"]] == ["train 1"]
    assert [(w, shard) for w, label, shard in grid.asked if label == "train 2"] == [(0, 0), (0, 1), (1, 2), (0, 2)]
    assert entry["seconds"]["waiting"] == pytest.approx(2.5)


@BOTH
@ANY_CODE
def test_sampled_shards_are_trained_and_no_others(code: GradientCode, deployed: bool) -> None:
    inner = FedAvg(fraction_train=0.5, fraction_evaluate=0.0)
    result, (row,), grid = run(code, SAME, inner=inner, deployed=deployed)
    assert len(row["train"]["shards"]) == code.k // 2 == len(row["train"]["coverage"])
    assert {shard for _, _, shard in grid.asked} <= {*row["train"]["shards"], -1}
    assert off(result.arrays, row["train"]["shards"]) < 1e-6


@pytest.mark.parametrize("send", ["coded", "shards"])
def test_two_nodes_that_claim_one_worker_are_named_where_its_shards_lack_holders(send: Any) -> None:
    with InProcessGrid(toy_app(), 6, node_config=lambda i: {"partition-id": min(i, 4)}) as grid:
        engine = Watched(VirtualGrid(grid, SAME), deployed=True)
        with pytest.raises(RoundFailed, match="it answers as worker 4, which is node"):
            GradientCoding(FedAvg(), uncoded(6), send=send).start(engine, initial_arrays(), num_rounds=4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Shards(patience=-1.0), "patience=-1.0 must be a number of at least 0, or 'learned'."),
        (lambda: Shards(patience=float("inf")), "patience=inf must be a number of at least 0, or 'learned'."),
        (lambda: Coded(kappa_max=0.0), "kappa_max=0.0 must be greater than 0."),
        (lambda: Coded(give_up_after=-1.0), "give_up_after=-1.0 must be a number of seconds greater than 0."),
    ],
    ids=["negative patience", "endless patience", "no kappa", "negative seconds"],
)
def test_a_way_to_send_that_makes_no_sense_is_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        make()
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("word", "value"), [("coded", Coded()), ("shards", Shards()), ("adaptive", Adaptive())])
def test_a_word_stands_for_its_value(word: Any, value: object) -> None:
    assert GradientCoding(FedAvg(), fractional_repetition(4, 1), send=word).options.send == value


def test_a_word_that_is_not_known_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="must be one of coded, shards, adaptive, or a Coded"):
        GradientCoding(FedAvg(), fractional_repetition(4, 1), send="coded vectors")  # type: ignore[arg-type]


@BOTH
@pytest.mark.parametrize("case", ["error", "NaN"])
def test_an_idle_node_takes_over_what_another_has_lost(case: str, deployed: bool) -> None:
    """It is done long before, and would start a second copy only much later."""
    change = BAD[case][0]

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        config = message.content.config_records["config"]
        if worker != 1 or config["server-round"] != 2:
            return reply
        return Message(Error(2, "broken"), reply_to=message) if case == "error" else change(reply)

    options: dict[str, Any] = {"deployed": deployed, "tamper": tamper, "patience": 1000.0, "sees": "mean", "rounds": 2}
    latency = Latency(compute=Law("", lambda seed, worker, tick: 0.3 if worker == 0 and tick > 2 else 1.0))
    _, (_, row), _ = run(fractional_repetition(2, 1), latency, verify=0, **options)
    assert row["train"]["outcome"] == "exact" and row["train"]["used"] == [0]
    assert row["train"]["seconds"]["waiting"] < 2.0
