"""Adding up many long vectors at memory speed: what decoding is, once the decoding vector is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidCode

__all__ = ["combine"]

# 64 Ki entries: one block of the running sum and one of a reply stay in a core's cache.
_BLOCK = 1 << 16


def combine(
    replies: Sequence[NDArray[np.floating]] | NDArray[np.floating],
    coefficients: NDArray[np.float64],
    *,
    order: Sequence[int] | None = None,
) -> NDArray[np.floating]:
    """`sum_t coefficients[t] * replies[t]`, block by block so that the running sum stays in cache.

    Replies are added in ascending `order` (worker numbers), so that the result does not depend on who came
    first; those with coefficient 0 are not read, and coefficient 1 copies without rounding.

    Args:
        replies: One vector of equal length and dtype (float32 or float64) each.
        coefficients: Shape (len(replies),), or (len(replies), m): then block l of the result is the
            combination with column l.
        order: One number a reply; None keeps the order given.

    Returns:
        Shape (m * length,).
    """
    a = np.asarray(coefficients, np.float64)
    a = a.reshape(len(replies), -1) if len(replies) else a.reshape(0, 1)
    if not len(replies):
        raise InvalidCode("There is no reply to combine.")
    sequence = range(len(replies)) if order is None else np.argsort(order, kind="stable")
    length = replies[0].size
    out = np.empty(a.shape[1] * length, replies[0].dtype)
    scratch = np.empty(min(_BLOCK, max(length, 1)), out.dtype)
    for column in range(a.shape[1]):
        used = [(replies[t], out.dtype.type(a[t, column])) for t in sequence if a[t, column] != 0]
        for start in range(0, length, _BLOCK):
            stop = min(start + _BLOCK, length)
            block = out[column * length + start : column * length + stop]
            if not used:
                block[:] = 0
            for position, (reply, coefficient) in enumerate(used):
                piece = reply[start:stop]
                if position == 0:
                    np.multiply(piece, coefficient, out=block)
                elif coefficient == 1:
                    block += piece
                else:
                    block += np.multiply(piece, coefficient, out=scratch[: stop - start])
    return out
