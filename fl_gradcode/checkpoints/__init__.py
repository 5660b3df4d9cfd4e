"""What a run keeps on disk between rounds: the checkpoint file, and the state of the wrapped strategy in it."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .checkpoint import KINDS, Checkpoint, MetricsKind, Saved
    from .strategy_state import StrategyState

__all__ = [
    "KINDS",
    "Checkpoint",
    "MetricsKind",
    "Saved",
    "StrategyState",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "checkpoint": [
            "KINDS",
            "Checkpoint",
            "MetricsKind",
            "Saved",
        ],
        "strategy_state": [
            "StrategyState",
        ],
    },
)
