"""Stores everything that a run needs to continue after its server was killed, in one file that is replaced atomically.

The file is a zip archive without compression. It contains `state.json` and one member for each array, and no code.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from .._files import absolute_path, followed, lock, make_folder, put_in_place, replace_file
from ..errors import InvalidSetting
from .strategy_state import decode, encode

__all__ = ["Checkpoint", "Saved"]

_log = logging.getLogger(__name__)

_FORMAT = 1
_STATE = "state.json"


@dataclass
class Saved:
    """The state of a run after one of its rounds.

    Attributes:
        run: Name of the run.
        round: The last completed round; 0 if there is none.
        arrays: The model after that round.
        fingerprint: Settings that must be the same when the run is resumed, such as code, seed and strategy.
        strategy: Attributes of the wrapped strategy that have changed since it was made.
        randomness: States of the global generators of `random` and NumPy, from which strategies sample.
        metrics: Kind -> round -> metrics, as in Flower's `Result`.
        privacy: State of the privacy account; None if the run promises no privacy.
    """

    run: str
    round: int
    arrays: ArrayRecord
    fingerprint: dict[str, Any]
    strategy: dict[str, Any] = field(default_factory=dict)
    randomness: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    privacy: dict[str, Any] | None = None


class Checkpoint:
    """Reads and writes the checkpoint file of one run.

    Args:
        path: Absolute path of the file; its folder is created. Beside it lie `PATH.lock` and, under a privacy promise,
            `PATH.privacy`, which records the requests so far, including those of the current round.

    Raises:
        InvalidSetting: The path is relative, or a folder, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = absolute_path(path, "checkpoint")
        if self.path.is_dir():
            raise InvalidSetting(f"The checkpoint's path {str(path)!r} is a folder; name a file in it.")
        try:
            self.path = followed(self.path)
            make_folder(self.path.parent)
            self._beside("lock").open("a").close()
        except OSError as error:
            raise InvalidSetting(f"The checkpoint {str(path)!r} cannot be written: {error.strerror}.") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the checkpoint, which the operating system releases if the process dies.

        Raises:
            InvalidSetting: Another run holds the lock.
        """
        with self._beside("lock").open("a") as file:
            error = lock(file)
            if isinstance(error, BlockingIOError):
                raise InvalidSetting(
                    f"The checkpoint {self.path} is in use by another run. Stop that one, or name another file."
                )
            if error is not None:
                _log.warning(
                    "The checkpoint %s cannot be locked (%s): make sure that no second run uses it.",
                    self.path,
                    error.strerror,
                )
            yield

    def load(self) -> Saved | None:
        """Returns the state that was saved last, or None if there is no file yet.

        Raises:
            InvalidSetting: The file is damaged or has another format.
        """
        if not self.path.exists():
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                state = json.loads(archive.read(_STATE))
                if state["format"] != _FORMAT:
                    raise InvalidSetting(
                        f"The checkpoint {self.path} has format {state['format']}; this version reads {_FORMAT}. Go on "
                        "with the version that wrote it, or name another file to start over."
                    )
                blobs = [archive.read(str(number)) for number in range(state["blobs"])]
            return Saved(**{entry.name: decode(state["saved"][entry.name], blobs) for entry in fields(Saved)})
        except InvalidSetting:
            raise
        except OSError as error:
            raise InvalidSetting(f"The checkpoint {self.path} cannot be read: {error.strerror}.") from error
        except Exception as error:  # a damaged file can raise almost anything
            raise InvalidSetting(
                f"The checkpoint {self.path} is damaged ({type(error).__name__}: {error}). Restore the file, or "
                "remove it to start over."
            ) from error

    def save(self, saved: Saved) -> None:
        """Replace the saved state; a crash or a power cut leaves either the old or the new file.

        Raises:
            InvalidSetting: The file cannot be written.
        """
        blobs: list[bytes] = []
        values = {entry.name: encode(getattr(saved, entry.name), blobs) for entry in fields(Saved)}
        draft = self._beside("new")
        try:
            with draft.open("wb") as file:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                    archive.writestr(_STATE, json.dumps({"format": _FORMAT, "blobs": len(blobs), "saved": values}))
                    for number, blob in enumerate(blobs):
                        archive.writestr(str(number), blob)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(draft, self.path)
        except OSError as error:
            raise InvalidSetting(
                f"The checkpoint {self.path} cannot be written: {error.strerror}. The one before it is still there."
            ) from error

    def save_privacy(self, run: str, account: dict[str, Any]) -> None:
        """Save the privacy account, which already charges for messages that have not been sent.

        Raises:
            InvalidSetting: The file cannot be written; then no message may be sent.
        """
        path = self._beside("privacy")
        try:
            replace_file(path, json.dumps({"run": run, "account": account}))
        except OSError as error:
            raise InvalidSetting(
                f"The account of privacy {path} cannot be written: {error.strerror}. Nothing is asked without it."
            ) from error

    def load_privacy(self, run: str) -> dict[str, Any] | None:
        """Returns the privacy account that was saved last for this run, or None if there is none."""
        try:
            values = json.loads(self._beside("privacy").read_text())
            return dict(values["account"]) if values["run"] == run else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{suffix}")
