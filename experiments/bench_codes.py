"""Benchmarks of the mathematics: decoding vectors, the prime field against floats, decoding against memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fl_gradcode import GradientCode
from fl_gradcode.codes import REALS, P, PrimeField, combine, for_assignment, reed_solomon
from fl_gradcode.protocol import FixedPointEncoding, encode_row

__all__ = ["bandwidth", "field", "vectors"]

_console = Console()


def vectors(n: int = 1000, s: int = 100, repeats: int = 15) -> None:
    """Server: the decoding vector for s random stragglers."""
    neighbours = [[(i + t) % n for t in range(s + 3)] for i in range(n)]
    makers: dict[str, tuple[str, Callable[[], GradientCode]]] = {
        "universal": ("20", lambda: for_assignment(neighbours, s=s, tries=1)),
        "Reed-Solomon over a field": ("2", lambda: reed_solomon(n, s)),
    }
    for name, (asked, make) in makers.items():
        started = time.perf_counter()
        code = make()
        design = time.perf_counter() - started
        started = time.perf_counter()
        code.decodable([])
        code.decoding_vector(range(s, n))
        first = time.perf_counter() - started
        rng = np.random.default_rng(0)
        times = []
        for _ in range(repeats):
            survivors = rng.permutation(n)[: n - s].tolist()
            started = time.perf_counter()
            code.decoding_vector(survivors)
            times.append(time.perf_counter() - started)
        median = statistics.median(times)
        _console.print(
            f"{name}, n = {n}, s = {s}: decoding vector [bold]{1e3 * median:.2f} ms[/] (asked: about {asked}); once a "
            f"code {design:.2f} s to make it and {first:.2f} s for the first."
        )


def field(d: int = 10**6, n: int = 100, s: int = 10, repeats: int = 7) -> None:
    """One worker's encoding and the server's decoding of d entries over the prime field, against float64."""
    load = s + 1
    updates = list(np.random.default_rng(0).standard_normal((load, d)))
    coefficients = np.random.default_rng(0).integers(1, P, max(load, n))
    replies = {
        "field": list(np.random.default_rng(0).integers(0, P, (n - s, d), dtype=np.uint32)),
        "float": list(np.random.default_rng(0).standard_normal((n - s, d))),
    }
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        f"one worker encodes {load} shards": (
            lambda: _encode_over_field(load, updates, coefficients),
            lambda: _encode_floats(updates, coefficients / P),
        ),
        f"the server decodes {n - s} replies": (
            lambda: PrimeField().decode(replies["field"], coefficients[: n - s]),
            lambda: REALS.decode(replies["float"], coefficients[: n - s] / P),
        ),
    }
    for what, (over_field, over_reals) in works.items():
        ours, theirs = [], []
        for _ in range(repeats):  # in turns, so that both meet the machine's moods
            ours.append(_seconds(over_field))
            theirs.append(_seconds(over_reals))
        a, b = statistics.median(ours), statistics.median(theirs)
        _console.print(
            f"{what}, d = {d:.0e}: field {1e3 * a:.0f} ms, float64 {1e3 * b:.0f} ms, ratio [bold]{a / b:.2f}[/] "
            "(asked: at most 3)."
        )


def _encode_over_field(
    load: int, updates: list[NDArray[np.float64]], coefficients: NDArray[np.int64]
) -> NDArray[np.uint32]:
    carrier = FixedPointEncoding(PrimeField(), load)
    total: NDArray[Any] | None = None
    for update, coefficient in zip(updates, coefficients, strict=False):
        total = carrier.add(total, update, (int(coefficient),))
    assert total is not None
    return carrier.sent(total)


def _encode_floats(updates: list[NDArray[np.float64]], coefficients: NDArray[np.float64]) -> NDArray[np.floating]:
    total: NDArray[np.floating] | None = None
    for update, coefficient in zip(updates, coefficients, strict=False):
        total = encode_row(total, update, (float(coefficient),))
    assert total is not None
    return total


def bandwidth(replies: int = 90, d: int = 11_700_000, repeats: int = 5) -> None:
    """Decoding with coefficients of both signs, against reading the same bytes once."""
    values = [np.full(d, i, np.float32) for i in range(replies)]
    coefficients = np.random.default_rng(0).standard_normal(replies)
    size = replies * values[0].nbytes
    decoding, reading = [], []
    for _ in range(repeats):  # in turns, so that both meet the machine's moods
        reading.append(_seconds(lambda: _read(values)))
        decoding.append(_seconds(lambda: combine(values, coefficients)))
    ours, theirs = size / statistics.median(decoding) / 1e9, size / statistics.median(reading) / 1e9
    _console.print(
        f"{replies} replies of {d / 1e6:.1f} M float32: decoding reads {ours:.1f} GB/s, plain reading {theirs:.1f} "
        f"GB/s: [bold]{ours / theirs:.0%}[/] (asked: at least 60 %)."
    )


def _read(values: list[np.ndarray[tuple[int], np.dtype[np.float32]]]) -> None:
    """All bytes once, with as many threads as there are cores; a dot product is the fastest reader NumPy has."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda x: float(np.dot(x, x)), values))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
