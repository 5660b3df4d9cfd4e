"""Sketches: a few numbers of an update, which differ where two copies of it differ.

A sketch is the norm and three signed sums. The server makes it of what it received, with signs that only it knows.
Where a code mixes shards, only the client has the update of a single one, so it sends *figures*: a sketch with public
signs for each of its shards. Signed sums are linear, so figures must add up to those of the coded vector.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..codes import P
from .packing import sum_of_squares, view

__all__ = ["SUMS", "Sketch", "Sketcher", "add_up", "figures_of", "folded_sums"]

#: Number of signed sums.
SUMS = 3
_FOLD = 1024  # entries after which the public signs repeat
_CACHED = 1 << 16  # entries that fit a core's cache, a multiple of _FOLD
_WHOLE = 16  # pieces of _CACHED entries up to which all enter the signed sums; of more, one in _ONE_IN does
_ONE_IN = 16
_ROUNDING = 1e-3  # relative to the norms: how far figures may be from sums of float32 numbers
_TINY = 1e-30


@dataclass(frozen=True)
class Sketch:
    """What one copy of an update looks like.

    Attributes:
        numbers: The norm and signed sums, or a client's own figures.
        weight: Number of examples.
        form: Names, dtypes and shapes, and a digest of entries that are no floats.
    """

    numbers: tuple[float, ...]
    weight: float = 0.0
    form: Hashable = ()

    def apart(self, other: Sketch) -> float:
        """Returns the relative difference of two copies; infinity if their names, shapes or counters differ."""
        if self.form != other.form or len(self.numbers) != len(other.numbers):
            return math.inf
        norms = max(abs(self.numbers[0]), abs(other.numbers[0])) if self.numbers else 0.0
        pairs = zip(self.numbers, other.numbers, strict=True)
        return max(_relative(self.weight, other.weight), *(_relative(x, y, norms) for x, y in pairs), 0.0)


def _relative(x: float, y: float, scale: float = 0.0) -> float:
    return abs(x - y) / max(abs(x), abs(y), scale, _TINY)


class Sketcher:
    """Makes sketches with secret signs, which are fresh for each object unless a key is given.

    The norm is taken of all entries. Of an array with more than a million entries, the signed sums take a sixteenth, in
    pieces at secret places, so that sketching stays cheap beside decoding.

    Args:
        key: Key of the signs, for sketches that several processes compare; drawn if None.
    """

    def __init__(self, key: int | None = None) -> None:
        self._key = secrets.randbits(63) if key is None else key
        self._drawn: dict[tuple[int, int], tuple[NDArray[np.float64], dict[int, NDArray[np.float32]]]] = {}

    def of_vector(self, values: NDArray[Any], weight: float, form: Hashable, *, square: float | None = None) -> Sketch:
        """Returns the sketch of a coded vector, floats or uint32 numbers of a prime field, shape (d,).

        Args:
            values: The vector.
            weight: Number of examples.
            form: Whatever else two copies must have in common.
            square: Sum of the squares, if it is known.
        """
        square, sums = self._scan(values, 0, square)
        return Sketch((math.sqrt(square), *sums.tolist()), weight, form)

    def of_records(self, content: RecordDict, weight_key: str) -> Sketch:
        """Returns the sketch of records as a function returned them.

        Floats enter the numbers. Names, shapes and all other entries of arrays enter the form. Metrics other than the
        weight, and ConfigRecords, may differ between holders, as times do.
        """
        square, sums, weight = 0.0, np.zeros(SUMS), 0.0
        form = hashlib.sha256()
        for name, record in sorted(content.items()):
            form.update(repr((name, type(record).__name__)).encode())
            if isinstance(record, MetricRecord) and isinstance(record.get(weight_key), int | float):
                weight = float(record[weight_key])  # type: ignore[arg-type]
            if not isinstance(record, ArrayRecord):
                continue
            for key in sorted(record):
                values: NDArray[Any] = np.asarray(view(record[key]))
                form.update(repr((key, str(values.dtype), values.shape)).encode())
                if values.dtype.kind != "f":
                    form.update(np.ascontiguousarray(values).data)
                    continue
                salt = int.from_bytes(hashlib.sha256(repr((name, key)).encode()).digest()[:8], "little")
                more, these = self._scan(values.reshape(-1), salt)
                square, sums = square + more, sums + these
        return Sketch((math.sqrt(square), *sums.tolist()), weight, form.hexdigest())

    def _scan(self, values: NDArray[Any], salt: int, square: float | None = None) -> tuple[float, NDArray[np.float64]]:
        """Returns the sum of squares and the signed sums."""
        if (values.size, salt) not in self._drawn:
            self._drawn[values.size, salt] = self._draw(values.size, salt)
        signs, turns = self._drawn[values.size, salt]
        if square is None and values.dtype.kind == "f" and values.dtype.itemsize >= 4:
            square = sum_of_squares(values)
        known = square is not None and math.isfinite(square)
        total = square if square is not None and known else 0.0
        folded = np.zeros(_FOLD)
        with np.errstate(all="ignore"):
            for number in turns if known else range(-(-values.size // _CACHED)):
                piece = _as_floats(values[number * _CACHED : (number + 1) * _CACHED])
                if not known:
                    piece = piece.astype(np.float64)
                    total += float(np.dot(piece, piece))
                if number in turns:
                    rows = piece[: piece.size // _FOLD * _FOLD].reshape(-1, _FOLD)
                    folded += turns[number][: len(rows)] @ rows
                    rest = piece[rows.size :]
                    folded[: rest.size] += turns[number][-1] * rest
            return total, signs @ folded

    def _draw(self, size: int, salt: int) -> tuple[NDArray[np.float64], dict[int, NDArray[np.float32]]]:
        """Returns the signs of columns, and for each piece that enters the signed sums, those of its rows."""
        random = np.random.Generator(np.random.Philox(key=[self._key, salt]))
        pieces = -(-size // _CACHED)
        chosen = np.flatnonzero(random.random(pieces) < (1.0 if pieces <= _WHOLE else 1 / _ONE_IN))
        turns = random.choice(np.array([-1.0, 1.0], np.float32), size=(len(chosen), _CACHED // _FOLD + 1))
        signs = random.choice([-1.0, 1.0], size=(SUMS, _FOLD))
        return signs, dict(zip(chosen.tolist(), turns, strict=True))


def _as_floats(piece: NDArray[Any]) -> NDArray[Any]:
    """Returns numbers as floats that are multiplied fast; a number of a prime field becomes its signed one."""
    if piece.dtype.kind == "u":
        signed = piece.astype(np.float64)
        signed[piece > P // 2] -= P
        return signed
    return piece.astype(np.float32) if piece.dtype.itemsize < 4 else piece


# ---- A client's figures ----


def figures_of(update: NDArray[np.floating], m: int) -> tuple[float, ...]:
    """Returns the norm of an update and the signed sums of each of its m blocks; zeros if one is not finite."""
    length = -(-update.size // m)
    square = sum_of_squares(update)
    if not math.isfinite(square):  # a float32 product may overflow where a float64 one does not
        with np.errstate(all="ignore"):
            square = float(np.square(update, dtype=np.float64).sum())
    values = [math.sqrt(square)]
    for block in range(m):
        values += folded_sums(update[block * length : (block + 1) * length], np.float64).tolist()
    # Zeros keep the figures valid. An update that is not finite is rejected with its own reason.
    return tuple(values) if all(map(math.isfinite, values)) else (0.0,) * len(values)


def folded_sums(values: NDArray[Any], dtype: type[np.float64 | np.int64]) -> NDArray[Any]:
    """Returns the sums of a vector with the public signs, shape (3,); they are exact for whole numbers and int64."""
    whole = values.size // _FOLD * _FOLD
    folded = np.zeros(_FOLD, dtype)
    with np.errstate(all="ignore"):
        if whole:
            folded += values[:whole].reshape(-1, _FOLD).sum(axis=0, dtype=dtype)
        folded[: values.size - whole] += values[whole:]
        return np.asarray(_signs().astype(dtype) @ folded)


@lru_cache(maxsize=1)
def _signs() -> NDArray[np.float64]:
    return np.random.Generator(np.random.Philox(0)).choice([-1.0, 1.0], size=(SUMS, _FOLD))


def add_up(
    vector: NDArray[np.floating], coefficients: Sequence[Sequence[float]], figures: Sequence[Sequence[float]]
) -> bool:
    """Returns whether a client's figures are those of updates that add up to its coded vector.

    Args:
        vector: The coded vector, shape (ceil(d / m),).
        coefficients: For each shard, its m coefficients.
        figures: For each shard, what `figures_of` returned.
    """
    expected, scale = np.zeros(SUMS), _TINY
    for mine, (norm, *sums) in zip(coefficients, figures, strict=True):
        size = sum(map(abs, mine))
        expected += np.asarray(mine) @ np.asarray(sums).reshape(len(mine), SUMS)
        scale += size * max(abs(norm), *map(abs, sums))
    return bool(np.abs(folded_sums(vector, np.float64) - expected).max() <= _ROUNDING * scale)
