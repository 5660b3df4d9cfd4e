"""Text: the next character in what the speakers of Shakespeare's plays say."""

import string
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from clients.dataset import Dataset
from clients.errors import AppConfigError
from clients.files import folder_with

__all__ = ["load_shakespeare"]

_FILES = ("input.txt",)
#: Character number i is the i-th of these.
_VOCABULARY = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
_CONTEXT = 20  # characters from which the next one is predicted
_LEAST_TEXT = 2000  # characters of a speaker
_TEST_SHARE = 0.2
_MOST_TRAIN, _MOST_TEST = 1000, 100  # examples of a speaker


def load_shakespeare(name: str, data_dir: str) -> Dataset:
    """Return 20 characters each and the one that follows them, as numbers in a vocabulary of 65.

    Groups are the speakers with at least 2,000 characters, in the order in which they first speak. All speeches
    under one name are one text, joined by line breaks, whichever play they are from. Its last 20 % are the test
    part, and no example reaches over that border. To keep it small, examples are taken at a stride, the smallest
    that leaves a speaker at most 1,000 for training and 100 for testing.
    """
    path = folder_with(name, data_dir, _FILES) / _FILES[0]
    texts = [text for text in _read_speakers(path).values() if len(text) >= _LEAST_TEXT]
    if not texts:
        raise AppConfigError(f"{path} has no speaker with {_LEAST_TEXT:,} characters or more. Fetch it again.")
    train, test = [], []
    for text in texts:
        numbers = _numbers(text, path)
        border = round((1 - _TEST_SHARE) * len(numbers))
        train.append(_windows(numbers[:border], _MOST_TRAIN))
        test.append(_windows(numbers[border:], _MOST_TEST))
    groups = np.repeat(np.arange(len(texts)), [len(windows) for windows in train])
    train_windows, test_windows = np.concatenate(train), np.concatenate(test)
    return Dataset(
        train_windows[:, :-1].astype(np.float32),
        train_windows[:, -1].astype(np.int64),
        test_windows[:, :-1].astype(np.float32),
        test_windows[:, -1].astype(np.int64),
        classes=len(_VOCABULARY),
        groups=groups.astype(np.int64),
    )


def _read_speakers(path: Path) -> dict[str, str]:
    """Return all that each speaker says; a speech is a line with the name and a colon, and lines of text."""
    try:
        blocks = path.read_text(encoding="ascii").split("\n\n")
    except (OSError, ValueError) as error:
        raise AppConfigError(f"{path} cannot be read as text ({error}). Fetch it again.") from error
    speeches: dict[str, list[str]] = {}
    for block in blocks:
        head, _, speech = block.strip("\n").partition("\n")
        if not head and not speech:
            continue
        if not head.endswith(":"):
            raise AppConfigError(
                f"{path} has a speech that begins with {head[:40]!r}; each begins with the speaker's name, a colon "
                "and a line break. Fetch it again."
            )
        speeches.setdefault(head[:-1], []).append(speech)
    return {speaker: "\n".join(spoken) for speaker, spoken in speeches.items()}


def _numbers(text: str, path: Path) -> NDArray[np.int64]:
    unknown = set(text).difference(_VOCABULARY)
    if unknown:
        raise AppConfigError(
            f"{path} has characters outside the vocabulary ({''.join(sorted(unknown))!r}); it needs to be the file "
            "as published. Fetch it again."
        )
    return np.array([_VOCABULARY.index(character) for character in text], dtype=np.int64)


def _windows(numbers: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most `most` windows of context and next character, evenly spaced, shape (windows, context + 1)."""
    windows = sliding_window_view(numbers, _CONTEXT + 1)
    return windows[:: -(-len(windows) // most)]
