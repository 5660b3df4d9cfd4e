"""Waiting: when a round ends, who is asked, what becomes of late replies. All in virtual time."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import (
    Coded,
    EarlyStopGrid,
    GradientCoding,
    VirtualGrid,
    fractional_repetition,
    gradient_coding_mod,
    uncoded,
)
from fl_gradcode.errors import InvalidSetting, RoundFailed, UnsuitableApp
from fl_gradcode.grid.polling import PollingArrivals
from fl_gradcode.latency import Latency, Law, lognormal, scaled
from fl_gradcode.protocol.messages import content_bytes
from fl_gradcode.testing import InProcessGrid, ManualClock, inside_a_run
from tests.conftest import all_codes, initial_arrays, relative, run_plain, toy_app


def table(times: dict[int, float], default: float = 1.0) -> Law:
    """A fixed time for each worker."""
    return Law("table", lambda seed, worker, tick: times.get(worker, default))


def run(code: Any, latency: Latency, rounds: int = 4, **kwargs: Any) -> tuple[Any, list[dict[str, Any]], VirtualGrid]:
    fraction_evaluate = kwargs.pop("fraction_evaluate", 0.0)
    timeout = kwargs.pop("timeout", 3600.0)
    strategy = GradientCoding(FedAvg(fraction_evaluate=fraction_evaluate), code, **{"verify": 0, **kwargs})
    with InProcessGrid(toy_app(), code.n) as grid:
        virtual = VirtualGrid(grid, latency)
        result = strategy.start(virtual, initial_arrays(), num_rounds=rounds, timeout=timeout)
    return result, strategy.ledger.rows, virtual


def test_does_not_wait_for_a_straggler() -> None:
    _, rows, virtual = run(fractional_repetition(4, 1), Latency(fixed=table({0: 100.0})))
    assert [row["train"]["seconds"]["waiting"] for row in rows] == [1.0] * 4
    assert virtual.now() == 4.0
    assert all(row["train"]["outcome"] == "exact" for row in rows)


def test_uncoded_waits_for_everyone() -> None:
    _, rows, _ = run(uncoded(4), Latency(fixed=table({0: 100.0})))
    assert [row["train"]["seconds"]["waiting"] for row in rows] == [100.0] * 4


def test_a_node_that_owes_a_reply_gets_the_current_round_at_once_when_it_answers() -> None:
    # Groups are (0, 2) and (1, 3). Worker 0 needs 2.5 rounds; worker 2 falls silent after it answered once.
    law = Law("", lambda seed, worker, tick: {0: 2.5, 2: 1.0 if tick <= 4 else float("inf")}.get(worker, 1.0))
    _, rows, _ = run(fractional_repetition(4, 1), Latency(fixed=law), rounds=5)
    held = [row["train"]["held-back"] for row in rows]
    assert held[0] == []
    assert 0 in held[1] and 0 in held[2]
    # Its reply to round 1 comes at 2.5, within round 3, which is then asked of it at once and ends at 5.0.
    assert rows[2]["train"]["late"] == [{"worker": 0, "node": rows[2]["train"]["late"][0]["node"], "from": "train 1"}]
    assert 0 in rows[2]["train"]["asked"]
    assert rows[2]["train"]["used"] == [0, 1]
    assert rows[2]["train"]["decodable-after-seconds"] == pytest.approx(3.0)


def test_each_reply_is_used_in_its_own_round_or_not_at_all() -> None:
    plain = run_plain(toy_app(), 6, FedAvg(fraction_evaluate=0.0), rounds=8)
    for code in all_codes(6, 2):
        result, rows, _ = run(code, Latency(compute=scaled(lognormal(sigma=0.8), {0: 7.0, 3: 3.0})), rounds=8)
        assert relative(result.arrays, plain.arrays) < 1e-6
        if code.s:
            assert any(row["train"]["late"] for row in rows), "the latencies of this test are too tame"


def test_a_debt_lapses_after_three_timeouts() -> None:
    # Worker 0 loses its first message for good and would be fine afterwards.
    law = Law("", lambda seed, worker, tick: float("inf") if worker == 0 and tick == 2 else 1.0)
    _, rows, _ = run(uncoded(2), Latency(fixed=law), rounds=6, timeout=10.0, give_up_rounds=None)
    outcomes = [row["train"]["outcome"] for row in rows]
    assert outcomes[:3] == ["skipped"] * 3
    assert 0 in rows[3]["train"]["lapsed"]
    assert outcomes[3:] == ["exact"] * 3  # it is asked again, and is fine


def test_hopeless_rounds_end_before_the_timeout() -> None:
    def fail(worker: int, message: Message, reply: Message) -> Message:
        from flwr.app import Error

        return Message(Error(2, "broken"), reply_to=message) if worker in (0, 2) else reply

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1))
    with InProcessGrid(toy_app(), 4, tamper=fail) as grid:
        virtual = VirtualGrid(grid, Latency(fixed=table({1: 50.0, 3: 60.0})))
        strategy.start(virtual, initial_arrays(), num_rounds=1)
    (row,) = strategy.ledger.rows
    assert row["train"]["ended"] == "hopeless"
    assert row["train"]["seconds"]["waiting"] <= 50.0  # the others decide first: errors are only seen when read


def test_a_round_times_out() -> None:
    _, rows, virtual = run(uncoded(3), Latency(fixed=table({1: float("inf")})), rounds=2, timeout=7.0)
    assert [row["train"]["ended"] for row in rows] == ["timed out", "timed out"]
    assert virtual.now() == 14.0
    assert rows[0]["train"]["stragglers"] == [1]


def test_computes_only_what_is_read() -> None:
    code = fractional_repetition(12, 2)
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, verify=0)
    with InProcessGrid(toy_app(), 12) as grid:
        virtual = VirtualGrid(grid, Latency(compute=lognormal(sigma=0.5)))
        strategy.start(virtual, initial_arrays(), num_rounds=5)
        assert sum(grid.calls) == 5 * len(code.groups or ())  # one reply a group and round
    used = [len(row["train"]["used"]) for row in strategy.ledger.rows]
    assert used == [4] * 5
    unread = [row["train"]["unread"] for row in strategy.ledger.rows]
    assert any(unread), "nobody was in time without being needed: the latencies are too tame"
    assert all(not set(one) & set(row["train"]["used"]) for one, row in zip(unread, strategy.ledger.rows, strict=True))


def test_compute_time_grows_with_the_number_of_shards_and_evaluation_is_cheaper() -> None:
    _, rows, _ = run(fractional_repetition(6, 2), Latency(fixed=0.5, compute=1.0), rounds=1, fraction_evaluate=1.0)
    assert rows[0]["train"]["seconds"]["waiting"] == pytest.approx(0.5 + 3 * 1.0)
    # Everybody is free again: all needed the same time. Evaluation costs 0.3 of training.
    assert rows[0]["evaluate"]["seconds"]["waiting"] == pytest.approx(0.5 + 0.3 * 3 * 1.0)


def test_transfer_time_grows_with_the_bytes() -> None:
    _, rows, _ = run(uncoded(2), Latency(transfer=1000.0), rounds=1)
    down = rows[0]["train"]["bytes-down"] / 2  # the model and a plan; the model comes back without one
    back = content_bytes(RecordDict({"arrays": initial_arrays(), "config": ConfigRecord({"server-round": 1})}))
    assert rows[0]["train"]["seconds"]["waiting"] == pytest.approx((down + back) / 1e6 * 1000.0, rel=0.01)


def test_virtual_time_is_the_same_for_the_same_seed_and_differs_for_another() -> None:
    def seconds(seed: int) -> float:
        with InProcessGrid(toy_app(), 6) as grid:
            virtual = VirtualGrid(grid, Latency(compute=lognormal()), seed=seed)
            FedAvg().start(virtual, initial_arrays(), num_rounds=3)
            return virtual.now()

    assert seconds(1) == seconds(1)
    assert seconds(1) != seconds(2)


def test_a_node_works_off_its_messages_one_by_one() -> None:
    with InProcessGrid(toy_app(), 2) as grid:
        virtual = VirtualGrid(grid, Latency(fixed=1.0))
        node, other = grid.get_node_ids()
        content = RecordDict({"config": ConfigRecord({"server-round": 1})})
        virtual.push([Message(content, dst_node_id=to, message_type="train") for to in (node, node, other)])
        arrivals = [virtual.next_arrival(None) for _ in range(3)]
    assert [(a.node == node, a.at) for a in arrivals if a is not None] == [(True, 1.0), (False, 1.0), (True, 2.0)]


def test_plain_strategies_run_in_virtual_time_unchanged() -> None:
    plain = run_plain(toy_app(), 5)
    with InProcessGrid(toy_app(), 5) as grid:
        virtual = VirtualGrid(grid, Latency(fixed=table({2: 4.0})))
        result = FedAvg().start(virtual, initial_arrays(), num_rounds=3)
    assert relative(result.arrays, plain.arrays) < 1e-6
    assert virtual.now() == 3 * (4.0 + 4.0)


class Ignorant(InProcessGrid):
    """Like a real engine: only the clients know who they are."""

    known_workers = None  # type: ignore[assignment]


def test_nodes_tell_who_they_are_when_the_grid_does_not_know() -> None:
    with Ignorant(toy_app(), 5) as grid:
        virtual = VirtualGrid(grid, Latency(fixed=1.0))
        assert virtual.known_workers() == InProcessGrid.known_workers(grid)
        assert virtual.now() == 0.0  # asking is not measured


def test_an_app_without_the_mod_needs_to_be_told_apart_by_hand() -> None:
    with Ignorant(ClientApp(), 2) as grid, pytest.raises(UnsuitableApp, match="Add gradient_coding_mod"):
        VirtualGrid(grid, Latency(fixed=1.0)).known_workers()


def test_early_stop_drops_the_slowest_for_any_strategy() -> None:
    with InProcessGrid(toy_app(), 5) as grid:
        virtual = VirtualGrid(grid, Latency(fixed=table({2: 9.0})))
        FedAvg(fraction_evaluate=0.0).start(EarlyStopGrid(virtual, stop_after=4), initial_arrays(), num_rounds=3)
        assert virtual.now() == 3.0
        assert grid.calls[2] == 0


def test_stop_after_must_be_a_number_of_replies() -> None:
    with InProcessGrid(toy_app(), 2) as grid, pytest.raises(InvalidSetting, match="at least 1 reply"):
        EarlyStopGrid(grid, stop_after=0)


@pytest.mark.parametrize(
    ("nodes", "n", "s", "sentence"),
    [
        (7, 6, 2, "7 nodes are online, but the code has n=6 workers"),
        (3, 6, 2, "3 nodes are online after .* needs at least n - s = 4"),
    ],
)
def test_a_code_that_does_not_fit_the_nodes_is_refused(nodes: int, n: int, s: int, sentence: str) -> None:
    with InProcessGrid(toy_app(), nodes) as grid, pytest.raises(RoundFailed, match=sentence):
        GradientCoding(FedAvg(), fractional_repetition(n, s)).start(grid, initial_arrays(), num_rounds=1)


def test_a_strategy_can_be_started_again_on_other_nodes() -> None:
    strategy = GradientCoding(FedAvg(), fractional_repetition(4, 1))
    for seed in (0, 1):
        with InProcessGrid(toy_app(), 4, seed=seed) as grid:
            strategy.start(grid, initial_arrays(), num_rounds=3)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 6


def test_starts_without_stragglers_that_never_came_online() -> None:
    strategy = GradientCoding(FedAvg(), fractional_repetition(6, 2))
    with InProcessGrid(toy_app(), 5) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact", "exact"]


def test_a_client_gives_up_between_two_shards_when_it_can_no_longer_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    monkeypatch.setattr("fl_gradcode.client.mod.time.monotonic", clock)
    app = ClientApp(mods=[gradient_coding_mod])
    trained: list[int] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trained.append(int(context.node_config["partition-id"]))
        clock.advance(10.0)
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    strategy = GradientCoding(
        FedAvg(fraction_evaluate=0.0), fractional_repetition(3, 2), send=Coded(give_up_after=15.0)
    )
    with InProcessGrid(app, 3) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
    reasons = [one["reason"] for one in strategy.ledger.rows[0]["train"]["rejected"]]
    assert len(reasons) == 3 and all("gave up" in reason and "2 shards done" in reason for reason in reasons)
    assert len(trained) == 6


class SlowUpload:
    """A grid whose replies can be pulled one by one, and whose first one blocks while it is uploaded."""

    def __init__(self) -> None:
        self.uploading = threading.Event()
        self.pulled: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [str(i) for i, _ in enumerate(messages)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        if message_id == "0":
            self.uploading.wait(20)
        self.pulled.append(message_id)
        with inside_a_run():
            return [Message(RecordDict(), dst_node_id=1, message_type="train")]


def test_a_slow_upload_does_not_hold_back_finished_replies() -> None:
    grid = SlowUpload()
    source = PollingArrivals(grid, poll_interval=0.01)  # type: ignore[arg-type]
    with inside_a_run():
        messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in range(3)]
    source.push(messages)
    first, second = source.next_arrival(source.now() + 10), source.next_arrival(source.now() + 10)
    assert first is not None and second is not None
    assert {first.node, second.node} == {1, 2}
    assert source.next_arrival(source.now() + 0.05) is None
    grid.uploading.set()
    third = source.next_arrival(source.now() + 10)
    assert third is not None and third.node == 0
    assert sorted(grid.pulled) == ["0", "1", "2"]  # each id exactly once
    source.close()


def test_the_deadline_holds_even_if_the_clock_is_set_by_hand() -> None:
    clock = ManualClock()
    source = PollingArrivals(SlowUpload(), clock=clock)  # type: ignore[arg-type]
    clock.advance(5.0)
    assert source.next_arrival(5.0) is None


class Failing(SlowUpload):
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise ConnectionError("no route")


def test_a_reply_that_cannot_be_pulled_is_a_straggler_with_a_reason() -> None:
    source = PollingArrivals(Failing(), poll_interval=0.001)  # type: ignore[arg-type]
    with inside_a_run():
        source.push([Message(RecordDict(), dst_node_id=7, message_type="train")])
    arrival = source.next_arrival(source.now() + 20)
    assert arrival is not None and arrival.reply is None
    assert "no route" in arrival.failure
    source.close()
