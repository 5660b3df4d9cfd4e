"""A random part of the training examples: the same for everybody, rows, labels and groups together."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from clients.app import app as client_app
from clients.data import DATASET_NAMES, Dataset, load_dataset
from clients.errors import AppConfigError
from clients.models import build_model
from clients.partition import partition_indices
from fl_gradcode.testing import InProcessGrid
from server.app import main

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def rows(dataset: Dataset) -> set[bytes]:
    return {x.tobytes() + bytes([y]) for x, y in zip(dataset.train_x, dataset.train_y, strict=True)}


@pytest.mark.parametrize("name", DATASET_NAMES)
def test_a_part_is_made_of_rows_with_their_labels_and_the_test_part_stays(name: str, synthetic: Path) -> None:
    whole, part = load_dataset(name, str(synthetic)), load_dataset(name, str(synthetic), 15)
    assert len(part.train_x) == len(part.train_y) == 15
    assert rows(part) <= rows(whole)
    assert part.test_x is whole.test_x
    assert part.test_y is whole.test_y
    assert part.classes == whole.classes
    assert not part.train_x.flags.writeable


@pytest.mark.parametrize("name", ["heart-disease", "adult", "shakespeare"])
@pytest.mark.parametrize("examples", [15, 50])
def test_groups_stay_with_their_rows(name: str, examples: int, synthetic: Path) -> None:
    whole, part = load_dataset(name, str(synthetic)), load_dataset(name, str(synthetic), examples, seed=2)
    assert whole.groups is not None
    assert part.groups is not None
    # several speakers' windows can be alike: an owner is then one of these
    owners: dict[bytes, set[int]] = {}
    for x, group in zip(whole.train_x, whole.groups, strict=True):
        owners.setdefault(x.tobytes(), set()).add(int(group))
    before = [owners[x.tobytes()] for x in part.train_x]
    for group in range(int(part.groups.max()) + 1):
        assert set.intersection(*(before[i] for i in np.flatnonzero(part.groups == group)))
    assert len(np.unique(part.groups)) == part.groups.max() + 1


def test_groups_without_an_example_are_gone(synthetic: Path) -> None:
    part = load_dataset("heart-disease", str(synthetic), 2)
    assert part.groups is not None
    assert set(part.groups) <= {0, 1}
    parts = partition_indices(part, len(set(part.groups)), partitioner="natural", alpha=0.3, seed=0, owners=0)
    assert sorted(np.concatenate(parts)) == [0, 1]


def test_the_seed_alone_decides_which_and_fewer_are_a_part_of_more() -> None:
    few, same, other, more = (
        load_dataset("digits", train_examples=count, seed=seed) for count, seed in ((50, 1), (50, 1), (50, 2), (90, 1))
    )
    assert few is same
    assert rows(few) < rows(more)
    assert rows(few) != rows(other)


def test_all_examples_in_number_are_the_whole_training_part() -> None:
    whole, part = load_dataset("digits"), load_dataset("digits", train_examples=1437, seed=5)
    np.testing.assert_array_equal(part.train_x, whole.train_x)
    np.testing.assert_array_equal(part.train_y, whole.train_y)


def test_zero_is_the_data_set_itself() -> None:
    assert load_dataset("digits", train_examples=0, seed=9) is load_dataset("digits")


@pytest.mark.parametrize(
    ("examples", "seed", "sentence"),
    [
        (-1, 0, "train-examples is -1; digits has 1437 training examples: choose between 1 and 1437, or 0 for all"),
        (1438, 0, "train-examples is 1438; digits has 1437 training examples"),
        (5, -1, "seed is -1; it has to be 0 or more"),
    ],
)
def test_says_why_there_is_no_such_part(examples: int, seed: int, sentence: str) -> None:
    with pytest.raises(AppConfigError, match=sentence):
        load_dataset("digits", train_examples=examples, seed=seed)


@pytest.mark.parametrize(
    ("config", "expected"), [({"train-examples": 100}, 100), ({"train-examples": 0}, 1437), ({}, 1437)]
)
def test_clients_share_out_the_part(config: dict[str, int], expected: int) -> None:
    run_config = {key: value for key, value in DEFAULTS.items() if key != "train-examples"} | config
    arrays = ArrayRecord(build_model("logistic", load_dataset("digits"), 0).state_dict())
    with InProcessGrid(client_app, 4, run_config=run_config) as grid:
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
        messages = [Message(content, node, kind) for node in grid.get_node_ids() for kind in ("train", "evaluate")]
        metrics: list[Any] = [reply.content["metrics"] for reply in grid.send_and_receive(messages)]
    assert sum(each["num-examples"] for each in metrics) == expected


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        (-1, "train-examples=-1 must be at least 0."),
        (1438, "train-examples is 1438; digits has 1437 training examples"),
        (5, "num-partitions is 6; it is between 1 and 5"),
    ],
)
def test_the_server_refuses_before_anything_is_sent(examples: int, sentence: str) -> None:
    config = DEFAULTS | {"train-examples": examples}
    with InProcessGrid(client_app, 6, run_config=config) as grid:
        with pytest.raises(AppConfigError, match=sentence):
            main(grid, Context(1, 0, {}, RecordDict(), config))
        assert grid.calls == [0] * 6
