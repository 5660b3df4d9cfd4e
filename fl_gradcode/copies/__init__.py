"""The copies of a shard: what its holders sent for it, compared."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .agreement import records_agree, vectors_agree
    from .ballots import Ballots
    from .comparisons import Comparisons, not_compared, shards_of_several
    from .copies import Copies
    from .disagreement import DISAGREEMENT, Disagreement

__all__ = [
    "DISAGREEMENT",
    "Ballots",
    "Comparisons",
    "Copies",
    "Disagreement",
    "not_compared",
    "records_agree",
    "shards_of_several",
    "vectors_agree",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "agreement": [
            "records_agree",
            "vectors_agree",
        ],
        "ballots": [
            "Ballots",
        ],
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
