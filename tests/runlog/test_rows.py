"""Typed ledger rows and their JSON form: nothing is lost, and what is no row is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.protocol import RejectionKind
from fl_gradcode.runlog.rows import (
    SCHEMA,
    CodeLine,
    FilledIn,
    JobLine,
    Late,
    ModeLine,
    PhaseRow,
    PhaseSeconds,
    PrivacyLine,
    Rejected,
    RoundRow,
)
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app

NUMBERS = st.integers(0, 99)
WORKERS = st.none() | NUMBERS
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SOMETIMES = st.none() | FLOATS


def lists(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=3).map(tuple)


JOBS = st.builds(JobLine, WORKERS, st.text(), st.none() | NUMBERS, NUMBERS, SOMETIMES, SOMETIMES)
PRIVACY = st.builds(
    PrivacyLine,
    unit=st.text(), noise=st.text(), noise_multiplier=FLOATS, clipping_norm=FLOATS, sample_rate=SOMETIMES,
    steps=st.none() | NUMBERS, delta=FLOATS, accountant=st.text(), epsilon=SOMETIMES, epsilon_told=SOMETIMES,
    epsilon_told_all_runs=SOMETIMES, other_requests=st.dictionaries(NUMBERS, st.tuples(NUMBERS, NUMBERS)),
)  # fmt: skip
ENTRIES = st.builds(
    PhaseRow,
    outcome=st.sampled_from(["exact", "approximate", "skipped", "raised"]), ended=st.text(), workers=NUMBERS,
    shards=lists(NUMBERS), asked=lists(WORKERS), held_back=lists(WORKERS), never_sent=lists(WORKERS),
    answered=lists(NUMBERS), unread=lists(WORKERS), used=lists(NUMBERS), stragglers=lists(NUMBERS),
    rejected=lists(st.builds(Rejected, WORKERS, st.text(), st.text(), st.text())),
    late=lists(st.builds(Late, WORKERS, st.text(), st.text(), st.none() | st.text(), st.none() | st.text())),
    lapsed=lists(WORKERS), joined=lists(WORKERS), restarted=lists(WORKERS),
    decodable_after_replies=st.none() | NUMBERS, decodable_after_seconds=SOMETIMES, decoding_error=SOMETIMES,
    kappa=SOMETIMES, rounding_error=SOMETIMES, coverage=lists(SOMETIMES), quantisation_error=SOMETIMES,
    filled_in=lists(st.builds(FilledIn, lists(NUMBERS), NUMBERS)), replica_disagreement=SOMETIMES,
    privacy=st.none() | PRIVACY, timings=lists(JOBS), owing=lists(JOBS), bytes_down=NUMBERS, bytes_up=NUMBERS,
    seconds=st.builds(PhaseSeconds, SOMETIMES, SOMETIMES, SOMETIMES),
)  # fmt: skip
MODES: tuple[Literal["coded", "shards"], ...] = ("coded", "shards")
ROWS = st.builds(
    RoundRow,
    run=st.text(), flower_run_id=st.text(), round=NUMBERS, ended_at=SOMETIMES, resumed=st.booleans(),
    code=st.builds(CodeLine, st.text(), st.integers(1, 99), st.integers(1, 99), NUMBERS, NUMBERS, st.booleans()),
    holders=st.none() | lists(lists(NUMBERS)),
    way=st.none() | st.builds(ModeLine, st.sampled_from(MODES), SOMETIMES, NUMBERS),
    train=st.none() | ENTRIES, evaluate=st.none() | ENTRIES, ended_by=st.none() | st.text(),
)  # fmt: skip


def through_json(values: Any) -> Any:
    return json.loads(json.dumps(values, allow_nan=False))


def real_rows() -> list[dict[str, Any]]:
    """Rows of a run in which workers fail, as a ledger file has them."""

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, "no disk"), reply_to=message) if 0 < worker < 5 else reply

    with InProcessGrid(toy_app(), 6, tamper=tamper) as grid:
        strategy = GradientCoding(FedAvg(), fractional_repetition(6, 2))
        strategy.start(grid, initial_arrays(), 2)
    rows = [through_json(row) for row in strategy.ledger.rows]
    assert rows[0]["train"]["rejected"] and rows[0]["evaluate"]["timings"]
    return rows


@given(ROWS)
def test_a_row_comes_back_from_json_as_it_was(row: RoundRow) -> None:
    assert RoundRow.from_json(through_json(row.to_json())) == row


def test_a_row_of_a_real_run_survives_unchanged() -> None:
    for values in real_rows():
        assert through_json(RoundRow.from_json(values).to_json()) == values


def a_phase(**fields: Any) -> PhaseRow:
    known: dict[str, Any] = {
        "outcome": "exact", "ended": "decoded", "workers": 2, "shards": (0, 1), "asked": (1, None), "answered": (1, 0),
        "used": (1,), "stragglers": (), "decoding_error": 0.0, "coverage": (1.0, 1.0), "bytes_down": 10, "bytes_up": 5,
        "seconds": PhaseSeconds(1.0, 0.5),
    }  # fmt: skip
    return PhaseRow(**{**known, **fields})


def a_row(**fields: Any) -> RoundRow:
    known: dict[str, Any] = {"run": "one", "flower_run_id": "7", "round": 3, "code": CodeLine("mine", 2, 2, 1, 1)}
    return RoundRow(**{**known, **fields})


def test_keys_are_kebab_case_and_some_are_left_out_until_they_say_something() -> None:
    plain = a_row().to_json()
    assert plain == {
        "schema": SCHEMA,
        "run": "one",
        "flower-run-id": "7",
        "round": 3,
        "ended-at": None,
        "code": {"name": "mine", "n": 2, "k": 2, "s": 1, "m": 1},
        "train": None,
        "evaluate": None,
    }
    more = a_row(resumed=True, ended_by="x", holders=((0, 1), (1,)), code=CodeLine("mine", 2, 2, 1, 1, exact=False))
    assert set(more.to_json()) - set(plain) == {"resumed", "ended-by", "holders"}
    assert more.to_json()["code"]["exact"] is False
    late = [Late(1, "9", "train 2"), Late(None, "8", "train 1", "error", "boom")]
    assert [one.to_json() for one in late] == [
        {"worker": 1, "node": "9", "from": "train 2"},
        {"worker": None, "node": "8", "from": "train 1", "kind": "error", "reason": "boom"},
    ]


def test_a_number_that_is_not_finite_becomes_null() -> None:
    infinite = a_row(train=a_phase(kappa=math.inf, decoding_error=math.nan, seconds=PhaseSeconds(math.inf, 0.0)))
    values = through_json(infinite.to_json())
    assert (values["train"]["kappa"], values["train"]["decoding-error"]) == (None, None)
    assert values["train"]["seconds"]["waiting"] is None
    assert RoundRow.from_json(values).to_json() == values


def test_numbers_of_numpy_are_written_and_read() -> None:
    numbers: Any = tuple(np.array([1, 0]))
    counted = a_row(train=a_phase(coverage=tuple(np.array([0.5, 1.0])), kappa=np.float64(1.5), used=numbers))
    assert RoundRow.from_json(through_json(counted.to_json())) == counted


def test_keys_that_are_not_known_are_ignored() -> None:
    values = a_row(train=a_phase()).to_json()
    more = {**values, "weather": "fine", "train": {**values["train"], "mood": [1]}}
    assert RoundRow.from_json(more) == a_row(train=a_phase())


def changed(path: str, value: Any) -> dict[str, Any]:
    """The JSON of a row in which one value is another one; None as value: it is missing."""
    timing = JobLine(0, "train", 1, 1, 2.0, None)
    spent = PrivacyLine(
        unit="record", noise="shared", noise_multiplier=1.0, clipping_norm=1.0, sample_rate=0.1, steps=2, delta=1e-5,
        accountant="prv", epsilon=1.0, other_requests={0: (1, 2)},
    )  # fmt: skip
    values: dict[str, Any] = through_json(a_row(train=a_phase(timings=(timing, timing), privacy=spent)).to_json())
    *folders, key = path.split(".")
    inner: Any = values
    for part in folders:
        inner = inner[int(part) if isinstance(inner, list) else part]
    last = int(key) if isinstance(inner, list) else key
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return values


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (changed("schema", 3), "This ledger row has schema 3; this version of fl-gradcode reads schemas 1 and 2. Read"),
        (changed("schema", None), "This is not a ledger row: it has no field 'schema'."),
        (changed("schema", "one"), "This is not a ledger row: schema is 'one' and must be 1."),
        (changed("round", None), "This is not a ledger row: round is missing."),
        (changed("round", "3"), "This is not a ledger row: round is '3' and must be a whole number."),
        (changed("round", True), "This is not a ledger row: round is True and must be a whole number."),
        (changed("code.n", 2.5), "This is not a ledger row: code.n is 2.5 and must be a whole number."),
        (changed("train", [1]), "This is not a ledger row: train is [1] and must be an object."),
        (changed("train.asked", 1), "This is not a ledger row: train.asked is 1 and must be a list."),
        (changed("train.coverage.1", "x"), "This is not a ledger row: train.coverage[1] is 'x' and must be a finite"),
        (changed("train.kappa", math.nan), "This is not a ledger row: train.kappa is nan and must be a finite number."),
        (
            changed("train.timings.1.seconds", {}),
            "This is not a ledger row: train.timings[1].seconds is {} and must be",
        ),
        (
            changed("train.outcome", "fine"),
            "This is not a ledger row: train.outcome is 'fine' and must be one of exact,",
        ),
        (changed("train.seconds.waiting", None), "This is not a ledger row: train.seconds.waiting is missing."),
        (
            changed("train.privacy.other-requests.0", [1]),
            "This is not a ledger row: train.privacy.other-requests[0] is [1] and must be a list of 2.",
        ),
        (
            changed("train.privacy.other-requests.a", [1, 2]),
            "must be an object with whole numbers as keys.",
        ),
        (changed("run", ["x" * 200]), "This is not a ledger row: run is ['xxx"),
        ([1, 2], "This is not a ledger row: it is [1, 2] and must be an object."),
        (None, "This is not a ledger row: it is None and must be an object."),
    ],
    ids=str,
)
def test_what_is_no_row_is_refused_in_one_sentence(values: Any, sentence: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        RoundRow.from_json(values)
    assert sentence in str(refused.value) and len(str(refused.value)) < 200


def test_a_row_is_replaced_not_changed() -> None:
    row = a_row()
    with pytest.raises(AttributeError):
        row.round = 4  # type: ignore[misc]
    assert replace(row, train=a_phase()).phases == (a_phase(),)
    assert (row.phase("train"), replace(row, evaluate=a_phase()).phase("evaluate")) == (None, a_phase())


def test_a_phase_says_who_was_in_time_and_a_late_reply_who_asked() -> None:
    assert a_phase(answered=(1, 0, 2), unread=(3, None), used=(1,), stragglers=(2,)).in_time == {0, 1, 3}
    assert [Late(0, "9", text).asked for text in ("train 12", "probe")] == [("train", 12), ("probe", None)]


DOCS = Path(__file__).resolve().parents[2] / "docs" / "ledger.md"


def keys_of(values: Any) -> set[str]:
    """All keys of JSON values, but for numbers."""
    if isinstance(values, list):
        return {key for one in values for key in keys_of(one)}
    if isinstance(values, dict):
        return {key for key in values if not key.isdecimal()} | {key for one in values.values() for key in keys_of(one)}
    return set()


def test_every_field_and_every_kind_is_documented() -> None:
    job = JobLine(0, "train", 1, 1, 2.0, None)
    spent = PrivacyLine(
        unit="record", noise="shared", noise_multiplier=1.0, clipping_norm=1.0, sample_rate=0.1, steps=2, delta=1e-5,
        accountant="prv", epsilon=1.0,
    )  # fmt: skip
    full = a_row(
        resumed=True, ended_by="x", holders=((0,),), code=CodeLine("mine", 2, 2, 1, 1, exact=False),
        way=ModeLine("coded", None, 1),
        train=a_phase(
            timings=(job,), owing=(job,), privacy=spent, rejected=(Rejected(0, "7", "error", "boom"),),
            late=(Late(0, "7", "train 1", "error", "boom"),), filled_in=(FilledIn((0,), 1),),
        ),
    ).to_json()  # fmt: skip
    text = DOCS.read_text()
    named = {*keys_of(full), *get_args(RejectionKind)}
    assert len(named) > 80
    assert sorted(name for name in named if f"`{name}`" not in text and f'"{name}"' not in text) == []
