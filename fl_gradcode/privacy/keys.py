"""Key files: one for each node, with the secrets of the shards that it holds and no others."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .._files import MEGABYTE, make_folder, parse_json, read_file, replace_file
from ..errors import InvalidSetting

__all__ = ["KEYS_FILE", "NodeKeys", "check_own", "check_private", "read_keys", "rotate_keys", "write_keys"]

#: Name of the file in a node's folder.
KEYS_FILE = "keys.json"

_FORMAT = "fl-gradcode keys 1"
_BYTES = 32
_LARGEST = 16 * MEGABYTE  # of a key file; that of 100,000 shards has half
_MOST = 10**9  # of workers, generations and holders
#: For everybody but the owner.
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class NodeKeys:
    """The content of a node's key file.

    Attributes:
        worker: Number of the worker that the file was made for.
        generation: 1 for the first keys, one more with each rotation.
        secrets: Shard -> its secret, 32 bytes.
        holders: Shard -> number of workers that have its secret.
    """

    worker: int
    generation: int
    secrets: Mapping[int, bytes] = field(repr=False)
    holders: Mapping[int, int] = field(default_factory=dict)

    def holders_of(self, shard: int) -> int:
        """Returns the number of workers that have the shard's secret, whatever a server says; at least 1."""
        return max(1, self.holders.get(shard, 1))

    def secret(self, shard: int) -> bytes:
        """Returns the shard's secret, 32 bytes.

        Raises:
            InvalidSetting: This file does not have it.
        """
        if shard not in self.secrets:
            raise InvalidSetting(
                f"The key file of worker {self.worker} has no secret of shard {shard}; it has those of shards "
                f"{sorted(self.secrets)}. Make the keys for the code that the run uses: fl-gradcode keys make."
            )
        return self.secrets[shard]


def write_keys(
    folder: str | os.PathLike[str], shards_of: Sequence[Sequence[int]], *, generation: int = 1
) -> list[Path]:
    """Draw a new secret for each shard from the operating system's generator, and write a key file for each worker.

    Args:
        folder: Made if it is missing. `node-3/keys.json` in it goes to worker 3, with its data.
        shards_of: For each worker the shards that it holds.
        generation: Written into the files.

    Returns:
        Paths of the files, which only their owner can read.

    Raises:
        InvalidSetting: The folder has keys already: overwriting them would lock their owners out.
    """
    root = Path(folder)
    there = sorted(root.glob(f"node-*/{KEYS_FILE}"))
    if there:
        raise InvalidSetting(f"{there[0]} already exists. Use another folder, or run fl-gradcode keys rotate.")
    return _write(root, shards_of, generation)


def _write(root: Path, shards_of: Sequence[Sequence[int]], generation: int) -> list[Path]:
    paths = [root / f"node-{worker}" / KEYS_FILE for worker in range(len(shards_of))]
    made = {shard: secrets.token_bytes(_BYTES) for shard in sorted({j for held in shards_of for j in held})}
    for worker, (path, held) in enumerate(zip(paths, shards_of, strict=True)):
        make_folder(path.parent)
        path.parent.chmod(0o700)
        content = {
            "format": _FORMAT,
            "worker": worker,
            "generation": generation,
            "secrets": {str(shard): made[shard].hex() for shard in sorted(held)},
            "holders": {str(shard): sum(shard in one for one in shards_of) for shard in sorted(held)},
        }
        replace_file(path, json.dumps(content, indent=1) + "\n", mode=0o600)  # never open to others, not for a moment
    return paths


