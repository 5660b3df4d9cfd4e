"""A lock on a file that ends with its process, where the system has such locks."""

from __future__ import annotations

from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: there two processes can take one file
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock"]


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
