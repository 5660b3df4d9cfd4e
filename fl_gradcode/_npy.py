"""Arrays in NumPy's file format, as bytes or in a .npz file, read without trusting what they say about themselves.

`numpy.load` reads a header with Python's own parser, and allocates what it asks for before it looks whether there is as
much.
"""

from __future__ import annotations

import io
import math
import os
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._files import open_file

__all__ = ["array_of", "loaded", "read_npz"]

_USUAL = 128  # bytes of a header of plain arrays
_LONGEST_HEADER = 4096  # bytes; those of plain arrays have less than 200


def array_of(data: bytes) -> NDArray[np.generic]:
    """Returns the array in the bytes of a .npy file, read-only and without a copy.

    Raises:
        ValueError: They are no array in NumPy's format (version 1 or 2), or one of Python objects, or do not fit its
            shape.
    """
    offset, shape, order, dtype = _usual_form(data[:_USUAL]) or _form(data)
    size = math.prod(shape)
    if not dtype.itemsize or len(data) - offset != dtype.itemsize * size:
        raise ValueError("an array's bytes do not fit its shape")
    values: NDArray[np.generic] = np.frombuffer(data, dtype, size, offset)
    return values if len(shape) == 1 else values.reshape(shape, order=order)


def loaded(data: bytes) -> NDArray[Any]:
    """Returns what `numpy.load` reads from the bytes of a .npy file, which may be written to.

    Raises:
        ValueError: They are no array in NumPy's format, or one of Python objects.
    """
    try:
        return array_of(data).copy(order="K")
    except ValueError:  # NumPy says what is wrong with them
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))


_Form = tuple[int, tuple[int, ...], Literal["C", "F"], np.dtype[np.generic]]


@lru_cache(maxsize=1024)
def _usual_form(start: bytes) -> _Form | None:
    """Returns the form of arrays that begin so, or None if a header is shorter or longer than this."""
    length = 10 + int.from_bytes(start[8:10], "little")
    return _form(start) if start[6:8] == b"\x01\x00" and length == len(start) == _USUAL else None


def _form(data: bytes) -> _Form:
    """Returns the number of bytes before the values, their shape and order, and their dtype."""
    if data[:6] != b"\x93NUMPY" or data[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError("an array is not in NumPy's format")
    digits = 2 if data[6] == 1 else 4
    length = int.from_bytes(data[8 : 8 + digits], "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"an array's header has {length} bytes")
    offset = 8 + digits + length
    shape, fortran_order, dtype = _header(data[:offset])
    return offset, shape, "F" if fortran_order else "C", dtype


@lru_cache(maxsize=1024)
def _header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Returns shape, whether the order is Fortran's, and dtype.

    The result is cached, because NumPy takes longer to parse this text than to read a small array.
    """
    stream = io.BytesIO(header)
    form = np.lib.format
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of text that is no header of any NumPy
            read = form.read_array_header_1_0 if form.read_magic(stream) == (1, 0) else form.read_array_header_2_0
            shape, fortran_order, dtype = read(stream)
    except Exception as error:  # Python's own parser reads the text, which can raise almost anything
        raise ValueError(f"an array's header cannot be read ({type(error).__name__})") from None
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are refused")
    if len(shape) > 32 or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"an array has the shape {str(shape)[:50]}")
    return shape, fortran_order, dtype


def read_npz(path: Path, most: int) -> dict[str, NDArray[Any]]:
    """Returns the arrays in a .npz file by name.

    Args:
        path: The file.
        most: Largest size of all arrays together, in bytes, which is checked before they are unpacked.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is no .npz file, is damaged, or its arrays are larger.
    """
    with os.fdopen(open_file(path), "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                size = sum(one.file_size for one in archive.infolist())
                if size > most:
                    raise ValueError(f"its arrays take {size} bytes, more than {most}")
                return {name.removesuffix(".npy"): array_of(archive.read(name)) for name in archive.namelist()}
        except (OSError, ValueError):
            raise
        except Exception as error:  # a damaged archive can raise almost anything
            raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from error
