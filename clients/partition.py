"""Splits a training part into partitions: every example in exactly one, the same in every process."""

import contextlib
import io
from functools import lru_cache

import datasets
import numpy as np
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
)
from numpy.typing import NDArray

from clients.data import Dataset
from clients.errors import AppConfigError

__all__ = ["PARTITIONER_NAMES", "OwnedLabelsPartitioner", "partition_indices"]

PARTITIONER_NAMES = ("iid", "dirichlet", "pathological", "natural", "owned-labels")

_CLASSES_PER_PARTITION = 2  # of the pathological split
_OWNED_CLASSES = 2  # of the owned-labels split


class OwnedLabelsPartitioner(Partitioner):  # type: ignore[misc] # flwr-datasets has no types
    """The first `owners` partitions alone hold the last two labels; the others share the rest evenly.

    Owners hold nothing else. Each of the two labels is dealt evenly to the owners, and what remains
    is cut into equal parts, both in the order of the data set: shuffle it first.
    """

    def __init__(self, num_partitions: int, partition_by: str, *, owners: int) -> None:
        super().__init__()
        if not 1 <= owners < num_partitions:
            raise AppConfigError(
                f"owners is {owners}; the owned-labels split into {num_partitions} partitions needs between "
                f"1 and {num_partitions - 1}, so that somebody holds the other labels."
            )
        self._num_partitions = num_partitions
        self._partition_by = partition_by
        self._owners = owners
        self._parts: list[NDArray[np.int64]] = []

    @property
    def num_partitions(self) -> int:
        """Total number of partitions."""
        return self._num_partitions

    def load_partition(self, partition_id: int) -> datasets.Dataset:
        """Return one partition as a data set of its own."""
        if not self._parts:
            self._parts = self._deal()
        return self.dataset.select(self._parts[partition_id])

    def _deal(self) -> list[NDArray[np.int64]]:
        labels = np.asarray(self.dataset.with_format("numpy")[self._partition_by][:])
        present, counts = np.unique(labels, return_counts=True)
        if len(present) <= _OWNED_CLASSES:
            raise AppConfigError(
                f"The owned-labels split keeps {_OWNED_CLASSES} labels for the owners; this data set has "
                f"only {len(present)}, which leaves nothing for the others. Choose another partitioner."
            )
        owned, scarcest = present[-_OWNED_CLASSES:], counts[-_OWNED_CLASSES:].min()
        if self._owners > scarcest:
            raise AppConfigError(
                f"owners is {self._owners}, but an owned label has only {scarcest} examples; set owners to "
                f"{scarcest} or less."
            )
        rest = np.flatnonzero(~np.isin(labels, owned))
        others = self._num_partitions - self._owners
        if len(rest) < others:
            raise AppConfigError(
                f"{others} partitions own no label, but only {len(rest)} examples have other labels; lower "
                "num-partitions."
            )
        by_label = [np.array_split(np.flatnonzero(labels == label), self._owners) for label in owned]
        owner_parts = [np.concatenate(pieces) for pieces in zip(*by_label, strict=True)]
        return owner_parts + np.array_split(rest, others)


def partition_indices(
    dataset: Dataset, num_partitions: int, *, partitioner: str, alpha: float, seed: int, owners: int
) -> tuple[NDArray[np.int64], ...]:
    """Return which training examples each partition holds.

    Args:
        dataset: The whole data set; only its training part is split.
        num_partitions: Number of partitions.
        partitioner: One of `PARTITIONER_NAMES`. `natural` gives each group a partition of its own, in order; with
            fewer partitions than groups it merges whole groups, largest first, each into the smallest partition.
        alpha: Concentration of the Dirichlet split; small means uneven. Other splits ignore it.
        seed: Seed of the order of the examples and of the split.
        owners: How many partitions own the last two labels; only for `owned-labels`.

    Returns:
        For each partition the indices into `dataset.train_x`, read-only int64; none is empty.

    Raises:
        AppConfigError: No such split exists for this data set and number of partitions.
    """
    return _partition_indices(dataset, num_partitions, partitioner, float(alpha), seed, owners)


