"""Loads a named data set whole, as read-only NumPy arrays; the same arrays in every process."""

from collections.abc import Callable
from functools import lru_cache

from clients.dataset import Dataset
from clients.errors import AppConfigError
from clients.images import load_digits, load_idx
from clients.tables import load_adult, load_heart_disease
from clients.text import load_shakespeare

__all__ = ["DATASET_NAMES", "Dataset", "load_dataset"]

_LOADERS: dict[str, Callable[[str, str], Dataset]] = {
    "digits": load_digits,
    "fashion-mnist": load_idx,
    "mnist": load_idx,
    "heart-disease": load_heart_disease,
    "adult": load_adult,
    "shakespeare": load_shakespeare,
}
DATASET_NAMES = tuple(_LOADERS)


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
