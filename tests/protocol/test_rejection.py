"""A refusal's kind travels from the node to the server, whatever its sentence says."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Context, Error, Message
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, gradient_coding_mod, uncoded
from fl_gradcode.errors import (
    FlGradcodeError,
    InvalidSetting,
    Overflow,
    PrivacyRefused,
    ShardMismatch,
    UnsuitableApp,
    VersionMismatch,
)
from fl_gradcode.protocol.rejection import Rejection, last_line, rejection_of, with_kind
from fl_gradcode.testing import InProcessGrid, inside_a_run
from tests.conftest import initial_arrays, toy_app

ERRORS: list[type[FlGradcodeError]] = [
    FlGradcodeError,
    InvalidSetting,
    Overflow,
    PrivacyRefused,
    ShardMismatch,
    UnsuitableApp,
    VersionMismatch,
]


def reply_with(reason: str) -> Message:
    from flwr.app import RecordDict

    with inside_a_run():
        return Message(Error(2, reason), reply_to=Message(RecordDict(), dst_node_id=1, message_type="train"))


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "form", ["{name}: {text}", "Traceback\n  line 1\n{name}: {text}", "<class 'a.b.{name}'>:<'{text}'>"]
)
def test_an_error_of_ours_keeps_its_kind_and_its_sentence(kind: type[FlGradcodeError], form: str) -> None:
    error = with_kind(kind("what is wrong: the value."))
    reply = reply_with(form.format(name=kind.__name__, text=error))
    assert rejection_of(reply) == Rejection(kind.kind, f"error 2: {kind.__name__}: what is wrong: the value.")  # type: ignore[arg-type]


def test_a_kind_is_written_once() -> None:
    once = with_kind(ShardMismatch("other data"))
    assert str(with_kind(once)) == str(once) == "fl-gradcode/shard-mismatch: other data"
    assert isinstance(once, ShardMismatch)


@pytest.mark.parametrize(
    "reason",
    ["ValueError: out of disk", "UnsuitableApp: a sentence of somebody else", "fl-gradcode/unheard-of: x", "", "\n \n"],
)
def test_what_is_not_ours_is_an_error(reason: str) -> None:
    assert rejection_of(reply_with(reason)).kind == "error"


def test_a_long_text_is_cut() -> None:
    assert last_line("a\n" + 1000 * "b" + "\n\n") == 497 * "b" + "..."


def test_rewording_an_error_changes_nothing() -> None:
    """Whether a run ends goes by the kind: here the sentence says nothing that anybody would look for."""

    def refusing(message: Message, context: Context, call_next: Any) -> Message:
        raise with_kind(InvalidSetting("no."))

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), uncoded(3))
    with InProcessGrid(toy_app([refusing]), 3) as grid, pytest.raises(UnsuitableApp, match="No client can take part"):
        strategy.start(grid, initial_arrays(), num_rounds=1)
    (row,) = strategy.ledger.rows
    assert {one["kind"] for one in row["train"]["rejected"]} == {"invalid-setting"}


def test_words_of_an_app_do_not_end_a_run() -> None:
    """Before, any error text with the name of one of our exceptions in it did."""

    def failing(message: Message, context: Context, call_next: Any) -> Message:
        raise ValueError("see UnsuitableApp in the docs")

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), uncoded(3))
    with InProcessGrid(toy_app([failing, gradient_coding_mod]), 3) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["skipped"] * 2
