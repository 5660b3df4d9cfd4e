"""Blocks of matrices: cut, combined, multiplied and put together again at memory speed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..codes import P, combine_mod, lift_mod, matmul_mod
from ..errors import InvalidCode, Overflow

__all__ = ["as_operand", "check_range", "combine_blocks", "join", "multiply", "split"]

_HALF = (P - 1) // 2
# Inner dimension that is multiplied at once over the field: sums stay exact in float64.
_INNER = 1 << 19
# Numbers of the answers that are combined at once, and multiply-adds of one call of BLAS: above these OpenBLAS starts
# threads, which for such small products wait for each other.
_CACHED, _ONE_THREAD = 1 << 17, 1 << 17
# Numbers from which a second thread of ours pays for its start.
_WORTH_THREADS = 1 << 22
_MAX_THREADS = 4


def as_operand(values: ArrayLike, name: str) -> NDArray[Any]:
    """A matrix of finite real numbers that is not empty; a vector becomes a column, except as A."""
    array = np.asarray(values)
    if array.ndim != 2 and (array.ndim != 1 or name == "A"):
        needed = "(rows, inner)" if name == "A" else "(inner, columns) or (inner,)"
        raise InvalidCode(f"{name} has shape {array.shape}; a product needs {needed}.")
    if array.dtype.kind not in "iubf":
        raise InvalidCode(f"{name} has dtype {array.dtype}; only real numbers can be multiplied.")
    if not array.size:
        raise InvalidCode(f"{name} has shape {array.shape}: there is nothing to multiply.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidCode(f"{name} has entries that are not finite.")
    return array.reshape(len(array), -1)


def check_range(a: NDArray[Any], b: NDArray[Any]) -> None:
    """Every entry of `a @ b` fits the field: by Cauchy-Schwarz, the longest row times the longest column.

    Raises:
        Overflow: It might not.
    """
    row = float(np.sqrt(np.einsum("ij,ij->i", a, a, dtype=np.float64).max()))
    column = float(np.sqrt(np.einsum("ij,ij->j", b, b, dtype=np.float64).max()))
    largest = max(float(np.abs(a).max()), float(np.abs(b).max()))
    if row * column * (1 + 1e-9) > _HALF or largest > _HALF:
        raise Overflow(
            f"An entry of the product may reach {row * column:.4g} units; over the field it must stay within "
            f"(p - 1) / 2 = {_HALF}. Scale A or B down, or take fewer fraction_bits."
        )


def split(a: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """A matrix in rows x columns blocks of equal size, filled up with zeros; shape (rows * columns, height, width)."""
    height, width = -(-a.shape[0] // rows), -(-a.shape[1] // columns)
    if a.shape != (height * rows, width * columns):
        padded = np.zeros((height * rows, width * columns), a.dtype)
        padded[: a.shape[0], : a.shape[1]] = a
        a = padded
    blocks = a.reshape(rows, height, columns, width).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks).reshape(rows * columns, height, width)


def combine_blocks(coefficients: NDArray[Any], blocks: NDArray[Any]) -> NDArray[Any]:
    """`sum_t coefficients[i, t] blocks[t]` for every i; a single block with coefficient 1 throughout is not copied.

    Integer coefficients are modulo the field's prime; the result is then uint32.
    """
    count, (_, *shape) = len(coefficients), blocks.shape
    flat = blocks.reshape(len(blocks), -1)
    if coefficients.dtype.kind == "i":
        return combine_mod(flat, coefficients.T).reshape(count, *shape).astype(np.uint32)
    if len(blocks) == 1 and (coefficients == 1).all():
        return np.broadcast_to(blocks, (count, *shape))
    if coefficients.dtype.kind == "c":
        parts = [part.astype(flat.dtype) @ flat for part in (coefficients.real, coefficients.imag)]
        return np.asarray(parts[0] + 1j * parts[1]).reshape(count, *shape)
    return np.asarray(coefficients.astype(flat.dtype) @ flat).reshape(count, *shape)


def multiply(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """`left @ right`; uint32 blocks are multiplied modulo the field's prime, exactly."""
    if left.dtype != np.uint32:
        with np.errstate(over="ignore", invalid="ignore"):  # whoever uses the answer looks whether it is finite
            return np.asarray(left @ right)
    total = np.zeros((left.shape[0], right.shape[1]), np.int64)
    for start in range(0, left.shape[1], _INNER):
        part = slice(start, start + _INNER)
        total += matmul_mod(left[:, part].astype(np.int64), right[part].astype(np.int64))
    return (total % P).astype(np.uint32)


def join(answers: Sequence[NDArray[Any]], coefficients: NDArray[Any]) -> NDArray[Any]:
    """Blocks `C_cl = sum_t coefficients[t, c, l] answers[t]` put together: shape (p * height, q * width).

    Complex coefficients belong to real products: the real part is taken. Over the field the numbers are lifted to
    their signed form, int64.
    """
    count, p, q = coefficients.shape
    height, width = answers[0].shape
    if coefficients.dtype.kind == "i":
        flat = combine_mod([x.reshape(-1) for x in answers], coefficients.reshape(count, -1))
        blocks = lift_mod(flat).reshape(p, q, height, width)
        return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3)).reshape(p * height, q * width)
    if coefficients.dtype.kind == "c":
        # Re(a y) = Re a Re y - Im a Im y: the real and the imaginary parts are answers of their own.
        parts = [part for x in answers for part in (x.real, x.imag)]
        signed = np.stack([coefficients.real, -coefficients.imag], axis=1)
        return join(parts, signed.reshape(2 * count, p, q))
    dtype = answers[0].dtype
    out = np.empty((p * height, q * width), dtype)
    factors = np.ascontiguousarray(coefficients.reshape(count, p * q).T, dtype)
    target = out.reshape(p, height, q, width)
    threads = min(_MAX_THREADS, os.cpu_count() or 1) if count * height * width >= _WORTH_THREADS else 1
    piece = max(_ONE_THREAD // factors.size, 8)
    across = min(width, max(_CACHED // count // piece, 1) * piece)
    down = max(_CACHED // count // across, 1)
    strips = [(top, first) for top in range(0, height, down) for first in range(0, width, across)]

    def work(mine: Sequence[tuple[int, int]]) -> None:
        size = -(-down * across // piece) * piece
        gathered, combined = np.zeros((count, size), dtype), np.empty((p * q, size), dtype)
        # One call of BLAS for each piece: the same numbers, seen as a stack of narrow matrices.
        stack = gathered.reshape(count, -1, piece).transpose(1, 0, 2)
        result = combined.reshape(p * q, -1, piece).transpose(1, 0, 2)
        with np.errstate(over="ignore", invalid="ignore"):
            for top, first in mine:
                part = (slice(top, top + down), slice(first, first + across))
                rows, columns = answers[0][part].shape
                used = rows * columns
                for row, answer in zip(gathered, answers, strict=True):
                    row[:used].reshape(rows, columns)[:] = answer[part]
                np.matmul(factors, stack, out=result)
                target[:, part[0], :, part[1]] = combined[:, :used].reshape(p, q, rows, columns).transpose(0, 2, 1, 3)

    if threads == 1:
        work(strips)
        return out
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, strips[number::threads]) for number in range(threads)]:
            done.result()
    return out
