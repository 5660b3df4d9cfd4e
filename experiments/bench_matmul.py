"""Benchmarks of coded products: decoding and a worker's share against the uncoded product, and virtual time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from flwr.clientapp import ClientApp
from rich.console import Console

from fl_gradcode import VirtualGrid
from fl_gradcode.latency import named
from fl_gradcode.matmul import CodedMatrix, ProductCode, coded_matmul_worker, polynomial, uncoded_product
from fl_gradcode.testing import InProcessGrid

__all__ = ["products"]

_console = Console()
_LAWS = ("pareto", "virtual-machines", "serverless", "lognormal", "none")


def products(size: int = 4096, n: int = 20, p: int = 4, repeats: int = 5, count: int = 200) -> None:
    """A product split p x p over n workers: what decoding and a worker cost, and how long it takes with stragglers."""
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((size, size)), rng.standard_normal((size, size))
    code = polynomial(n, p, p)
    workers = rng.permutation(n)[: code.k].tolist()
    a, b = code.operands(A, B)
    # Only what is timed: all blocks at once would take 2 n / p times the memory of A.
    left, right = code.left_blocks(a, workers[:1])[0], code.right_blocks(b, workers[:1])[0]
    answers = [code.multiply(code.left_blocks(a, [i])[0], code.right_blocks(b, [i])[0]) for i in workers]
    whole, share, decoding = [], [], []
    for _ in range(repeats + 1):  # in turns, so that both meet the machine's moods
        whole.append(_seconds(lambda: A @ B))
        share.append(_seconds(lambda: code.multiply(left, right)))
        decoding.append(_seconds(lambda: code.decode(answers, workers)))
    error = float(np.linalg.norm(code.decode(answers, workers) - A @ B) / np.linalg.norm(A @ B))
    # The first of each takes fresh memory from the system, which a later one finds in place.
    first, (u, s, d) = decoding[0] / whole[0], (statistics.median(times[1:]) for times in (whole, share, decoding))
    _console.print(
        f"{size} x {size} in {p} x {p} blocks over {n} workers: decoding from {code.k} answers, gathering the blocks "
        f"included, takes {1e3 * d:.0f} ms, the uncoded product {u:.2f} s: [bold]{d / u:.2%}[/] (asked: at most 2.5 %; "
        f"the first, in fresh memory, {first:.1%}). Relative error {error:.0e}."
    )
    _console.print(
        f"A worker multiplies {1e3 * s:.0f} ms, [bold]1/{u / s:.1f}[/] of the product (asked: 1/{p * p}), and stores "
        f"1/{A.nbytes / left.nbytes:g} of A and 1/{B.nbytes / right.nbytes:g} of B (asked: 1/{p} each)."
    )
    for law in _LAWS:
        slow, fast = (_virtual(one, law, count) for one in (uncoded_product(p, n // p), code))
        asked = " (asked: at least 2)" if law == "pareto" else ""
        _console.print(
            f"{n} virtual nodes, {law}: {slow:.2f} s a product uncoded, {fast:.2f} s from any {code.k}: "
            f"[bold]{slow / fast:.2f}x[/] faster{asked}."
        )


def _virtual(code: ProductCode, law: str, count: int) -> float:
    """Mean virtual seconds of a product over a run; its size does not matter, since work is charged by the law."""
    app = ClientApp()
    app.query("matmul")(coded_matmul_worker)
    A, B = np.ones((20, 3)), np.ones((3, 20))
    with InProcessGrid(app, code.n) as grid:
        matrix = CodedMatrix(VirtualGrid(grid, named(law)), A, code, timeout=None)
        for _ in range(count):
            matrix.multiply(B)
    return statistics.mean(report.waiting for report in matrix.reports[count // 5 :])


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
