"""Small files in the formats in which the data sets are published, for tests that do not have the real ones."""

import gzip
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")


def packed(content: bytes) -> bytes:
    """The content as a gzip file without the time of day, so that equal content makes equal bytes."""
    return gzip.compress(content, mtime=0)


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(packed(head + array.astype(np.uint8).tobytes()))


def write_images(folder: Path, *, seed: int) -> dict[str, np.ndarray]:
    """Write 20 + 10 images of 6x5 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    arrays = {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (20, 6, 5)),
        "train-labels-idx1-ubyte.gz": np.arange(20) % 10,
        "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (10, 6, 5)),
        "t10k-labels-idx1-ubyte.gz": np.arange(10),
    }
    for file, array in arrays.items():
        write_idx(folder / file, array)
    return arrays


def write_hospitals(folder: Path) -> None:
    """Write 10, 15, 20 and 25 rows; the third feature is missing in every third row, the last one always."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, hospital in enumerate(HOSPITALS):
        rows = []
        for row in range(10 + 5 * i):
            cells = [f"{value:.3f}" for value in rng.normal(5, 2, size=13)]
            cells[2] = "?" if row % 3 == 0 else cells[2]
            cells[12] = "?"
            rows.append(",".join([*cells, str(row % 5)]))
        (folder / f"processed.{hospital}.data").write_text("\n".join(rows) + "\n")


def adult_row(country: str, label: str, rng: np.random.Generator, *, workclass: str = "") -> str:
    """One row of UCI Adult."""
    numbers = rng.integers(1, 100, 6)
    workclass = workclass or str(rng.choice(["Private", "State-gov", "?"]))
    return (
        f"{numbers[0]}, {workclass}, {numbers[1]}, Bachelors, {numbers[2]}, Divorced, Sales, Wife, White, "
        f"{rng.choice(['Female', 'Male'])}, {numbers[3]}, {numbers[4]}, {numbers[5]}, {country}, {label}"
    )


def write_adult(folder: Path) -> None:
    """Write 70 rows from ?, 65 from the United States, 60 from Cuba, 59 from Poland, 2 from Laos; and 20 test rows."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    counts = {"?": 70, "United-States": 65, "Cuba": 60, "Poland": 59, "Laos": 2}
    countries = rng.permutation(np.repeat(list(counts), list(counts.values())))
    train = [adult_row(country, (">50K", "<=50K")[min(i % 4, 1)], rng) for i, country in enumerate(countries)]
    test = [adult_row("Cuba", (">50K.", "<=50K.")[i % 2], rng) for i in range(19)]
    test.append(adult_row("Hungary", "<=50K.", rng, workclass="Never-worked"))
    (folder / "adult.data.gz").write_bytes(packed("\n".join([*train, "", ""]).encode()))
    (folder / "adult.test.gz").write_bytes(packed("\n".join(["|1x3 Cross validator", *test, "", ""]).encode()))


def write_plays(folder: Path, texts: dict[str, str]) -> None:
    """Write what each speaker says, cut at line breaks into speeches of five lines, the speakers taking turns."""
    folder.mkdir()
    turns = {speaker: iter(text.strip("\n").split("\n")) for speaker, text in texts.items()}
    speeches = []
    while turns:
        for speaker in list(turns):
            lines = list(islice(turns[speaker], 5))
            if lines:
                speeches.append("\n".join([f"{speaker}:", *lines]))
            else:
                del turns[speaker]
    # as published: two empty lines in one place, and a line break at the end
    (folder / "input.txt").write_text(speeches[0] + "\n\n\n" + "\n\n".join(speeches[1:]) + "\n")


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """A folder with small files of every data set."""
    write_images(tmp_path / "fashion_mnist", seed=1)
    write_images(tmp_path / "mnist", seed=2)
    write_hospitals(tmp_path / "heart_disease")
    write_adult(tmp_path / "adult")
    write_plays(tmp_path / "tinyshakespeare", {"ANNA": "What is it? " * 400, "BEN": "It is late.\n" * 200})
    return tmp_path
