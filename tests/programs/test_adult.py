"""UCI Adult: columns, labels and countries as published, statistics from the training file alone."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from clients.data import load_dataset
from clients.errors import AppConfigError
from tests.programs.conftest import REAL, adult_row, packed

with_real_files = pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")
ROW = adult_row("Cuba", ">50K", np.random.default_rng(0))


def test_labels_say_who_earns_more(synthetic: Path) -> None:
    adult = load_dataset("adult", str(synthetic))
    np.testing.assert_array_equal(adult.train_y, np.arange(256) % 4 == 0)
    np.testing.assert_array_equal(adult.test_y, [*(np.arange(19) % 2 == 0), 0])


def test_small_countries_and_unknown_ones_are_one_group(synthetic: Path) -> None:
    adult = load_dataset("adult", str(synthetic))
    assert adult.groups is not None
    assert np.bincount(adult.groups).tolist() == [60, 65, 70 + 59 + 2]  # Cuba, United-States, all others


def test_groups_belong_to_the_rows(synthetic: Path) -> None:
    adult = load_dataset("adult", str(synthetic))
    countries = adult.train_x[:, -5:].argmax(axis=1)  # ?, Cuba, Laos, Poland, United-States
    np.testing.assert_array_equal(adult.groups, np.array([2, 0, 2, 2, 1])[countries])


def test_numbers_are_standardised_over_the_training_file_alone(synthetic: Path) -> None:
    adult = load_dataset("adult", str(synthetic))
    np.testing.assert_allclose(adult.train_x[:, :6].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(adult.train_x[:, :6].std(axis=0), 1, atol=1e-6)
    assert np.abs(adult.test_x[:, :6].mean(axis=0)).max() > 0.01


def test_numbers_are_those_of_the_file(synthetic: Path) -> None:
    lines = gzip.decompress((synthetic / "adult" / "adult.data.gz").read_bytes()).decode().split("\n")
    hours = np.array([float(line.split(", ")[12]) for line in lines if line])
    adult = load_dataset("adult", str(synthetic))
    np.testing.assert_allclose(adult.train_x[:, 5], (hours - hours.mean()) / hours.std(), rtol=1e-5, atol=1e-6)


def test_names_are_one_hot_and_an_unseen_one_is_all_zeros(synthetic: Path) -> None:
    adult = load_dataset("adult", str(synthetic))
    # workclass has 3 names, sex 2, native-country 5, the five other columns 1 each
    assert adult.train_x.shape[1] == 6 + 3 + 2 + 5 + 5
    assert (adult.train_x[:, 6:].sum(axis=1) == 8).all()
    assert (adult.test_x[:-1, 6:].sum(axis=1) == 8).all()
    assert adult.test_x[-1, 6:].sum() == 6  # Never-worked, Hungary


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param(b"not gzip", "cannot be read as a gzip file .* Fetch it again.$", id="not gzip"),
        pytest.param(
            packed(b"|1x3 Cross validator\n"), "cannot be read as rows of UCI Adult .it has no rows", id="no rows"
        ),
        pytest.param(packed(b"1, 2, 3\n"), "'1, 2, 3' is not 14 features and one of <=50K, >50K", id="too few columns"),
        pytest.param(packed(ROW.replace(">50K", "rich").encode()), "is not 14 features and one of", id="no label"),
        pytest.param(packed(("?" + ROW[2:]).encode()), "could not convert string to float: '?", id="no number"),
        pytest.param(packed("é".encode()), "'ascii' codec", id="not ASCII"),
    ],
)
def test_says_what_is_wrong_with_a_file(content: bytes, sentence: str, synthetic: Path) -> None:
    (synthetic / "adult" / "adult.test.gz").write_bytes(content)
    with pytest.raises(AppConfigError, match=sentence):
        load_dataset("adult", str(synthetic))


@with_real_files
def test_published_files_have_their_published_shares() -> None:
    adult = load_dataset("adult", str(REAL))
    assert adult.train_x.shape == (32_561, 108)
    assert adult.test_x.shape == (16_281, 108)
    # adult.names: 23.93 % of both parts together earn more
    assert np.concatenate([adult.train_y, adult.test_y]).mean() == pytest.approx(0.2393, abs=5e-5)
    assert adult.groups is not None
    counts = np.bincount(adult.groups)
    assert len(counts) == 20
    assert counts[:-1].min() == 60  # Poland
    assert counts.max() == 29_170  # the United States