def rotate_keys(folder: str | os.PathLike[str]) -> list[Path]:
    """Draw new secrets for the same holders, one generation later.

    All holders of a shard have to get their new files together, between two runs. What was spent stays spent: budgets
    belong to the data, not to the key.

    Args:
        folder: With the key files of all workers, as `write_keys` made them.

    Returns:
        Paths of the files, which are replaced.

    Raises:
        InvalidSetting: There are no key files, or they do not belong together.
    """
    root = Path(folder)
    found = sorted(root.glob(f"node-*/{KEYS_FILE}"))
    if not found:
        raise InvalidSetting(f"{root} has no node-*/{KEYS_FILE}: make keys first by fl-gradcode keys make.")
    nodes = []
    for path in found:
        nodes.append(read_keys(path.parent))
        if path.parent.name != f"node-{nodes[-1].worker}":
            raise InvalidSetting(f"{path} is worker {nodes[-1].worker}'s: bring it back to node-{nodes[-1].worker}.")
    nodes.sort(key=lambda node: node.worker)
    if [node.worker for node in nodes] != list(range(len(nodes))):
        raise InvalidSetting(
            f"{root} has keys of workers {[node.worker for node in nodes]}; rotating needs those of all workers "
            f"0..{max(node.worker for node in nodes)}, or holders of a shard would differ."
        )
    generation = max(node.generation for node in nodes) + 1
    return _write(root, [sorted(node.secrets) for node in nodes], generation)


def read_keys(folder: str | os.PathLike[str]) -> NodeKeys:
    """Returns the content of the key file in a node's folder.

    Raises:
        InvalidSetting: The file is missing, unreadable, short, of another format, or readable by others.
    """
    path = Path(folder) / KEYS_FILE
    try:
        check_private(path)
        values = parse_json(read_file(path, _LARGEST))
    except FileNotFoundError:
        raise InvalidSetting(
            f"There is no key file {path}. Make keys with fl-gradcode keys make, and bring each node its folder."
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidSetting):
            raise
        raise InvalidSetting(f"The key file {path} cannot be read: {type(error).__name__}.") from None
    try:
        if values["format"] != _FORMAT:
            raise InvalidSetting(f"{path} has format {repr(values['format'])[:50]}; this version reads {_FORMAT!r}.")
        found = {_whole(int(shard)): bytes.fromhex(text) for shard, text in values["secrets"].items()}
        holders = {_whole(int(shard)): _whole(count) for shard, count in values["holders"].items()}
        keys = NodeKeys(_whole(values["worker"]), _whole(values["generation"]), found, holders)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InvalidSetting):
            raise
        raise InvalidSetting(f"{path} is not a key file of fl-gradcode; make one with fl-gradcode keys make.") from None
    for shard, secret in found.items():
        if len(secret) != _BYTES:
            raise InvalidSetting(f"The secret of shard {shard} in {path} has {len(secret)} bytes instead of {_BYTES}.")
        if len(set(secret)) == 1:
            raise InvalidSetting(f"The secret of shard {shard} in {path} is one byte repeated: anybody can guess it.")
    return keys


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError("a whole number")
    return value


def check_own(path: Path) -> None:
    """Check that a file is one that this process's user made, which nobody else can read, change or exchange.

    Raises:
        InvalidSetting: It is a symbolic link, another user's, or open to others; says what to do.
        OSError: The file is missing, or cannot be looked at.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise InvalidSetting(f"{path} is a symbolic link, whose target may change: put the file itself there.")
    if not stat.S_ISREG(found.st_mode):
        raise InvalidSetting(f"{path} is not a file: move it away, and restore the file.")
    if os.name == "posix" and found.st_uid not in (os.geteuid(), 0):
        raise InvalidSetting(f"{path} belongs to another user (uid {found.st_uid}): chown {os.geteuid()} {path}")
    check_private(path)


def check_private(path: Path) -> None:
    """Check that only its owner can read or change a file.

    Raises:
        InvalidSetting: Others can; names the mode and the command that corrects it.
        OSError: The file is missing, or cannot be looked at.
    """
    mode, folder = path.stat().st_mode, path.parent.stat().st_mode
    if os.name == "posix" and mode & _OTHERS:
        raise InvalidSetting(f"{path} is accessible to other users (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}")
    if os.name == "posix" and folder & (stat.S_IWGRP | stat.S_IWOTH):
        raise InvalidSetting(
            f"Other users can replace the files in {path.parent} (mode {stat.S_IMODE(folder):04o}): "
            f"chmod 700 {path.parent}"
        )
