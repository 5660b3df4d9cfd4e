"""Stores everything that a run needs to continue after its server was killed, in one file that is replaced atomically.

The file is a zip archive without compression. It contains `state.json` and one member for each array, and no code.
Another program may have made it, so nothing in it is believed: members are as large as the file says, and values are of
the kinds that `strategy_state` lists.
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
from typing import Any, Literal

from flwr.app import ArrayRecord, MetricRecord

from .._files import (
    MEGABYTE,
    absolute_path,
    followed,
    lock,
    make_folder,
    open_file,
    parse_json,
    read_file,
    replace_file,
    replacing,
)
from .._seeding import check_global_states
from ..errors import InvalidSetting
from ..protocol import view
from .strategy_state import decode, encode

__all__ = ["KINDS", "Checkpoint", "MetricsKind", "Saved"]

_log = logging.getLogger(__name__)

_FORMAT = 1
_STATE = "state.json"
_LARGEST_STATE, _LARGEST_ACCOUNT = 64 * MEGABYTE, 64 * MEGABYTE
#: Names of the metrics in Flower's `Result`.
MetricsKind = Literal["train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"]
KINDS: tuple[MetricsKind, ...] = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
_LATEST_ROUND = 10**9
#: Of every member: the real time says nothing, and a zip archive knows no clock before 1980 or after 2107.
_TIME = (1980, 1, 1, 0, 0, 0)
_OPEN = os.O_RDWR | os.O_CREAT


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
        memory: Last updates of the shards; None without bounded staleness.
        average: State of the models' average; None without one.
        tags: Tags of the last round that masked replies came with, which the next plan shows; None without.
    """

    run: str
    round: int
    arrays: ArrayRecord
    fingerprint: dict[str, Any]
    strategy: dict[str, Any] = field(default_factory=dict)
    randomness: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    privacy: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    average: dict[str, Any] | None = None
    tags: dict[str, Any] | None = None


