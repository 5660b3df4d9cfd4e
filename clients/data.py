"""Loads a named data set whole, as read-only NumPy arrays; the same arrays in every process.

What reads a data set is imported with it: Flower starts a process for each message to a node, and scikit-learn alone
takes half a second of each.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from clients.dataset import Dataset
from clients.errors import AppConfigError

__all__ = ["DATASET_NAMES", "Dataset", "load_dataset"]

#: Name -> module of this package, and the function there that loads it.
_LOADERS = {
    "digits": ("images", "load_digits"),
    "fashion-mnist": ("images", "load_idx"),
    "mnist": ("images", "load_idx"),
    "heart-disease": ("tables", "load_heart_disease"),
    "adult": ("tables", "load_adult"),
    "shakespeare": ("text", "load_shakespeare"),
}
DATASET_NAMES = tuple(_LOADERS)


def load_dataset(name: str, data_dir: str = "", train_examples: int = 0, *, seed: int = 0) -> Dataset:
    """Return the named data set; a second call in the same process returns the same object.

    Args:
        name: One of `DATASET_NAMES`.
        data_dir: Absolute path of the folder with the data set's files, or of its parent. Empty:
            from the Hugging Face hub, through flwr-datasets. `digits` needs neither.
        train_examples: Keep so many examples of the training part, drawn at random and in their order; 0: all.
            Fewer are a part of more. What is standardised stays so by the whole training part, and groups that
            are left without an example are gone: the others close ranks.
        seed: Seed of that draw.

    Raises:
        AppConfigError: The name is unknown, the files are missing, unreadable or out of reach, or there are not
            so many examples.
    """
    return _train_subset(name, data_dir, train_examples, seed) if train_examples else _load_dataset(name, data_dir)


@lru_cache(maxsize=8)
def _load_dataset(name: str, data_dir: str) -> Dataset:
    if name not in _LOADERS:
        raise AppConfigError(f"There is no data set {name!r}; dataset is one of {', '.join(DATASET_NAMES)}.")
    module, function = _LOADERS[name]
    load: Callable[[str, str], Dataset] = getattr(importlib.import_module(f"clients.{module}"), function)
    return load(name, data_dir)


@lru_cache(maxsize=8)
def _train_subset(name: str, data_dir: str, train_examples: int, seed: int) -> Dataset:
    whole = _load_dataset(name, data_dir)
    examples = len(whole.train_y)
    if not 0 < train_examples <= examples:
        raise AppConfigError(
            f"train-examples is {train_examples}; {name} has {examples} training examples: choose between 1 and "
            f"{examples}, or 0 for all."
        )
    if seed < 0:
        raise AppConfigError(f"seed is {seed}; it has to be 0 or more.")
    # a draw of its own, apart from those of the partitions
    order = np.random.default_rng((seed, *b"train-examples")).permutation(examples)
    kept = np.sort(order[:train_examples])
    groups = None
    if whole.groups is not None:
        groups = np.unique(whole.groups[kept], return_inverse=True)[1].astype(np.int64)
    return replace(whole, train_x=whole.train_x[kept], train_y=whole.train_y[kept], groups=groups)
