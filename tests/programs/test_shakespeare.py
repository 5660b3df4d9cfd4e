"""Next characters: windows of one speaker's text, cut into a training and a test part."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from clients.data import Dataset, load_dataset
from clients.errors import AppConfigError
from tests.programs.conftest import REAL, write_plays

CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def words(length: int, seed: int) -> str:
    """Text of this length in lines of 9 characters; no two windows of it are alike."""
    letters = np.random.default_rng(seed).choice(list("ABCDEFGHIJabcdefghij '.,:"), length)
    letters[9::10] = "\n"
    letters[-1] = "!"
    return "".join(letters)


TEXTS = {
    "First Citizen": words(2_000, 1),
    "ANNA": words(30_000, 2),
    "BEN": words(1_999, 3),
    "CATO": words(5_555, 4),
}
SPEAKERS = ("First Citizen", "ANNA", "CATO")  # those with 2,000 characters


@pytest.fixture
def plays(tmp_path: Path) -> Dataset:
    write_plays(tmp_path / "tinyshakespeare", TEXTS)
    return load_dataset("shakespeare", str(tmp_path))


def sentences(x: np.ndarray, y: np.ndarray) -> list[str]:
    """The 21 characters of each example."""
    return ["".join(CHARACTERS[int(i)] for i in (*row, label)) for row, label in zip(x, y, strict=True)]


def test_training_examples_are_windows_of_the_first_80_percent_of_a_speakers_text(plays: Dataset) -> None:
    assert plays.groups is not None
    for group, speaker in enumerate(SPEAKERS):
        mine = plays.groups == group
        text = TEXTS[speaker][: round(0.8 * len(TEXTS[speaker]))]
        starts = [text.index(window) for window in sentences(plays.train_x[mine], plays.train_y[mine])]
        assert len(starts) <= 1_000
        stride = starts[1] - starts[0]
        assert starts == list(range(0, len(text) - 20, stride))
        assert len(range(0, len(text) - 20, stride - 1)) > 1_000 if stride > 1 else True


def test_test_examples_are_windows_of_the_last_20_percent(plays: Dataset) -> None:
    windows = sentences(plays.test_x, plays.test_y)
    for speaker in SPEAKERS:
        text = TEXTS[speaker][round(0.8 * len(TEXTS[speaker])) :]
        starts = [text.index(window) for window in windows if window in text]
        assert 50 <= len(starts) <= 100
        assert starts == list(range(0, len(text) - 20, starts[1] - starts[0]))
        windows = [window for window in windows if window not in text]
    assert not windows


def test_classes_are_the_characters(plays: Dataset) -> None:
    assert plays.classes == len(CHARACTERS) == 65
    assert plays.train_x.shape[1] == 20


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no speaker with 2,000 characters or more"),
        ("ANNA:\nWho is there?\n", "has no speaker with 2,000 characters or more"),
        ("ANNA:\nWho?\n\nNobody.\nNobody.", "has a speech that begins with 'Nobody.'; each begins with the"),
        ("ANNA:\n" + "1 + 2 = 4 " * 200, r"has characters outside the vocabulary \('\+124='\)"),
        ("ANNA:\n" + "é" * 2000, "cannot be read as text .'ascii' codec"),
    ],
)
def test_says_what_is_wrong_with_a_file(content: str, sentence: str, synthetic: Path) -> None:
    (synthetic / "tinyshakespeare" / "input.txt").write_text(content, encoding="utf-8")
    with pytest.raises(AppConfigError, match=sentence):
        load_dataset("shakespeare", str(synthetic))


@pytest.mark.skipif(not REAL.is_dir(), reason="the published file is not here")
def test_published_file_has_99_speakers_and_all_characters() -> None:
    plays = load_dataset("shakespeare", str(REAL))
    assert plays.groups is not None
    per_speaker = np.bincount(plays.groups)
    assert len(per_speaker) == 99
    assert 500 < per_speaker.min() <= per_speaker.max() <= 1_000
    assert len(plays.test_y) <= 99 * 100
    text = (REAL / "tinyshakespeare" / "input.txt").read_text()
    assert "".join(sorted(set(text))) == CHARACTERS
    # blank and e, the most frequent characters of English
    assert {CHARACTERS[label] for label, _ in Counter(plays.train_y.tolist()).most_common(2)} == {" ", "e"}
