"""Whatever a node claims binds that node alone."""

from __future__ import annotations

import pytest

from fl_gradcode.protocol import RejectionKind
from fl_gradcode.roster import WorkerRegistry


def kind(registry: WorkerRegistry, node: int, worker: int, server_round: int) -> RejectionKind | None:
    refused = registry.claim(node, worker, server_round)
    return None if refused is None else refused.kind


def test_a_node_that_claims_another_number_is_left_out_for_good() -> None:
    registry = WorkerRegistry()
    registry.holdings[10] = {0: "digest"}
    assert kind(registry, 10, 1, 1) is None
    assert kind(registry, 10, 2, 2) == "contradiction"
    assert kind(registry, 10, 1, 3) == "quarantined" and kind(registry.copy(), 10, 2, 3) == "quarantined"
    assert registry.quarantined == {10: "it answers as worker 2, and is worker 1"}
    assert registry.holdings == {} and registry.worker_of(10) is None
    assert kind(registry, 11, 1, 3) is None  # its worker is free


def test_a_node_that_failed_may_come_back_as_another_worker() -> None:
    registry = WorkerRegistry()
    assert kind(registry, 10, 1, 1) is None
    registry.forget(10)
    assert kind(registry, 10, 2, 2) is None


def test_what_the_engine_knows_cannot_be_claimed_otherwise() -> None:
    registry = WorkerRegistry()
    registry.learn_from_engine({10: 0, 11: 1})
    assert kind(registry, 11, 0, 1) == "contradiction" and kind(registry, 10, 0, 1) is None


def test_the_node_that_was_known_first_keeps_its_worker_however_fast_the_other_is() -> None:
    registry = WorkerRegistry()
    assert kind(registry, 10, 1, 1) is None
    for server_round in range(2, 9):
        registry.keep([10, 11])
        assert kind(registry, 11, 1, server_round) == "duplicate-worker"
        assert kind(registry, 10, 1, server_round) is None
    assert registry.node_of(1) == 10


def test_a_restarted_node_takes_over_once_the_old_one_is_gone_or_silent() -> None:
    registry = WorkerRegistry()
    assert kind(registry, 10, 1, 1) is None
    registry.keep([11])
    assert kind(registry, 11, 1, 2) is None  # no longer listed
    registry.keep([11, 12])
    assert kind(registry, 12, 1, 3) == "duplicate-worker" and kind(registry, 12, 1, 4) is None  # listed and silent
    assert registry.node_of(1) == 12 and registry.quarantined == {}


def test_a_node_that_took_over_a_slow_one_s_number_is_left_out_when_that_answers() -> None:
    registry = WorkerRegistry()
    assert kind(registry, 10, 1, 1) is None and kind(registry, 11, 1, 3) is None
    assert kind(registry, 10, 1, 2) == "duplicate-worker"  # a late reply decides nothing
    assert registry.quarantined == {}
    assert kind(registry, 10, 1, 4) is None
    assert registry.quarantined == {11: "it answers as worker 1, which is node 10"}
    assert kind(registry, 11, 1, 5) == "quarantined" and registry.node_of(1) == 10


@pytest.mark.parametrize("rounds", [1, 50])
def test_nodes_that_are_gone_leave_nothing_behind(rounds: int) -> None:
    registry = WorkerRegistry()
    for server_round in range(rounds):
        registry.keep([1000 + server_round])
        assert kind(registry, 1000 + server_round, server_round, server_round) is None
        registry.holdings[1000 + server_round] = {0: "x"}
    registry.keep([])
    assert registry.holdings == {} and registry.node_of(rounds - 1) is None


def test_an_engine_does_not_bring_a_silenced_worker_back() -> None:
    registry = WorkerRegistry()
    registry.learn_from_engine({10: 0, 11: 1})
    registry.quarantine(11, "it lied")
    phase = registry.copy()
    phase.learn_from_engine({10: 0, 11: 1})
    phase.keep([10, 11])
    assert phase.worker_of(11) is None and phase.silenced == {1} and phase.missing([0, 1]) == [1]
    phase.keep([10])
    assert phase.silenced == set()


def test_a_node_that_fails_and_takes_another_number_gives_its_old_one_back() -> None:
    registry = WorkerRegistry()
    assert kind(registry, 10, 1, 5) is None
    registry.forget(10)
    assert kind(registry, 10, 2, 5) is None
    assert kind(registry, 11, 1, 5) is None and registry.node_of(1) == 11 and registry.node_of(2) == 10
