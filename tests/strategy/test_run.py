"""One run: plans are values, effects come in their order, and a row names workers as they were known when asked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCode, GradientCoding, VirtualGrid, fractional_repetition, uncoded
from fl_gradcode.checkpoints.checkpoint import Checkpoint
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency
from fl_gradcode.privacy import DPSGD
from fl_gradcode.privacy.run_account import RunAccount
from fl_gradcode.strategy.options import Options
from fl_gradcode.strategy.plan_messages import make_plan
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, toy_app

CODE = fractional_repetition(6, 1)
# The worker whose reply is read first, so that it is read at all.
FIRST = next(worker for _, worker in sorted(InProcessGrid(ClientApp(), 6).known_workers().items()))
PROMISE = DPSGD(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, steps=3)


def failing(worker: int, rounds: tuple[int, ...]) -> Any:
    """The worker answers with an error in these rounds."""

    def tamper(who: int, message: Message, reply: Message) -> Message:
        config: Any = message.content["config"]
        if who == worker and config["server-round"] in rounds:
            return Message(Error(2, "RuntimeError: out of disk"), reply_to=message)
        return reply

    return tamper


@pytest.mark.parametrize("send", ["coded", "shards"])
@pytest.mark.parametrize("virtual", [False, True], ids=["in process", "virtual"])
def test_a_worker_that_fails_keeps_its_number_in_the_row(send: Any, virtual: bool) -> None:
    """Its node was known when it was asked; that it failed since does not change that."""
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODE, send=send)
    with InProcessGrid(toy_app(), 6, tamper=failing(FIRST, (2,))) as grid:
        strategy.start(VirtualGrid(grid, Latency(compute=1.0)) if virtual else grid, initial_arrays(), num_rounds=3)
    train = strategy.ledger.rows[1]["train"]
    assert set(train["asked"]) == set(range(6))
    assert {one["worker"] for one in train["timings"]} <= set(range(6))
    (rejected,) = train["rejected"]
    assert (rejected["worker"], rejected["kind"]) == (FIRST, "error")


def plan_of(account: RunAccount, server_round: int) -> Any:
    return make_plan(
        CODE,
        range(6),
        Options(privacy=PROMISE),
        k=6,
        run="r",
        server_round=server_round,
        kind="train",
        weight_key="num-examples",
        arrays_key="arrays",
        privacy=account.text,
        releases=account.releases(server_round, range(6)),
    )


def test_building_a_plan_charges_nothing_and_gives_the_same_plan_again() -> None:
    account = RunAccount(PROMISE, CODE, "r")
    account.begin(5)
    before = account.state
    assert plan_of(account, 1) == plan_of(account, 1)
    assert account.state == before
    account.charge_request(1, range(6))
    assert account.state != before
    assert plan_of(account, 2).releases[0] == (2, ((1, 1),))  # two holders, asked in round 1


class Stopped(Exception):
    """The process ends here."""


def test_the_charge_is_on_disk_before_the_messages_leave(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two counts a round too many, never one too few."""
    kept: list[Any] = []

    class Grid(InProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            sent = list(messages)
            if any("fl-gradcode.plan" in message.content for message in sent):
                kept.append(Checkpoint(tmp_path / "run.ckpt").load_privacy("mine"))
                raise Stopped
            return super().push_messages(sent)

    strategy = GradientCoding(
        FedAvg(fraction_evaluate=0.0), CODE, privacy=PROMISE, run="mine", checkpoint=tmp_path / "run.ckpt"
    )
    with Grid(toy_app(), 6) as grid, pytest.raises(Stopped):
        strategy.start(grid, initial_arrays(), num_rounds=2)
    assert kept[0]["asked"][0] == 1
    assert all(ranges == [[1, 1]] for _, ranges in kept[0]["released"])


def test_before_it_has_started_a_run_has_the_name_it_was_given_or_none() -> None:
    assert GradientCoding(FedAvg(), CODE, run="mine").run == "mine"
    with pytest.raises(InvalidSetting, match=r"gets its name at start\(\)"):
        GradientCoding(FedAvg(), CODE).run  # noqa: B018


@pytest.mark.parametrize("code", [uncoded(4), fractional_repetition(4, 1)], ids=["uncoded", "fractional"])
def test_a_loop_of_ones_own_may_call_a_strategy_that_was_not_started(code: GradientCode) -> None:
    strategy = GradientCoding(FedAvg(), code)
    with InProcessGrid(toy_app(), 4) as grid:
        messages = strategy.configure_train(1, initial_arrays(), ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
        plain: ArrayRecord = FedAvg().start(grid, initial_arrays(), num_rounds=1).arrays
    assert arrays is not None
    for ours, theirs in zip(arrays.to_numpy_ndarrays(), plain.to_numpy_ndarrays(), strict=True):
        assert np.abs(ours - theirs).max() < 1e-6


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"initial_arrays": [np.zeros(3)]}, "initial_arrays is a list: pass an ArrayRecord"),
        ({"initial_arrays": None}, "initial_arrays is a NoneType: pass an ArrayRecord"),
        ({"num_rounds": "2"}, "num_rounds='2': pass a whole number"),
        ({"num_rounds": 1.5}, "num_rounds=1.5: pass a whole number"),
        ({"timeout": math.nan}, "timeout=nan: pass seconds of at least 0, or None"),
        ({"timeout": -1}, "timeout=-1: pass seconds of at least 0, or None"),
        ({"timeout": "60"}, "timeout='60': pass seconds of at least 0, or None"),
    ],
)
def test_what_no_run_can_be_started_with_is_told_before_the_first_message(
    settings: dict[str, Any], sentence: str
) -> None:
    strategy = GradientCoding(FedAvg(), fractional_repetition(4, 1))
    with InProcessGrid(toy_app(), 4) as grid, pytest.raises(InvalidSetting, match=sentence):
        strategy.start(grid, **{"initial_arrays": initial_arrays(), "num_rounds": 1, **settings})
    assert grid.calls == [0] * 4


def test_what_a_function_of_the_round_s_end_does_to_its_arrays_does_not_reach_the_model() -> None:
    def spoiling(number: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        for name in [*arrays]:
            arrays[name].data = b""
        arrays.clear()
        row.clear()

    results = []
    for function in (None, spoiling):
        strategy = GradientCoding(FedAvg(), fractional_repetition(4, 1), on_round_end=function)
        with InProcessGrid(toy_app(), 4) as grid:
            results.append(strategy.start(grid, initial_arrays(), num_rounds=3).arrays)
        assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 3
    assert relative(*results) == 0
