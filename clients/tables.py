"""Tables: UCI heart disease."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import StandardScaler

from clients.dataset import Dataset
from clients.errors import AppConfigError
from clients.files import folder_with

__all__ = ["load_heart_disease"]

_SPLIT_SEED = 2024  # heart disease is published without a test part
_TEST_SHARE = 0.2
_HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
_HEART_FILES = tuple(f"processed.{hospital}.data" for hospital in _HOSPITALS)
_HEART_COLUMNS = 14  # 13 features and the label `num`


def load_heart_disease(name: str, data_dir: str) -> Dataset:
    """Return the patients of four hospitals, which are the groups; an 80/20 split of each."""
    if not data_dir:
        raise AppConfigError(
            f"{name} is not on the hub. Set data-dir to the absolute path of the folder that holds "
            f"{', '.join(_HEART_FILES)}."
        )
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
