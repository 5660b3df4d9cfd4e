"""Every split gives every example to exactly one partition, and each split has its own shape."""

from typing import Any

import numpy as np
import pytest

from clients.data import Dataset, load_dataset
from clients.errors import AppConfigError
from clients.partition import PARTITIONER_NAMES, partition_indices

OPTIONS: dict[str, Any] = {"alpha": 0.3, "seed": 0, "owners": 2}


def tabular(labels: list[int], groups: list[int] | None = None) -> Dataset:
    """A data set with these labels and one feature that means nothing."""
    x = np.zeros((len(labels), 1), dtype=np.float32)
    y = np.array(labels, dtype=np.int64)
    owners = None if groups is None else np.array(groups, dtype=np.int64)
    return Dataset(x, y, x.copy(), y.copy(), classes=max(labels) + 1, groups=owners)


HOSPITALS = tabular([0, 1] * 15, groups=[3, 0, 1, 2, 3, 0] * 5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "partitioner", "num_partitions", "alpha"),
    [
        *(
            (load_dataset("digits"), name, count, 0.3)
            for name in PARTITIONER_NAMES
            for count in (10, 64)
            if name != "natural"
        ),
        (load_dataset("digits"), "iid", 1, 0.3),
        (HOSPITALS, "iid", 30, 0.3),
        (load_dataset("digits"), "dirichlet", 64, 0.01),
        (HOSPITALS, "dirichlet", 30, 0.3),
        *((HOSPITALS, "natural", count, 0.3) for count in (1, 2, 3, 4)),
        (HOSPITALS, "pathological", 4, 0.3),
        (HOSPITALS, "dirichlet", 20, 0.01),
    ],
)
def test_every_example_is_in_exactly_one_partition_and_none_is_empty(
    dataset: Dataset, partitioner: str, num_partitions: int, alpha: float, seed: int
) -> None:
    parts = partition_indices(dataset, num_partitions, partitioner=partitioner, alpha=alpha, seed=seed, owners=2)
    assert len(parts) == num_partitions
    assert min(len(part) for part in parts) >= 1
    assert not any(part.flags.writeable for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(dataset.train_y)))


