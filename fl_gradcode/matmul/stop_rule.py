"""The stop rules of coded products, which wait for enough answers that agree with each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from .._text import listed, numbered, printable
from ..grid import Arrival, StopRule, Wait
from ..protocol import rejection_of, view
from .answer_check import AnswerCheck, Finding
from .product_code import ProductCode
from .records import Answer, block

__all__ = ["PlacingRule", "ProductRule"]

_log = logging.getLogger(__name__)

_LONGEST = 200  # characters of what a node says


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
        self.rejected.append((worker, printable(reason, _LONGEST) or "no reason given"))


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

    More answers are waited for if they disagree and nobody can be named, or if the check would miss too large an error
    of one of the workers. Once nobody else can answer, answers that agree are used, and `unchecked` names the workers
    of which the check saw too little.

    Args:
        label, matrix, product, workers: See `_Rule`.
        code: The code.
        shape: Shape of every answer.
        dtype: Dtype of every answer.
        extra: Number of answers beyond k to wait for, which are used to check all answers.
        resend: Returns the message for a node that has lost its block of A.
        check: The bounds of the answers, and the check of more than k of them.

    Attributes:
        answers: Worker -> its answer, in order of arrival.
        finding: What the check said of these answers; None if they were not checked.
        unchecked: Workers that the check was meant to check, and of whose errors it sees too little.
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
        check: AnswerCheck,
    ) -> None:
        super().__init__(label, matrix, product, workers)
        self.code, self.shape, self.dtype, self._resend, self._check = code, shape, dtype, resend, check
        self.answers: dict[int, NDArray[Any]] = {}
        self.finding: Finding | None = None
        self.unchecked: tuple[int, ...] = ()
        self._decided = False
        self.needed = code.k + extra
        self._least, self._left_out = self.needed, 0
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
            values = self._values(said.worker, reply)
        except Exception as error:  # an answer is untrusted input, and reading it can raise almost anything
            why = str(error) if isinstance(error, ValueError) else type(error).__name__
            self.reject(said.worker, f"its product cannot be used: {why}")
            return
        self.answers[said.worker] = values
        self._look()

    def finish(self, wait: Wait) -> list[Message]:
        """Decide with the answers that came, now that no more are waited for; returns no messages."""
        super().finish(wait)
        if not self._decided and len(self.answers) > self.code.k:
            self._settle()
        return []

    def failure(self) -> str:
        """Returns a sentence that says why there is no product, with the first few reasons."""
        came = f"{len(self.answers)} usable answers came, and the product needs {self.needed}"
        if self.finding is not None and not self.finding.agree:
            came = f"the {len(self.answers)} answers that came disagree with each other, so that one or more are wrong"
        reasons = "; ".join(f"worker {worker}: {reason}" for worker, reason in self.rejected[:3])
        ended = {"timed out": "time ran out", "hopeless": "nobody else can answer", "answered": "everybody answered"}
        return (
            f"Product {self.product} failed: {came}; after {self.wait.seconds:.3g} s "
            f"{ended.get(self.wait.ended, self.wait.ended)}{f' ({reasons})' if reasons else ''}."
        )

    def _values(self, worker: int, reply: Message) -> NDArray[Any]:
        sent = block(reply.content, "answer")
        if sent is None:
            raise ValueError("there is none")
        values = view(sent)
        if values.shape != self.shape or values.dtype != self.dtype:
            raise ValueError(f"it has shape {values.shape} of {values.dtype}, not {self.shape} of {self.dtype}")
        if self.dtype == np.uint32:
            if values.size and int(values.max()) >= 2**31 - 1:
                raise ValueError("it has entries outside the field")
        elif not np.isfinite(values).all():
            raise ValueError("it has entries that are not finite")
        if self._check.impossible(worker, values):
            self._left_out += 1  # a wrong answer that is found takes no second one to find it
            raise ValueError("it is larger than any product of the blocks that were sent")
        return values

    def _look(self) -> None:
        """Decide whether there are enough answers; if there are more than k, they have to agree."""
        self.finding = None
        if len(self.answers) < self.needed:
            return
        if len(self.answers) == self.code.k:
            self._decided = True
            return
        self.finding = self._check.look(self.answers)
        if self.finding.suspects:
            self._drop(self.finding.suspects)
        # Answers that came beyond k though no check was asked for are checked as far as it goes.
        asked = self._least > self.code.k
        self._decided = self.finding.agree and not (asked and self._weak())
        if not self._decided:
            self.needed = len(self.answers) + 1  # one more answer may identify a wrong one, or check a weak one

    def _settle(self) -> None:
        """Decide although no more answers come, if what there is allows it."""
        self.finding = self._check.look(self.answers)
        if not self.finding.agree or len(self.answers) + self._left_out < self._least:
            return
        self._decided = True
        self.unchecked = tuple(self._weak())
        if self.unchecked:
            _log.warning(
                "Product %d was computed, but its check sees too little of worker%s %s: a wrong answer could have "
                "changed it by more than the check promises. Choose more extra answers, or a code with larger n - k.",
                self.product,
                "" if len(self.unchecked) == 1 else "s",
                listed(self.unchecked, 10),
            )

    def _drop(self, suspects: tuple[frozenset[int], ...]) -> None:
        """Leave out the most suspect workers. The others agree, so that their own check bounds what is still wrong."""
        wrong = suspects[0]
        others = sorted(frozenset().union(*suspects[1:]) - wrong)
        either = f", or {numbered('worker', others)} does" if others else ""
        for worker in sorted(wrong):
            del self.answers[worker]
            self._left_out += 1
            self.reject(worker, f"it disagrees with the {len(self.answers)} others{either}")
        self.finding = self._check.look(self.answers)

    def _weak(self) -> list[int]:
        assert self.finding is not None
        return self._check.weak(list(self.answers), self.finding.rest)
