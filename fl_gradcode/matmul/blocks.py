"""Splits matrices into blocks, and combines, multiplies and joins the blocks efficiently."""

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
# Largest inner dimension that is multiplied at once over the field, so that sums stay exact in float64.
_INNER = 1 << 19
# Number of entries that are combined at once, and number of multiply-adds in one call of BLAS. With more of them,
# OpenBLAS starts threads, which wait for each other in such small products.
_CACHED, _ONE_THREAD = 1 << 17, 1 << 17
# Number of entries from which a second Python thread pays off.
_WORTH_THREADS = 1 << 22
_MAX_THREADS = 4


def as_operand(values: ArrayLike, name: str) -> NDArray[Any]:
    """Returns the values as a matrix, after checking that they are finite real numbers and not empty.

    A vector becomes a column, except as A, where it is refused.

    Raises:
        InvalidCode: The shape, the dtype or an entry is not allowed.
    """
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
    """Check that every entry of `a @ b` fits the field, by the longest row times the longest column (Cauchy-Schwarz).

    Raises:
        Overflow: An entry might not fit.
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
    """Returns a matrix split into blocks of equal size, shape (rows * columns, height, width), padded with zeros."""
    height, width = -(-a.shape[0] // rows), -(-a.shape[1] // columns)
    if a.shape != (height * rows, width * columns):
        padded = np.zeros((height * rows, width * columns), a.dtype)
        padded[: a.shape[0], : a.shape[1]] = a
        a = padded
    blocks = a.reshape(rows, height, columns, width).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks).reshape(rows * columns, height, width)


def combine_blocks(coefficients: NDArray[Any], blocks: NDArray[Any]) -> NDArray[Any]:
    """Returns `sum_t coefficients[i, t] blocks[t]` for every i, shape (len(coefficients), height, width).

    Integer coefficients are taken modulo the field's prime, and the result is then uint32. If there is a single block
    and all coefficients are 1, the block is not copied.
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
    """Returns `left @ right`; uint32 blocks are multiplied exactly, modulo the field's prime."""
    if left.dtype != np.uint32:
        with np.errstate(over="ignore", invalid="ignore"):  # the server checks whether an answer is finite
            return np.asarray(left @ right)
    total = np.zeros((left.shape[0], right.shape[1]), np.int64)
    for start in range(0, left.shape[1], _INNER):
        part = slice(start, start + _INNER)
        total += matmul_mod(left[:, part].astype(np.int64), right[part].astype(np.int64))
    return (total % P).astype(np.uint32)


def join(answers: Sequence[NDArray[Any]], coefficients: NDArray[Any]) -> NDArray[Any]:
    """Returns the product joined from blocks `C_cl = sum_t coefficients[t, c, l] answers[t]`.

    With complex coefficients, the product is real, and the real part is returned. Over the field, the result is int64
    with signs.

    Args:
        answers: The answers, each of shape (height, width).
        coefficients: The decoding coefficients, shape (len(answers), p, q).

    Returns:
        The product, shape (p * height, q * width).
    """
    count, p, q = coefficients.shape
    height, width = answers[0].shape
    if coefficients.dtype.kind == "i":
        flat = combine_mod([x.reshape(-1) for x in answers], coefficients.reshape(count, -1))
        blocks = lift_mod(flat).reshape(p, q, height, width)
        return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3)).reshape(p * height, q * width)
    if coefficients.dtype.kind == "c":
        # Re(a y) = Re a Re y - Im a Im y, so the real and the imaginary parts are combined as separate answers.
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
        # Views as stacks of narrow matrices, so that BLAS is called once for each piece.
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
