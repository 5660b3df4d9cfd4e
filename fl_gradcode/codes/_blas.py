"""Computes `y += a * x` in place with BLAS's axpy, in one pass and without holding the interpreter lock.

SciPy exports axpy for compiled code (`scipy.linalg.cython_blas`), from where ctypes calls it. NumPy alone would need
two passes. `scipy.linalg.blas` would hold the interpreter lock, so that threads would wait for each other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_blas

__all__ = ["Scaled"]

_ONE = ctypes.c_int(1)
_STEP = ctypes.addressof(_ONE)


class Scaled:
    """A scaled vector `a * x`, which can be added to other vectors piece by piece.

    Args:
        x: The vector, float32 or float64.
        a: The factor.
    """

    def __init__(self, x: NDArray[np.floating], a: float) -> None:
        self.x, self.a = x, x.dtype.type(a)
        self._compiled = _compiled(x.dtype.char) if x.flags.c_contiguous and x.flags.aligned else None
        if self._compiled is not None:
            self._factor = self._compiled[1](a)
            self._a, self._x = ctypes.addressof(self._factor), x.ctypes.data

    def add_to(self, y: NDArray[np.floating], first: int, last: int) -> None:
        """Compute `y[first:last] += a * x[first:last]`."""
        y[first:last] += self.x[first:last] * self.a

    @property
    def compiled(self) -> bool:
        """Whether `add_at` can be called."""
        return self._compiled is not None

    def add_at(self, address: int, first: int, last: int) -> None:
        """Do the same as `add_to` for a contiguous y of the same dtype that begins at this memory address."""
        assert self._compiled is not None
        offset = first * self.x.itemsize
        size = ctypes.c_int(last - first)
        self._compiled[0](ctypes.addressof(size), self._a, self._x + offset, _STEP, address + offset, _STEP)


@lru_cache(maxsize=2)
def _compiled(kind: str) -> tuple[Callable[..., None], type[Any]] | None:
    """Returns the axpy function and its C number type, or None if SciPy does not export the expected signature."""
    known: dict[str, tuple[str, type[Any]]] = {"f": ("saxpy", ctypes.c_float), "d": ("daxpy", ctypes.c_double)}
    name, number = known[kind]
    capsule = getattr(cython_blas, "__pyx_capi__", {}).get(name)
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = api.PyCapsule_GetName(capsule) if capsule is not None else b""
    parts = signature.split(b",")
    # (int *n, number *a, number *x, int *stride, number *y, int *stride), with 32-bit integers
    if len(parts) != 6 or parts[0] != b"void (int *" or parts[3].strip() != b"int *":
        return None
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6)(api.PyCapsule_GetPointer(capsule, signature)), number
