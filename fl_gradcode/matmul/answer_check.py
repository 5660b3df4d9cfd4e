"""Checks the answers of a product against each other, and bounds how far a wrong one can have moved the product.

An honest answer of worker t is `Y_t = sum_j D[t, j] Z_j + H_t`. The server knows A and B, so it knows a bound on the
rounding error, `||H_t||_F <= eta_t`, and on the answer itself, `||Y_t||_F <= ||L_t||_F ||R_t||_F`, where L and R are
the worker's two coded blocks. Neither bound depends on any answer.

1. An answer that is larger than its bound is impossible, and is rejected by itself.
2. More than k answers are divided by their eta and projected onto the directions N that no product can reach
   (`N^H diag(1/eta) D = 0`, N orthonormal). What is left of honest answers has at most the norm tau = sqrt(answers).
3. An error E of worker w leaves `||N_w|| ||E||_F / eta_w`. The norm of its row of N is the worker's *leverage*: how
   much of its error the check sees. If the rest is r <= tau, `||E||_F <= (r + tau) eta_w / ||N_w||`, whatever was sent.
4. Decoding multiplies E by the worker's coefficient. That bounds the change of the product, worker by worker.

The rest of a single liar lies in the direction of its row of N, which tells who it was if there are enough directions
(Pearson's parity space; in coding theory, a syndrome). Over a prime field nothing is rounded, and the check is exact
except with a probability of about 1e-9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codes import P, PrimeField, matmul_mod, solve_mod
from .blocks import split
from .product_code import ProductCode

__all__ = ["AnswerCheck", "Finding", "gram_of"]

#: Most that a wrong answer may change a block of the product unnoticed in the Frobenius norm, as a share of the norms
#: of A's blocks times those of B's that make up the largest block.
_LIMIT = {np.dtype(np.float64): 1e-6, np.dtype(np.float32): 1e-2}
_MOST_LOST = {np.dtype(np.float64): 1e-8, np.dtype(np.float32): 1e-2}
_PROJECTIONS = 4
_PIECE = 1 << 16  # entries of each answer that are projected at once
_MOST_SETS = 2000  # sets of suspects that are tried


@dataclass(frozen=True)
class Finding:
    """What a set of answers says about itself.

    Attributes:
        agree: Whether all answers are those of one product, up to rounding.
        suspects: If they do not, the smallest sets of workers without which all others agree, the best one first.
            There is one if the error is large. Without any of them, the others are within the bound of their own check.
        rest: What is left outside the reach of any product, in units of the rounding errors; 0 over a field.
    """

    agree: bool
    suspects: tuple[frozenset[int], ...] = ()
    rest: float = 0.0


def gram_of(matrix: NDArray[Any], rows: int, columns: int) -> NDArray[np.float64]:
    """Returns the inner products of the rows * columns blocks of a matrix, shape (blocks, blocks), in float64."""
    flat = split(matrix, rows, columns).reshape(rows * columns, -1)
    gram = np.zeros((len(flat), len(flat)))
    for start in range(0, flat.shape[1], _PIECE):
        piece = flat[:, start : start + _PIECE].astype(np.float64)
        gram += piece @ piece.T
    return gram


def _norms(coefficients: NDArray[Any], gram: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the norm of each combination of blocks, and the sum of the norms of what it combines, shape (n,) each."""
    flat = coefficients.reshape(len(coefficients), -1)
    apart = np.abs(flat) @ np.sqrt(np.diag(gram))
    square = np.einsum("ti,ij,tj->t", flat, gram, flat.conj()).real
    return np.sqrt(np.maximum(square, 0.0) + 1e-12 * np.square(apart)), apart


