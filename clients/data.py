"""Loads a named data set whole, as read-only NumPy arrays; the same arrays in every process."""

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from clients.errors import AppConfigError

__all__ = ["DATASET_NAMES", "Dataset", "load_dataset"]

_SPLIT_SEED = 2024  # of the 80/20 splits of the data sets published without a test part
_TEST_SHARE = 0.2

# as published, for both MNIST and Fashion-MNIST
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
_HEART_FILES = tuple(f"processed.{hospital}.data" for hospital in _HOSPITALS)
_HEART_COLUMNS = 14  # 13 features and the label `num`

_FOLDERS = {"fashion-mnist": "fashion_mnist", "mnist": "mnist", "heart-disease": "heart_disease"}
_HUB_NAMES = {"fashion-mnist": "zalando-datasets/fashion_mnist", "mnist": "ylecun/mnist"}


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: what depends on it can be cached
class Dataset:
    """A data set in memory, its training part and its test part; all arrays are read-only.

    Attributes:
        train_x: Images in [0, 1], shape (N, 1, H, W), or standardised rows, shape (N, F); float32.
        train_y: Labels 0..classes-1, shape (N,), int64.
        test_x: As `train_x`, for the test part.
        test_y: As `train_y`, for the test part.
        classes: Number of labels.
        groups: Natural owner of each training example, 0..G-1, shape (N,), int64; None if there is none.
    """

    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]
    classes: int
    groups: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        for array in (self.train_x, self.train_y, self.test_x, self.test_y, self.groups):
            if array is not None:
                array.setflags(write=False)


def load_dataset(name: str, data_dir: str = "") -> Dataset:
    """Return the named data set; a second call in the same process returns the same object.

    Args:
        name: One of `DATASET_NAMES`.
        data_dir: Absolute path of the folder with the data set's files, or of its parent. Empty:
            from the Hugging Face hub, through flwr-datasets. `digits` needs neither.

    Raises:
        AppConfigError: The name is unknown, or the files are missing, unreadable or out of reach.
    """
    return _load_dataset(name, data_dir)


@lru_cache(maxsize=8)
def _load_dataset(name: str, data_dir: str) -> Dataset:
    if name not in _LOADERS:
        raise AppConfigError(f"There is no data set {name!r}; dataset is one of {', '.join(DATASET_NAMES)}.")
    return _LOADERS[name](name, data_dir)


def _load_digits(_name: str, _data_dir: str) -> Dataset:
    bunch = load_digits()
    x = np.asarray(bunch.images / 16.0, dtype=np.float32)[:, np.newaxis]
    train_x, test_x, train_y, test_y = train_test_split(
        x,
        np.asarray(bunch.target, dtype=np.int64),
        test_size=_TEST_SHARE,
        random_state=_SPLIT_SEED,
        stratify=bunch.target,
    )
    return Dataset(train_x, train_y, test_x, test_y, classes=10)


def _load_images(name: str, data_dir: str) -> Dataset:
    if data_dir:
        folder = _folder(name, data_dir, _IDX_FILES)
        train_x, train_y, test_x, test_y = (_read_idx(folder / file) for file in _IDX_FILES)
    else:
        train_x, train_y, test_x, test_y = _download(name)
    for part, images, labels in (("training", train_x, train_y), ("test", test_x, test_y)):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise AppConfigError(
                f"The {part} part of {name} has images of shape {images.shape} and labels of shape "
                f"{labels.shape}; it needs images (N, H, W) and labels (N,). Fetch the files again."
            )
    return Dataset(
        _to_unit_range(train_x),
        train_y.astype(np.int64),
        _to_unit_range(test_x),
        test_y.astype(np.int64),
        classes=10,
    )