@lru_cache(maxsize=16)
def _partition_indices(
    dataset: Dataset, num_partitions: int, partitioner: str, alpha: float, seed: int, owners: int
) -> tuple[NDArray[np.int64], ...]:
    examples = len(dataset.train_y)
    if not 1 <= num_partitions <= examples:
        raise AppConfigError(
            f"num-partitions is {num_partitions}; it is between 1 and {examples}, the number of examples."
        )
    if seed < 0:
        raise AppConfigError(f"seed is {seed}; it has to be 0 or more.")
    # the partitioners cut classes and rows in the order they find: shuffle, as FederatedDataset does
    order = np.random.default_rng(seed).permutation(examples)
    columns = {"index": order, "label": dataset.train_y[order]}
    if dataset.groups is not None:
        columns["group"] = _merged(dataset.groups, num_partitions)[order]
    split = _build(dataset, num_partitions, partitioner, alpha, seed, owners)
    split.dataset = datasets.Dataset.from_dict(columns)
    try:
        # NaturalIdPartitioner draws a progress bar on stderr and has no switch for it
        with contextlib.redirect_stderr(io.StringIO()):
            parts = [
                np.array(split.load_partition(i).with_format("numpy")["index"][:], dtype=np.int64)
                for i in range(num_partitions)
            ]
    except AppConfigError:
        raise
    except ValueError as error:
        raise AppConfigError(f"The {partitioner} split into {num_partitions} partitions fails: {error}") from error
    if partitioner == "dirichlet":
        _fill_empty(parts)
    for part in parts:
        part.setflags(write=False)
    return tuple(parts)


def _build(
    dataset: Dataset, num_partitions: int, partitioner: str, alpha: float, seed: int, owners: int
) -> Partitioner:
    match partitioner:
        case "iid":
            return IidPartitioner(num_partitions)
        case "dirichlet":
            if not 0 < alpha < np.inf:
                raise AppConfigError(f"alpha is {alpha}; the Dirichlet split needs a number above 0.")
            # flwr-datasets would redraw the whole split up to ten times to meet a minimum size, and then
            # give up: 64 partitions at alpha 0.1 often end there. We draw once and fill what is empty.
            return DirichletPartitioner(
                num_partitions, "label", alpha, min_partition_size=0, self_balancing=False, seed=seed
            )
        case "pathological":
            if num_partitions < dataset.classes:
                raise AppConfigError(
                    f"num-partitions is {num_partitions}; the pathological split needs at least "
                    f"{dataset.classes}, one for each label, or some examples are in no partition."
                )
            return PathologicalPartitioner(
                num_partitions,
                "label",
                min(_CLASSES_PER_PARTITION, dataset.classes),
                class_assignment_mode="first-deterministic",
                seed=seed,
            )
        case "natural":
            if dataset.groups is None:
                raise AppConfigError(
                    "The natural split needs examples that belong to someone, as in heart-disease; this data "
                    "set has no groups. Choose another partitioner."
                )
            groups = len(np.unique(dataset.groups))
            if num_partitions > groups:
                raise AppConfigError(
                    f"num-partitions is {num_partitions}; the natural split of this data set has at most "
                    f"{groups} partitions, one for each group."
                )
            return NaturalIdPartitioner("group")
        case "owned-labels":
            return OwnedLabelsPartitioner(num_partitions, "label", owners=owners)
    raise AppConfigError(
        f"There is no partitioner {partitioner!r}; partitioner is one of {', '.join(PARTITIONER_NAMES)}."
    )


def _merged(groups: NDArray[np.int64], num_partitions: int) -> NDArray[np.int64]:
    """Return the groups, merged until there are at most this many: largest first, each to where the fewest are.

    References:
        R. L. Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969 (the largest
        part is then at most 4/3 as large as in the most even merging).
    """
    present, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    if len(present) <= num_partitions:
        return groups
    sizes = np.zeros(num_partitions, dtype=np.int64)
    partition = np.zeros(len(present), dtype=np.int64)
    for i in np.argsort(-counts, kind="stable"):
        partition[i] = np.argmin(sizes)
        sizes[partition[i]] += counts[i]
    merged: NDArray[np.int64] = partition[group]
    return merged


def _fill_empty(parts: list[NDArray[np.int64]]) -> None:
    """Give every empty partition the last example of the largest one, in place."""
    for i in range(len(parts)):
        if not len(parts[i]):
            largest = max(range(len(parts)), key=lambda j: len(parts[j]))
            parts[largest], parts[i] = parts[largest][:-1], parts[largest][-1:].copy()
