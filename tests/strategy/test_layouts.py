"""Which arrays a reply may have."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from fl_gradcode.strategy.layouts import AgreedLayouts, check_layout, check_records, unlike_sent

SENT = ArrayRecord(
    {
        "w": Array(np.array([0.5, -70_000.0], np.float32)),
        "count": Array(np.array([300], np.int64)),
        "on": Array(np.array([True])),
    }
)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("w", "int8"),
        ("w", "bool"),
        ("w", "int64"),
        ("w", "float16"),
        ("count", "int8"),
        ("count", "bool"),
        ("count", "uint8"),
    ],
)
def test_a_dtype_that_cannot_hold_the_values_is_refused(name: str, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"array '{name}' has dtype {dtype}, which cannot hold the server's"):
        check_layout(((name, dtype, tuple(SENT[name].shape)),), SENT)
    content = RecordDict({"arrays": ArrayRecord({name: Array(np.ones(SENT[name].shape, dtype))})})
    with pytest.raises(ValueError, match="cannot hold"):
        check_records(content, SENT)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("w", "float64"), ("w", "bfloat16"), ("count", "int32"), ("count", "float32"), ("count", "int16"), ("on", "int8")],
)
def test_a_dtype_that_holds_them_is_not(name: str, dtype: str) -> None:
    check_layout(((name, dtype, tuple(SENT[name].shape)),), SENT)


@pytest.mark.parametrize("dtype", ["V8", "object", "complex64", "<U3"])
def test_what_is_no_real_number_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match="only real numbers can be averaged"):
        check_layout((("w", dtype, (2,)),), SENT)


def test_the_order_of_arrays_is_no_difference_and_their_names_are() -> None:
    layout = tuple((name, array.dtype, tuple(array.shape)) for name, array in SENT.items())
    assert unlike_sent(layout[::-1], SENT) == ""
    assert "it lacks the array 'count'" in unlike_sent((layout[0], layout[2]), SENT)
    assert "is not among" in unlike_sent((*layout, ("more", "float32", (1,))), SENT)


def test_a_few_agreed_layouts_are_remembered() -> None:
    agreed = AgreedLayouts()
    for number in range(20):
        agreed.add(number)
    assert 19 in agreed and 12 in agreed and 0 not in agreed
