"""Placed shards, for apps: where a shard lies on this node, verified.

    from fl_gradcode.placement import shard_path

    @app.train()
    def train(message, context):
        path = shard_path(context.node_config)      # the shard that partition-id names
        ...

A node says where its folder is, as `fl-gradcode place` wrote it, in its node config: `shards-dir="/path/to/node-0"`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .._files import absolute_path
from ..errors import FlGradcodeError, InvalidSetting, ShardMismatch
from .manifest import SHARDS_FILE, Manifest, Shard, checked_path, held_digests, remember
from .shard_files import RESERVED, find, hash_shard, stamp_of, visible

__all__ = [
    "Finding",
    "Manifest",
    "Shard",
    "ShardMismatch",
    "checked_path",
    "held_digests",
    "shard_path",
    "verify_folder",
]

_SHARDS_DIR, _PARTITION_ID = "shards-dir", "partition-id"


def shard_path(node_config: Mapping[str, Any]) -> Path:
    """The file or folder with the data of the shard that `partition-id` names, its bytes verified.

    Args:
        node_config: Flower's, with `shards-dir`, the absolute path of this node's folder.

    Raises:
        InvalidSetting: `shards-dir` or `partition-id` is missing or cannot be used, or the folder has no manifest.
        ShardMismatch: The node does not hold that shard, or its bytes are not what the manifest says.
    """
    folder = node_config.get(_SHARDS_DIR)
    if not folder:
        raise InvalidSetting(
            f"This node does not say where its shards lie: start its SuperNode with --node-config '... {_SHARDS_DIR}="
            '"/path/to/node-0"\', the folder that fl-gradcode place wrote for it.'
        )
    path = absolute_path(str(folder), _SHARDS_DIR)
    number = node_config.get(_PARTITION_ID)
    if isinstance(number, bool) or not isinstance(number, int):
        raise InvalidSetting(f"{_PARTITION_ID} in the node config is {number!r}; it has to be the number of a shard.")
    return checked_path(path, number)


@dataclass(frozen=True)
class Finding:
    """What verifying a node's folder found of one shard, or of one other entry.

    Attributes:
        kind: "right", "wrong" (other bytes, or not as the whole manifest says), "missing", or "extra" (no shard).
        name: Of the file or folder.
        number: The shard; None: an entry that is none.
        told: What is wrong; empty: nothing.
    """

    kind: Literal["right", "wrong", "missing", "extra"]
    name: str
    number: int | None
    told: str = ""


def verify_folder(
    folder: str | os.PathLike[str], against: Manifest | str | os.PathLike[str] | None = None
) -> tuple[Finding, ...]:
    """Read every byte of a node's folder, and compare it with its manifest.

    Args:
        folder: The node's folder.
        against: The whole manifest, or its path: the node's must say the same.

    Raises:
        InvalidSetting: A manifest cannot be read, or is not of the kind that is needed.
    """
    folder = Path(folder)
    mine = Manifest.read(folder)
    if mine.held is not None:
        raise InvalidSetting(
            f"{folder} holds the folders of all nodes: verify each alone, such as {folder / 'node-0'}."
        )
    found = [_verified(folder, shard) for shard in mine.shards]
    if against is not None:
        found = _compared(found, mine, against if isinstance(against, Manifest) else Manifest.read(against))
    known = {path for one in mine.shards if (path := find(folder, one.name)) is not None}
    others = [path for path in visible(folder) if path not in known and path.name not in RESERVED]
    return (*found, *(Finding("extra", path.name, None) for path in others))


def _verified(folder: Path, shard: Shard) -> Finding:
    path = find(folder, shard.name)
    if path is None:
        return Finding("missing", shard.name, shard.number)
    try:
        stamp = stamp_of(path)
        size, digest = hash_shard(path)
    except (OSError, FlGradcodeError) as error:
        return Finding("wrong", shard.name, shard.number, f"it cannot be read: {error}")
    if size != shard.bytes:
        return Finding("wrong", shard.name, shard.number, f"it has {size} bytes instead of {shard.bytes}")
    if digest != shard.sha256:
        return Finding(
            "wrong", shard.name, shard.number, f"its SHA-256 is {digest[:12]}..., not {shard.sha256[:12]}..."
        )
    remember(folder, {shard.name: (stamp, digest)})
    return Finding("right", shard.name, shard.number)


def _compared(found: list[Finding], mine: Manifest, whole: Manifest) -> list[Finding]:
    """With what the whole manifest says otherwise."""
    if whole.held is None:
        raise InvalidSetting(f"That is the {SHARDS_FILE} of a node; compare with the manifest.json of all shards.")
    if mine.worker is None or mine.worker >= len(whole.held):
        raise InvalidSetting(
            f"The folder is of worker {mine.worker}; the manifest has workers 0..{len(whole.held) - 1}."
        )
    held = {*whole.held[mine.worker]}
    result = []
    for one in found:
        assert one.number is not None
        told = ""
        if one.number not in held:
            told = f"the manifest does not assign it to worker {mine.worker}"
        elif whole.digests[one.number] != mine.digests[one.number]:
            told = f"the manifest says SHA-256 {whole.digests[one.number][:12]}..., of other data"
        result.append(Finding("wrong", one.name, one.number, told) if told and one.kind == "right" else one)
    absent = sorted(held - {*mine.digests})
    return [*result, *(Finding("missing", whole.shard(number).name, number) for number in absent)]
