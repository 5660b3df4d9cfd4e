"""The client half of a coded round: the mod, and the shards that a node holds."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .mod import LEGACY_CLIENT, RecordingConfig, gradient_coding_mod

__all__ = [
    "LEGACY_CLIENT",
    "RecordingConfig",
    "gradient_coding_mod",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "mod": [
            "LEGACY_CLIENT",
            "RecordingConfig",
            "gradient_coding_mod",
        ],
    },
)
