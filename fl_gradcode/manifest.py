"""Placeholder until placement lands (being written): the contract only."""

from __future__ import annotations

from pathlib import Path


class Manifest:
    """Replaced soon."""

    digests: dict[int, str]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Replaced soon."""
        raise FileNotFoundError(path)


def held_digests(folder: Path) -> dict[int, str]:
    """Replaced soon."""
    raise FileNotFoundError(folder)


def checked_path(folder: Path, number: int) -> Path:
    """Replaced soon."""
    raise FileNotFoundError(folder)
