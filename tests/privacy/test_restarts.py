"""Private runs that end and go on, and servers and clients that lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from fl_gradcode import GradientCoding, Ledger, VirtualGrid, uncoded
from fl_gradcode.latency import Latency
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat
from tests.privacy.private_app import initial, keys_for, private_app
from tests.privacy.test_run_account import ANY_CODE, CODES, clients, hand_computed, private, rounds_of, start
from tests.strategy.test_bad_replies import with_reply


def test_each_start_is_a_run_of_its_own(tmp_path: Path) -> None:
    code = CODES["fractional"]
    strategy = private(code)
    names = []
    for again in range(2):
        start(strategy, clients(code, tmp_path), 2)
        rows = [row["train"] for row in strategy.ledger.rows[2 * again :]]
        assert [row["outcome"] for row in rows] == ["exact"] * 2
        assert rows[-1]["privacy"]["epsilon"] == pytest.approx(hand_computed(2), rel=1e-9)
        names.append(strategy.run)
        assert {row["run"] for row in strategy.ledger.rows[2 * again :]} == {strategy.run}
    assert rows[-1]["privacy"]["epsilon-told-all-runs"] == pytest.approx(hand_computed(4), rel=1e-9)
    assert names[0] != names[1]


def test_a_name_that_was_given_is_kept_and_its_rounds_are_answered_once(tmp_path: Path) -> None:
    code = uncoded(3)  # everybody has to answer
    strategy = private(code, run="mine")
    # The same round of the same run, with the same weights: the same answer, at no cost.
    first, again = (start(strategy, clients(code, tmp_path), 1).arrays for _ in range(2))
    assert (flat(first) == flat(again)).all()
    assert rounds_of(tmp_path, 0, 0) == [1]
    with clients(code, tmp_path) as grid:  # with other weights: refused
        strategy.start(VirtualGrid(grid, Latency(compute=1.0)), first, num_rounds=1, timeout=1000.0)
    row = strategy.ledger.rows[-1]["train"]
    assert strategy.run == "mine" and row["outcome"] == "skipped"
    assert all("answered before" in one["reason"] for one in row["rejected"]) and rounds_of(tmp_path, 0, 0) == [1]


def go_on(strategy: GradientCoding, grid: Any, arrays: ArrayRecord, rounds: range) -> ArrayRecord:
    """A server that was killed goes on by a loop of its own: Flower's begins at round 1."""
    for server_round in rounds:
        messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
        arrays = strategy.aggregate_train(server_round, grid.send_and_receive(messages))[0] or arrays
        strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
        strategy.aggregate_evaluate(server_round, [])
    return arrays


@ANY_CODE
def test_a_run_that_goes_on_after_a_kill_has_the_same_model_and_ledgers(name: str, tmp_path: Path) -> None:
    code = CODES[name]
    keys_for(code, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def deaf(first: int) -> Any:
        """Worker 1 gets no message before the round `first`."""

        class Deaf(InProcessGrid):
            def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
                heard = [
                    m
                    for m in messages
                    if self._worker[m.metadata.dst_node_id] != 1 or int(m.metadata.group_id) >= first
                ]
                return super().send_and_receive(heard, timeout=timeout)

        return Deaf

    found = {}
    for folder, stops in (("one", [4]), ("two", [3, 4])):
        arrays, begin = initial(), 1
        for stop in stops:  # each by a strategy that knows nothing of the one before
            strategy = private(code, run="r")
            with deaf(3)(private_app(), 6, run_config={"privacy-dir": str(tmp_path / folder)}) as grid:
                arrays = go_on(strategy, grid, arrays, range(begin, stop))
            assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * (stop - begin)
            begin = stop
        assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(3), rel=1e-9)
        files = {path.relative_to(tmp_path / folder): path.read_text() for path in (tmp_path / folder).rglob("*.jsonl")}
        found[folder] = (flat(arrays), files)
    assert (found["one"][0] == found["two"][0]).all()
    assert len(found["one"][1]) == 18 and found["one"][1] == found["two"][1]


def test_the_server_s_figure_after_a_restart_is_not_too_small_even_if_clients_say_nothing(tmp_path: Path) -> None:
    code = CODES["fractional"]
    strategy = private(code, run="r")
    hush = lambda worker, message, reply: with_reply(spent=[])(reply)  # noqa: E731
    with clients(code, tmp_path, tamper=hush) as grid:
        go_on(strategy, grid, initial(), range(4, 6))
    epsilons = [row["train"]["privacy"]["epsilon"] for row in strategy.ledger.rows]
    assert epsilons == pytest.approx([hand_computed(4), hand_computed(5)], rel=1e-9)


# Servers and clients that lie


class Equivocating(InProcessGrid):
    """Sends one worker other weights than the others."""

    victim = 0

    def _answer(self, message: Message) -> Message:
        if self._worker[message.metadata.dst_node_id] == self.victim:
            content: Any = message.content
            content["arrays"] = ArrayRecord({k: Array(a.numpy() + np.float32(1)) for k, a in content["arrays"].items()})
        return super()._answer(message)


@pytest.mark.parametrize("victim", range(6))
def test_other_weights_to_one_holder_are_noticed_and_not_mixed(
    victim: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = CODES["cyclic"]
    keys_for(code, tmp_path)
    grid = Equivocating(private_app(), 6, run_config={"privacy-dir": str(tmp_path)})
    grid.victim = victim
    strategy = private(code)
    result = start(strategy, grid, 2)
    met = [row["train"] for row in strategy.ledger.rows if victim in row["train"]["answered"]]
    for entry in met:
        # Not decoded to garbage: the others agree and decode without it, or the round is skipped.
        assert victim not in entry["used"] and entry["outcome"] in ("exact", "skipped")
        assert entry["outcome"] == "skipped" or [one["worker"] for one in entry["rejected"]] == [victim]
        assert {int(j) for j in entry["privacy"]["other-requests"]} <= set(code.shards_of(victim))
        assert all(victim in pair for pair in entry["privacy"]["other-requests"].values())
        assert entry["privacy"]["other-requests"]
    told = [r.getMessage() for r in caplog.records if "bound their noise to different requests" in r.getMessage()]
    assert len(told) == bool(met)
    if len(met) == 2 and {entry["outcome"] for entry in met} == {"skipped"}:
        assert (flat(result.arrays) == flat(initial())).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "x"])
def test_a_client_that_tells_nonsense_of_what_it_spent_is_a_straggler(value: Any, tmp_path: Path) -> None:
    code = CODES["fractional"]
    bad = 4

    def lie(worker: int, message: Message, reply: Message) -> Message:
        return with_reply(spent=[[0, "", value, 1.0]])(reply) if worker == bad else reply

    strategy = private(code, ledger=str(tmp_path / "ledger.jsonl"))
    result = start(strategy, clients(code, tmp_path / "keys", tamper=lie), 2)
    for number, row in enumerate(Ledger.read(tmp_path / "ledger.jsonl"), 1):
        assert row["train"]["outcome"] == "exact" and bad not in row["train"]["used"]
        assert row["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(number), rel=1e-9)
    assert np.isfinite(float(result.train_metrics_clientapp[2]["fl-gradcode.epsilon"]))
