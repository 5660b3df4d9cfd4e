"""Who is who: which node is which worker, which shards it holds, and the code that fits."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .discovery import discover
    from .holdings import Discovered, Holdings
    from .rehearsal import collect_tags, rehearse
    from .worker_registry import WorkerRegistry

__all__ = [
    "Discovered",
    "Holdings",
    "WorkerRegistry",
    "collect_tags",
    "discover",
    "rehearse",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "discovery": [
            "discover",
        ],
        "holdings": [
            "Discovered",
            "Holdings",
        ],
        "rehearsal": [
            "collect_tags",
            "rehearse",
        ],
        "worker_registry": [
            "WorkerRegistry",
        ],
    },
)
