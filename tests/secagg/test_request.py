"""The request digest binds all that a class's integers depend on."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fl_gradcode.client.masked_call import _entry
from fl_gradcode.secagg import Entry, Received, content_digest, given_digest, layout_digest, request_digest
from tests.secagg import second

WEIGHTS = Entry("w", "float32", (2, 3), b"\x00" * 24)
RECORDS = [
    Received("ArrayRecord", "arrays", (WEIGHTS, Entry("b", "float32", (3,), b"\x01" * 12))),
    Received("ArrayRecord", "decoy", (Entry("w", "float32", (2, 3), b"\x02" * 24),)),
    Received("ConfigRecord", "config", (Entry("lr", "float", (), b"0.1"), Entry("steps", "int", (), b"5"))),
    Received("ConfigRecord", "fl-gradcode.plan", (Entry("arrays-key", "str", (), b"arrays"),)),
]


def entry(**changes: Any) -> Entry:
    return Entry(**{"key": "w", "type": "float32", "shape": (2, 3), "content": b"\x00" * 24, **changes})


OTHERS = {
    "other weights": [
        Received("ArrayRecord", "arrays", (entry(content=b"\x09" * 24), *RECORDS[0].entries[1:])),
        *RECORDS[1:],
    ],
    "other dtype": [Received("ArrayRecord", "arrays", (entry(type="int32"), *RECORDS[0].entries[1:])), *RECORDS[1:]],
    "other shape": [Received("ArrayRecord", "arrays", (entry(shape=(3, 2)), *RECORDS[0].entries[1:])), *RECORDS[1:]],
    "flat shape": [Received("ArrayRecord", "arrays", (entry(shape=(23,)), *RECORDS[0].entries[1:])), *RECORDS[1:]],
    "other name of an array": [
        Received("ArrayRecord", "arrays", (entry(key="v"), *RECORDS[0].entries[1:])),
        *RECORDS[1:],
    ],
    "arrays in another order": [Received("ArrayRecord", "arrays", RECORDS[0].entries[::-1]), *RECORDS[1:]],
    "records in another order": [RECORDS[1], RECORDS[0], *RECORDS[2:]],
    "config in another order": [*RECORDS[:2], Received("ConfigRecord", "config", RECORDS[2].entries[::-1]), RECORDS[3]],
    "another type of record": [*RECORDS[:2], Received("MetricRecord", "config", RECORDS[2].entries), RECORDS[3]],
    "another name of a record": [*RECORDS[:2], Received("ConfigRecord", "settings", RECORDS[2].entries), RECORDS[3]],
    "decoy named by the plan": [
        *RECORDS[:3],
        Received("ConfigRecord", "fl-gradcode.plan", (Entry("arrays-key", "str", (), b"decoy"),)),
    ],
    "a record less": RECORDS[:3],
    "a record more": [*RECORDS, Received("ConfigRecord", "more", ())],
    "number as text": [
        *RECORDS[:2],
        Received("ConfigRecord", "config", (RECORDS[2].entries[0], Entry("steps", "str", (), b"5"))),
        RECORDS[3],
    ],
    "an entry moved to the next record": [
        Received("ArrayRecord", "arrays", RECORDS[0].entries[:1]),
        Received("ArrayRecord", "decoy", (RECORDS[0].entries[1], *RECORDS[1].entries)),
        *RECORDS[2:],
    ],
}


@pytest.mark.parametrize("change", OTHERS)
def test_whatever_changes_in_the_message_changes_the_digest(change: str) -> None:
    assert content_digest(OTHERS[change]) != content_digest(RECORDS)


def test_the_content_is_hashed_field_by_field() -> None:
    import hashlib

    expected = b""
    for record in RECORDS:
        expected += second.lp(record.type, record.name, len(record.entries))
        for one in record.entries:
            expected += second.lp(one.key, one.type, second.lp(*one.shape), bytes(one.content))
    assert content_digest(RECORDS) == hashlib.sha256(expected).digest()
    viewed = [
        Received(r.type, r.name, [Entry(e.key, e.type, e.shape, memoryview(e.content)) for e in r.entries])
        for r in RECORDS
    ]
    assert content_digest(viewed) == content_digest(RECORDS)


def test_what_is_given_beside_the_message() -> None:
    config: dict[str, Any] = {"lr": 0.1, "steps": 5, "name": "a", "flag": True, "raw": b"x"}
    base = given_digest(seed=7, run_config=config, k=4)
    assert base == given_digest(seed=7, run_config=dict(reversed([*config.items()])), k=4)
    others: list[dict[str, Any]] = [
        {"seed": 8},
        {"k": 5},
        *({"run_config": {**config, **one}} for one in (
            {"lr": 0.1 + 2**-55}, {"steps": 5.0}, {"steps": "5"}, {"flag": 1}, {"name": b"a"}, {"more": 0})),
    ]  # fmt: skip
    digests = {given_digest(**{"seed": 7, "run_config": config, "k": 4, **one}) for one in others}
    assert len(digests | {base}) == len(others) + 1


def test_the_layout_of_what_comes_back() -> None:
    base = layout_digest([("w", "float32", (2, 3))], [("loss", -1)])
    others = [
        layout_digest([("w", "float32", (3, 2))], [("loss", -1)]),
        layout_digest([("w", "float64", (2, 3))], [("loss", -1)]),
        layout_digest([("v", "float32", (2, 3))], [("loss", -1)]),
        layout_digest([("w", "float32", (2, 3))], [("loss", 1)]),
        layout_digest([("w", "float32", (2, 3))], [("accuracy", -1)]),
        layout_digest([("w", "float32", (2, 3))], []),
    ]
    assert len({base, *others}) == 7


GIVEN: dict[str, Any] = {
    "manifest": b"\x00" * 32,
    "run": "run-1",
    "kind": "train",
    "round": 3,
    "content": b"\x01" * 32,
    "given": b"\x02" * 32,
    "quantiser": b"\x03" * 32,
    "layout": b"\x04" * 32,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("manifest", b"\x09" * 32),
        ("run", "run-2"),
        ("kind", "evaluate"),
        ("round", 4),
        ("content", b"\x09" * 32),
        ("given", b"\x09" * 32),
        ("quantiser", b"\x09" * 32),
        ("layout", b"\x09" * 32),
    ],
)
def test_each_field_is_bound(field: str, value: Any) -> None:
    assert request_digest(**{**GIVEN, field: value}) != request_digest(**GIVEN)


def test_the_digest_is_that_of_length_prefixed_fields() -> None:
    import hashlib

    expected = second.lp("fl-gradcode/secagg/request/v1", *GIVEN.values())
    assert request_digest(**GIVEN) == hashlib.sha256(expected).digest()
    # A byte that moves from one field to the next makes another digest.
    assert request_digest(**{**GIVEN, "run": "run-1t", "kind": "rain"}) != request_digest(**GIVEN)


def test_two_values_that_are_no_numbers_are_two_values() -> None:
    """A program can read which bits a NaN has, so two holders could be sent two of them."""
    several = [struct.unpack(">d", bytes.fromhex(bits))[0] for bits in ("7ff8000000000000", "7ff8000000000001")]
    assert all(value != value for value in several)
    assert len({given_digest(seed=1, run_config={"x": value}, k=4) for value in [*several, 0.0, -0.0]}) == 4
    for other in (lambda x: x, lambda x: [x, 1.0]):
        records = [RecordDict({"c": ConfigRecord({"x": other(value)})}) for value in [*several, 0.0, -0.0]]
        entries = [[_entry("x", value) for value in one["c"].values()] for one in records]
        assert len({content_digest([Received("ConfigRecord", "c", one)]) for one in entries}) == 4
    models = [np.array([bits], np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FC00001)]
    arrays = [ArrayRecord([model])["0"] for model in models]
    assert len({content_digest([Received("ArrayRecord", "a", [_entry("0", one)])]) for one in arrays}) == 2
