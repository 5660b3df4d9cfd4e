"""Files that survive a kill: written whole or not at all, one writer at a time, at an absolute path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: there two processes can take one file
    fcntl = None  # type: ignore[assignment]

__all__ = ["followed", "lock", "put_in_place", "replace_file"]


def lock(file: IO[Any] | int, *, wait: bool = False) -> OSError | None:
    """Lock a file, or a folder, until it is closed.

    Args:
        file: Open.
        wait: Whether to wait for whoever has it.

    Returns:
        None: it is locked, or the system has no locks. Else what went wrong: a `BlockingIOError` if somebody has it.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error
    return None


def followed(path: Path) -> Path:
    """Where a symbolic link leads: a file is replaced there, and the link stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f"{path.name}.new")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(draft, path)


def put_in_place(draft: Path, path: Path) -> None:
    """Move a file that is written and synced to its name, so that the name survives a power cut too."""
    draft.replace(path)
    if os.name == "posix":  # the new name is there after a power cut only if its folder was written too
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