def _to_unit_range(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = np.divide(images[:, np.newaxis], np.float32(255), dtype=np.float32)
    return scaled


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array in an idx-ubyte file: two zero bytes, 8 for uint8, number of axes, axes, data."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise AppConfigError(f"{path} cannot be read as a gzip file ({error}). Fetch it again.") from error
    axes = raw[3] if len(raw) > 3 else 0
    start = 4 + 4 * axes
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4))
    if raw[:3] != b"\x00\x00\x08" or len(raw) != start + math.prod(shape):
        raise AppConfigError(
            f"{path} is no idx-ubyte file: it begins with {raw[:4].hex()} and holds {len(raw)} bytes for the "
            f"shape {shape}. Fetch it again."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _download(name: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    # here, because whoever names a folder need not wait for these imports
    import datasets
    from flwr_datasets import FederatedDataset

    datasets.disable_progress_bars()
    # one partition and no shuffling: all clients need the same order, and partition.py does the rest
    hub = FederatedDataset(dataset=_HUB_NAMES[name], partitioners={"train": 1}, shuffle=False)
    try:
        train, test = (hub.load_split(split).with_format("numpy") for split in ("train", "test"))
    except Exception as error:  # the hub's clients raise many kinds; all mean that there is no data
        raise AppConfigError(
            f"{name} could not be loaded from the hub as {_HUB_NAMES[name]} "
            f"({type(error).__name__}: {error}). "
            f"Set data-dir to the absolute path of the folder that holds {', '.join(_IDX_FILES)}."
        ) from error
    return train["image"][:], train["label"][:], test["image"][:], test["label"][:]


def _load_heart_disease(name: str, data_dir: str) -> Dataset:
    if not data_dir:
        raise AppConfigError(
            f"{name} is not on the hub. Set data-dir to the absolute path of the folder that holds "
            f"{', '.join(_HEART_FILES)}."
        )
    folder = _folder(name, data_dir, _HEART_FILES)
    train_rows, test_rows, groups = [], [], []
    for group, file in enumerate(_HEART_FILES):
        rows = _read_heart_rows(folder / file)
        order = np.random.default_rng((_SPLIT_SEED, group)).permutation(len(rows))
        held_out = max(1, round(_TEST_SHARE * len(rows)))
        test_rows.append(rows[order[:held_out]])
        train_rows.append(rows[order[held_out:]])
        groups.append(np.full(len(rows) - held_out, group, dtype=np.int64))
    train, test = np.concatenate(train_rows), np.concatenate(test_rows)
    # Only `?` counts as missing: the zeros that stand for an unmeasured cholesterol are kept as published.
    impute = SimpleImputer(strategy="median", keep_empty_features=True).fit(train[:, :-1])
    scale = StandardScaler().fit(impute.transform(train[:, :-1]))

    def features(rows: NDArray[np.float64]) -> NDArray[np.float32]:
        standard = scale.transform(impute.transform(rows[:, :-1]))
        return np.concatenate([standard, np.isnan(rows[:, :-1])], axis=1).astype(np.float32)

    def labels(rows: NDArray[np.float64]) -> NDArray[np.int64]:
        return (rows[:, -1] > 0).astype(np.int64)

    return Dataset(
        features(train), labels(train), features(test), labels(test), classes=2, groups=np.concatenate(groups)
    )


def _read_heart_rows(path: Path) -> NDArray[np.float64]:
    """Return the rows of one hospital, shape (rows, 14), NaN where the file has `?`."""
    try:
        text = path.read_text(encoding="ascii")
        rows = [
            [math.nan if cell.strip() == "?" else float(cell) for cell in line.split(",")]
            for line in text.splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise AppConfigError(f"{path} cannot be read as comma-separated numbers ({error}). Fetch it again.") from error
    if len(rows) < 2 or any(len(row) != _HEART_COLUMNS for row in rows):
        raise AppConfigError(
            f"{path} has {len(rows)} rows of {sorted({len(row) for row in rows})} columns; it needs at least "
            f"2 rows of {_HEART_COLUMNS}. Fetch it again."
        )
    return np.array(rows)


def _folder(name: str, data_dir: str, files: tuple[str, ...]) -> Path:
    """Return the folder that holds `files`: `data_dir/<folder of the data set>` or `data_dir` itself."""
    given = Path(data_dir)
    if not given.is_absolute():
        raise AppConfigError(
            f"data-dir is {data_dir!r}, a relative path; it has to be absolute, because the engine's working "
            "folder is not the user's."
        )
    if not given.is_dir():
        raise AppConfigError(f"data-dir is {data_dir!r}, and there is no such folder on this machine.")
    below = given / _FOLDERS[name]
    folder = below if below.is_dir() else given
    # MNIST and Fashion-MNIST have the same file names: the wrong one would load without a word
    if folder.name in _FOLDERS.values() and folder.name != _FOLDERS[name]:
        raise AppConfigError(
            f"data-dir is {data_dir!r}, the folder of another data set; {name} belongs in a folder {_FOLDERS[name]!r}."
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise AppConfigError(
            f"{folder} lacks {', '.join(missing)}, needed for {name}. Set data-dir to the folder that holds "
            f"{', '.join(files)}, or to its parent if it is called {_FOLDERS[name]!r}."
        )
    return folder


_LOADERS: dict[str, Callable[[str, str], Dataset]] = {
    "digits": _load_digits,
    "fashion-mnist": _load_images,
    "mnist": _load_images,
    "heart-disease": _load_heart_disease,
}
DATASET_NAMES = tuple(_LOADERS)
