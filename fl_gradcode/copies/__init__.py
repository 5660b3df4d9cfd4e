"""The copies of a shard: what its holders sent for it, compared."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .comparisons import Comparisons, not_compared, shards_of_several
    from .copies import Copies
    from .disagreement import DISAGREEMENT, Disagreement

__all__ = [
    "DISAGREEMENT",
    "Comparisons",
    "Copies",
    "Disagreement",
    "not_compared",
    "shards_of_several",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "comparisons": [
            "Comparisons",
            "not_compared",
            "shards_of_several",
        ],
        "copies": [
            "Copies",
        ],
        "disagreement": [
            "DISAGREEMENT",
            "Disagreement",
        ],
    },
)
