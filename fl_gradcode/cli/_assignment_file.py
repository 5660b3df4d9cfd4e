"""The file that says which worker holds which shards, for `place` and `keys make`."""

from __future__ import annotations

from pathlib import Path

from .._files import MEGABYTE, parse_json, read_file
from ..errors import InvalidSetting

__all__ = ["read_assignment"]

_LARGEST = 64 * MEGABYTE
_MOST = 10**6  # of shards


def read_assignment(path: Path) -> list[tuple[int, ...]]:
    """Returns the shards of each worker from a JSON file such as [[0, 1], [1, 2], [2, 0]], in the file's order.

    Raises:
        InvalidSetting: The file cannot be read, or is not one list of distinct shard numbers for each worker.
    """
    try:
        workers = parse_json(read_file(path, _LARGEST))
    except (OSError, ValueError):
        workers = None
    if not isinstance(workers, list) or not workers or not all(map(_is_list_of_shards, workers)):
        raise InvalidSetting(
            f"{path} must hold, as JSON, for each worker the list of its shards, such as [[0, 1], [1, 2], [2, 0]]."
        )
    for worker, shards in enumerate(workers):
        if len({*shards}) < len(shards):
            twice = next(shard for shard in sorted(shards) if shards.count(shard) > 1)
            raise InvalidSetting(f"{path} lists shard {twice} more than once for worker {worker}; list it once.")
    return [tuple(shards) for shards in workers]


def _is_list_of_shards(value: object) -> bool:
    return isinstance(value, list) and all(type(shard) is int and 0 <= shard < _MOST for shard in value)
