"""The product code, an immutable value that encodes blocks of matrices and decodes their product from answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg

from ..codes import P, PrimeField, Reals, as_float, check_workers, condition, lift_mod, lstsq, matmul_mod, solve_mod
from ..errors import InvalidCode, NotDecodable
from .blocks import as_operand, check_range, combine_blocks, join, multiply, split

__all__ = ["ConditionWarning", "Evaluation", "ProductCode", "best_draw", "choose", "nodes", "powers", "worst_condition"]

#: A real basis up to this worst condition number is preferred to complex numbers, which take four times the work.
_SOUND = 1e6
#: Decoding with a larger condition number keeps less than half of the digits of a float64.
_WARN = 1e8
_SETS = 64  # number of random sets of answers by which a basis is judged
_TRIES = 5
_BUDGET = 200 * 100**3  # limit of k^3 times the number of singular value decompositions


class ConditionWarning(UserWarning):
    """Warns that decoding with a code loses many digits; the message names a better choice."""


@dataclass(frozen=True)
class Evaluation:
    """The coefficients of a product code, and the matrix by which its answers are decoded.

    Attributes:
        left: Coefficients of A's p x m blocks, shape (n, p, m).
        right: Coefficients of B's m x q blocks, shape (n, m, q).
        D: Decoding matrix, shape (n, k); answer i is `sum_t D[i, t] Z_t` with unknown matrices Z_t.
        wanted: For each block of the product, the index t of the Z_t that equals it, shape (p, q).
    """

    left: NDArray[Any]
    right: NDArray[Any]
    D: NDArray[Any]
    wanted: NDArray[np.int64]


def nodes(basis: str, n: int) -> NDArray[Any]:
    """Returns the points at which the workers evaluate, shape (n,).

    They are Chebyshev nodes ("chebyshev"), the n-th roots of unity ("roots"), or 1..n as floats ("integers") or as
    integers ("field").
    """
    i = np.arange(n)
    if basis == "chebyshev":
        return np.asarray(np.cos((2 * i + 1) * np.pi / (2 * n)))
    if basis == "roots":
        return np.asarray(np.exp(2j * np.pi * i / n))
    return i + 1 if basis == "field" else i + 1.0


def powers(x: NDArray[Any], exponents: NDArray[np.int64]) -> NDArray[Any]:
    """Returns `x_i ** e`, shape (n, *exponents.shape); whole numbers are taken modulo the field's prime."""
    if x.dtype.kind == "i":
        table = [[pow(int(point), int(e), P) for e in exponents.ravel()] for point in x]
        return np.array(table, np.int64).reshape(len(x), *exponents.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow shows in the condition number
        return np.asarray(x.reshape(-1, *[1] * exponents.ndim) ** exponents)


def worst_condition(
    D: NDArray[Any], *, sets: int = _SETS, rng: np.random.Generator | None = None
) -> tuple[float, NDArray[np.int64]]:
    """Returns the largest condition number found among sets of k rows of D, and the rows of that set.

    The sets are a sample of `sets` random ones and up to as many of consecutive rows, so a worse set may exist.
    """
    n, k = D.shape
    rng = np.random.default_rng(0) if rng is None else rng
    count = 1 if n == k else min(sets, max(_BUDGET // k**3, 8))
    drawn = np.argsort(rng.random((count, n)), axis=1)[:, :k]
    starts = np.linspace(0, n, min(count, n), endpoint=False).astype(int)
    tried = np.concatenate([drawn, (starts[:, None] + np.arange(k)) % n])
    if not np.isfinite(D).all():
        return float("inf"), tried[0]
    # A hundred sets at a time, to limit memory: a hundred 100 x 100 matrices take 8 MB.
    numbers = np.concatenate([condition(D[rows]) for rows in np.array_split(tried, -(-len(tried) // 100))])
    numbers = np.nan_to_num(numbers, nan=np.inf, posinf=np.inf)
    worst = int(np.argmax(numbers))
    return float(numbers[worst]), tried[worst]


def best_draw(
    draw: Callable[[np.random.Generator], Evaluation], rng: np.random.Generator | None, tries: int = _TRIES
) -> Evaluation:
    """Returns the best conditioned of a few random evaluations."""
    rng = np.random.default_rng(0) if rng is None else rng
    drawn = [draw(rng) for _ in range(tries)]
    return min(drawn, key=lambda evaluation: worst_condition(evaluation.D)[0])


def choose(
    name: str, basis: str, candidates: Mapping[str, Callable[[], Evaluation]], order: Sequence[str]
) -> tuple[str, Evaluation]:
    """Returns the name and the evaluation of a basis, with a warning if it is badly conditioned.

    Args:
        name: Name of the code's family, for messages.
        basis: Name of a candidate. "auto" takes the first basis in `order` whose worst sampled condition number is at
            most 1e6, or else the best of them.
        candidates: Name -> function that makes the evaluation.
        order: Bases that "auto" tries, in this order.

    Raises:
        InvalidCode: The code has no such basis.
    """
    known = ["auto", *candidates]
    if basis not in known:
        raise InvalidCode(f"basis={basis!r}: {name} codes have {', '.join(map(repr, known))}.")
    judged: list[tuple[float, str, Evaluation]] = []
    for candidate in order:
        made = candidates[candidate]()
        judged.append((worst_condition(made.D)[0], candidate, made))
        if judged[-1][0] <= _SOUND:
            break
    best, auto, evaluation = min(judged, key=lambda entry: entry[0])
    if basis in ("auto", auto):
        if best > _WARN:
            n, k = evaluation.D.shape
            warnings.warn(
                f"This {name} code (n={n}, k={k}) has a condition number of at least {best:.1g}; float64 tolerates "
                "about 1e8. Use numbers=PrimeField(...), which is exact, fewer spare workers (n - k up to 6), or "
                "polynomial(), whose random basis stays sound at any size.",
                ConditionWarning,
                stacklevel=4,
            )
        return auto, evaluation
    made = candidates[basis]()
    condition = worst_condition(made.D)[0]
    if condition > _WARN:
        warnings.warn(
            f"basis={basis!r} has a condition number of at least {condition:.1g} at n={len(made.D)}; float64 tolerates "
            f"about 1e8. basis={auto!r} has {best:.1g} here, and numbers=PrimeField(...) is exact.",
            ConditionWarning,
            stacklevel=4,
        )
    return basis, made


@dataclass(frozen=True, eq=False, repr=False)
class ProductCode:
    """A code for matrix products on n workers, of which any k answers decode.

    Use a constructor (`polynomial`, `mds_product`, `matdot`, `entangled`, `uncoded_product`).

    Attributes:
        name: Name of the code's family, for people.
        basis: Basis in which polynomials are evaluated: "random", "chebyshev", "roots" or "integers"; "units" for an
            uncoded product.
        evaluation: The coefficients and the decoding matrix.
        numbers: `REALS`, or a `PrimeField`, over which nothing is rounded.
    """

    name: str
    basis: str
    evaluation: Evaluation
    numbers: Reals | PrimeField

    def __post_init__(self) -> None:
        made = self.evaluation
        shapes = [made.left.shape, made.right.shape, made.D.shape, made.wanted.shape]
        (n, p, m), (_, _, q), (_, k), _ = shapes
        if shapes != [(n, p, m), (n, m, q), (n, k), (p, q)] or k > n:
            raise InvalidCode(
                f"An evaluation has shapes (n, p, m), (n, m, q), (n, k) with k <= n, and (p, q), not {shapes}."
            )
        for array in vars(made).values():
            array.setflags(write=False)

    def __repr__(self) -> str:
        p, m, q = self.partition
        over = f"{self.basis} basis" if isinstance(self.numbers, Reals) else f"over a {self.numbers.name}"
        return (
            f"<{self.name} code: n={self.n} workers, any k={self.k}, A in {p} x {m} and B in {m} x {q} blocks, {over}>"
        )

    @property
    def n(self) -> int:
        """Number of workers."""
        return int(self.evaluation.D.shape[0])

    @property
    def k(self) -> int:
        """Recovery threshold; any k answers decode, and fewer never do."""
        return int(self.evaluation.D.shape[1])

    @property
    def partition(self) -> tuple[int, int, int]:
        """Numbers of blocks (p, m, q): A is split into p x m blocks, and B into m x q blocks."""
        _, p, m = self.evaluation.left.shape
        return int(p), int(m), int(self.evaluation.right.shape[2])

    @property
    def complex(self) -> bool:
        """Whether workers compute with complex numbers, which take up to four times the work and twice the bytes."""
        return np.iscomplexobj(self.evaluation.left)

    @property
    def work(self) -> float:
        """Work of one worker, as a share of the whole product."""
        p, m, q = self.partition
        both = self.complex and bool(self.evaluation.right.imag.any())
        return (4 if both else 2 if self.complex else 1) / (p * m * q)

    def encode(self, A: ArrayLike, B: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns the two coded blocks of every worker.

        Args:
            A: Matrix of real numbers, shape (rows, inner).
            B: Matrix or vector of real numbers, shape (inner, columns) or (inner,).

        Returns:
            The coded blocks of A, shape (n, ceil(rows / p), ceil(inner / m)), and of B, shape
            (n, ceil(inner / m), ceil(columns / q)), padded with zeros. They are float32 if A and B are, else float64,
            or complex, or uint32 over a field.

        Raises:
            InvalidCode: A and B are not matrices of finite real numbers that fit each other.
            Overflow: Over a field, an entry of the product might not fit.
        """
        a, b = self.operands(A, B)
        every = range(self.n)
        return self.left_blocks(a, every), self.right_blocks(b, every)

    def operands(self, A: ArrayLike, B: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns A and B as checked matrices of the same dtype, as whole numbers over a field.

        Raises:
            InvalidCode: A and B are not matrices of finite real numbers that fit each other.
            Overflow: Over a field, an entry of the product might not fit.
        """
        a, b = self.operand(A, "A"), self.operand(B, "B")
        if a.dtype != b.dtype:
            a, b = a.astype(np.float64), b.astype(np.float64)
        self.check_fit(a, b)
        return a, b

    def operand(self, values: ArrayLike, name: str) -> NDArray[Any]:
        """Returns A or B as a checked matrix, in float32 or float64, or over a field as int64 in fixed point."""
        array = as_operand(values, name)
        if isinstance(self.numbers, PrimeField):
            array = array if array.dtype.kind != "f" else self.numbers.quantise(array)
            return array.astype(np.int64, copy=False)
        return as_float(array)

    def check_fit(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        """Check that the product of two operands exists and fits the field.

        Raises:
            InvalidCode: The inner dimensions differ.
            Overflow: Over a field, an entry of the product might not fit.
        """
        if a.shape[1] != b.shape[0]:
            raise InvalidCode(f"A has {a.shape[1]} columns and B {b.shape[0]} rows; a product needs as many.")
        if isinstance(self.numbers, PrimeField):
            check_range(a, b)

    def left_blocks(self, a: NDArray[Any], workers: Iterable[int]) -> NDArray[Any]:
        """Returns these workers' combinations of A's blocks, for an operand `a` from `operands`."""
        p, m, _ = self.partition
        return combine_blocks(self.evaluation.left[list(workers)].reshape(-1, p * m), split(a, p, m))

    def right_blocks(self, b: NDArray[Any], workers: Iterable[int]) -> NDArray[Any]:
        """Returns these workers' combinations of B's blocks, for an operand `b` from `operands`."""
        _, m, q = self.partition
        return combine_blocks(self.evaluation.right[list(workers)].reshape(-1, m * q), split(b, m, q))

    @property
    def right_is_whole(self) -> bool:
        """Whether every worker gets all of B, without coding."""
        return self.evaluation.right.shape[1:] == (1, 1) and bool((self.evaluation.right == 1).all())

    def answer_type(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[tuple[int, int], np.dtype[Any]]:
        """Returns the shape and the dtype of every worker's answer for these operands."""
        p, _, q = self.partition
        dtype = np.dtype(np.uint32) if a.dtype.kind == "i" else a.dtype
        if self.complex:
            dtype = np.result_type(dtype, np.complex64)
        return (-(-a.shape[0] // p), -(-b.shape[1] // q)), dtype

    def multiply(self, left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
        """Returns a worker's answer, the product of its two blocks in the code's arithmetic."""
        return multiply(left, right)

    def decodable(self, workers: Iterable[int]) -> bool:
        """Returns whether the answers of these workers determine the product, for which k of them are needed."""
        return len(check_workers(workers, self.n)) >= self.k

    def coefficients(self, workers: Iterable[int]) -> NDArray[Any]:
        """Returns the decoding coefficients, shape (len(workers), p, q).

        The blocks of the product are `C_cl = sum_t coefficients[t, c, l] answers[t]`. For more than k answers, the
        coefficients have the least norm.

        Raises:
            NotDecodable: There are fewer than k answers, or their rows are dependent.
        """
        rows = check_workers(workers, self.n)
        if len(rows) < self.k:
            raise NotDecodable(f"{len(rows)} answers do not determine the product; any {self.k} of {self.n} do.")
        D = self.evaluation.D[rows]
        p, q = self.evaluation.wanted.shape
        target = np.zeros((self.k, p * q), D.dtype)
        target[self.evaluation.wanted.ravel(), np.arange(p * q)] = 1
        if D.dtype.kind == "i":
            solution = solve_mod(D.T, target)
        elif len(rows) > self.k:
            solution = lstsq(D.T, target)
        else:
            solution = _solve(D.T, target)
        if solution is None:
            raise NotDecodable(f"The answers of workers {rows} do not determine the product: their rows are dependent.")
        return np.asarray(solution).reshape(len(rows), p, q)

    def condition(self, workers: Iterable[int]) -> float:
        """Returns the condition number of decoding from these answers; it is 1 over a field.

        Its decimal logarithm is about the number of digits that decoding loses.
        """
        rows = check_workers(workers, self.n)
        if len(rows) < self.k:
            return float("inf")
        return float(condition(self.evaluation.D[rows])) if isinstance(self.numbers, Reals) else 1.0

    def worst_condition(self, sets: int = 200, *, rng: np.random.Generator | None = None) -> float:
        """Returns the largest condition number among `sets` random sets of k answers and as many consecutive ones."""
        return worst_condition(self.evaluation.D, sets=sets, rng=rng)[0] if isinstance(self.numbers, Reals) else 1.0

    def error_of(self, workers: Sequence[int], coefficients: NDArray[Any]) -> float:
        """Returns the decoding error, computed from `left` and `right` alone.

        It is the largest error in the coefficient of any `A_cj B_j'l` in a block of the decoded product.
        """
        made = self.evaluation
        rows = list(workers)
        p, m, q = self.partition
        terms = (made.left[rows][:, :, :, None, None] * made.right[rows][:, None, None]).reshape(len(rows), -1)
        flat = coefficients.reshape(len(rows), -1).T
        if made.D.dtype.kind == "i":
            decoded = lift_mod(matmul_mod(flat, terms % P))
        else:
            decoded = flat @ terms
        i, j = np.eye(p), np.eye(m)
        right = np.einsum("ac,jk,bl->abcjkl", i, j, np.eye(q)).reshape(p * q, -1)
        return float(np.abs(decoded - right).max())

    def fraction_bits(self, A: ArrayLike, B: ArrayLike) -> int:
        """Returns the number of fraction bits of the decoded product of A and B.

        It is the field's number for each of A and B that contains floats, and 0 over the reals.
        """
        if isinstance(self.numbers, Reals):
            return 0
        return self.numbers.fraction_bits * sum(np.asarray(x).dtype.kind == "f" for x in (A, B))

    def decode(
        self,
        answers: Sequence[NDArray[Any]],
        workers: Iterable[int],
        *,
        shape: tuple[int, ...] | None = None,
        fraction_bits: int = 0,
    ) -> NDArray[Any]:
        """Returns the product, decoded from k or more answers.

        Args:
            answers: The answers, one a worker, of equal shapes.
            workers: Workers that sent the answers, in the same order.
            shape: Shape of the product, (rows, columns) or (rows,), to cut off the padding.
            fraction_bits: Over a field, number of fraction bits of the product; see the method of that name.

        Returns:
            The product in the dtype of the answers (float32 or float64). Over a field it is int64, or float64 with
            fraction bits.

        Raises:
            NotDecodable: There are fewer than k answers.
            InvalidCode: Answers have different shapes, or do not match the workers in number.
        """
        rows = check_workers(workers, self.n)
        if len(answers) != len(rows) or len({x.shape for x in answers}) > 1:
            raise InvalidCode(
                f"{len(answers)} answers for {len(rows)} workers: one each, all of one shape, are needed."
            )
        whole = join(answers, self.coefficients(rows))
        if fraction_bits:
            whole = whole * 2.0**-fraction_bits
        if shape is None:
            return whole
        r, c = shape if len(shape) == 2 else (*shape, 1)
        if not (0 <= r <= whole.shape[0] and 0 <= c <= whole.shape[1]):
            raise InvalidCode(f"shape={shape} does not fit a decoded product of {whole.shape[0]} x {whole.shape[1]}.")
        return whole[:r, :c].reshape(shape)


def _solve(A: NDArray[Any], right: NDArray[Any]) -> NDArray[Any] | None:
    """Returns the solution of `A x = right`, or None if A is exactly singular.

    There is no warning of a nearly singular A, since the constructor has warned already.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", linalg.LinAlgWarning)
            return np.asarray(linalg.solve(A, right, check_finite=False))
    except linalg.LinAlgError:
        return None
