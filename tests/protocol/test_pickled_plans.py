"""What a process knows of a plan that it has written stays in that process."""

from __future__ import annotations

import pickle

from flwr.app import RecordDict

from fl_gradcode.protocol import Plan, Row
from fl_gradcode.protocol.records import PlanWriter


def plan_of(workers: int) -> Plan:
    rows = {i: Row((i,), ((1.0,),)) for i in range(workers)}
    values = {"run": "r", "seed": 0, "round": 1, "kind": "train", "n": workers, "k": workers}
    return Plan(**values, weight_key="num-examples", arrays_key="arrays", rows=rows)  # type: ignore[arg-type]


def test_a_message_for_one_worker_is_as_long_whatever_the_number_of_workers() -> None:
    sizes = []
    for workers in (10, 1000):
        plan = plan_of(workers)
        content = PlanWriter(plan).add_to(RecordDict(), {3: plan.rows[3]})
        assert Plan.find_in(content) == plan.for_worker(3)
        there = pickle.loads(pickle.dumps(content))
        assert Plan.find_in(there) == plan.for_worker(3) and Plan.rows_in(there) == {3: plan.rows[3]}
        sizes.append(len(pickle.dumps(content)))
    assert sizes[1] < sizes[0] + 20
