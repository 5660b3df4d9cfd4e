"""The client half of a coded round: the mod, and the shards that a node holds."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .environment import environment_words, versions_of
    from .mod import LEGACY_CLIENT, RecordingConfig, gradient_coding_mod

__all__ = [
    "LEGACY_CLIENT",
    "RecordingConfig",
    "environment_words",
    "gradient_coding_mod",
    "versions_of",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "environment": [
            "environment_words",
            "versions_of",
        ],
        "mod": [
            "LEGACY_CLIENT",
            "RecordingConfig",
            "gradient_coding_mod",
        ],
    },
)
