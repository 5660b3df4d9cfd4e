"""How much each family of codes loses: noise amplification kappa and the error of the decoded sum, measured.

`python -m experiments.code_table` prints a Markdown table. For each code: random straggler sets and sets of consecutive
workers, with replies in float64 and rounded to float32. Updates are standard normal; the error is relative to the sum,
in L2 norm.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from fl_gradcode import FlGradcodeError, GradientCode
from fl_gradcode.codes import (
    PrimeField,
    cyclic_mds,
    cyclic_repetition,
    for_assignment,
    fractional_repetition,
    reed_solomon,
    vandermonde,
)

__all__ = ["FAMILIES", "SIZES", "Loss", "measure"]

SIZES = ((20, 5), (100, 10), (200, 20), (1000, 100))
_ENTRIES = 32  # of an update


def _cyclic(n: int, holders: int) -> NDArray[np.bool_]:
    held = np.zeros((n, n), bool)
    for worker in range(n):
        held[worker, (worker + np.arange(holders)) % n] = True
    return held


def _universal(extra: int) -> Callable[[int, int, int], GradientCode]:
    """Cyclic supports with s + m + extra holders."""
    return lambda n, s, m: for_assignment(_cyclic(n, s + m + extra), s=s, m=m, tries=1)


FAMILIES: dict[str, Callable[[int, int, int], GradientCode]] = {
    "fractional repetition": lambda n, s, m: fractional_repetition(n, s, m=m),
    "universal, holders chosen": lambda n, s, m: for_assignment(np.ones((n, n)), s=s, m=m, holders=s + m),
    "universal, s + m + 2 holders": _universal(2),
    "universal, s + m holders": _universal(0),
    "cyclic repetition": lambda n, s, m: _only(m, cyclic_repetition(n, s, rng=np.random.default_rng(0))),
    "cyclic MDS (n - 1 workers where n - s is even)": lambda n, s, m: _only(m, cyclic_mds(n - 1 + (n - s) % 2, s)),
    "real Vandermonde": lambda n, s, m: _only(m, vandermonde(n, s)),
    "Reed-Solomon over a field": lambda n, s, m: reed_solomon(n, s, m=m),
}


@dataclass(frozen=True)
class Loss:
    """What decoding cost over several straggler sets.

    Attributes:
        kappa: Noise amplification, one a set.
        error64, error32: Relative error of the decoded sum, replies in float64 and in float32. Over a field the error
            against the sum of the rounded updates: 0 if exact.
        undecodable: How many sets the code could not decode to 1e-8, although it promises to; they count with the
            closest vector there is.
    """

    kappa: NDArray[np.float64]
    error64: NDArray[np.float64]
    error32: NDArray[np.float64]
    undecodable: int


def random_sets(n: int, s: int, count: int) -> Iterator[NDArray[np.intp]]:
    """Straggler sets drawn at random."""
    rng = np.random.default_rng(1)
    return (rng.choice(n, s, replace=False) for _ in range(count))


def consecutive_sets(n: int, s: int, count: int) -> Iterator[NDArray[np.intp]]:
    """Neighbours straggle together, beginning all round the circle."""
    return ((first + np.arange(s)) % n for first in np.linspace(0, n, min(count, n), endpoint=False).astype(int))


def measure(code: GradientCode, sets: Iterator[NDArray[np.intp]]) -> Loss:
    """Encode random updates, lose each of these sets, decode."""
    rng = np.random.default_rng(2)
    updates = rng.standard_normal((code.k, _ENTRIES))
    exact = isinstance(code.numbers, PrimeField)
    if isinstance(code.numbers, PrimeField):
        updates = code.numbers.quantise(updates / 8) / 2.0**code.numbers.fraction_bits
    total = updates.sum(axis=0)
    replies = code.encode(updates)
    kappas: list[float] = []
    errors64: list[float] = []
    errors32: list[float] = []
    undecodable = 0
    for stragglers in sets:
        survivors = np.setdiff1d(np.arange(code.n), stragglers)
        decoder = code.incremental()
        decoder.update(survivors.tolist())
        a = decoder.vector()
        if a is None:
            undecodable += 1
            a = code.least_squares_vector(survivors.tolist())
        kappas.append(code.kappa_of(a))
        for errors, wire in ((errors64, replies), (errors32, replies if exact else replies.astype(np.float32))):
            rows = wire[survivors] if exact else wire[survivors].astype(np.float64)
            decoded = code.numbers.decode(rows, a[survivors])[:_ENTRIES]
            errors.append(float(np.linalg.norm(decoded - total) / np.linalg.norm(total)))
    return Loss(np.array(kappas), np.array(errors64), np.array(errors32), undecodable)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.code_table", description=__doc__)
    parser.add_argument("--sets", type=int, default=200, help="straggler sets of each kind")
    parser.add_argument("--largest", type=int, default=1000, help="leave out sizes with more workers")
    options = parser.parse_args(arguments)
    cells = [(n, s, m, family) for n, s in SIZES if n <= options.largest for m in (1, 4) for family in FAMILIES]
    lines = [
        "| n, s | m | family | load | kappa, random | kappa, consecutive | error, float64 | error, float32 | failed |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for n, s, m, family in track(cells, console=Console(stderr=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the baselines warn, rightly
            try:
                code = FAMILIES[family](n, s, m)
            except FlGradcodeError:
                continue  # there is no such code
            kinds = [measure(code, sets(code.n, s, options.sets)) for sets in (random_sets, consecutive_sets)]
        loads = [len(code.shards_of(i)) for i in range(code.n)]
        both64, both32 = (np.concatenate([getattr(loss, name) for loss in kinds]) for name in ("error64", "error32"))
        undecodable = sum(loss.undecodable for loss in kinds) / sum(len(loss.kappa) for loss in kinds)
        row = [f"{n}, {s}", m, family, f"{min(loads)} to {max(loads)}" if min(loads) < max(loads) else loads[0]]
        row += [_three(kinds[0].kappa), _three(kinds[1].kappa), _three(both64), _three(both32), f"{undecodable:.0%}"]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


def _three(values: NDArray[np.float64]) -> str:
    """Median, 99th percentile, worst."""
    return " / ".join(_two_digits(x) for x in (np.median(values), np.quantile(values, 0.99), values.max()))


def _two_digits(value: float) -> str:
    """Two digits, written out where that is as short: 150 and not 1.5e+02."""
    text = f"{value:.2g}"
    return f"{float(text):.0f}" if 100 <= float(text) < 10_000 else text


def _only(m: int, code: GradientCode) -> GradientCode:
    if m != 1:
        raise FlGradcodeError(f"{code.name} codes have m = 1")
    return code


if __name__ == "__main__":
    main()
