"""A run that trains nothing ends, and says which shards are missing, who holds them, and why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition, gradient_coding_mod
from fl_gradcode.errors import InvalidSetting, RoundFailed
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app

BROKEN = 2


def app_with_a_broken_shard(well_in: tuple[int, ...] = ()) -> ClientApp:
    """Its training raises for one shard, whoever holds it, but for some rounds."""

    def break_it(message: Message, context: Context, call_next: Any) -> Message:
        content: Any = message.content
        if context.node_config["partition-id"] == BROKEN and content["config"]["server-round"] not in well_in:
            raise RuntimeError("the file is truncated")
        return call_next(message, context)  # type: ignore[no-any-return]

    return toy_app([gradient_coding_mod, break_it])


def run(app: ClientApp, rounds: int, **options: Any) -> GradientCoding:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 1), **options)
    with InProcessGrid(app, 6) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=rounds)
    return strategy


@pytest.mark.parametrize("send", ["coded", "shards"])
def test_it_ends_after_three_rounds_and_names_shards_holders_and_reasons(
    send: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(RoundFailed) as caught:
        run(app_with_a_broken_shard(), 10, send=send)
    text = str(caught.value)
    assert text.startswith("None of the last 3 rounds made a model, and the next would hardly differ")
    assert f"shard {BROKEN}" in text.replace("shards 2 and 5", "shard 2") and "workers 2 and 5" in text
    assert "the file is truncated" in text and "give_up_rounds=" in text and "\n" not in text
    # It is named at once, not only at the end.
    assert sum("plain Flower would have gone on without that data" in line.message for line in caplog.records) == 2


def test_any_round_with_a_model_begins_the_count_anew() -> None:
    rows = run(app_with_a_broken_shard(well_in=(3, 6)), 6).ledger.rows
    assert [row["train"]["outcome"] for row in rows] == ["skipped", "skipped", "exact"] * 2


def test_how_long_is_the_users_to_say() -> None:
    with pytest.raises(RoundFailed, match="^No round made a model"):
        run(app_with_a_broken_shard(), 10, give_up_rounds=1)
    rows = run(app_with_a_broken_shard(), 6, give_up_rounds=None).ledger.rows
    assert [row["train"]["outcome"] for row in rows] == ["skipped"] * 6
    with pytest.raises(InvalidSetting, match="give_up_rounds=0 must be at least 1, or None for never"):
        GradientCoding(FedAvg(), fractional_repetition(4, 1), give_up_rounds=0)


def test_the_row_of_the_last_round_is_written() -> None:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 1))
    with InProcessGrid(app_with_a_broken_shard(), 6) as grid, pytest.raises(RoundFailed):
        strategy.start(grid, initial_arrays(), num_rounds=10)
    rows = strategy.ledger.rows
    assert [row["train"]["outcome"] for row in rows] == ["skipped", "skipped", "raised"]
    assert rows[-1]["ended-by"].startswith("RoundFailed: None of the last 3 rounds")
