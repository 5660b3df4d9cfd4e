"""The command line, `fl-gradcode`."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .app import main

__all__ = [
    "main",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "app": [
            "main",
        ],
    },
)
