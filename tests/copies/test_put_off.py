"""First copies are sketched late or never, and everything is found that comparing all of them at once would find."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fl_gradcode._flower_internals import message_of_nobody
from fl_gradcode.copies.copies import Copies
from fl_gradcode.protocol import Plan, Reply, Row

N, HELD = 6, 3  # workers, which are as many as shards, and shards of each worker
BEFORE = ArrayRecord({"w": Array(np.full(40, 100.0))})


def plan() -> Plan:
    rows = {i: Row(tuple((i + j) % N for j in range(HELD)), ((1.0,),) * HELD) for i in range(N)}
    return Plan("run", 0, 1, "train", N, N, "num-examples", "w", rows, as_returned=True)


def copies() -> Copies:
    return Copies(plan(), BEFORE, compares=True)


def update_of(number: int) -> Any:
    return 100.0 + np.random.default_rng(number).standard_normal(40)


def content_of(number: int) -> RecordDict:
    record = ArrayRecord({"w": Array(update_of(number))})
    return RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 5})})


def reply_of(worker: int, shard: int) -> Reply:
    return Reply("run", 1, "train", worker, "returned", shards=(shard,))


def late_message(worker: int, shard: int, content: RecordDict) -> Message:
    return message_of_nobody(reply_of(worker, shard).content(**dict(content.items())), "train")


@pytest.mark.parametrize("seed", range(60))
def test_all_is_found_that_a_comparison_of_all_pairs_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    phase = copies()
    sent: list[tuple[int, int, int]] = []
    order = rng.permutation([(i, shard) for i, row in plan().rows.items() for shard in row.shards]).tolist()
    for worker, shard in order[: rng.integers(2, len(order))]:
        number = shard
        if rng.random() < 0.2:
            number = int(rng.choice(plan().rows[worker].shards))  # perhaps of a shard that it sends as well
        earlier = [one for one in sent if one[1] == shard]
        apart = phase.add_records(reply_of(worker, shard), content_of(number))
        assert (apart is None) == (not earlier)
        if earlier:
            assert (apart > 1e-5) == (earlier[0][2] != number)  # type: ignore[operator]
        sent.append((worker, shard, number))
    shards = {shard for _, shard, _ in sent}
    of = {shard: [number for _, its, number in sent if its == shard] for shard in shards}
    assert phase.noted == len(sent)
    assert phase.compared == {shard for shard in shards if len(of[shard]) > 1}
    assert {shard for (shard,) in phase.disagreements} == {shard for shard in shards if len({*of[shard]}) > 1}
    alike = any(
        one[0] == other[0] and one[1] != other[1] and one[2] == other[2]
        for i, one in enumerate(sent)
        for other in sent[:i]
    )
    assert (phase.alike is not None) == alike


def test_a_late_copy_of_whoever_owes_one_is_compared_with_what_was_used() -> None:
    for number, apart in ((2, False), (3, True)):
        phase = copies()
        for shard in range(N):
            phase.add_records(reply_of(shard, shard), content_of(shard))
        phase.close(used=True, owing=[1])  # it holds shards 1, 2 and 3
        found = phase.add_late(reply_of(1, 2), late_message(1, 2, content_of(number)))
        assert found is not None and (found > 1e-5) == apart
        assert bool(phase.disagreements) == apart


def test_a_late_reply_that_nobody_waits_for_is_no_disagreement() -> None:
    """Its arrays are dropped on arrival, since all replies stay in memory until the next phase."""
    phase = copies()
    for shard in range(N):
        phase.add_records(reply_of(shard, shard), content_of(shard))
    phase.close(used=True)
    rest = RecordDict({"metrics": content_of(2)["metrics"]})
    assert phase.add_late(reply_of(1, 2), late_message(1, 2, rest)) is None
    assert not phase.disagreements


def test_no_reply_outlives_its_phase() -> None:
    phase, content = copies(), content_of(0)
    gone = weakref.ref(content)
    phase.add_records(reply_of(0, 0), content)
    phase.close(used=True, owing=[4])  # it holds shard 0
    del content
    gc.collect()
    assert gone() is None
