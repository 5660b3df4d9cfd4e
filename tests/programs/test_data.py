"""Data sets load whole, read-only and as published; what is wrong with a folder is said in one sentence."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits

from clients import data
from clients.data import DATASET_NAMES, load_dataset
from clients.errors import AppConfigError
from tests.programs.conftest import REAL, packed, write_images

FOLDERS = {
    "fashion-mnist": "fashion_mnist",
    "mnist": "mnist",
    "heart-disease": "heart_disease",
    "adult": "adult",
    "shakespeare": "tinyshakespeare",
}


def test_digits_is_all_of_scikit_learns_digits_split_once() -> None:
    digits = load_dataset("digits")
    images = np.concatenate([digits.train_x, digits.test_x])
    assert digits.train_x.shape == (1437, 1, 8, 8)
    assert digits.test_x.shape == (360, 1, 8, 8)
    published = load_digits().data / 16
    assert sorted(map(tuple, images.reshape(-1, 64))) == sorted(map(tuple, published))


def test_digits_split_keeps_the_share_of_each_label() -> None:
    digits = load_dataset("digits")
    all_counts = np.bincount(load_digits().target)
    assert np.abs(np.bincount(digits.train_y) - 0.8 * all_counts).max() < 1


def test_a_second_call_returns_the_same_object() -> None:
    assert load_dataset("digits") is load_dataset("digits")


@pytest.mark.parametrize("source", ["real", "synthetic"] if REAL.is_dir() else ["synthetic"])
@pytest.mark.parametrize("name", DATASET_NAMES)
def test_every_data_set_keeps_its_promises(name: str, source: str, synthetic: Path) -> None:
    dataset = load_dataset(name, str(REAL if source == "real" else synthetic))
    for x, y in ((dataset.train_x, dataset.train_y), (dataset.test_x, dataset.test_y)):
        assert x.dtype == np.float32
        assert y.dtype == np.int64
        assert len(x) == len(y) > 0
        if name == "shakespeare":  # rare characters may follow nowhere
            assert 0 <= y.min() < y.max() < dataset.classes
        else:
            assert set(np.unique(y)) == set(range(dataset.classes))
        assert not x.flags.writeable
        assert not y.flags.writeable
        assert np.isfinite(x).all()
        if x.ndim == 4:
            assert x.shape[1] == 1
            assert 0 <= x.min() < 0.1 < 0.9 < x.max() <= 1
        else:
            assert x.ndim == 2
    assert dataset.train_x.shape[1:] == dataset.test_x.shape[1:]
    assert (dataset.groups is not None) == (name in ("heart-disease", "adult", "shakespeare"))
    if dataset.groups is not None:
        assert dataset.groups.dtype == np.int64
        assert dataset.groups.shape == dataset.train_y.shape
        assert set(np.unique(dataset.groups)) == set(range(dataset.groups.max() + 1))
        assert not dataset.groups.flags.writeable


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_images_are_the_bytes_of_the_files_divided_by_255(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name.replace("-", "_")
    written = write_images(folder, seed=3)
    dataset = load_dataset(name, str(folder))
    np.testing.assert_allclose(dataset.train_x[:, 0], written["train-images-idx3-ubyte.gz"] / 255, rtol=1e-6)
    np.testing.assert_allclose(dataset.test_x[:, 0], written["t10k-images-idx3-ubyte.gz"] / 255, rtol=1e-6)
    np.testing.assert_array_equal(dataset.train_y, written["train-labels-idx1-ubyte.gz"])
    np.testing.assert_array_equal(dataset.test_y, written["t10k-labels-idx1-ubyte.gz"])


@pytest.mark.parametrize("name", FOLDERS)
def test_data_dir_may_be_the_folder_or_its_parent(name: str, synthetic: Path) -> None:
    from_parent = load_dataset(name, str(synthetic))
    from_folder = load_dataset(name, str(synthetic / FOLDERS[name]))
    np.testing.assert_array_equal(from_parent.train_x, from_folder.train_x)


def test_data_dir_may_have_any_name(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", seed=4)
    assert len(load_dataset("mnist", str(tmp_path / "pictures")).train_y) == 20


def test_each_hospital_is_split_80_to_20(synthetic: Path) -> None:
    heart = load_dataset("heart-disease", str(synthetic))
    assert heart.groups is not None
    np.testing.assert_array_equal(np.bincount(heart.groups), [8, 12, 16, 20])
    assert len(heart.test_y) == 2 + 3 + 4 + 5


def test_heart_label_says_whether_num_is_above_zero(synthetic: Path) -> None:
    heart = load_dataset("heart-disease", str(synthetic))
    # num counts 0..4 over and over: one row in five of each hospital is healthy
    labels = np.concatenate([heart.train_y, heart.test_y])
    assert np.bincount(labels).tolist() == [14, 56]


def test_missing_values_become_the_training_median_and_are_marked(synthetic: Path) -> None:
    heart = load_dataset("heart-disease", str(synthetic))
    values, marks = heart.train_x[:, :13], heart.train_x[:, 13:]
    missing = marks[:, 2] == 1
    assert 0 < missing.sum() < len(missing)
    filled = np.unique(values[missing, 2])
    assert len(filled) == 1
    np.testing.assert_allclose(filled[0], np.median(values[~missing, 2]), rtol=1e-5)
    assert (marks[:, 12] == 1).all()
    assert (marks[:, [0, 1, *range(3, 12)]] == 0).all()
    assert (heart.test_x[heart.test_x[:, 15] == 1, 2] == filled[0]).all()


def test_heart_features_are_standardised_over_the_training_part_alone(synthetic: Path) -> None:
    heart = load_dataset("heart-disease", str(synthetic))
    np.testing.assert_allclose(heart.train_x[:, :12].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(heart.train_x[:, :12].std(axis=0), 1, atol=1e-6)
    assert np.abs(heart.test_x[:, :12].mean(axis=0)).max() > 0.01


@pytest.mark.parametrize(
    ("name", "data_dir", "sentence"),
    [
        ("cifar", "", "There is no data set 'cifar'; dataset is one of digits, fashion-mnist"),
        (
            "mnist",
            "data/mnist",
            "'data/mnist', a relative path; .* engine's working folder is not the user's",
        ),
        ("mnist", "/no/such/folder", "'/no/such/folder', and there is no such folder"),
        ("mnist", "{}/fashion_mnist", "the folder of another data set; mnist belongs in a folder 'mnist'"),
        ("mnist", "{}/empty", "lacks train-images-idx3-ubyte.gz, .* needed for mnist. Set data-dir to"),
        ("heart-disease", "{}/empty", "lacks processed.cleveland.data, .* needed for heart-disease"),
        ("heart-disease", "", "heart-disease is not taken from the hub. Set data-dir to .* holds processed.cleveland"),
        ("adult", "", "adult is not taken from the hub. Set data-dir to .* holds adult.data.gz, adult.test.gz"),
        ("adult", "{}/empty", "lacks adult.data.gz, adult.test.gz, needed for adult"),
        ("adult", "{}/mnist", "the folder of another data set; adult belongs in a folder 'adult'"),
        ("shakespeare", "", "shakespeare is not taken from the hub. Set data-dir to .* holds input.txt"),
        ("shakespeare", "{}/empty", "lacks input.txt, needed for shakespeare. .* called 'tinyshakespeare'"),
    ],
)
def test_says_what_is_wrong_with_a_name_or_folder(name: str, data_dir: str, sentence: str, synthetic: Path) -> None:
    (synthetic / "empty").mkdir()
    with pytest.raises(AppConfigError, match=sentence):
        load_dataset(name, data_dir.format(synthetic))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param(b"not gzip", "cannot be read as a gzip file", id="not gzip"),
        pytest.param(
            packed(b"\0\0\x08\x01\0\0\0\x09abc"),
            r"is no idx-ubyte file: .* holds 11 bytes for the shape \(9,\)",
            id="too short",
        ),
        pytest.param(
            packed(b"\0\0\x0d\x01\0\0\0\x03abc"), "is no idx-ubyte file: it begins with 00000d01", id="other type"
        ),
        pytest.param(packed(b""), "is no idx-ubyte file", id="empty"),
        pytest.param(packed(b"\0\0\x08\x01\0\0\0\x03abc"), r"labels of shape \(3,\)", id="too few labels"),
    ],
)
def test_says_what_is_wrong_with_an_image_file(content: bytes, sentence: str, synthetic: Path) -> None:
    (synthetic / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(AppConfigError, match=sentence):
        load_dataset("mnist", str(synthetic))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("1,2,x\n", "cannot be read as comma-separated numbers .*'x'"),
        ("1,2\n3,4\n", r"has 2 rows of \[2\] columns; it needs at least 2 rows of 14"),
        ("", "has 0 rows"),
    ],
)
def test_says_what_is_wrong_with_a_hospital_file(content: str, sentence: str, synthetic: Path) -> None:
    (synthetic / "heart_disease" / "processed.va.data").write_text(content)
    with pytest.raises(AppConfigError, match=sentence):
        load_dataset("heart-disease", str(synthetic))


@pytest.fixture
def quiet_hub(monkeypatch: pytest.MonkeyPatch):
    """No telemetry, and nothing that a test loads is kept for the next one."""
    monkeypatch.setattr("flwr_datasets.federated_dataset.event", lambda *_: None)
    yield
    data._load_dataset.cache_clear()


def test_without_data_dir_images_come_from_the_hub(monkeypatch: pytest.MonkeyPatch, quiet_hub: None) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 5)).astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    split = datasets.Dataset.from_dict({"image": list(pixels), "label": list(np.arange(20) % 10)}, features=features)
    asked = []

    def hub(path: str, **_: object) -> datasets.DatasetDict:
        asked.append(path)
        return datasets.DatasetDict({"train": split, "test": split.select(range(10))})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    mnist = load_dataset("mnist")
    assert asked == ["ylecun/mnist"]
    np.testing.assert_allclose(mnist.train_x[:, 0], pixels / 255, rtol=1e-6)
    np.testing.assert_array_equal(mnist.test_y, np.arange(10))


def test_an_unreachable_hub_is_one_sentence_that_names_data_dir(
    monkeypatch: pytest.MonkeyPatch, quiet_hub: None
) -> None:
    def hub(path: str, **_: object) -> None:
        raise ConnectionError(f"Couldn't reach {path}")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(AppConfigError, match=r"fashion-mnist could not be loaded .* Set data-dir to the absolute"):
        load_dataset("fashion-mnist")
