"""Images: scikit-learn's digits, MNIST and Fashion-MNIST."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits as published_digits
from sklearn.model_selection import train_test_split

from clients.dataset import Dataset
from clients.errors import AppConfigError
from clients.files import folder_with, read_gzip

__all__ = ["load_digits", "load_idx"]

_SPLIT_SEED = 2024  # digits is published without a test part
_TEST_SHARE = 0.2

# as published, for both MNIST and Fashion-MNIST
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_HUB_NAMES = {"fashion-mnist": "zalando-datasets/fashion_mnist", "mnist": "ylecun/mnist"}


def load_digits(_name: str, _data_dir: str) -> Dataset:
    """Return the 8x8 digits that scikit-learn brings along."""
    bunch = published_digits()
    x = np.asarray(bunch.images / 16.0, dtype=np.float32)[:, np.newaxis]
    train_x, test_x, train_y, test_y = train_test_split(
        x,
        np.asarray(bunch.target, dtype=np.int64),
        test_size=_TEST_SHARE,
        random_state=_SPLIT_SEED,
        stratify=bunch.target,
    )
    return Dataset(train_x, train_y, test_x, test_y, classes=10)


def load_idx(name: str, data_dir: str) -> Dataset:
    """Return images from files in the format of MNIST, or from the hub."""
    if data_dir:
        folder = folder_with(name, data_dir, _IDX_FILES)
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
    raw = read_gzip(path)
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
