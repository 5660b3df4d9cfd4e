"""Reads which shards a node holds from its node config, and checks them against the server's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context

from .._files import absolute_path
from .._flower_internals import in_a_simulation
from .._text import numbered
from ..errors import InvalidSetting, ShardMismatch
from ..placement import WITHHELD, checked_path, held_digests
from ..privacy import BUDGET, FOLDER
from ..protocol import Plan

__all__ = [
    "SECAGG_DIR",
    "SHARDS",
    "SHARDS_DIR",
    "held_by",
    "refuse_other_shards",
    "secagg_folder",
    "secagg_named",
    "told_by",
]

#: Keys of the node config.
SHARDS_DIR, SHARDS = "shards-dir", "shards"
#: Key of the node config, and of the run config where all nodes are on one machine: folder of secure aggregation.
SECAGG_DIR = "secagg-dir"


def held_by(node_config: Mapping[str, Any]) -> dict[int, str] | None:
    """Returns shard -> SHA-256 of its data for the shards in the node config, or None if the config names none.

    The SHA-256 is empty if it is not known.

    Raises:
        InvalidSetting: The node config cannot be read.
    """
    folder, listed = node_config.get(SHARDS_DIR), node_config.get(SHARDS)
    if folder:
        return held_digests(absolute_path(str(folder), SHARDS_DIR))
    if listed is None:
        return None
    try:
        return {int(part): "" for part in str(listed).split(",") if part.strip()}
    except ValueError:
        raise InvalidSetting(f'{SHARDS}={listed!r} must be numbers with commas between, such as "0,3,7".') from None


def told_by(node_config: Mapping[str, Any]) -> tuple[tuple[int, str], ...]:
    """Returns the (shard, SHA-256) pairs that a reply reports; empty if the node config names no shards.

    A node with privacy settings withholds the SHA-256 of its data. Somebody who knows all records but one could
    otherwise use it to find the last one. Under secure aggregation it tells nothing: what it holds is in the manifest.
    """
    if node_config.get(SECAGG_DIR):
        return ()
    held = held_by(node_config) or {}
    return tuple(sorted(dict.fromkeys(held, WITHHELD).items() if _is_private(node_config) else held.items()))


def refuse_other_shards(plan: Plan, worker: int, node_config: Mapping[str, Any]) -> None:
    """Refuse to train on data that differ from what the server expects.

    The files of a folder are compared with the folder's manifest, and that manifest with the server's if there is one.
    A node with privacy settings skips the second check, because a refusal would tell the server whether it guessed the
    records right.

    Raises:
        ShardMismatch: The node does not hold a requested shard, or holds other data under its number.
    """
    held, private = held_by(node_config), _is_private(node_config)
    for shard in plan.rows[worker].shards:
        wanted = plan.digests.get(shard, "")
        if held is None:
            if wanted:
                raise ShardMismatch(
                    "The server has a manifest of the shards, but this node does not report what it holds: start it "
                    f"with --node-config '... {SHARDS_DIR}=\"/path/to/node-{worker}\"'."
                )
            continue
        if shard not in held:
            raise ShardMismatch(
                f"This node was asked for shard {shard}, but it holds {_listed(held)}: copy to it the folder "
                f"node-{worker} that fl-gradcode place wrote for this code, or correct its {SHARDS_DIR}."
            )
        folder = node_config.get(SHARDS_DIR)
        if wanted and not held[shard] and not private:
            raise ShardMismatch(
                f"The server has a manifest of the shards, but this node reports only numbers by {SHARDS}: start it "
                f"with --node-config '... {SHARDS_DIR}=\"/path/to/node-{worker}\"'."
            )
        if wanted and held[shard] != wanted and not private:
            raise ShardMismatch(
                f"The data of shard {shard} on this node differs from the server's manifest (SHA-256 "
                f"{held[shard][:12]}..., not {wanted[:12]}...): fetch the folder node-{worker} again, and verify it by "
                f"fl-gradcode place --check {folder}."
            )
        if folder:
            checked_path(Path(str(folder)), shard)


def secagg_named(context: Context) -> bool:
    """Returns whether the node's own config, or the run config, names a folder of secure aggregation."""
    return bool(context.node_config.get(SECAGG_DIR) or context.run_config.get(SECAGG_DIR))


def secagg_folder(context: Context, worker: int) -> tuple[Path, bool]:
    """Returns the node's folder of secure aggregation, and whether all nodes are on the server's machine.

    Raises:
        InvalidSetting: The node is on a machine of its own, and its node config names no folder: a server must not
            choose where a node reads and writes. Or the path is not absolute.
    """
    own, simulated = context.node_config.get(SECAGG_DIR), in_a_simulation()
    if own:
        return absolute_path(str(own), SECAGG_DIR), simulated
    if simulated:
        return absolute_path(str(context.run_config[SECAGG_DIR]), SECAGG_DIR) / f"node-{worker}", True
    raise InvalidSetting(
        f"The run config has {SECAGG_DIR}, which only simulations use: a server does not choose where a node reads and "
        f"writes. Start the node with --node-config '... {SECAGG_DIR}=\"/path/to/node-{worker}\"'."
    )


def _is_private(node_config: Mapping[str, Any]) -> bool:
    return FOLDER in node_config or BUDGET in node_config


def _listed(held: Mapping[int, str]) -> str:
    return numbered("shard", sorted(held), 11) if held else "none"