class Checkpoint:
    """Reads and writes the checkpoint file of one run.

    Args:
        path: Absolute path of the file; its folder is created. Beside it lie `PATH.lock` and, under a privacy promise,
            `PATH.privacy`, which records the requests so far, including those of the current round. `PATH.secagg` has
            the public part of the last set-up, if keys of masks are set up through the server.

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
            os.close(open_file(self._beside("lock"), _OPEN))
        except OSError as error:
            raise InvalidSetting(f"The checkpoint {str(path)!r} cannot be written: {error.strerror}.") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the checkpoint, which the operating system releases if the process dies.

        Raises:
            InvalidSetting: Another run holds the lock.
        """
        try:
            opened = open_file(self._beside("lock"), _OPEN)
        except OSError as error:
            raise InvalidSetting(
                f"The checkpoint {self.path} cannot be locked: {self._beside('lock')}: {error.strerror}."
            ) from error
        with os.fdopen(opened, "r+b") as file:
            problem = lock(file)
            if isinstance(problem, BlockingIOError):
                raise InvalidSetting(
                    f"The checkpoint {self.path} is in use by another run. Stop that run, or name another file."
                )
            if problem is not None:
                _log.warning(
                    "The checkpoint %s cannot be locked (%s): make sure that no second run uses it.",
                    self.path,
                    problem.strerror,
                )
            yield

    def load(self) -> Saved | None:
        """Returns the state that was saved last, or None if there is no file yet.

        Raises:
            InvalidSetting: The file is damaged or has another format.
        """
        if not os.path.lexists(self.path):
            return None
        try:
            with os.fdopen(open_file(self.path), "rb") as file, zipfile.ZipFile(file) as archive:
                _check_members(archive, os.fstat(file.fileno()).st_size)
                state = parse_json(archive.read(_STATE), finite=False)
                if state["format"] != _FORMAT:
                    raise InvalidSetting(
                        f"The checkpoint {self.path} has format {str(state['format'])[:20]}; this version reads "
                        f"{_FORMAT}. Continue with the version that wrote it, or name another file to start over."
                    )
                if type(state["blobs"]) is not int or state["blobs"] != len(archive.infolist()) - 1:
                    raise ValueError("the number of its members")
                blobs = [archive.read(str(number)) for number in range(state["blobs"])]
            later = {"memory": None, "average": None, "tags": None}  # which files of earlier versions lack
            known = {**later, **state["saved"]}
            saved = Saved(**{entry.name: decode(known[entry.name], blobs) for entry in fields(Saved)})
            _check(saved)
        except InvalidSetting:
            raise
        except OSError as error:
            raise InvalidSetting(f"The checkpoint {self.path} cannot be read: {error.strerror}.") from error
        except Exception as error:  # a damaged file can raise almost anything
            raise InvalidSetting(
                f"The checkpoint {self.path} is damaged ({type(error).__name__}: {_cut(error)}). Restore the file, or "
                "remove it to start over."
            ) from error
        return saved

    def save(self, saved: Saved) -> None:
        """Replace the saved state; a crash or a power cut leaves either the old or the new file.

        Raises:
            InvalidSetting: The file cannot be written.
        """
        blobs: list[bytes] = []
        values = {entry.name: encode(getattr(saved, entry.name), blobs) for entry in fields(Saved)}
        members = [(_STATE, json.dumps({"format": _FORMAT, "blobs": len(blobs), "saved": values}).encode())]
        members += [(str(number), blob) for number, blob in enumerate(blobs)]
        try:
            with (
                replacing(self.path, self._beside("new")) as file,
                zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            ):
                for name, data in members:
                    archive.writestr(zipfile.ZipInfo(name, _TIME), data)
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
                f"The privacy account {path} cannot be written: {error.strerror}. Without it, no messages are sent."
            ) from error

    def load_privacy(self, run: str) -> dict[str, Any] | None:
        """Returns the privacy account that was saved last for this run, or None if there is none.

        Raises:
            InvalidSetting: The file is damaged, or cannot be read.
        """
        path = self._beside("privacy")
        if not os.path.lexists(path):
            return None
        try:
            values = parse_json(read_file(path, _LARGEST_ACCOUNT))
            return dict(values["account"]) if values["run"] == run else None
        except OSError as error:
            raise InvalidSetting(f"The privacy account {path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InvalidSetting(
                f"The privacy account {path} is damaged ({type(error).__name__}). Restore the file; if it is lost, "
                "remove it, and all rounds so far count as asked of all shards."
            ) from error

    def save_enrolment(self, run: str, enrolment: dict[str, Any]) -> None:
        """Save the public part of a set-up of masks, under whose keys nothing was asked yet.

        Raises:
            InvalidSetting: The file cannot be written.
        """
        path = self._beside("secagg")
        try:
            replace_file(path, json.dumps({"run": run, "enrolment": enrolment}))
        except OSError as error:
            raise InvalidSetting(f"The set-up of masks {path} cannot be written: {error.strerror}.") from error

    def load_enrolment(self, run: str) -> dict[str, Any] | None:
        """Returns the set-up of masks that was saved last for this run, or None if there is none.

        Raises:
            InvalidSetting: The file is damaged, or cannot be read.
        """
        path = self._beside("secagg")
        if not os.path.lexists(path):
            return None
        try:
            values = parse_json(read_file(path, _LARGEST_ACCOUNT))
            return dict(values["enrolment"]) if values["run"] == run else None
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InvalidSetting(
                f"The set-up of masks {path} cannot be read ({type(error).__name__}). Restore the file, or remove it: "
                "nodes then set up new keys."
            ) from error

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{suffix}")


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive that would take more memory than its file has bytes, or that has other members.

    Raises:
        ValueError: It says what is wrong.
    """
    members = archive.infolist()
    if any(one.compress_type != zipfile.ZIP_STORED or one.compress_size != one.file_size for one in members):
        raise ValueError("a member is compressed")
    if sum(one.file_size for one in members) > size:
        raise ValueError("its members are larger than the file")
    if {one.filename for one in members} != {_STATE, *map(str, range(len(members) - 1))}:
        raise ValueError("it has other members than a checkpoint")
    if archive.getinfo(_STATE).file_size > _LARGEST_STATE:
        raise ValueError(f"{_STATE} has more than {_LARGEST_STATE} bytes")


def _check(saved: Saved) -> None:
    """Check the types of a state that was read; what a strategy keeps is checked when it is restored.

    Raises:
        TypeError, ValueError: Something is of another type, or no such value can be.
    """
    run, number, arrays = (getattr(saved, name) for name in ("run", "round", "arrays"))
    if not isinstance(run, str) or len(run) > 1000:
        raise TypeError("run")
    if type(number) is not int or not 0 <= number <= _LATEST_ROUND:
        raise ValueError("round")
    if not isinstance(arrays, ArrayRecord):
        raise TypeError("arrays")
    for array in saved.arrays.values():
        view(array)
    kept: list[Any] = [
        saved.fingerprint,
        saved.strategy,
        saved.randomness,
        saved.metrics,
        saved.privacy or {},
        saved.memory or {},
        saved.average or {},
        saved.tags or {},
    ]
    if not all(type(value) is dict and all(isinstance(key, str) for key in value) for value in kept):
        raise TypeError("what is kept is no dict of names")
    if saved.randomness:
        check_global_states(saved.randomness)
    for rounds in saved.metrics.values():
        for number, metrics in rounds.items():
            if type(number) is not int:
                raise TypeError("metrics")
            MetricRecord(metrics)


def _cut(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 200 else f"{text[:200]}..."
