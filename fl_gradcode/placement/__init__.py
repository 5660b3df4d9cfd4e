"""Who holds which data: assignments, shard files on disk, and manifests that verify them."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .assignment import Assignment, assign
    from .manifest import MANIFEST, WITHHELD, Manifest, Shard, checked_path, held_digests
    from .node_folders import ASSIGNMENT, shards_in, unfinished, write_folders
    from .node_shards import Finding, shard_path, verify_folder
    from .splitting import SPLITS, cut

__all__ = [
    "ASSIGNMENT",
    "MANIFEST",
    "SPLITS",
    "WITHHELD",
    "Assignment",
    "Finding",
    "Manifest",
    "Shard",
    "assign",
    "checked_path",
    "cut",
    "held_digests",
    "shard_path",
    "shards_in",
    "unfinished",
    "verify_folder",
    "write_folders",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "assignment": [
            "Assignment",
            "assign",
        ],
        "manifest": [
            "MANIFEST",
            "Manifest",
            "Shard",
            "WITHHELD",
            "checked_path",
            "held_digests",
        ],
        "node_folders": [
            "ASSIGNMENT",
            "shards_in",
            "unfinished",
            "write_folders",
        ],
        "node_shards": [
            "Finding",
            "shard_path",
            "verify_folder",
        ],
        "splitting": [
            "SPLITS",
            "cut",
        ],
    },
)