class AnswerCheck:
    """The bounds of one product's answers, and the check that uses them.

    Args:
        code: The code.
        left: Inner products of A's blocks, from `gram_of`, shape (p m, p m).
        right: Inner products of B's blocks, shape (m q, m q).
        inner: Inner dimension of one block.
        dtype: Dtype of the answers.
        rng: Draws the projections of the check over a field.
    """

    def __init__(
        self,
        code: ProductCode,
        left: NDArray[np.float64],
        right: NDArray[np.float64],
        inner: int,
        dtype: np.dtype[Any],
        rng: np.random.Generator,
    ) -> None:
        self.code, self._seed = code, int(rng.integers(2**63))
        self._field = isinstance(code.numbers, PrimeField)
        if self._field:
            return
        p, m, q = code.partition
        real = np.finfo(dtype).dtype
        self._unit = float(np.finfo(real).eps) / 2
        (L, alpha), (R, beta) = _norms(code.evaluation.left, left), _norms(code.evaluation.right, right)
        # Rounding errors of a sum of `inner` products: at worst `inner` units (Higham, "Accuracy and stability of
        # numerical algorithms", section 3.5), and 8 sqrt(inner) if summed in blocks, as BLAS does, or if errors do not
        # all have one sign (Higham and Mary 2019). Encoding adds one unit for each block, and some for coefficients.
        units = (min(inner, 8 * math.sqrt(inner)) + 4) * L * R + (p * m + 4) * alpha * R + (m * q + 4) * L * beta
        # D itself, and the directions N, are computed in float64.
        exact = (16 * code.k + 8 * (p * m + m * q)) * float(np.finfo(np.float64).eps) * alpha * beta
        rounding = units * self._unit * (4 if code.complex else 1) + exact
        top = float(rounding.max(initial=0.0))
        #: Largest rounding error of each answer in the Frobenius norm, shape (n,).
        self.rounding = np.maximum(rounding, top * 1e-12) if top > 0 else np.ones(code.n)
        #: Largest Frobenius norm of each worker's answer, shape (n,).
        self.largest = L * R + self.rounding
        blocks = np.sqrt(np.diag(left)).reshape(p, m), np.sqrt(np.diag(right)).reshape(m, q)
        self._every = float(blocks[0].sum() * blocks[1].sum())
        #: The largest block of the product, by the norms of A's blocks times those of B's that make it up.
        self.scale = float((blocks[0] @ blocks[1]).max())
        self.limit = _LIMIT[real] * self.scale
        #: Amplification of rounding errors from which so few digits are left that people should know.
        self.most_amplified = _MOST_LOST[real] / self._unit

    def impossible(self, worker: int, answer: NDArray[Any]) -> bool:
        """Returns whether no product of these blocks can be so large."""
        if self._field:
            return False
        bound = float(self.largest[worker])
        with np.errstate(over="ignore"):
            return not float(np.linalg.norm(answer.astype(np.result_type(answer.dtype, np.float64)))) <= bound

    def look(self, answers: Mapping[int, NDArray[Any]]) -> Finding:
        """Returns whether more than k answers agree, and who may be wrong if not.

        Args:
            answers: Worker -> its answer.
        """
        workers = list(answers)
        if self._field:
            return self._look_over_field(answers)
        outside = self._outside(workers)
        rest = self._rest(answers, outside)
        size, most = float(np.linalg.norm(rest)), math.sqrt(len(workers)) * (1 + 1e-6)
        if size <= most:
            return Finding(True, rest=size)

        place = {worker: at for at, worker in enumerate(workers)}

        def rest_without(some: Sequence[int]) -> float:
            basis = np.linalg.qr(outside[[place[worker] for worker in some]].conj().T)[0]
            return float(np.linalg.norm(rest - basis @ (basis.conj().T @ rest)))

        return Finding(False, self._smallest(workers, rest_without, most), size)

    def unseen(self, workers: Sequence[int], coefficients: NDArray[Any], rest: float) -> NDArray[np.float64]:
        """Returns the most by which each worker alone can have changed each block unnoticed, in the Frobenius norm.

        Args:
            workers: Workers whose answers agree.
            coefficients: Their decoding coefficients, shape (len(workers), p, q).
            rest: What the check found left over; see `Finding`.

        Returns:
            The bounds, shape (len(workers), p, q).
        """
        factor = np.abs(coefficients)
        if self._field:
            return np.where(factor > 0, 0.0 if len(workers) > self.code.k else math.inf, 0.0)
        at = list(workers)
        error = 2 * self.largest[at]
        if len(at) > self.code.k:
            leverage = np.linalg.norm(self._outside(at), axis=1)
            with np.errstate(divide="ignore"):
                seen = (rest + math.sqrt(len(at))) * self.rounding[at] / leverage
            error = np.minimum(error, np.nan_to_num(seen, nan=math.inf, posinf=math.inf))
        return np.asarray(factor * error[:, None, None])

    def weak(self, workers: Sequence[int], rest: float) -> list[int]:
        """Returns the workers of which the check sees too little: an error of theirs may change a block too much."""
        if self._field:
            return []
        changes = self.unseen(workers, self.code.coefficients(workers), rest)
        return [worker for worker, mine in zip(workers, changes, strict=True) if float(mine.max()) > self.limit]

    def honest(self, workers: Sequence[int], coefficients: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the largest error of each block if no answer is wrong, in the Frobenius norm, shape (p, q)."""
        if self._field:
            return np.zeros(coefficients.shape[1:])
        at, factor = list(workers), np.abs(coefficients)
        each = self.rounding[at] + (len(at) + 2) * self._unit * 4 * self.largest[at]
        inexact = self.code.error_of(at, coefficients) * self._every
        return np.asarray(np.einsum("tcl,t->cl", factor, each) + inexact)

    def amplified(self, workers: Sequence[int], coefficients: NDArray[Any]) -> float:
        """Returns how much larger a rounding error of the product may be than without a code, at worst over blocks."""
        if self._field or not self.scale:
            return 1.0
        total = np.einsum("tcl,t->cl", np.abs(coefficients), self.largest[list(workers)])
        return float(total.max()) / self.scale

    def _outside(self, workers: Sequence[int]) -> NDArray[Any]:
        """Returns N: orthonormal directions that no product can reach, shape (len(workers), len(workers) - k)."""
        at = list(workers)
        scaled = self.code.evaluation.D[at] / self.rounding[at, None]
        # Columns of length 1 change no direction, and keep D from overflowing.
        scaled = scaled / np.maximum(np.linalg.norm(scaled, axis=0), np.finfo(np.float64).tiny)
        return np.asarray(np.linalg.qr(scaled, mode="complete")[0][:, self.code.k :])

    def _rest(self, answers: Mapping[int, NDArray[Any]], outside: NDArray[Any]) -> NDArray[Any]:
        """Returns a square matrix with the norms and angles of the answers' parts in the directions `outside`."""
        flat = [answer.reshape(-1) for answer in answers.values()]
        eta = self.rounding[list(answers)]
        directions = outside.shape[1]
        found = np.zeros((0, directions), np.result_type(outside.dtype, flat[0].dtype, np.float64))
        for start in range(0, flat[0].size, _PIECE):
            piece = np.stack([one[start : start + _PIECE] for one in flat]).astype(found.dtype) / eta[:, None]
            left_over = (outside.conj().T @ piece).conj().T
            found = np.asarray(np.linalg.qr(np.concatenate([found, left_over]), mode="r"))
        return np.asarray(found.conj().T)

    def _look_over_field(self, answers: Mapping[int, NDArray[Any]]) -> Finding:
        workers = list(answers)
        numbers = _project(list(answers.values()), np.random.default_rng(self._seed))

        def agree(kept: Sequence[int]) -> bool:
            rows = [workers[place] for place in kept]
            return solve_mod(self.code.evaluation.D[rows], numbers[list(kept)]) is not None

        every = range(len(workers))
        if agree(every):
            return Finding(True)

        def rest_without(some: Sequence[int]) -> float:
            return float(not agree([at for at in every if workers[at] not in some]))

        return Finding(False, self._smallest(workers, rest_without, 0.0))

    def _smallest(
        self, workers: Sequence[int], rest_without: Callable[[Sequence[int]], float], most: float
    ) -> tuple[frozenset[int], ...]:
        """Returns the smallest sets without which the others agree; e liars take 2 e answers beyond k to be told."""
        for liars in range(1, (len(workers) - self.code.k) // 2 + 1):
            if math.comb(len(workers), liars) > _MOST_SETS:
                break
            rests = {some: rest_without(some) for some in combinations(workers, liars)}
            found = sorted((some for some in rests if rests[some] <= most), key=rests.__getitem__)
            if found:
                return tuple(frozenset(some) for some in found)
        return ()


def _project(answers: Sequence[NDArray[Any]], rng: np.random.Generator) -> NDArray[np.int64]:
    """Returns four random linear projections of each answer modulo p, the same for all, shape (len(answers), 4)."""
    height, width = answers[0].shape
    a, b = (rng.integers(1, P, shape) for shape in ((_PROJECTIONS, height), (width, _PROJECTIONS)))
    return np.array([matmul_mod(matmul_mod(a, x.astype(np.int64)), b).diagonal() for x in answers])
