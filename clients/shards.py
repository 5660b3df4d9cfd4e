"""A partition from a file of its own, as `experiments.make_shards` writes them: a node then has no other data."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clients.dataset import Dataset
from clients.errors import AppConfigError
from fl_gradcode.placement import shard_path

__all__ = ["load_shard", "write_shard"]


def load_shard(node_config: Mapping[str, Any]) -> Dataset:
    """Return the partition that `partition-id` names, from the folder `shards-dir`; all of it is the training part.

    Raises:
        AppConfigError: The file is none that `write_shard` wrote.
        FlGradcodeError: The folder does not hold that partition, or other bytes than its manifest says.
    """
    path = shard_path(node_config)
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y, classes = file["x"], file["y"], int(file["classes"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise AppConfigError(
            f"{path} cannot be read ({error}); it has to be an .npz with x, y and classes, as python -m "
            "experiments.make_shards writes it."
        ) from error
    if x.dtype.kind not in "fiu" or y.shape != (len(y),) or len(x) != len(y) or not len(y):
        raise AppConfigError(
            f"{path} has x of shape {x.shape} and y of shape {y.shape}; both need as many entries, and at least one."
        )
    return Dataset(x, y.astype(np.int64, copy=False), x[:0], y[:0], classes)


def write_shard(path: Path, dataset: Dataset, indices: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Write these training examples, in this order; with the same examples the same bytes."""
    np.savez(path, x=dataset.train_x[indices], y=dataset.train_y[indices], classes=np.array(dataset.classes))
