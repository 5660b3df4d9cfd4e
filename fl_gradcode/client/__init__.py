"""The client half of a coded round: the mod, and the shards that a node holds."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .mod import gradient_coding_mod

__all__ = [
    "gradient_coding_mod",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "mod": [
            "gradient_coding_mod",
        ],
    },
)
