"""The server half of a coded round: the strategy wrapper, its plans, stop rules, replies, report and resume."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .discovery import Discovered
    from .gradient_coding import GradientCoding
    from .options import Adaptive, Approximation, Coded, Shards

__all__ = [
    "Adaptive",
    "Approximation",
    "Coded",
    "Discovered",
    "GradientCoding",
    "Shards",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "discovery": [
            "Discovered",
        ],
        "gradient_coding": [
            "GradientCoding",
        ],
        "options": [
            "Adaptive",
            "Approximation",
            "Coded",
            "Shards",
        ],
    },
)
