"""Files that survive a kill or a power cut: written whole or not at all, by one writer at a time.

Reading takes nothing for granted either: a path may lead to a folder or a pipe, and a file may be of any size.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from .errors import InvalidSetting

try:
    import fcntl
except ImportError:  # Windows: there two processes can take one file
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "MEGABYTE",
    "absolute_path",
    "followed",
    "lock",
    "locked",
    "make_folder",
    "open_file",
    "parse_json",
    "put_in_place",
    "read_file",
    "replace_file",
    "replacing",
    "sync_folder",
]

MEGABYTE = 1_000_000


def absolute_path(path: str | os.PathLike[str], what: str) -> Path:
    """Returns a path that a user gave, which must be absolute.

    Args:
        path: As the user gave it.
        what: Name of the setting, for the error.

    Raises:
        InvalidSetting: It is relative. Inside an app, that would be relative to a folder of Flower's engine.
    """
    if not Path(path).is_absolute():
        raise InvalidSetting(
            f"{what}={str(path)!r} is a relative path; inside an app the working folder is the engine's, not yours. "
            "Give an absolute path."
        )
    return Path(path)


def followed(path: Path) -> Path:
    """Returns the file that a symbolic link leads to, or the path itself: the file is replaced, and the link stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def open_file(path: Path, flags: int = os.O_RDONLY, *, mode: int = 0o666) -> int:
    """Returns a descriptor of a regular file, without waiting for whoever may be at the other end of a pipe.

    Args:
        path: The file.
        flags: As for `os.open`.
        mode: Permissions of a new file, less the process's umask.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device.
    """
    found = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0), mode)
    try:
        kind = os.fstat(found).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "Not a regular file")
    except OSError:
        os.close(found)
        raise
    return found


def read_file(path: Path, most: int) -> bytes:
    """Returns the content of a regular file.

    Args:
        path: The file.
        most: Largest size in bytes that is read.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
    """
    with os.fdopen(open_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(size + 1)  # asking for more would set it aside
        if max(size, len(content)) > most:
            raise OSError(errno.EFBIG, f"More than {most} bytes")
    return content


def parse_json(text: bytes, *, finite: bool = True) -> Any:
    """Returns the value of a JSON text in UTF-8.

    Args:
        text: The text.
        finite: Whether NaN and Infinity, which are no JSON, are refused.

    Raises:
        ValueError: It is no JSON, not in UTF-8, or nested too deeply; the message is short.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number")

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse if finite else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not valid UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def lock(file: IO[Any] | int, *, wait: bool = False, seconds: float | None = None) -> OSError | None:
    """Lock an open file, or an open folder, until it is closed.

    Args:
        file: The open file, or a file descriptor.
        wait: Whether to wait for another process that has the lock, for as long as it takes.
        seconds: How long to wait at most; None where `wait` says all.

    Returns:
        None if it is locked, or if the system has no locks. Otherwise the error: a `BlockingIOError` if another process
        has the lock.
    """
    until = time.monotonic() + (seconds or 0.0)
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if seconds is not None or not wait else 0))
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() >= until:
                return error
            time.sleep(0.02)
        else:
            break
    return None


@contextlib.contextmanager
def locked(path: Path, *, mode: int | None = None) -> Iterator[None]:
    """Hold a lock, for which one process at a time is let through; others wait.

    Args:
        path: The file that is locked, in the folder whose files are changed.
        mode: Permissions of the folder if it is not there yet; None if it has to be.

    Raises:
        InvalidSetting: The folder cannot be written, or is on a file system without locks.
    """
    folder = path.parent
    try:
        if mode is not None:
            make_folder(folder, mode=mode)
        file = open(path, "ab")  # noqa: SIM115 # closed below
    except OSError as error:
        raise InvalidSetting(f"The folder {folder} cannot be written: {error.strerror}.") from None
    with file:
        if (problem := lock(file, wait=True)) is not None:
            raise InvalidSetting(
                f"The folder {folder} cannot be locked ({problem.strerror}): it must be on a file system with locks, "
                "such as a local disk."
            )
        yield


def replace_file(path: Path, content: str | bytes, *, mode: int | None = None) -> None:
    """Write a file whole or not at all; it survives a power cut once this returns.

    Args:
        path: Replaced if it is there.
        content: The content; a text is written as UTF-8.
        mode: Permissions of the new file, less the process's umask, from its first moment on. None for those of the
            file that is replaced, or 0o666.

    Raises:
        OSError: It cannot be written. An earlier file is still there then.
    """
    with replacing(path, path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.new"), mode=mode) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, draft: Path, *, mode: int | None = None) -> Iterator[IO[bytes]]:
    """A new file, which takes the place of another once it is whole and on disk.

    Args:
        path: Replaced if it is there.
        draft: Name of the file until then. Whatever has this name is removed, so a link never leads elsewhere.
        mode: See `replace_file`.

    Raises:
        OSError: It cannot be written. An earlier file is still there then.
    """
    kept = None
    if mode is None:
        with contextlib.suppress(FileNotFoundError):
            kept = stat.S_IMODE(path.stat().st_mode)
    draft.unlink(missing_ok=True)
    try:
        made = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if kept is not None else mode or 0o666)
        with os.fdopen(made, "wb") as file:
            if kept is not None and hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), kept)
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def put_in_place(draft: Path, path: Path) -> None:
    """Move a file that is written and synced to its name, so that the name survives a power cut too."""
    draft.replace(path)
    sync_folder(path.parent)


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make a folder, and the folders above it that are missing, so that their names survive a power cut.

    Args:
        folder: May be there.
        mode: Permissions of this folder if it is new, less the process's umask.

    Raises:
        OSError: It cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(mode=mode, parents=True, exist_ok=True)
    for one in reversed(missing):
        sync_folder(one.parent)


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names to disk: a new name survives a power cut only after that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
