"""The check of answers: whatever one worker sends, an accepted product is within the stated bound of the right one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message
from flwr.clientapp import ClientApp

from fl_gradcode.codes.prime_field import P, PrimeField
from fl_gradcode.errors import RoundFailed
from fl_gradcode.matmul import (
    CodedMatrix,
    ProductCode,
    coded_matmul_worker,
    entangled,
    matdot,
    mds_product,
    polynomial,
)
from fl_gradcode.matmul.answer_check import AnswerCheck, gram_of
from fl_gradcode.protocol.packing import as_array, view
from fl_gradcode.testing import InProcessGrid

FAMILIES: list[ProductCode] = [
    polynomial(12, 3, 3),
    polynomial(20, 4, 4),
    polynomial(11, 2, 3, basis="chebyshev"),
    polynomial(8, 2, 2, basis="integers"),
    mds_product(20, 15),
    mds_product(12, 9, basis="roots"),
    matdot(12, 4),
    matdot(21, 10, basis="chebyshev"),
    matdot(9, 3, basis="roots"),
    entangled(13, 2, 2, 2),
    entangled(24, 2, 2, 4),
]
ANSWER = "fl-gradcode.block.answer"


def worker_app() -> ClientApp:
    app = ClientApp()
    app.query("matmul")(coded_matmul_worker)
    return app


def operands(dtype: Any, seed: int = 0, shape: tuple[int, int, int] = (31, 26, 24)) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    rows, inner, columns = shape
    return rng.standard_normal((rows, inner)).astype(dtype), rng.standard_normal((inner, columns)).astype(dtype)


def honest(code: ProductCode, a: Any, b: Any) -> list[Any]:
    return [code.multiply(left, right) for left, right in zip(*code.encode(a, b), strict=True)]


def check_of(code: ProductCode, a: Any, b: Any) -> AnswerCheck:
    p, m, q = code.partition
    dtype = code.answer_type(a, b)[1]
    rng = np.random.default_rng(1)
    return AnswerCheck(code, gram_of(a, p, m), gram_of(b, m, q), -(-a.shape[1] // m), dtype, rng)


def exact(a: Any, b: Any) -> Any:
    return (a.astype(np.longdouble) @ b.astype(np.longdouble)).astype(np.float64)


def sets_of(code: ProductCode, extra: int) -> list[list[int]]:
    """Consecutive and random sets of k + extra workers."""
    rng = np.random.default_rng(2)
    size = code.k + extra
    drawn = [rng.choice(code.n, size, replace=False).tolist() for _ in range(12)]
    return [[(start + i) % code.n for i in range(size)] for start in range(0, code.n, 3)] + drawn


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("code", FAMILIES, ids=repr)
def test_whatever_one_worker_sends_an_accepted_product_is_within_its_bound(code: ProductCode, dtype: Any) -> None:
    a, b = operands(dtype)
    answers, right, check = honest(code, a, b), exact(a, b), check_of(code, a, b)
    rng = np.random.default_rng(3)
    seen = set()
    for extra in (1, 2):
        for workers in sets_of(code, extra):
            rest = check.look({worker: answers[worker] for worker in workers}).rest
            coefficients = code.coefficients(workers)
            leverage = check.unseen(workers, coefficients, rest).max(axis=(1, 2)) / check.rounding[workers]
            for worker in (workers[int(leverage.argmax())], workers[int(leverage.argmin())]):
                shape = answers[worker].shape
                wrong = rng.standard_normal(shape), np.ones(shape), np.outer(np.eye(shape[0])[0], np.eye(shape[1])[-1])
                for size in 10.0 ** np.arange(-1, 13):
                    sent = {other: answers[other] for other in workers}
                    error = wrong[int(rng.integers(3))] * size * check.rounding[worker]
                    sent[worker] = (answers[worker] + error).astype(answers[worker].dtype)
                    finding = check.look(sent)
                    accepted = finding.agree and not check.impossible(worker, sent[worker])
                    seen.add((size > 1, accepted))
                    if not accepted:
                        continue
                    product = code.decode([*sent.values()], workers, shape=right.shape)
                    bound = check.unseen(workers, coefficients, finding.rest).max(axis=0)
                    most = bound + check.honest(workers, coefficients)
                    assert np.abs(product - right).max() <= most.max()
                    if not check.weak(workers, finding.rest):
                        assert bound.max() <= (1e-6 if dtype == np.float64 else 1e-2) * check.scale
    assert seen >= {(True, True), (True, False), (False, True)}  # some large errors are missed, and within the bound


@pytest.mark.parametrize("code", FAMILIES, ids=repr)
def test_the_bound_is_reached_within_a_factor_of_two_by_the_worst_answer(code: ProductCode) -> None:
    # The error that just escapes the check: were the bound much larger, it would be of no use.
    a, b = operands(np.float64)
    answers, check = honest(code, a, b), check_of(code, a, b)
    workers = sets_of(code, 1)[0]
    rest = check.look({worker: answers[worker] for worker in workers}).rest
    coefficients = code.coefficients(workers)
    for place, worker in enumerate(workers):

        def accepted(size: float, place: int = place, worker: int = worker) -> bool:
            sent = {other: answers[other] for other in workers}
            error = np.zeros(answers[worker].shape)
            error[0, 0] = size
            sent[worker] = answers[worker] + error
            return not check.impossible(worker, sent[worker]) and check.look(sent).agree

        low, high = 0.0, 4 * float(check.largest[worker])
        for _ in range(60):
            low, high = ((low + high) / 2, high) if accepted((low + high) / 2) else (low, (low + high) / 2)
        bound = check.unseen(workers, np.ones_like(coefficients), rest)[place].max()
        assert low <= bound * (1 + 1e-6)
        if bound < check.largest[worker]:  # what its size alone allows
            assert bound <= 2.2 * low


def test_honest_answers_always_agree_whatever_the_matrices() -> None:
    rng = np.random.default_rng(4)
    ones, third = np.ones((24, 40)), np.full((24, 40), 1 / 3)
    spread = rng.standard_normal((24, 40)) * 10.0 ** rng.uniform(-6, 6, (24, 1))
    spikes = np.where(rng.random((24, 40)) < 0.02, 1e8, 1e-8)
    for a in (ones * 0.1, third, spread, spikes, np.zeros((24, 40)), rng.random((24, 40))):
        for b in (ones.T * 0.7, rng.standard_normal((40, 24)), spikes.T, np.zeros((40, 3))):
            for dtype in (np.float32, np.float64):
                x, y = a.astype(dtype), b.astype(dtype)
                for code in FAMILIES:
                    answers, check = honest(code, x, y), check_of(code, x, y)
                    everyone = dict(enumerate(answers))
                    assert not any(check.impossible(worker, answer) for worker, answer in everyone.items())
                    assert check.look(everyone).agree


# On a grid


def spoilt(change: Callable[[int, Any], Any], *who: int) -> Callable[[int, Message, Message], Message]:
    """A tamper that changes these workers' products."""

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content.get(ANSWER) if reply.has_content() else None
        if worker in who and record is not None:
            record["answer"] = as_array(change(worker, view(record["answer"])))
        return reply

    return tamper


