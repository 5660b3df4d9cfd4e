"""Files that survive a kill or a power cut: written whole or not at all, by one writer at a time."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO, Any

from .errors import InvalidSetting

try:
    import fcntl
except ImportError:  # Windows: there two processes can take one file
    fcntl = None  # type: ignore[assignment]

__all__ = ["absolute_path", "followed", "lock", "make_folder", "put_in_place", "replace_file", "sync_folder"]


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


def lock(file: IO[Any] | int, *, wait: bool = False) -> OSError | None:
    """Lock an open file, or an open folder, until it is closed.

    Args:
        file: The open file, or a file descriptor.
        wait: Whether to wait for another process that has the lock.

    Returns:
        None if it is locked, or if the system has no locks. Otherwise the error: a `BlockingIOError` if another process
        has the lock.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error
    return None


def replace_file(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file whole or not at all; it survives a power cut once this returns.

    Args:
        path: Replaced if it is there.
        content: The content; a text is written as UTF-8.
        mode: Permissions of the new file, less the process's umask, from its first moment on.

    Raises:
        OSError: It cannot be written. An earlier file is still there then.
    """
    draft = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
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
