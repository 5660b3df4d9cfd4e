"""How many digits coded products lose: relative errors of every basis, against the integer nodes of the papers.

`python -m experiments.product_table` prints a Markdown table. Each row is a code, each cell the median and the worst
relative error (Frobenius norm) of the decoded product in float64 over random sets of k answers and consecutive ones; A
and B are standard normal. The prime field multiplies whole numbers up to 999, and its column says in how many of its
sets (a tenth of the others') the product was not exact.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from fl_gradcode import NotDecodable
from fl_gradcode.codes import PrimeField
from fl_gradcode.matmul import ConditionWarning, ProductCode, entangled, matdot, mds_product, polynomial

__all__ = ["BASES", "CODES", "errors_of", "main"]

CODES: tuple[tuple[str, Callable[..., ProductCode], tuple[int, ...]], ...] = (
    ("MDS", mds_product, (20, 16)),
    ("MDS", mds_product, (110, 100)),
    ("polynomial", polynomial, (20, 4, 4)),
    ("polynomial", polynomial, (53, 7, 7)),
    ("polynomial", polynomial, (110, 10, 10)),
    ("MatDot", matdot, (11, 5)),
    ("MatDot", matdot, (20, 8)),
    ("MatDot", matdot, (53, 25)),
    ("entangled", entangled, (11, 2, 2, 2)),
    ("entangled", entangled, (31, 2, 3, 4)),
)
BASES = ("random", "chebyshev", "roots", "integers")
_TITLES = ("random", "Chebyshev", "roots of unity", "integer nodes")


def errors_of(code: ProductCode, sets: int) -> NDArray[np.float64]:
    """Relative error of the decoded product for `sets` random sets of k answers, and up to as many consecutive ones."""
    rng = np.random.default_rng(1)
    p, m, q = code.partition
    A: NDArray[Any] = rng.standard_normal((2 * p, 3 * m))
    B: NDArray[Any] = rng.standard_normal((3 * m, 2 * q))
    if isinstance(code.numbers, PrimeField):
        A, B = rng.integers(-999, 1000, A.shape), rng.integers(-999, 1000, B.shape)
    answers = [code.multiply(left, right) for left, right in zip(*code.encode(A, B), strict=True)]
    chosen = [rng.permutation(code.n)[: code.k] for _ in range(sets)]
    chosen += [(first + np.arange(code.k)) % code.n for first in range(min(code.n, sets))]
    exact = A @ B
    found = []
    for rows in chosen:
        try:
            with np.errstate(all="ignore"):  # integer nodes overflow
                off = np.linalg.norm(code.decode([answers[i] for i in rows], rows) - exact)
            error = float(off / np.linalg.norm(exact))
        except NotDecodable:  # singular in floats
            error = float("inf")
        found.append(error if np.isfinite(error) else np.inf)
    return np.array(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.product_table", description=__doc__)
    parser.add_argument("--sets", type=int, default=1000, help="random sets of answers (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.sets < 10:
        parser.error(f"--sets {options.sets} must be at least 10.")
    lines = [
        "| code | n | k | default | " + " | ".join(_TITLES) + " | field: inexact |",
        "|---|---|---|---|" + "---:|" * 5,
    ]
    for name, make, sizes in track(CODES, console=Console(stderr=True), transient=True):
        auto = make(*sizes)
        cells = [_cell(make, sizes, basis, options.sets, auto.basis) for basis in BASES]
        exact = errors_of(make(*sizes, numbers=PrimeField(0)), max(options.sets // 10, 10))
        row = [f"{name} {auto.partition}", auto.n, auto.k, _TITLES[BASES.index(auto.basis)], *cells]
        lines.append("| " + " | ".join(map(str, [*row, f"{np.count_nonzero(exact)} of {len(exact)}"])) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


def _cell(make: Callable[..., ProductCode], sizes: tuple[int, ...], basis: str, sets: int, auto: str) -> str:
    if basis == "random" and make in (matdot, entangled):
        return ""  # these need a polynomial's structure
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConditionWarning)  # the baselines warn, rightly
        errors = errors_of(make(*sizes, basis=basis), sets)
    told = " / ".join("> 1" if x > 1 else f"{x:.0e}" for x in (np.median(errors), errors.max()))
    return f"**{told}**" if basis == auto else told


if __name__ == "__main__":
    main()
