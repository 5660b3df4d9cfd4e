"""Tables: UCI heart disease and UCI Adult."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from clients.dataset import Dataset
from clients.errors import AppConfigError
from clients.files import folder_with, read_gzip

__all__ = ["load_adult", "load_heart_disease"]

_SPLIT_SEED = 2024  # heart disease is published without a test part
_TEST_SHARE = 0.2
_HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
_HEART_FILES = tuple(f"processed.{hospital}.data" for hospital in _HOSPITALS)
_HEART_COLUMNS = 14  # 13 features and the label `num`

_ADULT_FILES = ("adult.data.gz", "adult.test.gz")
_ADULT_NUMBERS = (0, 2, 4, 10, 11, 12)  # age, fnlwgt, education-num, capital-gain, capital-loss, hours-per-week
_ADULT_NAMES = (1, 3, 5, 6, 7, 8, 9, 13)  # workclass, education, ..., native-country
_ADULT_COUNTRY = 13
_ADULT_LABELS = ("<=50K", ">50K")
_ADULT_COLUMNS = 15  # 14 features and the label
_ADULT_SMALLEST_GROUP = 60  # training rows


def load_heart_disease(name: str, data_dir: str) -> Dataset:
    """Return the patients of four hospitals, which are the groups; an 80/20 split of each."""
    folder = folder_with(name, data_dir, _HEART_FILES)
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


def load_adult(name: str, data_dir: str) -> Dataset:
    """Return who earns more than 50,000 dollars a year, as published in a training and a test file.

    Six numbers, standardised, and eight names, one-hot, `?` as a name of its own; both as the training file has
    them, so that a country seen in the test file alone is all zeros. Groups are the countries with at least 60
    training rows, in alphabetical order, and behind them one for all other countries and `?`.
    """
    folder = folder_with(name, data_dir, _ADULT_FILES)
    train, test = (_read_adult_rows(folder / file) for file in _ADULT_FILES)
    scale = StandardScaler().fit(train[:, _ADULT_NUMBERS].astype(np.float64))
    one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(train[:, _ADULT_NAMES])

    def features(rows: NDArray[np.str_]) -> NDArray[np.float32]:
        numbers = scale.transform(rows[:, _ADULT_NUMBERS].astype(np.float64))
        return np.concatenate([numbers, one_hot.transform(rows[:, _ADULT_NAMES])], axis=1).astype(np.float32)

    def labels(rows: NDArray[np.str_]) -> NDArray[np.int64]:
        return np.asarray(rows[:, -1] == _ADULT_LABELS[1], dtype=np.int64)

    return Dataset(
        features(train),
        labels(train),
        features(test),
        labels(test),
        classes=2,
        groups=_by_country(train[:, _ADULT_COUNTRY]),
    )


def _by_country(countries: NDArray[np.str_]) -> NDArray[np.int64]:
    names, country, counts = np.unique(countries, return_inverse=True, return_counts=True)
    alone = (counts >= _ADULT_SMALLEST_GROUP) & (names != "?")
    group = np.where(alone, np.cumsum(alone) - 1, alone.sum())
    groups: NDArray[np.int64] = group[country].astype(np.int64)
    return groups


def _read_adult_rows(path: Path) -> NDArray[np.str_]:
    """Return the cells of one file, shape (rows, 15); the full stop behind each label of the test file is gone."""
    raw = read_gzip(path)
    rows = []
    try:
        for line in raw.decode("ascii").splitlines():
            if not line.strip() or line.startswith("|"):  # the test file begins with `|1x3 Cross validator`
                continue
            row = [cell.strip() for cell in line.rstrip(" .").split(",")]
            if len(row) != _ADULT_COLUMNS or row[-1] not in _ADULT_LABELS:
                raise ValueError(f"{line!r} is not 14 features and one of {', '.join(_ADULT_LABELS)}")
            for column in _ADULT_NUMBERS:
                float(row[column])
            rows.append(row)
        if not rows:
            raise ValueError("it has no rows")
    except ValueError as error:
        raise AppConfigError(f"{path} cannot be read as rows of UCI Adult ({error}). Fetch it again.") from error
    return np.array(rows)