def alone(workers: Sequence[int], tamper: Callable[[int, Message, Message], Message]) -> Any:
    """A tamper by which all other workers fail."""

    def both(worker: int, message: Message, reply: Message) -> Message:
        return tamper(worker, message, reply) if worker in workers else Message(Error(1, "gone"), reply_to=message)

    return both


@pytest.mark.parametrize("code", [*FAMILIES, polynomial(12, 3, 3, numbers=PrimeField(12))], ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_liar_is_named_and_left_out_with_two_extra_answers(code: ProductCode, dtype: Any) -> None:
    a, b = operands(dtype)
    for liar in (0, code.k, code.n - 1):
        for change in (lambda w, x: x // 2 if x.dtype == np.uint32 else -x, lambda w, x: x * 0 + x.dtype.type(3)):
            with InProcessGrid(worker_app(), code.n, tamper=spoilt(change, liar)) as grid:
                matrix = CodedMatrix(grid, a, code, extra=2)
                product = matrix.multiply(b)
            report = matrix.reports[0]
            assert liar not in report.used
            assert {worker for worker, _ in report.rejected} <= {liar}
            tolerance = 0.1 if isinstance(code.numbers, PrimeField) else report.error_bound
            assert np.abs(product - exact(a, b)).max() <= tolerance


@pytest.mark.parametrize("numbers", [None, PrimeField(0)], ids=["reals", "field"])
def test_two_liars_who_agree_with_each_other_are_named_with_four_extra_answers(numbers: PrimeField | None) -> None:
    code = polynomial(9, 2, 2) if numbers is None else polynomial(9, 2, 2, numbers=numbers)
    a, b = (np.rint(10 * x) for x in operands(np.float64))
    # They answer as if A were another matrix.
    false = honest(code, np.rint(a + 5).astype(np.int64) if numbers else a + 5, b.astype(np.int64) if numbers else b)
    if numbers:
        a, b = a.astype(np.int64), b.astype(np.int64)
    for liars in ((0, 1), (3, 8), (6, 2)):
        with InProcessGrid(worker_app(), 9, tamper=spoilt(lambda w, x: false[w], *liars)) as grid:
            matrix = CodedMatrix(grid, a, code, extra=4)
            assert np.abs(matrix.multiply(b) - a @ b).max() < 1e-9
        assert {worker for worker, _ in matrix.reports[0].rejected} == {worker for worker in liars if worker < 8} | (
            {8} if 8 in liars and any(worker == 8 for worker, _ in matrix.reports[0].rejected) else set()
        )


def blind_set(code: ProductCode, check: AnswerCheck) -> tuple[list[int], int]:
    """A set of k + 1 workers of whose errors the check sees little, and the worker of whom it sees least."""
    rng = np.random.default_rng(0)
    worst: tuple[float, list[int], int] = (0.0, [], 0)
    for _ in range(400):
        workers = sorted(rng.choice(code.n, code.k + 1, replace=False).tolist())
        unseen = check.unseen(workers, code.coefficients(workers), 0.0).max(axis=(1, 2))
        if unseen.max() > worst[0]:
            worst = float(unseen.max()), workers, workers[int(unseen.argmax())]
    return worst[1:]


def test_a_set_that_hardly_sees_a_worker_is_enlarged_and_if_nobody_is_left_the_report_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = polynomial(20, 4, 4)
    a, b = operands(np.float32)
    workers, blind = blind_set(code, check_of(code, a, b))
    other = next(worker for worker in range(20) if worker not in workers)

    def late(worker: int) -> int:
        return [*workers, other].index(worker) if worker in (*workers, other) else 99

    class Ordered(InProcessGrid):
        """Answers come from the blind set first."""

        def get_node_ids(self) -> list[int]:
            return sorted(self._worker, key=lambda node: late(self._worker[node]))

    large = spoilt(lambda w, x: x + np.float32(0.02), blind)
    for tamper in (lambda w, m, r: r, large):
        with Ordered(worker_app(), 20, tamper=tamper) as grid:
            matrix = CodedMatrix(grid, a, code, extra=1)
            product = matrix.multiply(b)
        report = matrix.reports[0]
        assert len(report.used) + len(report.rejected) > 17 and not report.unchecked
        assert np.abs(product - exact(a, b)).max() <= report.error_bound < 1e-2 * 400
    with (
        caplog.at_level(logging.WARNING, "fl_gradcode"),
        InProcessGrid(worker_app(), 20, tamper=alone(workers, large)) as grid,
    ):
        matrix = CodedMatrix(grid, a, code, extra=1)
        product = matrix.multiply(b)
    report = matrix.reports[0]
    assert blind in report.unchecked and "sees too little of worker" in caplog.text
    assert np.abs(product - exact(a, b)).max() <= report.error_bound


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("code", FAMILIES, ids=repr)
def test_an_error_that_is_hardly_noticed_stops_no_product_and_stays_within_the_bound(
    code: ProductCode, dtype: Any
) -> None:
    a, b = operands(dtype)
    check = check_of(code, a, b)
    for factor in 10.0 ** np.arange(-1.0, 5.0, 0.5):
        size = factor * float(check.rounding[0])
        change = spoilt(lambda w, x, size=size: x + x.dtype.type(size), 0)  # type: ignore[misc]
        with InProcessGrid(worker_app(), code.n, tamper=change) as grid:
            matrix = CodedMatrix(grid, a, code, extra=2)
            product = matrix.multiply(b)
        assert np.abs(product - exact(a, b)).max() <= matrix.reports[0].error_bound


def test_without_extra_answers_only_the_size_limits_what_a_liar_can_change() -> None:
    a, b = operands(np.float64)
    code = polynomial(6, 2, 2)
    for size in (1e-3, 1.0, 1e3, 1e300):
        with InProcessGrid(worker_app(), 6, tamper=spoilt(lambda w, x, size=size: x + size, 0)) as grid:  # type: ignore[misc]
            matrix = CodedMatrix(grid, a, code)
            product = matrix.multiply(b)
        assert np.abs(product - exact(a, b)).max() <= matrix.reports[0].error_bound < 1e5
        assert (0 in matrix.reports[0].used) == (size < 10)


# Answers that cannot be read


def header(text: str, version: int = 1) -> bytes:
    digits = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + (len(text) + 1).to_bytes(digits, "little") + text.encode() + b"\n"


def described(descr: str, shape: str, version: int = 1, order: str = "False") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}", version)


GOOD = np.zeros((5, 2))
BAD: dict[str, bytes] = {
    "empty": b"",
    "zip": b"PK\x03\x04junk",
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin\x94.",
    "magic only": b"\x93NUMPY",
    "header that ends early": b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4', (",
    "length without a header": b"\x93NUMPY\x01\x00\xff\xff",
    "nested header": header("(" * 200),
    "nested header of version 2": header("(" * 4000, 2),
    "header of megabytes": header("[" * 5_000_000, 2),
    "minus signs": header("-" * 3000 + "1"),
    "version 3": described("'<f8'", "(5, 2)", 3),
    "version 9": described("'<f8'", "(5, 2)", 9),
    "no such dtype": described("'x9'", "(5, 2)"),
    "objects": described("'|O'", "(5, 2)"),
    "texts": described("'<U4'", "(5, 2)"),
    "dates": described("'<M8[ns]'", "(5, 2)") + bytes(80),
    "fields": described("[('a', '<f8'), ('b', '<f8')]", "(5, 1)") + bytes(80),
    "nothing wide": described("'|V0'", "(5, 2)"),
    "whole numbers": described("'<i8'", "(5, 2)") + bytes(80),
    "half precision": described("'<f2'", "(5, 2)") + bytes(20),
    "complex": described("'<c16'", "(5, 2)") + bytes(160),
    "shape of texts": described("'<f8'", "('a',)"),
    "shape of floats": described("'<f8'", "(5.0, 2)") + bytes(80),
    "negative shape": described("'<f8'", "(-5, -2)") + bytes(80),
    "huge shape": described("'<f8'", "(10000000000000000,)", 2),
    "larger than memory": described("'<f8'", "(100000000000, 2)"),
    "many digits": described("'<f8'", "(" + "9" * 2000 + ",)"),
    "another shape": described("'<f8'", "(2, 5)") + bytes(80),
    "too few bytes": described("'<f8'", "(5, 2)") + bytes(79),
    "too many bytes": described("'<f8'", "(5, 2)") + bytes(81),
    "not a number": described("'<f8'", "(5, 2)") + np.full(10, np.nan).tobytes(),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bytes_that_are_no_product_count_as_a_straggler(data: bytes) -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content.get(ANSWER)
        if worker == 1 and record is not None:
            record["answer"] = Array("float64", (5, 2), "numpy.ndarray", data)
        return reply

    a, b = operands(np.float64, shape=(10, 7, 4))
    with InProcessGrid(worker_app(), 6, tamper=tamper) as grid:
        matrix = CodedMatrix(grid, a, polynomial(6, 2, 2))
        assert np.abs(matrix.multiply(b) - a @ b).max() < 1e-12
    ((worker, reason),) = matrix.reports[0].rejected
    assert worker == 1 and len(reason) <= 220 and reason.isprintable()


@pytest.mark.parametrize(
    "record",
    [
        ConfigRecord({"json": "[" * 100_000}),
        ConfigRecord({"json": "{"}),
        ConfigRecord({"json": "5"}),
        ConfigRecord({"json": "null"}),
        ConfigRecord({"json": '{"matrix": 1, "worker": "x", "product": [], "outcome": {}, "kept": 1}'}),
        ConfigRecord({"json": '{"matrix": "m", "worker": 1e999, "product": 1, "outcome": "product", "kept": true}'}),
        ConfigRecord({"json": b"\xff"}),
        ConfigRecord({"json": [1, 2]}),
        ConfigRecord({}),
        ArrayRecord({"x": Array(GOOD)}),
        None,
    ],
    ids=str,
)
def test_records_that_say_nothing_count_as_a_straggler(record: Any) -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        if worker == 1:
            its: Any = reply.content["fl-gradcode.product"]
            reply.content.pop("fl-gradcode.product")
            if record is not None:
                if isinstance(record, ConfigRecord):
                    for key in ("protocol", "version"):
                        record[key] = its[key]
                reply.content["fl-gradcode.product"] = record
        return reply

    a, b = operands(np.float64, shape=(10, 7, 4))
    with InProcessGrid(worker_app(), 6, tamper=tamper) as grid:
        matrix = CodedMatrix(grid, a, polynomial(6, 2, 2))
        assert np.abs(matrix.multiply(b) - a @ b).max() < 1e-12
        assert matrix.place() != ()  # the same records, when a matrix is placed
    ((worker, reason),) = matrix.reports[0].rejected
    assert worker == 1 and len(reason) <= 220 and reason.isprintable()


def test_elements_outside_the_field_count_as_a_straggler() -> None:
    code = polynomial(6, 2, 2, numbers=PrimeField(0))
    a, b = (np.rint(10 * x).astype(np.int64) for x in operands(np.float64))
    with InProcessGrid(worker_app(), 6, tamper=spoilt(lambda w, x: x + np.uint32(P), 1)) as grid:
        matrix = CodedMatrix(grid, a, code)
        assert (matrix.multiply(b) == a @ b).all()
    assert matrix.reports[0].rejected[0][0] == 1


def test_too_many_liars_end_it_with_one_sentence() -> None:
    a, b = operands(np.float64)
    noise = np.random.default_rng(5)
    with (
        InProcessGrid(worker_app(), 8, tamper=spoilt(lambda w, x: x + noise.random(x.shape), 0, 1, 2, 3)) as grid,
        pytest.raises(RoundFailed, match="disagree with each other"),
    ):
        CodedMatrix(grid, a, polynomial(8, 2, 2), extra=1).multiply(b)
