"""The server half of a coded round: the strategy wrapper, its plans, stop rules, replies, report and resume."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .gradient_coding import GradientCoding
    from .options import Adaptive, Approximation, Coded, Shards
    from .wrapped import why_no_average

__all__ = [
    "Adaptive",
    "Approximation",
    "Coded",
    "GradientCoding",
    "Shards",
    "why_no_average",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "gradient_coding": [
            "GradientCoding",
        ],
        "options": [
            "Adaptive",
            "Approximation",
            "Coded",
            "Shards",
        ],
        "wrapped": [
            "why_no_average",
        ],
    },
)
