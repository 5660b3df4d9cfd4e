"""The stop rules of coded products, which wait for enough answers that agree with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from ..codes import P, matmul_mod, solve_mod
from ..errors import InvalidCode
from ..grid import Arrival, StopRule, Wait
from ..protocol import rejection_of, view
from .product_code import ProductCode
from .records import Answer, block

__all__ = ["PlacingRule", "ProductRule", "disagreement", "project", "suspects", "tolerance"]

_PROJECTIONS = 4
_STANDS_OUT = 0.01


def project(answers: Sequence[NDArray[Any]], rng: np.random.Generator) -> NDArray[Any]:
    """Returns four random linear projections of each answer, the same for all answers, shape (len(answers), 4)."""
    height, width = answers[0].shape
    if answers[0].dtype == np.uint32:
        a, b = (rng.integers(1, P, shape) for shape in ((_PROJECTIONS, height), (width, _PROJECTIONS)))
        rows = [matmul_mod(matmul_mod(a, x.astype(np.int64)), b).diagonal() for x in answers]
        return np.array(rows)
    u, v = rng.standard_normal((_PROJECTIONS, height)), rng.standard_normal((_PROJECTIONS, width))
    return np.array([np.einsum("tj,tj->t", u.astype(x.dtype) @ x, v) for x in answers])


def tolerance(dtype: np.dtype[Any]) -> float:
    """Returns the largest relative disagreement of correct answers: 1e-9, or 1e-4 in float32, or 0 over a field."""
    return 0.0 if dtype == np.uint32 else 1e-4 if dtype == np.float32 else 1e-9


def disagreement(code: ProductCode, numbers: NDArray[Any], workers: Sequence[int]) -> float:
    """Returns the distance of these workers' projected answers from those of any product, relative to their size.

    Over a field, the result is 0 or 1, and a wrong answer is missed with a probability of about 1e-9. Over the reals, a
    wrong answer is missed if its error is below about 1e-9 of the answers' size.

    Args:
        code: The code.
        numbers: The projections, from `project`, shape (len(workers), 4).
        workers: Workers that sent the answers, in the same order.

    Raises:
        InvalidCode: There are only k answers or fewer, which always agree with some product.
    """
    if len(workers) <= code.k:
        raise InvalidCode(f"{len(workers)} answers cannot be checked against each other; more than k={code.k} can.")
    D = code.evaluation.D[list(workers)]
    if D.dtype.kind == "i":
        return float(solve_mod(D, np.asarray(numbers, np.int64)) is None)
    outside = np.linalg.qr(D, mode="complete")[0][:, code.k :].conj().T  # directions that no product can reach
    size = float(np.linalg.norm(numbers))
    return float(np.linalg.norm(outside @ numbers)) / size if size else 0.0


def suspects(code: ProductCode, numbers: NDArray[Any], workers: Sequence[int], limit: float) -> list[int]:
    """Returns the workers without whose answer all others agree.

    If one answer is wrong and there are at least k + 2 answers, its sender is the only suspect. The list is empty if
    there are fewer answers, or if more than one is wrong.
    """
    if len(workers) < code.k + 2:
        return []
    without = {}
    for place, worker in enumerate(workers):
        others = [*workers[:place], *workers[place + 1 :]]
        without[worker] = disagreement(code, np.delete(numbers, place, axis=0), others)
    good = sorted((worker for worker in without if without[worker] <= limit), key=lambda worker: without[worker])
    # An error slightly above the limit may fall below it whichever answer is left out. Leaving out the wrong one gives
    # a much smaller disagreement than the others.
    return good[:1] if len(good) > 1 and without[good[0]] < _STANDS_OUT * without[good[1]] else good


class _Rule(StopRule):
    """Contains the common parts of the rules that wait for a product and for the placement of a matrix.

    Args:
        label: Name of the phase, for people and the ledger.
        matrix: Name of the matrix.
        product: Number of the product.
        workers: Node -> worker of all nodes that are asked.
    """

    def __init__(self, label: str, matrix: str, product: int, workers: Mapping[int, int]) -> None:
        self.label, self.matrix, self.product, self.workers = label, matrix, product, dict(workers)
        #: (worker, reason) of answers that are not used.
        self.rejected: list[tuple[int, str]] = []
        #: Nodes that have reported that they hold their block of A.
        self.holding: set[int] = set()
        self.wait = Wait()

    def finish(self, wait: Wait) -> list[Message]:
        """Keep the record of the wait, and return no messages, because the answers are attributes of the rule."""
        self.wait = wait
        return []

    def read(self, arrival: Arrival, reply: Message | None) -> Answer | None:
        """Returns the node's answer, or None if it cannot be used; the reason is then added to `rejected`."""
        worker = self.workers[arrival.node]
        if reply is None or reply.has_error():
            self.reject(worker, arrival.failure if reply is None else rejection_of(reply).reason)
            return None
        try:
            answer = Answer.find_in(reply.content)
        except ValueError as error:
            self.reject(worker, str(error))
            return None
        if (answer.matrix, answer.worker, answer.product) != (self.matrix, worker, self.product):
            self.reject(
                worker,
                f"it answers product {answer.product} of matrix {answer.matrix} as worker {answer.worker}, asked was "
                f"product {self.product} of matrix {self.matrix}",
            )
            return None
        if answer.kept:
            self.holding.add(arrival.node)
        return answer

    def reject(self, worker: int, reason: str) -> None:
        """Note that a worker's answer is not used, and why."""
        self.rejected.append((worker, reason or "no reason given"))


