"""Do more than k answers agree with each other? What a wrong answer is found by, without computing anything again.

k answers determine the product, so that every further one is a check. Answers are first projected to a few random
numbers each (`u^T Y v`, as in Freivalds' check); what the code allows of these is a subspace of dimension k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import prime_field
from .errors import InvalidCode
from .prime_field import P
from .product_code import ProductCode

__all__ = ["disagreement", "project", "suspects", "tolerance"]

_PROJECTIONS = 4
_STANDS_OUT = 0.01


def project(answers: Sequence[NDArray[Any]], rng: np.random.Generator) -> NDArray[Any]:
    """A few random numbers for each answer, shape (len(answers), 4): linear in it, and the same for all answers."""
    height, width = answers[0].shape
    if answers[0].dtype == np.uint32:
        a, b = (rng.integers(1, P, shape) for shape in ((_PROJECTIONS, height), (width, _PROJECTIONS)))
        rows = [prime_field.matmul(prime_field.matmul(a, x.astype(np.int64)), b).diagonal() for x in answers]
        return np.array(rows)
    u, v = rng.standard_normal((_PROJECTIONS, height)), rng.standard_normal((_PROJECTIONS, width))
    return np.array([np.einsum("tj,tj->t", u.astype(x.dtype) @ x, v) for x in answers])


def tolerance(dtype: np.dtype[Any]) -> float:
    """Up to which disagreement answers count as alike: 1e-9 of their size, 1e-4 in float32; 0 in a field."""
    return 0.0 if dtype == np.uint32 else 1e-4 if dtype == np.float32 else 1e-9


def disagreement(code: ProductCode, numbers: NDArray[Any], workers: Sequence[int]) -> float:
    """How far these workers' projected answers are from what any product yields, relative to their size.

    Over a field 0 or 1. A wrong answer passes unseen with a probability of about 1e-9 there; over the reals if it is
    wrong by less than about 1e-9 of the answers' size.

    Raises:
        InvalidCode: Only k answers or fewer: they agree with some product whatever they are.
    """
    if len(workers) <= code.k:
        raise InvalidCode(f"{len(workers)} answers cannot be checked against each other; more than k={code.k} can.")
    D = code.evaluation.D[list(workers)]
    if D.dtype.kind == "i":
        return float(prime_field.solve(D, np.asarray(numbers, np.int64)) is None)
    outside = np.linalg.qr(D, mode="complete")[0][:, code.k :].conj().T  # what no product can reach
    size = float(np.linalg.norm(numbers))
    return float(np.linalg.norm(outside @ numbers)) / size if size else 0.0


def suspects(code: ProductCode, numbers: NDArray[Any], workers: Sequence[int], limit: float) -> list[int]:
    """Workers without whose answer the others agree: one, if one answer is wrong and k + 2 are in.

    Empty with fewer answers, or if more than one is wrong.
    """
    if len(workers) < code.k + 2:
        return []
    without = {}
    for place, worker in enumerate(workers):
        others = [*workers[:place], *workers[place + 1 :]]
        without[worker] = disagreement(code, np.delete(numbers, place, axis=0), others)
    found = sorted((worker for worker in without if without[worker] <= limit), key=lambda worker: without[worker])
    # An error hardly above the limit falls below it with any answer left out; the wrong one's absence stands out.
    return found[:1] if len(found) > 1 and without[found[0]] < _STANDS_OUT * without[found[1]] else found
