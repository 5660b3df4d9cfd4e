"""Checks whether a Flower app keeps the contract of coding: calls its `train()` in two orders and two processes."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .check import AppReport, check_app, settings_of
    from .findings import Finding

__all__ = [
    "AppReport",
    "Finding",
    "check_app",
    "settings_of",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "check": [
            "AppReport",
            "check_app",
            "settings_of",
        ],
        "findings": [
            "Finding",
        ],
    },
)
