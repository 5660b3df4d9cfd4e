"""The server half of coded products: it places blocks on nodes, multiplies, and stops at the k-th usable answer."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Array, Message
from flwr.serverapp import Grid
from numpy.typing import ArrayLike, NDArray

from ..codes import Reals
from ..errors import InvalidSetting, RoundFailed
from ..grid import SETTLED, EarlyStopGrid, Wait, poll_nodes
from ..protocol import as_array
from .answer_check import AnswerCheck, gram_of
from .product_code import ProductCode
from .records import QUERY, Task
from .scales import Scales
from .stop_rule import PlacingRule, ProductRule

__all__ = ["CodedMatrix", "Nodes", "ProductReport", "coded_matmul"]

_log = logging.getLogger(__name__)


class Nodes:
    """The mapping of nodes to workers for one matrix.

    Worker i is the node that a virtual or in-process grid knows as worker i. On other grids, nodes are numbered by
    their ids, in an arbitrary order. A new node takes over the number of a node that is gone.
    """

    def __init__(self, grid: EarlyStopGrid, n: int) -> None:
        self._grid, self._n = grid, n
        self.worker: dict[int, int] = {}
        #: Nodes that have reported that they hold their block.
        self.holding: set[int] = set()
        #: Label of the phase -> nodes that were sent their block in it.
        self.sent: dict[str, set[int]] = {}

    def present(self, wanted: int, least: int, timeout: float) -> dict[int, int]:
        """Returns node -> worker of the online nodes, after waiting up to `timeout` seconds for `wanted` of them.

        Raises:
            RoundFailed: Fewer than `least` nodes are online.
        """
        source = self._grid.source
        online = sorted(
            poll_nodes(
                self._grid,
                timeout if source.late_nodes else 0.0,
                f"{wanted} nodes",
                lambda nodes: len(nodes) >= wanted,
                settled=SETTLED if source.fixed_nodes else math.inf,
            )
        )
        if len(online) < least:
            raise RoundFailed(
                f"{len(online)} nodes are online after {timeout:g} s; the product needs {least} answers. Start more "
                "nodes, or build the code for fewer."
            )
        if len(online) < wanted:
            _log.warning("Going on with %d of %d nodes; the others count as stragglers.", len(online), wanted)
        self._number(online)
        return dict(sorted(self.worker.items(), key=lambda pair: pair[1]))

    def learn(self, wait: Wait, holding: Collection[int]) -> None:
        """Record which nodes hold their block, from the answers of a phase and late answers to earlier phases."""
        self.holding.update(holding)
        for late in wait.late:
            if late.node in self.sent.get(late.label, ()) and late.node in self.worker and late.rejection is None:
                self.holding.add(late.node)

    def _number(self, online: list[int]) -> None:
        listed = set(online)
        self.worker = {node: worker for node, worker in self.worker.items() if node in listed}
        self.holding &= listed
        free = [i for i in range(self._n) if i not in set(self.worker.values())]
        new = [node for node in online if node not in self.worker]
        known = self._grid.source.known_workers() if free and new else {}
        for node in new:
            if known.get(node) in free:
                self.worker[node] = known[node]
                free.remove(known[node])
        self.worker.update(zip([node for node in new if node not in self.worker], free, strict=False))


@dataclass(frozen=True)
class ProductReport:
    """The report of one product.

    Attributes:
        product: Number of the product, from 1.
        used: Workers whose answers were used for decoding, in order of arrival.
        stragglers: Workers without an answer, because they are too slow or absent.
        rejected: (worker, reason) of answers that were not used, because they are errors or wrong.
        late: Workers whose answer to an earlier phase arrived during this one, and was dropped.
        unchecked: Workers whose answers `extra` was meant to check, but of whose errors the check saw too little,
            although all answers that came were used. Empty if `extra` is 0.
        error_bound: Most by which an entry of the product differs from A @ B if at most one of the used answers is
            wrong, whatever it contains; see `coded_matmul`.
        condition: Condition number of the decoding; see `ProductCode.condition`.
        waiting: Seconds of waiting in the grid's time, which is virtual on a virtual grid.
        decoding: Real seconds of decoding.
        bytes_down: Bytes of payload that were sent.
        bytes_up: Bytes of payload in the answers that were read.
    """

    product: int
    used: tuple[int, ...]
    stragglers: tuple[int, ...]
    rejected: tuple[tuple[int, str], ...]
    late: tuple[int, ...]
    unchecked: tuple[int, ...]
    error_bound: float
    condition: float
    waiting: float
    decoding: float
    bytes_down: int
    bytes_up: int


def coded_matmul(
    grid: Grid,
    A: ArrayLike,
    B: ArrayLike,
    code: ProductCode,
    *,
    timeout: float | None = 3600.0,
    extra: int = 0,
    node_timeout: float = 60.0,
    server_round: int = 1,
    rng: np.random.Generator | None = None,
) -> NDArray[Any]:
    """Returns A @ B, computed by the nodes of a grid, of which any k of n answers are enough.

    Call it in the ServerApp. The ClientApp must register `coded_matmul_worker`.

        C = coded_matmul(grid, A, B, polynomial(20, 4, 4))

    Flower cannot cancel work, so a node whose answer was not needed keeps computing. For several products, pass the
    same `EarlyStopGrid`, which sends such a node nothing until it is free, or use a `CodedMatrix`.

    Wrong answers: an answer that cannot be read, is not finite, or is larger than any product of the blocks that were
    sent counts as a straggler. With `extra` answers, one that is accepted although it is wrong changes no block of the
    product by more than 1e-6 in float64, or 1e-2 in float32, of the norms of A's blocks times those of B's that make up
    the largest block (Frobenius norms, rows and columns scaled as below). How much of an error the check sees differs
    between workers. Where it sees too little, more answers are waited for, and if none come, `ProductReport.unchecked`
    names the workers, and a line is logged. `ProductReport.error_bound` is the bound of the product at hand, entry by
    entry, with rounding errors. Without `extra` only an answer's size limits what it can change. Two wrong answers that
    conspire are found with `extra=4`.

    Scales: over the reals, rows of A and columns of B whose sizes differ by more than a factor of 16 are scaled to
    about 1 before they are coded. So are the columns of A, with the rows of B inversely, if the code divides the inner
    dimension. Otherwise the rounding errors of large rows would enter small ones. The factors are powers of two, and
    are undone exactly.

    Args:
        grid: The engine's grid, a `VirtualGrid` or an `EarlyStopGrid`.
        A: Left matrix, shape (rows, inner).
        B: Right matrix or vector, shape (inner, columns) or (inner,).
        code: The code, made by a function of `fl_gradcode.matmul`.
        timeout: Seconds to wait for answers; None to wait as long as any node may still answer.
        extra: Number of answers beyond k to wait for, which are used to check all answers. With 1, a wrong answer is
            detected and the wait goes on. With 2, its sender is identified and left out. An error that is hardly larger
            than rounding may be put down to another worker; the product is within the same bound then.
        node_timeout: Seconds to wait for n nodes; after that, k + extra nodes are enough.
        server_round: The round that the product belongs to, by which a virtual grid draws latencies.
        rng: Draws the random projections of the check over a field.

    Returns:
        The product, shape (rows, columns) or (rows,), float32 if A and B are, else float64. Over a field it is int64,
        or float64 if A or B contains floats.

    Raises:
        RoundFailed: There are too few usable answers, or the answers disagree until the end. The message says why.
        InvalidCode: A and B do not fit each other or the code.
        Overflow: The product might not fit the code's field, or an entry of it does not fit the dtype.
    """
    a, b = (np.asarray(x) for x in (A, B))
    if a.dtype == np.float32 != b.dtype:
        a = a.astype(np.float64)
    matrix = CodedMatrix(grid, a, code, timeout=timeout, extra=extra, node_timeout=node_timeout, rng=rng, keep=False)
    try:
        return matrix.multiply(b, server_round=server_round)
    finally:
        if matrix.grid is not grid:
            matrix.grid.close()


class CodedMatrix:
    """A matrix A whose coded blocks are stored on the nodes, so that it can be multiplied by many matrices B.

        matrix = CodedMatrix(grid, X, mds_product(12, 9))
        for _ in range(100):
            y = matrix.multiply(w)

    A node gets its block with the first product that it takes part in, or by `place`, and keeps it. The block is sent
    again only to a node that has lost it, or to a new node that replaces another one.

    Args:
        grid, A, code, timeout, extra, node_timeout, rng: See `coded_matmul`. Products have the precision of A.
        keep: Whether nodes keep their blocks.

    Attributes:
        reports: A `ProductReport` for each product.
        grid: The `EarlyStopGrid`; use it for other work on the same nodes too.
    """

    def __init__(
        self,
        grid: Grid,
        A: ArrayLike,
        code: ProductCode,
        *,
        timeout: float | None = 3600.0,
        extra: int = 0,
        node_timeout: float = 60.0,
        rng: np.random.Generator | None = None,
        keep: bool = True,
    ) -> None:
        spare = code.n - code.k
        if type(extra) is not int or not 0 <= extra <= spare:
            raise InvalidSetting(
                f"extra={extra!r}: {code.n} workers give {spare} answers beyond k={code.k}; choose 0 to {spare}."
            )
        for name, value in (("timeout", timeout), ("node_timeout", node_timeout)):
            if value is not None and not value >= 0:
                raise InvalidSetting(f"{name}={value} must be a number of seconds of at least 0.")
        self.code, self.timeout, self.extra, self.node_timeout = code, timeout, extra, node_timeout
        a = code.operand(A, "A")
        real = isinstance(code.numbers, Reals)
        self._scales = Scales.of(a, inner=code.partition[1] > 1) if real else None  # whole numbers lose no digits
        self._a = a if self._scales is None else self._scales.left(a)
        self._gram = gram_of(self._a, *code.partition[:2]) if real else np.zeros((0, 0))
        self._kind = np.zeros(0, np.asarray(A).dtype)  # keeps A's dtype, which decides the fraction bits of products
        self.grid = grid if isinstance(grid, EarlyStopGrid) else EarlyStopGrid(grid)
        self.reports: list[ProductReport] = []
        self._name, self._keep = uuid.uuid4().hex, keep
        self._rng = np.random.default_rng() if rng is None else rng
        self._nodes = Nodes(self.grid, code.n)
        self._products = 0
        self._warned = False

    def place(self) -> tuple[int, ...]:
        """Send every node its block and wait for all of them; returns the workers that hold their blocks, ascending."""
        workers = self._present()
        label = f"placing {self._name}"
        tasks = {
            node: Task(self._name, worker, 0) for node, worker in workers.items() if node not in self._nodes.holding
        }
        self._phase(label, tasks, self.timeout, lambda node: self._message(label, node, tasks[node], place=True))
        return tuple(sorted(workers[node] for node in self._nodes.holding))

    def release(self, *, timeout: float = 0.0) -> None:
        """Tell the nodes to forget their blocks, and wait up to `timeout` seconds for them to do so.

        There is no need to call it before the run ends. A node that still owes an answer gets the message only if that
        answer arrives in time.
        """
        given = set().union(self._nodes.holding, *self._nodes.sent.values())
        tasks = {
            node: Task(self._name, worker, 0, keep=False, release=True)
            for node, worker in self._nodes.worker.items()
            if node in given
        }
        label = f"releasing {self._name}"
        self._phase(label, tasks, timeout, lambda node: self._message(label, node, tasks[node]))
        self._nodes.holding.clear()
        self._nodes.sent.clear()

    def multiply(self, B: ArrayLike, *, server_round: int | None = None) -> NDArray[Any]:
        """Returns A @ B; see `coded_matmul`.

        Args:
            B: Right matrix or vector, shape (inner, columns) or (inner,).
            server_round: The round that the product belongs to; by default the number of the product.

        Raises:
            RoundFailed: There are too few usable answers, or the answers disagree until the end.
            InvalidCode: B does not fit A.
            Overflow: The product might not fit the code's field.
        """
        b = self.code.operand(B, "B").astype(self._a.dtype, copy=False)
        self.code.check_fit(self._a, b)
        columns = np.zeros(b.shape[1], np.int64)
        if self._scales is not None:
            b, columns = self._scales.right(b)
        workers = self._present()
        self._products += 1
        check = self._check_of(b)
        rule, messages = self._ask(b, workers, server_round, check)
        self.grid.expect(rule)
        self.grid.send_and_receive(messages, timeout=self.timeout)
        self._nodes.learn(rule.wait, rule.holding)
        if not rule.decided:
            raise RoundFailed(rule.failure())
        started = time.perf_counter()
        bits = self.code.fraction_bits(self._kind, B)
        whole = (len(self._a), b.shape[1])
        product = self.code.decode([*rule.answers.values()], rule.answers, shape=whole, fraction_bits=bits)
        if self._scales is not None:
            product = self._scales.undone(product, columns)
        decoding = time.perf_counter() - started
        bound = self._error_bound(rule, check, columns)
        self.reports.append(self._report(rule, workers, decoding, bound))
        return product.reshape(len(self._a), *np.shape(B)[1:])

    def _check_of(self, b: NDArray[Any]) -> AnswerCheck:
        _, m, q = self.code.partition
        dtype = self.code.answer_type(self._a, b)[1]
        gram = gram_of(b, m, q) if self._scales is not None else self._gram
        return AnswerCheck(self.code, self._gram, gram, -(-b.shape[0] // m), dtype, self._rng)

    def _error_bound(self, rule: ProductRule, check: AnswerCheck, columns: NDArray[np.int64]) -> float:
        """Returns the most by which an entry can be off if one used answer is wrong; warns once if digits are lost."""
        used = list(rule.answers)
        coefficients = self.code.coefficients(used)
        rest = 0.0 if rule.finding is None else rule.finding.rest
        blocks = check.honest(used, coefficients) + check.unseen(used, coefficients, rest).max(axis=0)
        if self._scales is None:
            return float(blocks.max())
        lost = check.amplified(used, coefficients)
        if lost > check.most_amplified and not self._warned:
            self._warned = True
            _log.warning(
                "Product %d may have lost %.0f of its digits to rounding: the answers that came amplify it by up to "
                "%.1g. The code is badly conditioned, or the rows of B differ too much in size for a code that divides "
                "the inner dimension.",
                self._products,
                math.log10(lost),
                lost,
            )
        p, _, q = self.code.partition
        return float((blocks * self._scales.largest(columns, p, q)).max())

    def _present(self) -> dict[int, int]:
        least = self.code.k + self.extra
        wanted = self.code.n if not self._nodes.worker else least
        return self._nodes.present(wanted, least, self.node_timeout)

    def _ask(
        self, b: NDArray[Any], workers: Mapping[int, int], server_round: int | None, check: AnswerCheck
    ) -> tuple[ProductRule, list[Message]]:
        code, number = self.code, self._products
        label = f"product {number} of {self._name}"
        shape, dtype = code.answer_type(self._a, b)
        task = Task(
            self._name,
            0,
            number,
            keep=self._keep,
            round=number if server_round is None else server_round,
        )
        work, answer_bytes = code.work * code.n, shape[0] * shape[1] * dtype.itemsize
        blocks = code.right_blocks(b, workers.values())
        # If B is sent without coding, all messages share one array.
        rights = [as_array(blocks[0])] * len(blocks) if code.right_is_whole else [as_array(coded) for coded in blocks]
        sent = dict(zip(workers, rights, strict=True))

        def message(node: int, place: bool) -> Message:
            mine = replace(task, worker=workers[node])
            return self._message(label, node, mine, place=place, right=sent[node], work=work, answer_bytes=answer_bytes)

        rule = ProductRule(
            label,
            self._name,
            number,
            workers,
            code=code,
            shape=shape,
            dtype=dtype,
            extra=self.extra,
            resend=lambda node: message(node, True),
            check=check,
        )
        return rule, [message(node, node not in self._nodes.holding) for node in workers]

    def _message(
        self,
        label: str,
        node: int,
        task: Task,
        *,
        place: bool = False,
        right: Array | None = None,
        work: float = 0.0,
        answer_bytes: int = 0,
    ) -> Message:
        blocks = {} if right is None else {"right": right}
        if place:
            self._nodes.sent.setdefault(label, set()).add(node)
            blocks["left"] = as_array(self.code.left_blocks(self._a, [task.worker])[0])
        return Message(
            task.content(work=work, answer_bytes=answer_bytes, **blocks),
            dst_node_id=node,
            message_type=f"query.{QUERY}",
        )

    def _phase(
        self, label: str, tasks: Mapping[int, Task], timeout: float | None, message: Callable[[int], Message]
    ) -> None:
        rule = PlacingRule(label, self._name, 0, {node: task.worker for node, task in tasks.items()})
        self.grid.expect(rule)
        self.grid.send_and_receive([message(node) for node in tasks], timeout=timeout)
        self._nodes.learn(rule.wait, rule.holding)

    def _report(
        self, rule: ProductRule, workers: Mapping[int, int], decoding: float, error_bound: float
    ) -> ProductReport:
        used, rejected, wait = tuple(rule.answers), tuple(rule.rejected), rule.wait
        heard = {*used, *(worker for worker, _ in rejected)}
        return ProductReport(
            self._products,
            used,
            tuple(i for i in range(self.code.n) if i not in heard),
            rejected,
            tuple(workers[late.node] for late in wait.late if late.node in workers),
            rule.unchecked,
            error_bound,
            self.code.condition(used),
            wait.seconds,
            decoding,
            wait.bytes_down,
            wait.bytes_up,
        )