class PlacingRule(_Rule):
    """Waits until every node that was asked has stored or released its block."""

    @property
    def decided(self) -> bool:
        """Always False, because the grid stops by itself once all nodes have answered."""
        return False

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Record whether the node holds its block."""
        self.read(arrival, reply)


class ProductRule(_Rule):
    """Stops at the k-th usable answer, or at the (k + extra)-th if these answers agree.

    Args:
        label, matrix, product, workers: See `_Rule`.
        code: The code.
        shape: Shape of every answer.
        dtype: Dtype of every answer.
        extra: Number of answers beyond k to wait for, which are used to check all answers.
        resend: Returns the message for a node that has lost its block of A.
        rng: Draws the projections of the check.
    """

    def __init__(
        self,
        label: str,
        matrix: str,
        product: int,
        workers: Mapping[int, int],
        *,
        code: ProductCode,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        extra: int,
        resend: Callable[[int], Message],
        rng: np.random.Generator,
    ) -> None:
        super().__init__(label, matrix, product, workers)
        self.code, self.shape, self.dtype, self._resend = code, shape, dtype, resend
        #: Worker -> its answer, in order of arrival.
        self.answers: dict[int, NDArray[Any]] = {}
        self._decided = False
        self.needed = code.k + extra
        self._seed = int(rng.integers(2**63))
        self._again: set[int] = set()  # nodes that get their block again as soon as they are free
        self._resent: set[int] = set()

    @property
    def decided(self) -> bool:
        """Whether there are enough answers, and they agree."""
        return self._decided

    def next_message(self, node: int, held: Message | None, now: float) -> Message | None:
        """Returns the node's message, or a second one with its block if the node has lost that."""
        if held is None and node in self._again:
            self._again.remove(node)
            return self._resend(node)
        return held

    def choose(self, arrivals: Sequence[Arrival], *, final: bool) -> list[Arrival]:
        """Returns as many arrivals as are needed."""
        short = self.needed - len(self.answers)
        return list(arrivals[:short]) if final or len(arrivals) >= short else []

    def hopeless(self, nodes: Sequence[int]) -> bool:
        """Returns whether too few answers can still arrive."""
        return len(self.answers) + len(set(nodes) | self._again) < self.needed

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Read an answer; errors and unusable answers are rejected, and do not count."""
        said = self.read(arrival, reply)
        if said is None:
            return
        assert reply is not None
        if said.outcome == "missing":
            if arrival.node in self._resent:
                self.reject(said.worker, "it has no block of the matrix, though it was sent it")
            else:
                self._again.add(arrival.node)
                self._resent.add(arrival.node)
            return
        try:
            values = self._values(reply)
        except ValueError as error:
            self.reject(said.worker, str(error))
            return
        self.answers[said.worker] = values
        self._look()

    def failure(self) -> str:
        """Returns a sentence that says why there is no product, with the first few reasons."""
        came = f"{len(self.answers)} usable answers came, and the product needs {self.needed}"
        if len(self.answers) > self.code.k:
            came = f"the {len(self.answers)} answers that came disagree with each other, so that one or more are wrong"
        reasons = "; ".join(f"worker {worker}: {reason}" for worker, reason in self.rejected[:3])
        ended = {"timed out": "time ran out", "hopeless": "nobody else can answer", "answered": "everybody answered"}
        return (
            f"Product {self.product} failed: {came}; after {self.wait.seconds:.3g} s "
            f"{ended.get(self.wait.ended, self.wait.ended)}{f' ({reasons})' if reasons else ''}."
        )

    def _values(self, reply: Message) -> NDArray[Any]:
        sent = block(reply.content, "answer")
        if sent is None:
            raise ValueError("it holds no product")
        values = view(sent)
        if values.shape != self.shape or values.dtype != self.dtype:
            raise ValueError(
                f"its product has shape {values.shape} of {values.dtype}, not {self.shape} of {self.dtype}"
            )
        if self.dtype == np.uint32:
            if values.size and int(values.max()) >= 2**31 - 1:
                raise ValueError("its product has entries outside the field")
        elif not np.isfinite(values).all():
            raise ValueError("its product has entries that are not finite")
        return values

    def _look(self) -> None:
        """Decide whether there are enough answers; if there are more than k, they have to agree."""
        workers = list(self.answers)
        if len(workers) < self.needed:
            return
        if len(workers) == self.code.k:
            self._decided = True
            return
        numbers = project(list(self.answers.values()), np.random.default_rng(self._seed))
        limit = tolerance(self.dtype)
        off = disagreement(self.code, numbers, workers)
        if off <= limit:
            self._decided = True
            return
        wrong = suspects(self.code, numbers, workers, limit)
        if len(wrong) == 1:
            del self.answers[wrong[0]]
            self.reject(wrong[0], f"it disagrees with the {len(workers) - 1} others")
            self._decided = True
        else:
            self._decided = False  # resets the flag, which may be set if several answers were read together
            self.needed = len(workers) + 1  # one more answer may identify the wrong one
