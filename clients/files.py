"""Finds and reads the files of a data set; what is wrong with them is said in one sentence."""

import gzip
import zlib
from pathlib import Path

from clients.errors import AppConfigError

__all__ = ["FOLDERS", "folder_with", "read_gzip"]

#: What the folder of each data set is called.
FOLDERS = {
    "fashion-mnist": "fashion_mnist",
    "mnist": "mnist",
    "heart-disease": "heart_disease",
    "adult": "adult",
    "shakespeare": "tinyshakespeare",
}


def folder_with(name: str, data_dir: str, files: tuple[str, ...]) -> Path:
    """Return the folder that holds `files`: `data_dir/<folder of the data set>` or `data_dir` itself."""
    if not data_dir:
        raise AppConfigError(
            f"{name} is not taken from the hub. Set data-dir to the absolute path of the folder that holds "
            f"{', '.join(files)}."
        )
    given = Path(data_dir)
    if not given.is_absolute():
        raise AppConfigError(
            f"data-dir is {data_dir!r}, a relative path; it has to be absolute, because the engine's working "
            "folder is not the user's."
        )
    if not given.is_dir():
        raise AppConfigError(f"data-dir is {data_dir!r}, and there is no such folder on this machine.")
    below = given / FOLDERS[name]
    folder = below if below.is_dir() else given
    # MNIST and Fashion-MNIST have the same file names: the wrong one would load without a word
    if folder.name in FOLDERS.values() and folder.name != FOLDERS[name]:
        raise AppConfigError(
            f"data-dir is {data_dir!r}, the folder of another data set; {name} belongs in a folder {FOLDERS[name]!r}."
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise AppConfigError(
            f"{folder} lacks {', '.join(missing)}, needed for {name}. Set data-dir to the folder that holds "
            f"{', '.join(files)}, or to its parent if it is called {FOLDERS[name]!r}."
        )
    return folder


def read_gzip(path: Path) -> bytes:
    """Return what a gzip file holds."""
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise AppConfigError(f"{path} cannot be read as a gzip file ({error}). Fetch it again.") from error
