"""Splits a data set file into shards, and counts the examples of files."""

from __future__ import annotations

import csv
import shutil
import zipfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting
from .shard_files import sizes

__all__ = ["SPLITS", "count_examples", "cut"]

#: The ways in which a data set can be split.
SPLITS = ("iid", "contiguous", "label:COLUMN", "dirichlet:COLUMN:ALPHA", "by:COLUMN")

_ROWS = 50_000  # number of rows of a .csv that are kept in memory


def count_examples(shard: Path) -> int | None:
    """Returns the number of rows of a .npz, .npy, .csv or .jsonl, or of files of a folder; None if not known."""
    if shard.is_dir():
        return sizes(shard)[0]
    if not shard.is_file():  # opening a pipe would wait for its other end
        return None
    try:
        match shard.suffix.lower():
            case ".npz":
                lengths = {shape[0] for shape in _shapes(shard) if shape}
                return lengths.pop() if len(lengths) == 1 else None
            case ".npy":
                with shard.open("rb") as file:
                    shape = _shape(file)
                return shape[0] if shape else None
            case ".csv":
                with closing(_records(shard)) as records:
                    first = next(records, [])
                    return sum(1 for _ in records) + any(map(_is_number, first))
            case ".jsonl":
                with shard.open("rb") as lines:
                    return sum(1 for line in lines if line.strip())
    except Exception:  # a damaged or strange file can raise almost anything
        return None
    return None


def cut(source: Path, folder: Path, split: str, shards: int | None, default: int, seed: int) -> dict[Path, int]:
    """Write the shards of a .npz or .csv into a folder; the same arguments give the same bytes.

    Args:
        source: A .npz whose arrays have the same first dimension, or a .csv with a header.
        folder: Empty folder for the shards.
        split: One of `SPLITS`. COLUMN is an array of the .npz, or a column of the .csv. "label" sorts by the column and
            splits evenly, which gives few labels in each shard. "by" makes one shard for each value.
        shards: Number of shards; None for the default.
        default: Number of shards if none is given and the split does not determine it.
        seed: Seed of the split.

    Returns:
        Path -> number of examples, in the order of the shards.

    Raises:
        InvalidSetting: The source cannot be split in this way.
    """
    if source.suffix.lower() not in (".npz", ".csv"):
        raise InvalidSetting(f"{source} cannot be cut: give a .npz, a .csv, or a folder whose entries are the shards.")
    if seed < 0:
        raise InvalidSetting(f"The seed is {seed}; it must be 0 or more.")
    file = _Npz(source) if source.suffix.lower() == ".npz" else _Csv(source)
    parts = _split(file, split, shards, default, seed)
    empty = next((j for j, part in enumerate(parts) if not len(part)), None)
    if empty is not None:
        raise InvalidSetting(
            f"Shard {empty} would have no examples, of {file.examples} in {len(parts)} shards: cut into fewer, "
            "or otherwise."
        )
    digits = max(3, len(str(len(parts) - 1)))
    paths = [folder / f"shard-{j:0{digits}}{source.suffix.lower()}" for j in range(len(parts))]
    file.write(paths, parts)
    for path in paths:
        shutil.copymode(source, path)  # a file that only its owner can read stays private
    return {path: len(part) for path, part in zip(paths, parts, strict=True)}


class _Npz:
    """The arrays of a .npz file, which must have the same first dimension."""

    def __init__(self, path: Path) -> None:
        try:
            loaded = np.load(path, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("it is one array without a name, a .npy")
            with loaded as file:
                self.arrays: dict[str, NDArray[Any]] = {name: file[name] for name in file.files}
        except Exception as error:  # a damaged, encrypted or unusually compressed file can raise almost anything
            raise InvalidSetting(f"{path} cannot be read as a .npz: {str(error)[:200].rstrip('.')}.") from None
        lengths = {name: len(array) if array.ndim else None for name, array in self.arrays.items()}
        if len({*lengths.values()}) != 1 or None in lengths.values():
            raise InvalidSetting(
                f"The arrays in {path} must have one first dimension, the number of examples; they have {lengths}."
            )
        self.path, self.examples = path, int(next(iter(lengths.values())) or 0)

    def column(self, name: str) -> NDArray[Any]:
        """Returns the array with this name, which must have one value for each example."""
        if name not in self.arrays:
            raise InvalidSetting(f"{self.path} has no array {name!r}; it has {', '.join(sorted(self.arrays))}.")
        if self.arrays[name].ndim != 1:
            raise InvalidSetting(f"{name!r} in {self.path} has shape {self.arrays[name].shape}; it must be one column.")
        return self.arrays[name]

    def write(self, paths: Sequence[Path], parts: Sequence[NDArray[np.int64]]) -> None:
        """Write the shards in the format of `np.savez`, which itself cannot store an array named "file"."""
        for path, part in zip(paths, parts, strict=True):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as packed:
                for name, array in self.arrays.items():
                    with packed.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array[part], allow_pickle=False)


