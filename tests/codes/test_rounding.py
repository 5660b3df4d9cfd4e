"""The bound of rounding errors: never below the true error of coding and decoding, and of its order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode.codes import (
    GradientCode,
    IncrementalDecoder,
    cyclic_mds,
    cyclic_repetition,
    for_assignment,
    fractional_repetition,
    rounding_bound,
    uncoded,
    vandermonde,
)
from fl_gradcode.protocol.packing import encode_row


def universal(n: int, s: int, m: int) -> GradientCode:
    held = np.zeros((n, n), bool)
    for shard in range(n):
        held[[(shard + t) % n for t in range(s + m)], shard] = True
    return for_assignment(held, s=s, m=m)


F32 = np.dtype(np.float32)
CODES = [
    uncoded(1),
    uncoded(10),
    uncoded(60),
    fractional_repetition(12, 2),
    fractional_repetition(100, 4),
    *(fractional_repetition(12, 3, m=m) for m in (2, 3)),
    fractional_repetition(24, 8, m=8),
    cyclic_repetition(10, 2, rng=np.random.default_rng(1)),
    cyclic_repetition(16, 4, rng=np.random.default_rng(1)),
    cyclic_mds(8, 3),
    vandermonde(7, 2),
    *(universal(*sizes) for sizes in ((8, 2, 1), (8, 2, 2), (10, 2, 3), (20, 3, 2), (12, 0, 12), (24, 2, 8))),
]


def updates(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    if kind == "alike":  # all shards pull in one direction, as at the beginning of training
        return np.tile(rng.random(shape[1]), (shape[0], 1))
    normal = rng.standard_normal(shape)
    if kind == "sizes":
        return normal * 10.0 ** rng.uniform(-4, 4, (shape[0], 1))
    if kind == "entries":
        return normal * 10.0 ** rng.uniform(-12, 12, shape[1])
    return {"small": normal * 1e-20, "large": normal * 1e20, "positive": np.abs(normal)}.get(kind, normal)


def true_error(
    code: GradientCode, x: NDArray[Any], weights: NDArray[Any], a: NDArray[np.float64]
) -> tuple[float, float]:
    """The error of the mean as clients and server compute it, and what it is relative to: the size of the updates."""
    dtype = x.dtype.type
    replies = []
    for worker in range(code.n):
        total = None
        for shard in code.shards_of(worker):
            total = encode_row(total, x[shard] * dtype(weights[shard]), tuple(code.blocks[worker, shard]))
        replies.append(np.zeros(-(-x.shape[1] // code.m), x.dtype) if total is None else total)
    rows = a.reshape(code.n, -1)
    used = [int(i) for i in np.flatnonzero(rows.any(axis=1))]
    decoded = code.numbers.decode([replies[i] for i in used], rows[used], order=code.order_of(used))
    mean = decoded[: x.shape[1]] / dtype(weights.sum())
    whole = x.astype(np.longdouble) * weights[:, None] / weights.sum()
    return float(np.linalg.norm(mean - whole.sum(axis=0))), float(np.linalg.norm(whole))


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_the_true_error_is_never_above_the_bound_and_the_bound_is_of_its_order(code: GradientCode) -> None:
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for kind in ("normal", "alike", "sizes", "entries", "small", "large", "positive"):
        for dtype, size in ((np.float32, 7), (np.float32, 2000), (np.float64, 300)):
            if dtype == np.float32 and kind in ("small", "large"):  # 1e-20 / 1e4 twice is above float32's smallest
                size = 300
            for _ in range(4):
                decoder = IncrementalDecoder(code)
                decoder.update([int(i) for i in rng.permutation(code.n)[: code.n - code.s]])
                a = decoder.vector()
                assert a is not None
                x = updates(kind, (code.k, size), rng).astype(dtype)
                error, scale = true_error(code, x, rng.integers(1, 500, code.k), a)
                bound = rounding_bound(code, a, np.dtype(dtype)) * scale
                assert error <= bound, (kind, dtype)
                if size >= 300 and dtype == np.float32 and code.n > 1:
                    found.setdefault(kind, []).append(bound / error)
    # Where many entries and shards are alike in size, the bound is not far above; 60 shards take part in some.
    assert not found or (np.median(found["normal"]) < 100 and np.median(found["positive"]) < 100)


def test_more_roundings_and_larger_coefficients_raise_the_bound() -> None:
    plain = rounding_bound(uncoded(12), np.ones(12), F32)
    assert rounding_bound(uncoded(12), np.ones(12), F32, further=5) > plain
    for m in (2, 3):
        code = fractional_repetition(12, 3, m=m)
        decoder = IncrementalDecoder(code)
        decoder.update(range(12))
        a = decoder.vector()
        assert a is not None and rounding_bound(code, a, F32) > plain
        assert rounding_bound(code, 3 * a, F32) > 1.5 * rounding_bound(code, a, F32)
