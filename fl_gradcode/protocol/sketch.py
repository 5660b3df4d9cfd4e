"""Sketches: a few numbers of an update, which differ where two copies of it differ.

A sketch is the norm and three signed sums. The server makes it of what it received, with signs that only it knows.
Where a code mixes shards, only the client has the update of a single one, so it sends *figures*: a sketch with public
signs for each of its shards. Signed sums are linear, so figures must add up to those of the coded vector.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..codes import P
from .packing import sum_of_squares, view

__all__ = ["SUMS", "Sketch", "Sketcher", "add_up", "figures_of", "folded_sums", "rounding_of"]

#: Number of signed sums.
SUMS = 3
_FOLD = 1024  # entries after which the public signs repeat
_FEW = 256  # entries that are scanned with fewer calls of NumPy
_CACHED = 1 << 16  # entries that fit a core's cache, a multiple of _FOLD
_WHOLE = 16  # pieces of _CACHED entries up to which all enter the signed sums
_ONE_IN = 32  # of more pieces, one in so many does, but never fewer than _FEWEST
_FEWEST = 8
_ROUNDING = 1e-3  # relative to the norms: how far figures may be from sums of float32 numbers
_TINY = 1e-30
_BFLOAT16_UNIT = 2.0**-7


@dataclass(frozen=True)
class Sketch:
    """What one copy of an update looks like.

    Attributes:
        norm: The norm of the update; None if it is not known.
        sums: Its signed sums, or whatever else two copies must have in common as numbers.
        weight: Number of examples.
        form: Names, dtypes and shapes, and a digest of entries that are no floats.
        rounding: Norm of what rounding the model's arrays to their dtypes may change in the update.
    """

    norm: float | None
    sums: tuple[float, ...]
    weight: float = 0.0
    form: Hashable = ()
    rounding: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(map(math.isfinite, (self.norm or 0.0, *self.sums, self.weight, self.rounding)))

    def apart(self, other: Sketch) -> float:
        """Returns the relative difference of two copies, beyond what rounding may cause.

        It is infinity if their names, shapes or counters differ, or a number is not finite.
        """
        if self.form != other.form or len(self.sums) != len(other.sums) or not (self.finite and other.finite):
            return math.inf
        norms = [norm for norm in (self.norm, other.norm) if norm is not None]
        scale, slack = max(norms, default=0.0), max(self.rounding, other.rounding)
        pairs = [*zip(self.sums, other.sums, strict=True), *([(norms[0], norms[1])] if len(norms) == 2 else [])]
        found = [max(0.0, abs(x - y) - slack) / max(abs(x), abs(y), scale, _TINY) for x, y in pairs]
        weights = abs(self.weight - other.weight) / max(abs(self.weight), abs(other.weight), _TINY)
        return max(weights, *found, 0.0)


class Sketcher:
    """Makes sketches with secret signs, which are fresh for each object unless a key is given.

    The norm is taken of all entries. Of an array with more than a million entries, one piece of 65,536 in 32 enters
    the signed sums, and at least 8, at secret places, so that sketching stays cheap beside decoding.

    Args:
        before: The arrays that training started from, which are subtracted from what functions return; None if not
            known.
        key: Key of the signs, for sketches that several processes compare; drawn if None.
    """

    def __init__(self, before: ArrayRecord | None = None, key: int | None = None) -> None:
        self._key = secrets.randbits(63) if key is None else key
        self._signs = np.random.Generator(np.random.Philox(key=self._key)).choice([-1.0, 1.0], size=(SUMS, _FOLD))
        self._drawn: dict[tuple[int, int], dict[int, NDArray[np.float32]]] = {}
        self._drawn_small: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._before: dict[str, NDArray[Any]] | None = None
        self._sums: dict[str, NDArray[np.float64]] = {}  # array -> signed sums of what training started from
        self._looked_at_records = False
        self._forms: dict[tuple[object, ...], tuple[object, ...]] = {}
        #: What rounding the arrays may change in an update of weight 1.
        self.rounding = 0.0
        if before is not None:
            self._before = {name: np.asarray(view(array)).reshape(-1) for name, array in before.items()}
            self.rounding = rounding_of(before)

    def close(self) -> None:
        """Let go of the arrays that training started from; their signed sums are kept, and norms no longer known."""
        for name, values in (self._before or {}).items() if self._looked_at_records else ():
            if values.dtype.kind == "f":
                self._sums[name] = self._scan(values, _salt_of(name), None, norm=False)[1]
        self._before = None

    def of_vector(self, values: NDArray[Any], weight: float, form: Hashable, *, square: float | None = None) -> Sketch:
        """Returns the sketch of a coded vector, floats or uint32 numbers of a prime field, shape (d,).

        Args:
            values: The vector.
            weight: Number of examples.
            form: Whatever else two copies must have in common.
            square: Sum of the squares, if it is known.
        """
        if square is None and values.dtype.kind == "f":
            square = sum_of_squares(values)
        if square is not None and not math.isfinite(square):
            square = None
        total, sums = self._scan(values, 0, None, norm=square is None)
        norm = math.sqrt(total if square is None else square)
        return Sketch(norm, tuple(sums.tolist()), weight, form, weight * self.rounding)

    def of_records(self, content: RecordDict, weight_key: str) -> Sketch:
        """Returns the sketch of records as a function returned them.

        Floats enter the numbers, less what training started from if it has arrays of the same name and size. Names,
        shapes and all other entries of arrays enter the form. Metrics other than the weight, and ConfigRecords, may
        differ between holders, as times do.
        """
        self._looked_at_records = True
        square: float | None = 0.0
        sums, weight = np.zeros(SUMS), 0.0
        form: list[object] = []
        for name, record in sorted(content.items()):
            form.append((name, type(record).__name__))
            if isinstance(record, MetricRecord):
                given = record.get(weight_key)
                weight = float(given) if isinstance(given, (int, float)) else weight
                continue
            if not isinstance(record, ArrayRecord):
                continue
            for key in sorted(record.keys()):
                values: NDArray[Any] = np.asarray(view(record[key]))
                form.append((key, record[key].dtype, values.shape))
                if values.dtype.kind != "f":
                    form.append(hashlib.sha256(values.tobytes()).digest())
                    continue
                old = None if self._before is None else self._before.get(key)
                if old is not None and (old.dtype.kind != "f" or old.size != values.size):
                    old = None
                more, these = self._scan(values.reshape(-1), _salt_of(key), old)
                if self._before is None and key in self._sums:
                    these, square = these - self._sums[key], None
                square, sums = None if square is None else square + more, sums + these
        norm = None if square is None else math.sqrt(square)
        return Sketch(norm, tuple(sums.tolist()), weight, self._shared(tuple(form)), self.rounding)

    def _shared(self, form: tuple[object, ...]) -> tuple[object, ...]:
        """Returns an equal form of an earlier sketch if there is one, since nearly all have the same."""
        return self._forms.setdefault(form, form)

    def _scan(
        self, values: NDArray[Any], salt: int, less: NDArray[Any] | None, *, norm: bool = True
    ) -> tuple[float, NDArray[np.float64]]:
        """Returns the sum of squares, or 0 without `norm`, and the signed sums of `values - less`."""
        if 0 < values.size <= _FEW and values.dtype == np.float32 and (less is None or less.dtype == np.float32):
            total, sums = self._scan_few(values, salt, less)
            if math.isfinite(total):
                return total, sums
        if (values.size, salt) not in self._drawn:
            self._drawn[values.size, salt] = self._draw(values.size, salt)
        turns = self._drawn[values.size, salt]
        total, folded = 0.0, np.zeros(_FOLD)
        with np.errstate(all="ignore"):
            for number in range(-(-values.size // _CACHED)) if norm else turns:
                part = slice(number * _CACHED, (number + 1) * _CACHED)
                piece = _as_floats(values[part])
                if less is not None:
                    piece = piece - _as_floats(less[part])
                if norm:
                    square = float(np.dot(piece, piece))
                    if not math.isfinite(square):  # a float32 product may overflow where a float64 one does not
                        piece = piece.astype(np.float64)
                        square = float(np.dot(piece, piece))
                    total += square
                if number in turns:
                    rows = piece[: piece.size // _FOLD * _FOLD].reshape(-1, _FOLD)
                    folded += turns[number][: len(rows)] @ rows
                    rest = piece[rows.size :]
                    folded[: rest.size] += turns[number][-1] * rest
            return total, self._signs @ folded

    def _scan_few(
        self, values: NDArray[Any], salt: int, less: NDArray[Any] | None
    ) -> tuple[float, NDArray[np.float64]]:
        """Returns what `_scan` returns, or an infinite sum of squares if a number is not finite.

        As float64, finite float32 numbers never overflow, so that NumPy's warnings need not be switched off.
        """
        signs = self._drawn_small.get((values.size, salt))
        if signs is None:
            signs = self._drawn_small[values.size, salt] = (
                self._signs[:, : values.size] * self._draw(values.size, salt)[0]
            )
        wide = values.astype(np.float64)
        total = float(np.dot(wide, wide))
        if less is not None and math.isfinite(total):
            wide -= less
            total = float(np.dot(wide, wide))
        return (total, np.dot(signs, wide)) if math.isfinite(total) else (math.inf, wide)

    def _draw(self, size: int, salt: int) -> dict[int, NDArray[np.float32]]:
        """Returns, for each piece that enters the signed sums, the signs of its rows."""
        random = np.random.Generator(np.random.Philox(key=[self._key, salt]))
        pieces = -(-size // _CACHED)
        count = pieces if pieces <= _WHOLE else max(_FEWEST, pieces // _ONE_IN)
        chosen = np.sort(random.choice(pieces, count, replace=False))
        rows = min(_CACHED, size) // _FOLD + 1
        turns = random.choice(np.array([-1.0, 1.0], np.float32), size=(len(chosen), rows))
        return dict(zip(chosen.tolist(), turns, strict=True))


@lru_cache(maxsize=1024)
def _salt_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def rounding_of(arrays: Mapping[str, Array]) -> float:
    """Returns the norm of what rounding arrays to their dtypes may change in them."""
    square = 0.0
    for array in arrays.values():
        values: NDArray[Any] = np.asarray(view(array)).reshape(-1)
        if values.dtype.kind == "f":
            unit = _BFLOAT16_UNIT if array.dtype == "bfloat16" else float(np.finfo(values.dtype).eps)
            square += unit**2 * sum_of_squares(values.astype(np.float32) if values.itemsize < 4 else values)
    return math.sqrt(square)


def _square(values: NDArray[Any]) -> float:
    """Returns the sum of squares, which is the same on every processor but for rounding in the last digits."""
    total = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, values.size, _CACHED):
            piece = _as_floats(values[start : start + _CACHED])
            square = float(np.dot(piece, piece))
            if not math.isfinite(square):  # a float32 product may overflow where a float64 one does not
                wide = piece.astype(np.float64)
                square = float(np.dot(wide, wide))
            total += square
    return total


def _as_floats(piece: NDArray[Any]) -> NDArray[Any]:
    """Returns numbers as floats that are multiplied fast; a number of a prime field becomes its signed one."""
    if piece.dtype.kind == "u":
        signed = piece.astype(np.float64)
        signed[piece > P // 2] -= P
        return signed
    return piece.astype(np.float32) if piece.dtype.itemsize < 4 else piece


# ---- A client's figures ----


def figures_of(update: NDArray[np.floating], rounding: float, m: int) -> tuple[float, ...]:
    """Returns the norm of an update, what rounding may change in it, and the signed sums of each of its m blocks.

    They are zeros if one is not finite.
    """
    length = -(-update.size // m)
    values = [math.sqrt(_square(update)), rounding]
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
    for mine, (norm, _, *sums) in zip(coefficients, figures, strict=True):
        size = sum(map(abs, mine))
        expected += np.asarray(mine) @ np.asarray(sums).reshape(len(mine), SUMS)
        scale += size * max(abs(norm), *map(abs, sums))
    return bool(np.abs(folded_sums(vector, np.float64) - expected).max() <= _ROUNDING * scale)
