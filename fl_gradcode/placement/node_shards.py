"""Gives apps the verified path of a placed shard on this node.

    from fl_gradcode.placement import shard_path

    @app.train()
    def train(message, context):
        path = shard_path(context.node_config)      # the shard that partition-id names
        ...

The node config of a node names the folder that `fl-gradcode place` wrote for it: `shards-dir="/path/to/node-0"`.
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
    """Returns the file or folder with the data of the shard that `partition-id` names, after verifying the data.

    Args:
        node_config: Flower's node config, with `shards-dir`, the absolute path of this node's folder.

    Raises:
        InvalidSetting: `shards-dir` or `partition-id` is missing or cannot be used, or the folder has no manifest.
        ShardMismatch: The node does not hold the shard, or its data differ from the manifest.
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
    """The result of verifying one shard, or one other entry, of a node's folder.

    Attributes:
        kind: "right", "wrong" (the data differ from the node's or the whole manifest), "missing", or "extra" (the entry
            is not a shard).
        name: Name of the file or folder.
        number: Number of the shard; None for an entry that is not a shard.
        told: What is wrong; empty if nothing is.
    """

    kind: Literal["right", "wrong", "missing", "extra"]
    name: str
    number: int | None
    told: str = ""


def verify_folder(
    folder: str | os.PathLike[str], against: Manifest | str | os.PathLike[str] | None = None
) -> tuple[Finding, ...]:
    """Returns the findings from reading every byte of a node's folder and comparing it with its manifest.

    Args:
        folder: The node's folder.
        against: The manifest of all shards, or its path, with which the node's manifest must agree.

    Raises:
        InvalidSetting: A manifest cannot be read, or is not of the required kind.
    """
    folder = Path(folder)
    mine = Manifest.read(folder)
    if mine.held is not None:
        raise InvalidSetting(
            f"{folder} holds the folders of all nodes: verify each alone, such as {folder / 'node-0'}."
        )
    findings = [_verified(folder, shard) for shard in mine.shards]
    if against is not None:
        findings = _compared(findings, mine, against if isinstance(against, Manifest) else Manifest.read(against))
    known = {path for shard in mine.shards if (path := find(folder, shard.name)) is not None}
    others = [path for path in visible(folder) if path not in known and path.name not in RESERVED]
    return (*findings, *(Finding("extra", path.name, None) for path in others))


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


def _compared(findings: list[Finding], mine: Manifest, whole: Manifest) -> list[Finding]:
    """Returns the findings, corrected and completed by the differences between the node's and the whole manifest."""
    if whole.held is None:
        raise InvalidSetting(f"That is the {SHARDS_FILE} of a node; compare with the manifest.json of all shards.")
    if mine.worker is None or mine.worker >= len(whole.held):
        raise InvalidSetting(
            f"The folder is of worker {mine.worker}; the manifest has workers 0..{len(whole.held) - 1}."
        )
    held = {*whole.held[mine.worker]}
    result = []
    for finding in findings:
        number = finding.number
        assert number is not None
        told = ""
        if number not in held:
            told = f"the manifest does not assign it to worker {mine.worker}"
        elif whole.digests[number] != mine.digests[number]:
            told = f"the manifest says SHA-256 {whole.digests[number][:12]}..., of other data"
        result.append(Finding("wrong", finding.name, number, told) if told and finding.kind == "right" else finding)
    absent = sorted(held - {*mine.digests})
    return [*result, *(Finding("missing", whole.shard(number).name, number) for number in absent)]
