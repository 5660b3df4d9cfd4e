"""Nodes that die, come back and come new while a round is under way: the round takes them in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import EarlyStopGrid, GradientCode, GradientCoding, cyclic_repetition, fractional_repetition
from fl_gradcode.strategy.plan_messages import time_to_live
from fl_gradcode.testing import inside_a_run
from tests.conftest import initial_arrays, relative, run_plain, toy_app
from tests.strategy.living import LivingGrid

CODES: dict[str, Callable[[], GradientCode]] = {
    "fractional": lambda: fractional_repetition(4, 1),  # groups (0, 2) and (1, 3)
    "cyclic": lambda: cyclic_repetition(4, 1, rng=np.random.default_rng(1)),
}


#: How many times faster than ours the server's clock goes: it looks at the nodes once a second.
HURRY = 10


def hurried(grid: LivingGrid) -> EarlyStopGrid:
    return EarlyStopGrid(grid, poll_interval=0.25 / HURRY, clock=lambda: HURRY * time.monotonic())


def run(grid: LivingGrid, code: GradientCode, rounds: int = 1, **options: Any) -> tuple[ArrayRecord, list[Any]]:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, **options)
    with inside_a_run():
        result = strategy.start(hurried(grid), initial_arrays(), num_rounds=rounds, timeout=60 * HURRY)
    return result.arrays, strategy.ledger.rows


def after(pushes: int, grid: LivingGrid, *steps: Callable[[], object]) -> None:
    """One step at each look at the nodes, once so many messages were sent."""
    left = list(steps)

    def look() -> None:
        if left and len(grid.pushed) >= pushes:
            left.pop(0)()

    grid.look = look


def expected(rounds: int = 1) -> ArrayRecord:
    arrays: ArrayRecord = run_plain(toy_app(), 4, FedAvg(fraction_evaluate=0.0), rounds).arrays
    return arrays


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("send", ["coded", "shards"])
def test_both_holders_are_killed_one_after_the_other_in_one_round(kind: str, send: str) -> None:
    """Never more than one is down at once, but none of the two that were asked first will ever answer."""
    grid = LivingGrid(toy_app(), 4)
    for node in grid.nodes.values():
        node.silent = node.worker in (0, 2)
    old = {one.worker: node for node, one in grid.nodes.items()}
    steps = [lambda: grid.kill(0), lambda: grid.start(0), lambda: grid.kill(2), lambda: grid.start(2)]
    after(4, grid, *steps)
    arrays, rows = run(grid, CODES[kind](), send=send)
    assert relative(arrays, expected()) < 1e-6
    entry = rows[0]["train"]
    assert entry["outcome"] == "exact"
    if (kind, send) != ("cyclic", "shards"):  # where the other two hold everything
        assert entry["joined"] and set(grid.pushed) > set(old.values())
    assert not any(node in (old[0], old[2]) for node, _ in grid.done)


@pytest.mark.parametrize("send", ["coded", "shards"])
def test_a_node_that_is_started_again_under_its_old_id_is_asked_again(send: str) -> None:
    """As under authentication: only the time since when it is active tells that its work is lost."""
    grid = LivingGrid(toy_app(), 4)
    for node in grid.nodes.values():
        node.silent = node.worker in (0, 2)
    zero = next(node for node, one in grid.nodes.items() if one.worker == 0)
    # The first look notes since when each is active; the process is another one at the third.
    after(4, grid, lambda: None, lambda: None, lambda: (grid.kill(0), grid.start(0, zero)))
    arrays, rows = run(grid, CODES["fractional"](), send=send)
    assert relative(arrays, expected()) < 1e-6
    entry = rows[0]["train"]
    assert entry["restarted"] == [0] and 0 in entry["used"]
    assert grid.pushed.count(zero) == (2 if send == "coded" else 3)  # its two shards, one by one


@pytest.mark.parametrize("send", ["coded", "shards"])
def test_a_node_that_was_given_up_and_is_back_under_its_old_id_is_asked_again(send: str) -> None:
    """The SuperLink answers for a node that it no longer hears, by an error; then the node is there again."""
    grid = LivingGrid(toy_app(), 4)
    for node in grid.nodes.values():
        node.silent = node.worker == 2
    zero = next(node for node, one in grid.nodes.items() if one.worker == 0)
    grid.nodes[zero].crashes = True
    after(4, grid, lambda: None, lambda: None, lambda: None, lambda: (grid.kill(0), grid.start(0, zero)))
    arrays, rows = run(grid, CODES["fractional"](), send=send)
    assert relative(arrays, expected()) < 1e-6
    entry = rows[0]["train"]
    assert entry["outcome"] == "exact" and 0 in entry["used"]
    assert [one["reason"].startswith("error 8") for one in entry["rejected"]] == [True]


@pytest.mark.parametrize(("k", "crashes_at"), [(4, 2), (8, 1)])
def test_whoever_is_back_after_an_error_gets_the_shard_it_failed_at_and_one_message_at_a_time(
    k: int, crashes_at: int
) -> None:
    """Worker 2 is silent from round 2 on; worker 0 is known, fails at one of its shards, and returns under its id."""
    grid = LivingGrid(toy_app(), 4, node_config=lambda worker: {"partition-id": worker, "num-partitions": k})
    zero = next(node for node, one in grid.nodes.items() if one.worker == 0)
    before: list[int] = []  # messages that were sent in round 1
    looks: list[bool] = []
    pull = grid.pull_messages

    def between(server_round: int, *_: Any) -> None:
        if server_round == 1:
            for one in grid.nodes.values():
                one.silent = one.worker == 2
            before.append(len(grid.pushed))

    def asked() -> int:
        return grid.pushed[before[0] :].count(zero) if before else 0

    def crash(message_ids: Any) -> Any:
        grid.nodes[zero].crashes = asked() == crashes_at and len(looks) < 4
        return pull(message_ids)

    def back() -> None:
        looks.extend([True] * (asked() >= crashes_at))
        if len(looks) == 4:
            grid.kill(0)
            grid.start(0, zero)

    grid.look, grid.pull_messages = back, crash  # type: ignore[method-assign]
    _, rows = run(grid, fractional_repetition(4, 1, k=k), rounds=2, send="shards", on_round_end=between)
    assert rows[1]["train"]["outcome"] == "exact" and len(rows[1]["train"]["rejected"]) == 1
    # Its shards, the one that it failed at once more; and its first, while it has to say again who it is.
    assert asked() == k // 2 + 1 + (crashes_at > 1)


def test_a_node_that_stays_is_asked_once_a_round() -> None:
    grid = LivingGrid(toy_app(), 4)
    _, rows = run(grid, CODES["fractional"](), rounds=3)
    for row in rows:
        assert row["train"]["joined"] == row["train"]["restarted"] == []
    assert max(map(grid.pushed.count, grid.nodes)) <= 3


def test_a_round_without_work_for_a_newcomer_sends_it_nothing() -> None:
    """It answers as a worker that is known: the message for it is empty."""
    grid = LivingGrid(toy_app(), 4)
    strategy = GradientCoding(
        FedAvg(fraction_train=0.25, min_train_nodes=1, fraction_evaluate=0.0), CODES["fractional"]()
    )
    with inside_a_run():
        strategy.start(hurried(grid), initial_arrays(), num_rounds=4, timeout=60 * HURRY)
    for row in strategy.ledger.rows[1:]:
        assert row["train"]["joined"] == [], "nodes without a sampled shard are no newcomers"


def test_a_hopeless_round_still_ends_at_once() -> None:
    """Both holders crash: nobody waits for somebody who might start again."""
    grid = LivingGrid(toy_app(), 4)
    for node in grid.nodes.values():
        node.crashes = node.worker % 2 == 0
    _, rows = run(grid, CODES["fractional"]())
    assert rows[0]["train"]["ended"] == "hopeless" and rows[0]["train"]["seconds"]["waiting"] < 30 * HURRY


@pytest.mark.parametrize("timeout", [None, 1.0, 30.0, 600.0, 3600.0])
@pytest.mark.parametrize("slowest", [None, 0.1, 10.0, 500.0, 1e5])
def test_a_message_never_expires_before_its_round_does(timeout: float | None, slowest: float | None) -> None:
    ttl = time_to_live(timeout, slowest)
    if timeout is None:
        assert ttl is None if slowest is None else ttl is not None and ttl >= 20 * slowest
    else:
        assert ttl is not None and ttl >= 1.25 * timeout + 60
        assert ttl <= max(600, 4 * timeout, 1.25 * timeout + 60)


def test_messages_live_shorter_once_replies_were_fast() -> None:
    before, later = time_to_live(3600, None), time_to_live(3600, 10.0)
    assert before is not None and later is not None
    assert later < before / 3
