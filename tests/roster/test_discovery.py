"""Nodes tell what they hold, and the code is made for that; they come, go and return."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedTrimmedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_gradcode import Discovered, GradientCoding, VirtualGrid
from fl_gradcode.errors import IncompatibleStrategy, InvalidCode, InvalidSetting, RoundFailed, UnsuitableApp
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.placement.manifest import WITHHELD
from fl_gradcode.protocol.records import Plan
from fl_gradcode.roster import Holdings
from fl_gradcode.testing import InProcessGrid, inside_a_run
from tests.conftest import initial_arrays, relative, run_plain, toy_app
from tests.strategy.living import LivingGrid

HELD = {0: "0,1,2", 1: "2,3", 2: "0,3,1", 3: "1,2,3,0"}


def config_of(held: dict[int, str]) -> Any:
    return lambda worker: {"partition-id": worker, "num-partitions": len(held), "shards": held[worker]}


def coded(k: int = 4, s: int = 1, inner: Any = None, **options: Any) -> GradientCoding:
    return GradientCoding(inner or FedAvg(fraction_evaluate=0.0), Discovered(k=k, s=s), **options)


def expected(k: int, rounds: int, inner: Any = None) -> Any:
    return run_plain(toy_app(), k, inner or FedAvg(fraction_evaluate=0.0), rounds).arrays


# The code


def holdings(held: dict[int, tuple[int, ...]], k: int, s: int = 1, m: int = 1, **digests: str) -> Holdings:
    found = Holdings(Discovered(k=k, s=s, m=m))
    for worker, shards in held.items():
        found.learn(worker, dict.fromkeys(shards, ""))
    return found


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_s_of_those_who_hold_something_may_be_missing(data: st.DataObject) -> None:
    k, n, s = data.draw(st.integers(1, 7)), data.draw(st.integers(3, 7)), data.draw(st.integers(0, 2))
    workers = data.draw(st.lists(st.integers(0, 12), min_size=n, max_size=n, unique=True))
    held: dict[int, set[int]] = {worker: set() for worker in workers}
    for shard in range(k):
        for worker in data.draw(st.lists(st.sampled_from(workers), min_size=s + 1, unique=True)):
            held[worker].add(shard)
    found = holdings({worker: tuple(shards) for worker, shards in held.items()}, k, s)
    code = found.code()
    assert code is not None and code.s == min(s, len(code.active) - 1) and code.k == k
    assert set(code.active) == {worker for worker, shards in held.items() if shards}
    for worker in code.active:
        assert set(code.shards_of(worker)) == held[worker]
    for gone in itertools.combinations(code.active, code.s):
        assert code.decodable([i for i in code.active if i not in gone])
    again = holdings({w: tuple(held[w]) for w in reversed(workers)}, k, s).code()
    assert again is not None and (again.B == code.B).all()


def test_equal_holdings_are_groups_and_decode_without_amplifying() -> None:
    code = holdings({0: (0, 1), 5: (0, 1), 2: (2,), 7: (2,)}, 3).code()
    assert code is not None and code.groups == ((0, 5), (2, 7)) and code.s == 1
    assert code.active == (0, 2, 5, 7) and code.n == 8
    uncoded = holdings({0: (0,), 1: (1,)}, 2, s=0).code()
    assert uncoded is not None and uncoded.groups == ((0,), (1,)) and uncoded.s == 0


def test_shards_that_lack_holders_are_named_and_lower_the_tolerance() -> None:
    found = holdings({0: (0, 1), 1: (1, 2), 2: (2, 1)}, 3)
    assert found.told_lacking() == ("s=1 needs 2 holders of each shard: shard 0 has 1 (0). Place them on more nodes.")
    code = found.code()
    assert code is not None and code.s == 0
    assert found.code([1, 2]) is None and "shard 0 has 0 (nobody)" in found.told_lacking([1, 2])
    found.learn(4, {0: ""})
    assert found.told_lacking() == "" and found.code().s == 1  # type: ignore[union-attr]
    lower = holdings({0: (0,), 1: (0, 1), 2: (1,)}, 2, s=1, m=2)
    assert lower.code().m == 2 and lower.code().s == 0  # type: ignore[union-attr]
    assert "s=1 at m=2 needs 3 holders" in lower.told_lacking()


def test_holders_with_other_data_do_not_count() -> None:
    found = Holdings(Discovered(k=2, s=1))
    for worker, digest in ((3, "a"), (1, "b"), (2, "a")):
        found.learn(worker, {0: digest, 1: "same"})
    assert found.holders()[0] == [2, 3] and found.wrong() == {1: [0]}
    tie = Holdings(Discovered(k=1, s=0))
    tie.learn(2, {0: "x"})
    tie.learn(1, {0: "y"})
    assert tie.holders()[0] == [] and tie.wrong() == {1: [0], 2: [0]} and tie.code() is None
    tie.learn(3, {0: "x"})
    assert tie.holders()[0] == [2, 3] and tie.changes() == []
    early = Holdings(Discovered(k=1, s=0))
    early.learn(5, {0: "evil"})
    assert early.holders()[0] == [5]  # nobody else has reported yet
    early.learn(1, {0: "x"})
    assert early.holders()[0] == []  # whoever reports first has no right to it
    tie.begin()
    tie.learn(4, {0: "y"})  # of a tie, what was right stays right
    assert tie.holders()[0] == [2, 3] and tie.changes() == []
    manifest = Holdings(Discovered(k=1, s=0), {0: "x"})
    manifest.learn(1, {0: "y"})
    manifest.learn(2, {0: "x", 9: "z"})
    manifest.learn(3, {0: ""})  # only numbers: it would be refused
    manifest.learn(4, {0: WITHHELD})
    assert manifest.holders()[0] == [2, 4] and manifest.wrong() == {1: [0], 2: [9], 3: [0]}


# Rounds


@pytest.mark.parametrize("send", ["coded", "shards"])
def test_the_model_is_that_of_all_shards_whoever_is_late(send: Any) -> None:
    for late in range(4):
        latency = Latency(compute=scaled(lognormal(), {late: float("inf")}))
        strategy = coded(send=send, inner=FedAdam(fraction_evaluate=0.0))
        with InProcessGrid(toy_app(), 4, node_config=config_of(HELD)) as grid:
            result = strategy.start(VirtualGrid(grid, latency), initial_arrays(), num_rounds=3)
        assert relative(result.arrays, expected(4, 3, FedAdam(fraction_evaluate=0.0))) < 1e-6
        assert all(late not in row["train"]["used"] for row in strategy.ledger.rows)
        assert strategy.code.s == 1 and strategy.code.name == "universal"


def test_nodes_that_hold_the_same_are_groups(caplog: pytest.LogCaptureFixture) -> None:
    strategy = coded(k=2)
    with InProcessGrid(toy_app(), 4, node_config=config_of({0: "0", 1: "1", 2: "0", 3: "1"})) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
    assert strategy.code.groups == ((0, 2), (1, 3))
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_nodes_join_leave_and_return_between_rounds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fl_gradcode")
    held = {0: "0,1", 1: "1,2", 2: "2,3", 3: "3,0", 4: "0,1,2,3"}
    grid = LivingGrid(toy_app(), 5, node_config=config_of(held))
    grid.kill(4)

    steps = iter([lambda: grid.start(4), lambda: grid.kill(0), lambda: grid.start(0)])
    seen: list[tuple[int, int]] = []

    def between(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        """The next step once the code has followed the last one: a node says who it is in its first round or so."""
        state = (row["code"]["n"], row["train"]["workers"])
        if state not in seen[-1:]:
            seen.append(state)
            next(steps, lambda: None)()

    strategy = coded(on_round_end=between, node_timeout=10)
    with inside_a_run():
        result = strategy.start(grid, initial_arrays(), num_rounds=30, timeout=60)
    # Without 0 its row is there, and empty; it comes back with a new node id, and is the same worker.
    # One that is slow to say so has its row for a round, loses it, and gets it again.
    assert seen[:4] == [(4, 4), (5, 5), (5, 4), (5, 5)] and seen[4:] in ([], [(5, 4), (5, 5)])
    assert relative(result.arrays, expected(4, 30)) < 1e-6
    rows = strategy.ledger.rows
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * 30
    told = [row["holders"] for row in rows if "holders" in row]  # whenever the code is another one
    with_4 = [[0, 3, 4], [0, 1, 4], [1, 2, 4], [2, 3, 4]]
    without_0 = [[one for one in holders if one != 0] for holders in with_4]
    assert told == [[[0, 3], [0, 1], [1, 2], [2, 3]], with_4, without_0, with_4, without_0, with_4][: len(seen)]
    assert any(4 in row["train"]["answered"] for row in rows)
    assert "been rebuilt for workers [0, 1, 2, 3, 4]" in caplog.text and "workers [1, 2, 3, 4]" in caplog.text


def test_a_node_that_never_says_who_it_is_keeps_nobody_in_the_code_who_is_gone() -> None:
    held = {0: "0,1", 1: "1,2", 2: "2,3", 3: "3,0", 4: "0,1,2,3"}

    def config(worker: int) -> dict[str, Any]:
        return config_of(held)(worker) if worker in held else {"partition-id": "unknown"}

    grid = LivingGrid(toy_app(), 6, node_config=config)

    def between(server_round: int, *_: Any) -> None:
        if server_round == 2:
            grid.kill(0)
            grid.kill(1)  # one more than the code tolerates

    strategy = coded(on_round_end=between, node_timeout=3)
    with inside_a_run():
        strategy.start(grid, initial_arrays(), num_rounds=5, timeout=60)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 5
    assert strategy.code.active == (2, 3, 4)


def test_a_node_whose_data_are_put_right_is_in_the_code_again() -> None:
    held = {**HELD, 1: ""}
    grid = LivingGrid(toy_app(), 4, node_config=lambda worker: config_of(held)(worker))

    def between(server_round: int, *_: Any) -> None:
        if server_round == 1:
            held[1] = HELD[1]

    strategy = coded(on_round_end=between, node_timeout=3)
    with inside_a_run():
        strategy.start(grid, initial_arrays(), num_rounds=4, timeout=60)
    assert strategy.code.shards_of(1) == tuple(sorted(map(int, HELD[1].split(","))))


def test_a_node_that_holds_nothing_is_asked_without_the_model() -> None:
    sent: list[tuple[int, int, bool]] = []

    def look(worker: int, message: Message, reply: Message) -> Message:
        plan = Plan.find_in(message.content)
        if plan is not None:
            sent.append((plan.round, worker, "arrays" in message.content))
        return reply

    held = {**HELD, 1: "7"}  # of a data set that has no such shard
    strategy = coded()
    with InProcessGrid(toy_app(), 4, node_config=config_of(held), tamper=look) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    assert {(worker, model) for _, worker, model in sent} == {(0, True), (1, False), (2, True), (3, True)}


def test_a_node_whose_shards_were_taken_away_says_so_and_the_code_follows() -> None:
    held = dict(HELD)
    grid = LivingGrid(toy_app(), 4, node_config=lambda worker: config_of(held)(worker))

    def between(server_round: int, *_: Any) -> None:
        if server_round == 1:
            held[0] = "0"

    strategy = coded(on_round_end=between, node_timeout=10)
    with inside_a_run():
        result = strategy.start(grid, initial_arrays(), num_rounds=4, timeout=60)
    assert relative(result.arrays, expected(4, 4)) < 1e-6
    reasons = [one["reason"] for row in strategy.ledger.rows for one in row["train"]["rejected"]]
    late = [one for row in strategy.ledger.rows for one in row["train"]["late"]]
    assert reasons[:1] == ["it does not hold all of the shards [0, 1, 2] any more"] or late
    assert strategy.code.shards_of(0) in ((0,), ())


def test_a_shard_without_holder_is_waited_for_and_then_named() -> None:
    strategy = coded(node_timeout=0.3)
    grid = LivingGrid(toy_app(), 2, node_config=config_of({0: "0,1", 1: "1,2"}))
    with inside_a_run(), pytest.raises(RoundFailed, match=r"No node holds shard 3: 2 nodes reported their shards"):
        strategy.start(grid, initial_arrays(), num_rounds=1, timeout=60)


def test_a_late_node_is_waited_for() -> None:
    grid = LivingGrid(toy_app(), 4, node_config=config_of(HELD))
    for worker in (1, 2, 3):
        grid.kill(worker)
    looks = itertools.count()

    def look() -> None:
        if (turn := next(looks)) in (2, 3, 4):
            grid.start(turn - 1)

    grid.look = look
    strategy = coded(node_timeout=30)
    with inside_a_run():
        strategy.start(grid, initial_arrays(), num_rounds=1, timeout=60)
    assert strategy.code.s == 1


def test_fewer_holders_than_wished_for_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    strategy = coded(k=3, node_timeout=0.3)
    grid = LivingGrid(toy_app(), 2, node_config=config_of({0: "0,1,2", 1: "1,2"}))
    with inside_a_run():
        strategy.start(grid, initial_arrays(), num_rounds=2, timeout=60)
    told = [r.getMessage() for r in caplog.records if "needs 2 holders" in r.getMessage()]
    assert told == [
        "s=1 needs 2 holders of each shard: shard 0 has 1 (0). Place them on more nodes. The code tolerates s=0 "
        "until then."
    ]


def test_the_vote_of_a_worker_ends_when_it_leaves_and_its_shards_are_forgotten() -> None:
    found = Holdings(Discovered(k=1, s=0))
    found.follow({1: {0: "x"}, 2: {0: "x"}, 3: {0: "y"}})
    found.begin()
    assert found.holders()[0] == [1, 2] and found.changes() == []
    found.follow({2: {0: "x"}, 3: {0: "y"}})
    assert found.holders()[0] == [1, 2] and found.changes() == []  # a tie
    found.follow({3: {0: "y"}})
    assert found.holders()[0] == [3]
    assert found.changes() == [
        "The data that counts as shard 0 has changed, because most of its holders now report other data: worker 3. "
        "A manifest would decide which data is right (manifest=)."
    ]
    for _ in range(4):
        found.follow({3: {0: "y"}})
    assert [*found.told] == [3] and found.changes() == []


def test_of_two_nodes_with_one_number_the_first_keeps_it(caplog: pytest.LogCaptureFixture) -> None:
    grid = LivingGrid(toy_app(), 2, node_config=lambda worker: {"partition-id": 0, "shards": "0,1"})
    with inside_a_run():
        coded(k=2, s=0, node_timeout=5).start(grid, initial_arrays(), num_rounds=1, timeout=60)
    assert "is left out: it answers as worker 0, which is node 10" in caplog.text


def test_a_shard_that_only_a_second_node_of_one_number_holds_is_named_with_the_reason() -> None:
    grid = LivingGrid(toy_app(), 2, node_config=lambda worker: {"partition-id": 0, "shards": str(worker)})
    with (
        inside_a_run(),
        pytest.raises(RoundFailed, match=r"No node holds shard .*answers as worker 0, which is node 10"),
    ):
        coded(k=2, node_timeout=5).start(grid, initial_arrays(), num_rounds=1, timeout=60)


def _with(more: dict[str, Any], worker: int) -> dict[str, Any]:
    return {"partition-id": worker, **more}


def test_nodes_that_do_not_say_what_they_hold_are_told_how(tmp_path: Any) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, r"worker \d does not say what it holds: start its SuperNode with"),
        ({"shards": "a;b"}, r"shards='a;b' must be numbers with commas"),
        ({"shards-dir": "here"}, r"shards-dir='here' is a relative path"),
    )
    for more, text in cases:
        with (
            InProcessGrid(toy_app(), 2, node_config=partial(_with, more)) as grid,
            pytest.raises(UnsuitableApp, match=text),
        ):
            coded(k=2).start(grid, initial_arrays(), num_rounds=1)


def test_what_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(InvalidSetting, match="send='adaptive'"):
        coded(send="adaptive")
    with pytest.raises(IncompatibleStrategy, match="asks for 9 nodes"):
        coded(inner=FedAvg(min_available_nodes=9))
    with pytest.raises(IncompatibleStrategy, match="pass send='shards'"):
        coded(inner=FedTrimmedAvg())
    with pytest.raises(InvalidCode, match="k=0"):
        Discovered(k=0)
    with pytest.raises(InvalidSetting, match="s=-1"):
        Discovered(k=2, s=-1)
    strategy = coded()
    with pytest.raises(InvalidSetting, match="once start"):
        _ = strategy.code


def test_a_run_over_what_nodes_hold_goes_on_after_a_kill(tmp_path: Any) -> None:
    def kill(server_round: int, *_: Any) -> None:
        if server_round == 2 and len(starts) == 1:
            raise KeyboardInterrupt

    starts: list[int] = []
    for _ in range(2):
        starts.append(1)
        options = {"ledger": tmp_path / "ledger.jsonl", "checkpoint": tmp_path / "run.ckpt", "on_round_end": kill}
        strategy = coded(**options)
        with InProcessGrid(toy_app(), 4, node_config=config_of(HELD)) as grid:
            if len(starts) == 1:
                with pytest.raises(KeyboardInterrupt):
                    strategy.start(grid, initial_arrays(), num_rounds=4)
            else:
                result = strategy.start(grid, initial_arrays(), num_rounds=4)
    assert relative(result.arrays, expected(4, 4)) < 1e-6
    assert [row["round"] for row in strategy.ledger.rows] == [1, 2, 3, 4]
    # Done is done, though nobody is there any more who could say what he holds.
    done = coded(ledger=tmp_path / "ledger.jsonl", checkpoint=tmp_path / "run.ckpt", node_timeout=0.1)
    with inside_a_run():
        again = done.start(LivingGrid(toy_app(), 0), initial_arrays(), num_rounds=4)
    assert relative(again.arrays, result.arrays) == 0 and done.run == strategy.run
    assert [*again.train_metrics_clientapp] == [1, 2, 3, 4] and len(done.ledger.rows) == 4


def test_rows_of_workers_that_are_not_there_are_empty() -> None:
    code = holdings({1: (0, 1), 4: (0, 1), 6: (1, 0)}, 2).code()
    assert code is not None and not np.asarray(code.B)[[0, 2, 3, 5]].any()
