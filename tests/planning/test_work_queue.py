"""The rule that hands out shards: the strategy and the planner's simulation share it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_gradcode.planning.work_queue import ShardQueue, first_shards, turns_of

BLOCKS = {0: (0, 1, 2), 1: (0, 1, 2), 2: (0, 1, 2)}


def test_holders_of_the_same_shards_start_spread_over_them() -> None:
    assert first_shards(BLOCKS) == {0: 0, 1: 1, 2: 2}
    assert turns_of(BLOCKS) == {0: (0, 1, 2), 1: (1, 2, 0), 2: (2, 0, 1)}


def test_a_cyclic_assignment_starts_with_as_many_different_shards_as_there_are_workers() -> None:
    blocks = {i: tuple(sorted((i + j) % 5 for j in range(3))) for i in range(5)}
    assert sorted(first_shards(blocks).values()) == [0, 1, 2, 3, 4]


def test_a_worker_without_shards_has_no_turn() -> None:
    assert turns_of({0: (0,), 1: ()}) == {0: (0,), 1: ()}


def test_a_free_worker_gets_the_open_shard_that_fewest_work_on() -> None:
    queue = ShardQueue(turns_of(BLOCKS), patience=0.0)
    assert [queue.start(i, i, set(), 0.0) for i in range(3)] == [0, 1, 2]
    assert queue.finish(0, 1.0) == 0
    assert queue.start(0, 0, {0}, 1.0) == 1  # 1 and 2 have one copy each: the next in its turn
    assert queue.finish(1, 2.0) == 1
    assert queue.start(1, 1, {0, 1}, 2.0) == 2


def test_a_second_copy_waits_for_patience_times_the_free_workers_own_time() -> None:
    queue = ShardQueue(turns_of({0: (0, 1), 1: (0, 1)}), patience=2.0)
    assert (queue.start(0, 0, set(), 0.0), queue.start(1, 1, set(), 0.0)) == (0, 1)
    assert queue.finish(0, 1.0) == 0  # it took 1 s
    assert queue.start(0, 0, {0}, 1.0) is None
    assert queue.wake_at == 2.0  # the copy of shard 1 began at 0
    assert queue.start(0, 0, {0}, 2.0) == 1


def test_a_lost_copy_is_no_copy() -> None:
    queue = ShardQueue(turns_of({0: (0,), 1: (0,)}), patience=5.0)
    assert queue.start(0, 0, set(), 0.0) == 0
    queue.drop(0)
    assert queue.finish(0, 1.0) is None  # it had nothing any more
    assert queue.start(1, 1, set(), 1.0) == 0


@given(st.integers(1, 6), st.integers(0, 3), st.sampled_from([0.0, 1.0, 2.0]), st.data())
def test_nobody_is_given_a_closed_shard_or_one_that_it_does_not_hold(
    n: int, s: int, patience: float, data: st.DataObject
) -> None:
    blocks = {i: tuple(sorted({(i + j) % n for j in range(min(n, s + 1))})) for i in range(n)}
    queue, closed, now = ShardQueue(turns_of(blocks), patience), set[int](), 0.0
    busy: dict[int, int] = {}
    for _ in range(4 * n):
        now += data.draw(st.floats(0.0, 3.0))
        worker = data.draw(st.integers(0, n - 1))
        if worker in busy:
            assert queue.finish(worker, now) == busy.pop(worker)
        shard = queue.start(worker, worker, closed, now)
        if shard is not None:
            assert shard in blocks[worker] and shard not in closed
            busy[worker] = shard
            if data.draw(st.booleans()):
                closed.add(shard)


@pytest.mark.parametrize("patience", [0.0, 2.0])
def test_whoever_has_not_finished_a_shard_yet_waits_for_nobody(patience: float) -> None:
    queue = ShardQueue(turns_of({0: (0,), 1: (0,)}), patience)
    assert queue.start(0, 0, set(), 0.0) == 0
    assert queue.start(1, 1, set(), 0.0) == 0
