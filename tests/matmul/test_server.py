"""Coded products on Flower: the k-th usable answer ends them, blocks are placed once, and nothing else counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fl_gradcode import EarlyStopGrid, VirtualGrid
from fl_gradcode.codes.prime_field import PrimeField
from fl_gradcode.errors import InvalidCode, InvalidSetting, Overflow, RoundFailed
from fl_gradcode.grid.arrivals import Arrival
from fl_gradcode.latency import Latency, Law, constant, exponential, pareto, replay
from fl_gradcode.matmul import (
    CodedMatrix,
    ProductCode,
    coded_matmul,
    coded_matmul_worker,
    entangled,
    matdot,
    mds_product,
    polynomial,
    uncoded_product,
)
from fl_gradcode.matmul.answer_check import AnswerCheck, gram_of
from fl_gradcode.matmul.records import Answer, Task, block
from fl_gradcode.matmul.stop_rule import ProductRule
from fl_gradcode.protocol.cost import Cost
from fl_gradcode.protocol.packing import as_array
from fl_gradcode.testing import InProcessGrid, inside_a_run

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((9, 7)), RNG.standard_normal((7, 5))
WHOLE = RNG.integers(-99, 99, (9, 7)), RNG.integers(-99, 99, (7, 5))
CODES: list[ProductCode] = [
    mds_product(8, 5),
    polynomial(8, 2, 3),
    matdot(8, 3),
    matdot(8, 3, basis="roots"),
    entangled(12, 2, 2, 2),
    uncoded_product(2, 3),
    *(make(*sizes, numbers=PrimeField(0)) for make, sizes in ((polynomial, (8, 2, 3)), (matdot, (8, 3)))),
]


def worker_app() -> ClientApp:
    app = ClientApp()
    app.query("matmul")(coded_matmul_worker)
    return app


def grid_of(n: int, tamper: Callable[[int, Message, Message], Message] | None = None) -> InProcessGrid:
    return InProcessGrid(worker_app(), n, tamper=tamper)


def error(message: Message, reason: str = "out of disk") -> Message:
    return Message(Error(2, f"RuntimeError: {reason}"), reply_to=message)


def changed(message: Message, reply: Message, change: Callable[[np.ndarray], np.ndarray], **answer: Any) -> Message:
    """The same answer with another product in it, or saying something else."""
    said = Answer.find_in(reply.content)
    sent = block(reply.content, "answer")
    assert sent is not None
    values = {**vars(said), **answer}
    return Message(Answer(**values).content(answer=as_array(change(sent.numpy()))), reply_to=message)


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_the_product_is_numpys(code: ProductCode) -> None:
    a, b = (A, B) if code.numbers.name == "reals" else WHOLE
    with grid_of(code.n) as grid:
        for right in (b, b[:, 0]):
            product = coded_matmul(grid, a, right, code)
            assert product.shape == (a @ right).shape
            assert np.abs(product - a @ right).max() < 1e-10


def test_precision_is_that_of_both_and_whole_numbers_stay_whole() -> None:
    with grid_of(6) as grid:
        for a, b, dtype in ((np.float32, np.float32, np.float32), (np.float32, np.float64, np.float64)):
            assert coded_matmul(grid, A.astype(a), B.astype(b), polynomial(6, 2, 2)).dtype == dtype
        product = coded_matmul(grid, *WHOLE, polynomial(6, 2, 2, numbers=PrimeField(0)))
        assert product.dtype == np.int64
        bits = PrimeField(8)
        product = coded_matmul(grid, A, B, polynomial(6, 2, 2, numbers=bits))
        assert (product == np.rint(A * 256) @ np.rint(B * 256) / 65536).all()
        product = coded_matmul(grid, A, WHOLE[1], polynomial(6, 2, 2, numbers=bits))
        assert (product == np.rint(A * 256) @ WHOLE[1] / 256).all()


# Stragglers, errors, wrong answers


def test_stops_at_the_kth_answer_and_never_reads_more() -> None:
    with grid_of(8) as grid:
        virtual = VirtualGrid(grid, Latency(compute=replay(np.arange(1.0, 9)[None])))
        matrix = CodedMatrix(virtual, A, polynomial(8, 2, 3))
        assert np.abs(matrix.multiply(B) - A @ B).max() < 1e-12
        (report,) = matrix.reports
    assert report.used == (0, 1, 2, 3, 4, 5)
    assert report.stragglers == (6, 7)
    assert report.waiting == pytest.approx(6 * 8 / 6)  # the sixth; a worker has a sixth of the work, not an eighth
    assert sum(grid.calls) == 6


@pytest.mark.parametrize("missing", list(itertools.combinations(range(6), 2)))
def test_any_two_of_six_may_fail(missing: tuple[int, int]) -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        return error(message) if worker in missing else reply

    with grid_of(6, tamper) as grid:
        assert np.abs(coded_matmul(grid, A, B, polynomial(6, 2, 2)) - A @ B).max() < 1e-12


def test_one_failure_too_many_ends_it_with_the_reasons() -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        return error(message) if worker < 3 else reply

    with grid_of(6, tamper) as grid, pytest.raises(RoundFailed, match="3 usable answers came, .* needs 4; .*worker 0: .*out of disk"):  # fmt: skip  # noqa: E501
        coded_matmul(grid, A, B, polynomial(6, 2, 2))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda x: x * np.nan, "not finite"),
        (lambda x: x[:-1], "has shape"),
        (lambda x: x.astype(np.float32), "float32"),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_straggler(spoil: Callable[[Any], Any], reason: str) -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        return changed(message, reply, spoil) if worker == 1 else reply

    with grid_of(6, tamper) as grid:
        matrix = CodedMatrix(grid, A, polynomial(6, 2, 2))
        assert np.abs(matrix.multiply(B) - A @ B).max() < 1e-12
        ((worker, why),) = matrix.reports[0].rejected
        assert worker == 1 and reason in why
        assert 1 not in matrix.reports[0].used


@pytest.mark.parametrize("numbers", [None, PrimeField(0)], ids=["reals", "field"])
def test_a_wrong_answer_is_found_with_two_to_check_by(numbers: PrimeField | None) -> None:
    code = polynomial(8, 2, 2) if numbers is None else polynomial(8, 2, 2, numbers=numbers)

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        return changed(message, reply, lambda x: x + x.dtype.type(1)) if worker == wrong else reply

    for wrong, extra in itertools.product(range(8), (1, 2)):
        with grid_of(8, tamper) as grid:
            matrix = CodedMatrix(grid, WHOLE[0], code, extra=extra)
            assert np.abs(matrix.multiply(WHOLE[1]) - WHOLE[0] @ WHOLE[1]).max() < 1e-8
            report = matrix.reports[0]
            # With one extra answer the sixth is needed to tell who it was.
            assert wrong not in report.used
            assert [worker for worker, _ in report.rejected] in ([], [wrong])


def rule_of(code: ProductCode, answers: list[np.ndarray], **options: Any) -> ProductRule:
    settings: dict[str, Any] = {"extra": 0, "resend": lambda node: pytest.fail("nobody lost a block")}
    p, m, q = code.partition
    settings["check"] = AnswerCheck(code, gram_of(A, p, m), gram_of(B, m, q), -(-7 // m), answers[0].dtype, RNG)
    settings |= {"code": code, "shape": answers[0].shape, "dtype": answers[0].dtype, **options}
    return ProductRule("product 1", "m", 1, {100 + i: i for i in range(code.n)}, **settings)


def test_answers_read_together_with_the_kth_have_to_agree_with_it() -> None:
    # A real grid brings what has come in one batch: what is beyond k is a check that costs nothing.
    code = polynomial(7, 2, 2)
    answers = [code.multiply(left, right) for left, right in zip(*code.encode(A, B), strict=True)]
    rule = rule_of(code, answers)
    states = []
    with inside_a_run():
        for i, answer in enumerate(answers):
            sent = answer + 1.0 if i == 4 else answer
            content = Answer("m", i, 1, "product", True).content(answer=as_array(sent))
            reply = Message(content, dst_node_id=100 + i, message_type="query.matmul")
            rule.offer(Arrival("", 100 + i, 0.0), reply, 0.0)
            states.append(rule.decided)
    assert states == [False, False, False, True, False, True, True]
    assert [worker for worker, _ in rule.rejected] == [4]


def test_gives_up_as_soon_as_too_few_can_still_answer() -> None:
    rule = rule_of(polynomial(7, 2, 2), [np.zeros((2, 2))], extra=2)
    assert not rule.hopeless([100, 101, 102, 103, 104, 105])
    rule.offer(Arrival("", 106, 0.0, failure="gone"), None, 0.0)
    assert rule.hopeless([100, 101, 102, 103, 104])
    assert rule.rejected == [(6, "gone")]


def test_wrong_answers_that_cannot_be_told_apart_end_it() -> None:
    def tamper(worker: int, message: Message, reply: Message) -> Message:
        return changed(message, reply, lambda x: x + 1.0 + worker) if worker in (1, 2) else reply

    with grid_of(6, tamper) as grid, pytest.raises(RoundFailed, match="6 answers that came disagree"):
        coded_matmul(grid, A, B, polynomial(6, 2, 2), extra=1)


def test_an_answer_to_another_product_or_matrix_or_as_another_worker_never_counts() -> None:
    for lie in ({"product": 7}, {"matrix": "other"}, {"worker": 2}):

        def tamper(worker: int, message: Message, reply: Message, lie: Any = lie) -> Message:
            return changed(message, reply, lambda x: x, **lie) if worker == 1 else reply

        with grid_of(6, tamper) as grid:
            matrix = CodedMatrix(grid, A, polynomial(6, 2, 2), extra=1)
            assert np.abs(matrix.multiply(B) - A @ B).max() < 1e-12
            assert "it answers product" in matrix.reports[0].rejected[0][1]


def test_a_node_that_answers_twice_counts_once() -> None:
    class Twice(InProcessGrid):
        """Reports every message twice."""

        def __init__(self) -> None:
            super().__init__(worker_app(), 6)
            self.again: list[Arrival] = []

        def next_arrival(self, deadline: float | None) -> Arrival | None:
            if self.again:
                return self.again.pop()
            arrival = super().next_arrival(deadline)
            self.again += [] if arrival is None else [arrival]
            return arrival

    with Twice() as grid:
        matrix = CodedMatrix(grid, A, polynomial(6, 2, 2))
        assert np.abs(matrix.multiply(B) - A @ B).max() < 1e-12
        assert len(set(matrix.reports[0].used)) == 4


# Many products with one matrix


def test_blocks_are_placed_once_and_reused() -> None:
    with grid_of(6) as grid:
        matrix = CodedMatrix(grid, A, polynomial(6, 2, 2))
        assert matrix.place() == (0, 1, 2, 3, 4, 5)
        for _ in range(3):
            b = RNG.standard_normal((7, 5))
            assert np.abs(matrix.multiply(b) - A @ b).max() < 1e-12
        down = [report.bytes_down for report in matrix.reports]
        with_blocks = CodedMatrix(grid, A, polynomial(6, 2, 2))
        with_blocks.multiply(B)
        # Half of A for each of six nodes, and a header of 128 bytes: that is what the first product takes more.
        assert with_blocks.reports[0].bytes_down - down[0] == pytest.approx(6 * (5 * 7 * 8 + 128), abs=6)
        assert max(down) - min(down) <= 6
        states = [context.state for context in grid._contexts.values()]
        assert all(len(state) >= 1 for state in states)
        matrix.release(timeout=1.0)
        assert all(len(state) <= 1 for state in states)


def test_a_node_that_lost_its_block_says_so_and_is_sent_it_again() -> None:
    with grid_of(5) as grid:
        matrix = CodedMatrix(grid, A, polynomial(5, 2, 2))
        matrix.place()
        for context in grid._contexts.values():
            context.state.clear()  # all were restarted
        assert np.abs(matrix.multiply(B) - A @ B).max() < 1e-12
        matrix.multiply(B)
        first, second = matrix.reports
        assert first.rejected == () and second.bytes_down < first.bytes_down


def test_a_returning_node_with_another_worker_s_block_is_not_believed() -> None:
    with grid_of(5) as grid:
        matrix = CodedMatrix(grid, A, polynomial(5, 2, 2))
        matrix.place()
        one, other = [grid._contexts[node].state for node in sorted(grid._worker, key=grid._worker.__getitem__)[:2]]
        one_blocks, other_blocks = dict(one), dict(other)
        one.clear()
        other.clear()
        one.update(other_blocks)
        other.update(one_blocks)
        assert np.abs(matrix.multiply(B) - A @ B).max() < 1e-12


def test_another_node_takes_over_the_number_of_one_that_is_gone() -> None:
    class Changing(InProcessGrid):
        gone: frozenset[int] = frozenset()

        def get_node_ids(self) -> list[int]:
            return [node for node in super().get_node_ids() if self._worker[node] not in self.gone]

        def known_workers(self) -> dict[int, int]:
            return {}

    grid = Changing(worker_app(), 7)
    with grid:
        grid.gone = frozenset({5, 6})
        matrix = CodedMatrix(grid, A, polynomial(5, 2, 2), node_timeout=0.0)
        matrix.place()
        grid.gone = frozenset({0, 1, 2})
        assert np.abs(matrix.multiply(B) - A @ B).max() < 1e-12
        assert grid.calls[5] + grid.calls[6] == 2
        assert matrix.place() == (0, 1, 3, 4)  # the worker whose node is gone is not among them
        grid.gone = frozenset({0, 1, 2, 3})
        with pytest.raises(RoundFailed, match="3 nodes are online after 0 s; the product needs 4 answers"):
            matrix.multiply(B)


def test_late_answers_are_dropped_and_free_their_node() -> None:
    # Worker 0 needs 10 s for the first product and 1 s afterwards, all others 1 s.
    table = np.ones((40, 5))
    table[0, 0] = 10.0
    with grid_of(5) as grid:
        virtual = VirtualGrid(grid, Latency(fixed=replay(table)))
        matrix = CodedMatrix(virtual, A, polynomial(5, 2, 2))
        for number in range(14):
            assert np.abs(matrix.multiply((number + 1) * B) - (number + 1) * (A @ B)).max() < 1e-9
            assert matrix.reports[-1].waiting == pytest.approx(1.0)
        late = [report.product for report in matrix.reports if report.late]
        assert late and all(0 not in report.used for report in matrix.reports[: late[0] - 1])
        # It held its block though its answer came too late: nothing is sent again.
        before = len(virtual.jobs)
        assert matrix.place() == (0, 1, 2, 3, 4) and len(virtual.jobs) == before
        downs = [report.bytes_down for report in matrix.reports]
        assert downs[-1] <= downs[0]


def test_two_matrices_share_the_nodes_and_never_mix() -> None:
    with grid_of(6) as grid:
        virtual = VirtualGrid(grid, Latency(fixed=exponential(1.0)), seed=3)
        stop = EarlyStopGrid(virtual)
        one, other = CodedMatrix(stop, A, polynomial(6, 2, 2)), CodedMatrix(stop, 2 * A, mds_product(6, 3))
        for _ in range(10):
            assert np.abs(one.multiply(B) - A @ B).max() < 1e-10
            assert np.abs(other.multiply(B) - 2 * A @ B).max() < 1e-10


# Virtual time


@pytest.mark.parametrize(
    ("code", "load"),
    [(polynomial(8, 2, 3), 8 / 6), (mds_product(8, 5), 8 / 5), (matdot(8, 3), 8 / 3), (uncoded_product(2, 4), 1.0)],
    ids=repr,
)
def test_a_worker_is_charged_for_its_share_of_the_work(code: ProductCode, load: float) -> None:
    with grid_of(8) as grid:
        virtual = VirtualGrid(grid, Latency(fixed=0.25, compute=constant(2.0)))
        matrix = CodedMatrix(virtual, A, code)
        matrix.place()
        assert virtual.now() == pytest.approx(0.25)  # placing computes nothing
        matrix.multiply(B)
        assert matrix.reports[0].waiting == pytest.approx(0.25 + 2 * load)


def test_transfer_is_charged_for_what_travels() -> None:
    code = polynomial(8, 2, 3)
    with grid_of(8) as grid:
        virtual = VirtualGrid(grid, Latency(transfer=1000.0))
        matrix = CodedMatrix(virtual, A, code)
        matrix.place()
        before = len(virtual.jobs)
        matrix.multiply(B)
        report = matrix.reports[0]
        assert sum(job.megabytes_down for job in virtual.jobs[before:]) * 1e6 == pytest.approx(report.bytes_down)
        (up,) = {job.megabytes_up for job in virtual.jobs[before:]}
        assert up * 1e6 == 5 * 2 * 8  # ceil(9 / 2) x ceil(5 / 3) float64


@pytest.mark.parametrize("law", [pareto(1.5, 0.5)], ids=["heavy tail"])
def test_with_4_stragglers_of_20_it_is_twice_as_fast_as_uncoded(law: Law) -> None:
    means = []
    for code in (uncoded_product(4, 5), polynomial(20, 4, 4)):
        with grid_of(20) as grid:
            virtual = VirtualGrid(grid, Latency(fixed=0.2, compute=0.8, slowdown=law))
            matrix = CodedMatrix(virtual, A, code, timeout=None)
            for _ in range(40):
                matrix.multiply(B)
            means.append(np.mean([report.waiting for report in matrix.reports]))
    assert means[0] >= 2 * means[1]


# Bad input


def test_bad_settings_get_one_sentence() -> None:
    code = polynomial(6, 2, 2)
    with grid_of(6) as grid:
        for extra in (-1, 3, 1.0):
            with pytest.raises(InvalidSetting, match="6 workers give 2 answers beyond k=4; choose 0 to 2"):
                coded_matmul(grid, A, B, code, extra=extra)  # type: ignore[arg-type]
        with pytest.raises(InvalidSetting, match="timeout=-1 must be"):
            coded_matmul(grid, A, B, code, timeout=-1)
        with pytest.raises(InvalidCode, match="A has 7 columns and B 9 rows"):
            coded_matmul(grid, A, A, code)
        with pytest.raises(Overflow):
            coded_matmul(grid, A * 1e4, B * 1e4, polynomial(6, 2, 2, numbers=PrimeField(8)))
        assert sum(grid.calls) == 0


def test_too_few_nodes_and_an_app_without_the_worker_are_said() -> None:
    with grid_of(3) as grid, pytest.raises(RoundFailed, match="3 nodes are online .* needs 4 answers"):
        coded_matmul(grid, A, B, polynomial(6, 2, 2))
    with InProcessGrid(ClientApp(), 6) as grid, pytest.raises(RoundFailed, match="0 usable answers .*query"):
        coded_matmul(grid, A, B, polynomial(6, 2, 2))


def test_the_worker_refuses_what_is_no_product() -> None:
    app = ClientApp()

    @app.query("matmul")
    def matmul(message: Message, context: Context) -> Message:
        message.content.pop("fl-gradcode.product")
        return coded_matmul_worker(message, context)

    with InProcessGrid(app, 4) as grid, pytest.raises(RoundFailed, match="holds no coded product"):
        coded_matmul(grid, A, B, polynomial(4, 2, 2))


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "{}", '{"matrix": 1, "x": 2}', "{"])
def test_a_task_that_cannot_be_read_is_refused_in_one_sentence(text: str) -> None:
    app = ClientApp()

    @app.query("matmul")
    def matmul(message: Message, context: Context) -> Message:
        record: Any = message.content["fl-gradcode.product"]
        record["json"] = text
        return coded_matmul_worker(message, context)

    with InProcessGrid(app, 4) as grid, pytest.raises(RoundFailed, match="The task of a coded product cannot be read"):
        coded_matmul(grid, A, B, polynomial(4, 2, 2))


def test_a_node_of_another_version_refuses_a_product_with_what_to_install() -> None:
    app = ClientApp()

    @app.query("matmul")
    def matmul(message: Message, context: Context) -> Message:
        record: Any = message.content["fl-gradcode.product"]
        record["protocol"] = 1
        return coded_matmul_worker(message, context)

    with InProcessGrid(app, 4) as grid, pytest.raises(RoundFailed, match="Install the same one on the node"):
        coded_matmul(grid, A, B, polynomial(4, 2, 2))


def test_an_answer_of_another_version_is_not_used() -> None:
    def older(worker: int, message: Message, reply: Message) -> Message:
        if worker == 0:
            record: Any = reply.content["fl-gradcode.product"]
            record["protocol"] = 1
        return reply

    with grid_of(6, older) as grid:
        matrix = CodedMatrix(grid, A, polynomial(6, 2, 2), extra=1)
        assert np.abs(matrix.multiply(B) - A @ B).max() < 1e-10
    ((worker, reason),) = matrix.reports[0].rejected
    assert worker == 0 and "protocol 1" in reason


def test_a_task_travels_as_it_is() -> None:
    task = Task("m", 3, 2, keep=False, round=9)
    assert Task.find_in(task.content(right=as_array(B))) == task


@pytest.mark.parametrize(
    ("task", "blocks", "must_run"),
    [
        (Task("m", 3, 2), ("right",), False),
        (Task("m", 3, 2), ("left", "right"), True),
        (Task("m", 3, 2, keep=False), ("left", "right"), False),
        (Task("m", 3, 0, keep=False, release=True), (), True),
    ],
)
def test_a_message_states_what_it_costs(task: Task, blocks: tuple[str, ...], must_run: bool) -> None:
    content = task.content(work=1.25, answer_bytes=80, **{name: as_array(B) for name in blocks})
    assert Cost.find_in(content) == Cost(1.25, 80, must_run)
