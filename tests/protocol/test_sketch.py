"""Sketches differ where copies differ, and a client's figures add up to those of its coded vector."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_gradcode.codes import P, PrimeField, cyclic_repetition, for_assignment, reed_solomon
from fl_gradcode.protocol import Sketcher, payload_encoding

WEIGHT = "num-examples"
RNG = np.random.default_rng(0)


def reply(scale: float = 1.0, *, count: int = 7, **more: Any) -> RecordDict:
    arrays = ArrayRecord({"w": Array(np.arange(1.0, 5.0) * scale), "n": Array(np.array([3]))})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({WEIGHT: count, "seconds": scale}), **more})


def apart(one: RecordDict, other: RecordDict) -> float:
    sketcher = Sketcher()
    return sketcher.of_records(one, WEIGHT).apart(sketcher.of_records(other, WEIGHT))


def test_records_are_apart_by_their_floats_and_times_may_differ() -> None:
    assert apart(reply(), reply()) == 0
    assert 5e-4 < apart(reply(), reply(1.001)) < 2e-3  # only the four floats differ
    assert apart(reply(told=ConfigRecord({"a": 1})), reply(told=ConfigRecord({"a": 2}))) == 0
    assert apart(reply(count=8), reply(count=7)) == pytest.approx(1 / 8)
    zeros = RecordDict({"a": ArrayRecord([np.zeros(3)])})
    assert apart(zeros, zeros) == 0


@pytest.mark.parametrize(
    "other",
    [
        reply(more=MetricRecord({"x": 1})),
        RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(4))}), "metrics": MetricRecord({WEIGHT: 7})}),
        RecordDict({**reply(), "arrays": ArrayRecord({"w": Array(np.arange(1.0, 5.0)), "n": Array(np.array([4]))})}),
        RecordDict({**reply(), "arrays": ArrayRecord({"w": Array(np.zeros(5)), "n": Array(np.array([3]))})}),
        RecordDict({**reply(), "arrays": ArrayRecord({"w": Array(np.ones(4, "f4")), "n": Array(np.array([3]))})}),
    ],
    ids=["a record more", "an array less", "a counter", "a shape", "a dtype"],
)
def test_whatever_is_no_float_must_be_equal(other: RecordDict) -> None:
    assert apart(reply(), other) == math.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32])
@pytest.mark.parametrize("size", [1, 1000, 70_001])
def test_one_entry_that_differs_shows_and_rounding_does_not(dtype: Any, size: int) -> None:
    values = RNG.standard_normal(size).astype(dtype) if dtype != np.uint32 else RNG.integers(0, P, size, dtype=dtype)
    sketcher = Sketcher()
    other = values.copy()
    other[size // 2] = values[size // 2] // 2 if dtype == np.uint32 else values[size // 2] + 1
    one = sketcher.of_vector(values, 1.0, ())
    assert one.apart(sketcher.of_vector(values.copy(), 1.0, ())) == 0
    assert one.apart(sketcher.of_vector(other, 1.0, ())) > 1e-5
    if dtype != np.uint32:
        near = sketcher.of_vector((values * (1 + 1e-7)).astype(dtype), 1.0, ())
        assert one.apart(near) < 1e-5


def test_swapped_entries_and_turned_signs_show_though_the_norm_stays() -> None:
    values = RNG.standard_normal(5000).astype(np.float32)
    for other in (values[::-1].copy(), -values, np.roll(values, 1), np.roll(values, 1024)):
        sketcher = Sketcher()
        assert sketcher.of_vector(values, 1.0, ()).apart(sketcher.of_vector(other, 1.0, ())) > 1e-2


@pytest.mark.parametrize("key", range(20))
def test_large_vectors_are_looked_at_in_part_for_signs_and_as_a_whole_for_the_norm(key: int) -> None:
    values = RNG.standard_normal(1_200_000).astype(np.float32)
    sketcher = Sketcher(key=key)
    other = values.copy()
    other[:100_000] *= 1.1  # about 0.02 of the square of the norm
    one, two = sketcher.of_vector(values, 1.0, ()), sketcher.of_vector(other, 1.0, ())
    assert one.norm == pytest.approx(float(np.linalg.norm(values.astype(np.float64))), rel=1e-4)
    assert one.apart(two) > 1e-3
    assert one.apart(sketcher.of_vector(-values, 1.0, ())) > 1e-2


CODES = {
    "cyclic": cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
    "m = 2": for_assignment([[i % 6, (i + 1) % 6, (i + 2) % 6, (i + 3) % 6] for i in range(6)], s=2, m=2),
    "prime field": reed_solomon(6, 2),
}


@pytest.mark.parametrize("size", [5, 4099])
@pytest.mark.parametrize("name", CODES)
def test_figures_add_up_and_wrong_ones_do_not(name: str, size: int) -> None:
    code = CODES[name]
    bits = code.numbers.fraction_bits if isinstance(code.numbers, PrimeField) else None
    encoding = payload_encoding(bits, code.k)
    for worker in range(code.n):
        columns = list(code.shards_of(worker))
        rows = [tuple(row) for row in code.B[worker, columns].reshape(len(columns), code.m).tolist()]
        total, figures = None, []
        for coefficients in rows:
            update = RNG.standard_normal(size).astype(np.float32)
            total, described = encoding.add_update(total, update, coefficients, describe=True)
            assert described is not None
            figures.append(encoding.with_metrics(described, np.array([1.0])))
        assert total is not None
        sent = encoding.sent(total)
        assert encoding.add_up(sent, rows, figures)
        for shard in range(len(figures)):
            wrong = [*figures]
            *most, last, weight = wrong[shard]
            wrong[shard] = (*most, last + (1 if bits else 10 * abs(most[0])), weight)
            assert not encoding.add_up(sent, rows, wrong)
            assert not encoding.add_up(sent, rows, [one[:-1] for one in figures])


@pytest.mark.parametrize("name", CODES)
def test_weights_add_up_and_wrong_ones_do_not(name: str) -> None:
    code = CODES[name]
    bits = code.numbers.fraction_bits if isinstance(code.numbers, PrimeField) else None
    encoding = payload_encoding(bits, code.k)
    columns = list(code.shards_of(1))
    rows = [tuple(row) for row in code.B[1, columns].reshape(len(columns), code.m).tolist()]
    metrics, figures = None, []
    for number, coefficients in enumerate(rows):
        weighted = np.array([10.25 + number, -3.0 * number])
        metrics = encoding.add_metrics(metrics, weighted, coefficients[:1])
        _, described = encoding.add_update(None, np.ones(7, np.float32), coefficients, describe=True)
        figures.append(encoding.with_metrics(described, weighted))
    assert metrics is not None
    assert encoding.weighs(metrics, rows, figures)
    for number, weight in itertools.product(range(len(rows)), (0.0, 11.0, -10.25, 1e13, 1e300)):
        wrong = [(*one[:-1], weight) if number == i else one for i, one in enumerate(figures)]
        assert encoding.weighs(metrics, rows, wrong) == (weight == 10.25 + number)
    other = metrics.copy()
    other[0] += 1
    assert not encoding.weighs(other, rows, figures)


def test_copies_of_records_differ_by_their_updates_and_not_by_the_model() -> None:
    before = ArrayRecord({"w": Array(1e3 + RNG.standard_normal(5000))})
    updates = RNG.standard_normal((2, 5000)) * 1e-3

    def trained(update: Any) -> RecordDict:
        return RecordDict({"arrays": ArrayRecord({"w": Array(before["w"].numpy() + update)})})

    sketcher = Sketcher(before)
    one, two = (sketcher.of_records(trained(update), WEIGHT) for update in updates)
    assert one.apart(two) > 0.1 and one.norm == pytest.approx(float(np.linalg.norm(updates[0])), rel=1e-6)
    sketcher.close()  # late copies come when the model is gone
    late = sketcher.of_records(trained(updates[0]), WEIGHT), sketcher.of_records(trained(updates[1]), WEIGHT)
    assert late[0].norm is None and one.apart(late[0]) < 1e-5 < 0.1 < one.apart(late[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounding_the_model_is_no_disagreement(dtype: Any) -> None:
    before = RNG.standard_normal(20_000).astype(dtype)
    update = RNG.standard_normal(20_000) * (1e-2 if dtype == np.float16 else 1e-4)
    copies = [(before.astype(np.float64) + update * (1 + error)).astype(dtype) for error in (0, 1e-6)]
    sketcher = Sketcher(ArrayRecord({"w": Array(before)}))
    flat = [(copy.astype(np.float64) - before).astype(np.float32) for copy in copies]
    one, two = (sketcher.of_vector(values, 1.0, ()) for values in flat)
    assert one.apart(two) < 1e-5
    other = (before.astype(np.float64) + RNG.permutation(update)).astype(dtype)
    assert one.apart(sketcher.of_vector((other.astype(np.float64) - before).astype(np.float32), 1.0, ())) > 1e-2


def test_what_is_not_finite_agrees_with_nothing() -> None:
    values = np.ones(2000, np.float32)
    sketcher = Sketcher()
    one = sketcher.of_vector(values, 1.0, ())
    for other in (sketcher.of_vector(values * np.nan, 1.0, ()), sketcher.of_vector(values, math.nan, ())):
        assert one.apart(other) == math.inf and other.apart(other) == math.inf


def test_any_dtype_of_an_array_can_be_sketched() -> None:
    for values in (np.array(["2020-01-01"], "M8[D]"), np.array([1 + 2j]), np.array([b"x"]), np.array(True)):
        assert apart(*2 * [RecordDict({"a": ArrayRecord({"x": Array(values)})})]) == 0