@pytest.mark.parametrize("partitioner", [name for name in PARTITIONER_NAMES if name != "natural"])
def test_the_seed_alone_decides_the_split(partitioner: str) -> None:
    digits = load_dataset("digits")
    again = Dataset(digits.train_x, digits.train_y, digits.test_x, digits.test_y, 10)  # no cached result
    first, same, other = (
        partition_indices(dataset, 10, partitioner=partitioner, alpha=0.3, seed=seed, owners=2)
        for dataset, seed in ((digits, 3), (again, 3), (digits, 4))
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_second_call_returns_the_same_object() -> None:
    digits = load_dataset("digits")
    first = partition_indices(digits, 10, partitioner="iid", **OPTIONS)
    assert partition_indices(digits, 10, partitioner="iid", **OPTIONS) is first


def test_iid_partitions_have_equal_sizes_and_mixed_labels() -> None:
    digits = load_dataset("digits")
    parts = partition_indices(digits, 10, partitioner="iid", **OPTIONS)
    assert {len(part) for part in parts} == {143, 144}
    assert all(len(np.unique(digits.train_y[part])) == 10 for part in parts)


def test_a_smaller_alpha_makes_labels_more_uneven() -> None:
    digits = load_dataset("digits")

    def largest_share(alpha: float) -> float:
        parts = partition_indices(digits, 10, partitioner="dirichlet", alpha=alpha, seed=0, owners=0)
        return float(np.mean([np.bincount(digits.train_y[part]).max() / len(part) for part in parts]))

    assert largest_share(0.05) > largest_share(0.5) > largest_share(100.0)


@pytest.mark.parametrize("num_partitions", [10, 64])
def test_pathological_partitions_hold_two_labels(num_partitions: int) -> None:
    digits = load_dataset("digits")
    parts = partition_indices(digits, num_partitions, partitioner="pathological", **OPTIONS)
    assert {len(np.unique(digits.train_y[part])) for part in parts} == {2}


def test_natural_partitions_are_the_groups_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    assert HOSPITALS.groups is not None
    parts = partition_indices(HOSPITALS, 4, partitioner="natural", alpha=0.3, seed=9, owners=2)
    for group, part in enumerate(parts):
        np.testing.assert_array_equal(np.sort(part), np.flatnonzero(HOSPITALS.groups == group))
    assert capfd.readouterr() == ("", "")  # no progress bar


def test_natural_merges_whole_groups_largest_first_where_the_fewest_are() -> None:
    sizes = [3, 9, 1, 4, 7, 4]
    dataset = tabular([0, 1] * 14, groups=np.random.default_rng(0).permutation(np.repeat(range(6), sizes)).tolist())
    assert dataset.groups is not None
    parts = partition_indices(dataset, 3, partitioner="natural", **OPTIONS)
    # 9 | 7 | 4, then 4 to the third (8), 3 to the second (10), 1 to the third (9)
    assert [set(dataset.groups[part].tolist()) for part in parts] == [{1}, {4, 0}, {3, 5, 2}]
    assert [len(part) for part in parts] == [9, 10, 9]


@pytest.mark.parametrize(("num_partitions", "owners"), [(10, 2), (10, 3), (64, 8), (3, 1)])
def test_owners_alone_hold_the_last_two_labels_and_nothing_else(num_partitions: int, owners: int) -> None:
    digits = load_dataset("digits")
    parts = partition_indices(digits, num_partitions, partitioner="owned-labels", alpha=0.3, seed=0, owners=owners)
    owned = np.array([np.bincount(digits.train_y[part], minlength=10) for part in parts])
    assert (owned[:owners, :8] == 0).all()
    assert (owned[owners:, 8:] == 0).all()
    for counts in (owned[:owners, 8], owned[:owners, 9], owned[owners:].sum(axis=1)):
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("dataset", "partitioner", "num_partitions", "options", "sentence"),
    [
        (
            HOSPITALS,
            "random",
            4,
            {},
            "There is no partitioner 'random'; partitioner is one of iid, dirichlet",
        ),
        (HOSPITALS, "iid", 0, {}, "num-partitions is 0; it is between 1 and 30"),
        (HOSPITALS, "iid", 31, {}, "num-partitions is 31; it is between 1 and 30"),
        (HOSPITALS, "iid", 4, {"seed": -1}, "seed is -1; it has to be 0 or more"),
        (HOSPITALS, "dirichlet", 4, {"alpha": 0.0}, "alpha is 0.0; .* above 0"),
        (HOSPITALS, "dirichlet", 4, {"alpha": float("nan")}, "alpha is nan"),
        (HOSPITALS, "natural", 5, {}, "num-partitions is 5; .* has at most 4 partitions"),
        (tabular([0, 1, 2]), "natural", 3, {}, "this data set has no groups"),
        (tabular([0, 1, 2] * 5), "pathological", 2, {}, "num-partitions is 2; .* at least 3"),
        (
            tabular([0, 0, 0, 0, 1]),
            "pathological",
            4,
            {},
            "The pathological split into 4 partitions fails: Label",
        ),
        (HOSPITALS, "owned-labels", 4, {}, "this data set has only 2, which leaves nothing for the others"),
        (tabular([0, 1, 2] * 5), "owned-labels", 4, {"owners": 0}, "owners is 0; .* between 1 and 3"),
        (tabular([0, 1, 2] * 5), "owned-labels", 4, {"owners": 4}, "owners is 4; .* between 1 and 3"),
        (
            tabular([0] * 9 + [1, 2]),
            "owned-labels",
            4,
            {},
            "owners is 2, but an owned label has only 1 examples",
        ),
        (tabular([0] + [1, 2] * 9), "owned-labels", 4, {}, "2 partitions own no label, but only 1 examples"),
    ],
)
def test_says_why_there_is_no_such_split(
    dataset: Dataset, partitioner: str, num_partitions: int, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AppConfigError, match=sentence):
        partition_indices(dataset, num_partitions, partitioner=partitioner, **{**OPTIONS, **options})