class _Csv:
    """The records of a .csv file with a header, which is never in memory as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with closing(_records(path)) as records:
            self.header = next(records, [])
            self.examples = sum(1 for _ in records)
        if not self.header:
            raise InvalidSetting(f"{path} is empty: it needs a header and records.")

    def column(self, name: str) -> NDArray[Any]:
        """Returns the values of this column, one for each example."""
        if name not in self.header:
            raise InvalidSetting(f"{self.path} has no column {name!r}; it has {', '.join(self.header)}.")
        at = self.header.index(name)
        with closing(_records(self.path)) as records:
            next(records)
            values = [record[at] if at < len(record) else "" for record in records]
        return np.array(values)

    def write(self, paths: Sequence[Path], parts: Sequence[NDArray[np.int64]]) -> None:
        """Write the shards, each in the order of the file, with only a limited number of records in memory."""
        owner = np.empty(self.examples, np.int64)
        for j, part in enumerate(parts):
            owner[part] = j
        for path in paths:
            self._append(path, [self.header])
        kept: dict[int, list[list[str]]] = {}
        seen = 0
        with closing(_records(self.path)) as records:
            next(records, None)
            for i, record in enumerate(records):
                seen = i + 1
                if seen > self.examples:
                    break
                kept.setdefault(int(owner[i]), []).append(record)
                if i % _ROWS == _ROWS - 1 or i == self.examples - 1:
                    for j, rows in kept.items():
                        self._append(paths[j], rows)
                    kept.clear()
        if seen != self.examples:
            raise InvalidSetting(f"{self.path} changed while it was cut: place again once nobody writes to it.")

    @staticmethod
    def _append(path: Path, rows: list[list[str]]) -> None:
        with path.open("a", encoding="utf-8", newline="") as file:
            plain = csv.writer(file, lineterminator="\n")
            quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
            for row in rows:  # a carriage return must be quoted, since on its own it ends a record too
                (quoted if any("\r" in cell for cell in row) else plain).writerow(row)


def _split(file: _Npz | _Csv, split: str, shards: int | None, default: int, seed: int) -> list[NDArray[np.int64]]:
    kind, _, rest = split.partition(":")
    column, _, last = rest.rpartition(":") if kind == "dirichlet" else (rest, "", "")
    if (kind in ("iid", "contiguous")) == bool(rest) or kind not in {known.split(":")[0] for known in SPLITS} or (
        kind == "dirichlet" and not column
    ):  # fmt: skip
        raise InvalidSetting(f"--split {split!r} must be one of {', '.join(SPLITS)}.")
    k = default if shards is None else shards
    if kind != "by" and not 1 <= k <= file.examples:
        raise InvalidSetting(f"{file.path} has {file.examples} examples: it cannot be cut into {k} shards.")
    order = np.arange(file.examples)
    match kind:
        case "iid":
            # Examples are sorted, so that each shard has the order of the file as with the other splits.
            return [np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(order), k)]
        case "label":
            return [np.sort(part) for part in np.array_split(np.argsort(file.column(column), kind="stable"), k)]
        case "by":
            values, group = np.unique(file.column(column), return_inverse=True)
            if shards not in (None, len(values)):
                raise InvalidSetting(
                    f"{column!r} has {len(values)} values, and --split {split} makes a shard for each: leave out "
                    f"--shards {shards}."
                )
            return [np.flatnonzero(group == j) for j in range(len(values))]
        case "dirichlet":
            return _dirichlet(file.column(column), k, last, seed)
    return np.array_split(order, k)


def _dirichlet(labels: NDArray[Any], k: int, alpha: str, seed: int) -> list[NDArray[np.int64]]:
    if not _is_number(alpha) or not 0 < float(alpha) < np.inf:
        raise InvalidSetting(
            f"The Dirichlet split needs a number above 0, such as dirichlet:COLUMN:0.3, not {alpha!r}."
        )
    try:
        import datasets
        from flwr_datasets.partitioner import DirichletPartitioner
    except ImportError:
        raise ImportError(
            "The Dirichlet split needs flwr-datasets: pip install 'flwr-datasets>=0.6', or choose another --split."
        ) from None
    split = DirichletPartitioner(
        k, "label", float(alpha), min_partition_size=1, self_balancing=False, shuffle=False, seed=seed
    )
    numbers = np.unique(labels, return_inverse=True)[1]
    split.dataset = datasets.Dataset.from_dict({"label": numbers, "index": np.arange(len(labels))})
    try:
        parts = [split.load_partition(j).with_format("numpy")["index"][:] for j in range(k)]
    except ValueError as error:
        raise InvalidSetting(
            f"The Dirichlet split into {k} shards with alpha {alpha} fails ({str(error).rstrip('.')}): choose a larger "
            "alpha, fewer shards or another seed."
        ) from None
    return [np.sort(np.asarray(part, np.int64)) for part in parts]


def _records(path: Path) -> Generator[list[str], None, None]:
    """Yields the records of a .csv file, without empty lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from (record for record in csv.reader(file) if record)
    except UnicodeDecodeError:
        raise InvalidSetting(f"{path} is not in UTF-8: convert it first, such as by iconv.") from None
    except csv.Error as error:
        raise InvalidSetting(f"{path} cannot be read as a .csv: {error}.") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _shapes(path: Path) -> list[tuple[int, ...]]:
    """Returns the shapes of the arrays in a .npz file, without reading their values."""
    with zipfile.ZipFile(path) as packed:
        shapes = []
        for name in packed.namelist():
            with packed.open(name) as file:
                shapes.append(_shape(file))
    return shapes


def _shape(file: Any) -> tuple[int, ...]:
    read: dict[tuple[int, int], Callable[..., Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape: tuple[int, ...] = read[np.lib.format.read_magic(file)](file)[0]
    return shape
