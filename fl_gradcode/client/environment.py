"""What the bits of an update depend on besides its inputs, as words and versions that a manifest can pin."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

__all__ = ["environment_words", "versions_of"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment_words() -> tuple[str, ...]:
    """Returns this machine's words: kind of processor, instruction sets that NumPy uses, and threads, sorted.

    A device such as a GPU is not among them: holders agree on it, and can pin a word of their own by their manifest.
    """
    config: Any = np.show_config(mode="dicts")
    found = config.get("SIMD Extensions", {}).get("found", [])
    threads = [f"{name}={os.environ[name]}" for name in _THREADS if name in os.environ]
    return tuple(sorted({f"machine={platform.machine()}", *(f"simd={name}" for name in found), *threads}))


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Returns the installed version of each distribution, or an empty text where it is missing."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
