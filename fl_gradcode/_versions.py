"""Versions: the library's own, Flower's, and a warning if this Flower is newer than what the tests have seen."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

__all__ = ["TESTED_FLOWER", "library_version", "newer_flower", "warn_of_newer_flower"]

_log = logging.getLogger(__name__)

#: First and last minor version of Flower with which the core suite has passed (docs/versions.md).
TESTED_FLOWER = ("1.41", "1.42")


@lru_cache(maxsize=1)
def library_version() -> str:
    """Returns the version of the installed library, or "of a checkout" if it is not installed."""
    try:
        return version("fl-gradcode")
    except PackageNotFoundError:  # the library is imported from a checkout
        return "of a checkout"


def newer_flower(installed: str) -> str | None:
    """Returns a sentence for people if a version of Flower is newer than the tested ones, else None.

    Args:
        installed: Version of Flower, such as "1.43.0" or "1.43.0.dev20261101".
    """
    if _minor(installed) <= _minor(TESTED_FLOWER[1]):
        return None
    return (
        f"Flower {installed} is newer than the versions that fl-gradcode {library_version()} was tested with "
        f"({TESTED_FLOWER[0]} to {TESTED_FLOWER[1]}). If something fails, try Flower {TESTED_FLOWER[1]} first."
    )


def warn_of_newer_flower() -> None:
    """Logs a warning if the installed Flower is newer than the tested versions."""
    if sentence := newer_flower(version("flwr")):
        _log.warning("%s", sentence)


def _minor(text: str) -> tuple[int, int]:
    """Returns the first two numbers of a version."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)
