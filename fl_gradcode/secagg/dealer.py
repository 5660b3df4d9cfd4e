"""Set-up by a dealer: seeds come from the shards' key files, and only the public manifest is made and handed out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .._files import replace_file
from ..errors import InvalidSetting, SecureRefused
from ..masking import KEY_BYTES
from ..privacy import NodeKeys, check_own, read_keys
from .classes import ShardClasses
from .keys import class_seed, data_commitment, private_key, public_key
from .manifest import Manifest, ManifestBody

__all__ = [
    "DIGEST_FILE",
    "MANIFEST_FILE",
    "check_data",
    "deal",
    "holders_in",
    "manifest_entry",
    "read_manifest",
    "seeds_of",
]

#: Name of the public manifest in a node's folder.
MANIFEST_FILE = "secagg-manifest.json"
#: Name of the file with the digest M that the node has pinned, as hexadecimal.
DIGEST_FILE = "secagg-digest"


def holders_in(folder: str | os.PathLike[str]) -> list[tuple[int, ...]]:
    """Returns for each shard the workers that have its secret, by the key files of all workers.

    Args:
        folder: Folder with `node-0/keys.json`, `node-1/keys.json`, and so on, as `write_keys` made it.
    """
    nodes = _all_keys(Path(folder))
    shards = max(shard for node in nodes for shard in node.secrets) + 1
    return [tuple(node.worker for node in nodes if shard in node.secrets) for shard in range(shards)]


def seeds_of(keys: NodeKeys, classes: ShardClasses) -> dict[int, bytes]:
    """Returns the seed of each class that a node's key file gives.

    Args:
        keys: The node's key file.
        classes: The classes of the manifest.

    Raises:
        SecureRefused: The manifest names fewer or other holders of a class than the key file counts. A holder that it
            left out could collude unnoticed.
    """
    held = classes.supports[keys.worker] if 0 <= keys.worker < classes.n else ()
    able = tuple(c for c, shards in enumerate(classes.members) if {*shards} <= set(keys.secrets))
    if able != held:
        raise SecureRefused(
            f"The manifest says that worker {keys.worker} holds classes {list(held)}; its key file has the secrets of "
            f"classes {list(able)}."
        )
    for c in held:
        most = min(keys.holders_of(shard) for shard in classes.members[c])
        if most != len(classes.holders[c]):
            raise SecureRefused(
                f"The manifest names {len(classes.holders[c])} holders of class {c}; by the key file there are {most}."
            )
    return {c: class_seed([keys.secret(shard) for shard in classes.members[c]]) for c in held}


def deal(folder: str | os.PathLike[str], body: ManifestBody, *, data: Mapping[int, str] | None = None) -> Manifest:
    """Makes the manifest of a body from the key files of all workers, and writes it and its digest to their folders.

    Args:
        folder: Folder with the key files, as `write_keys` made it.
        body: The body.
        data: For each shard, the digest of its data. Holders then refuse other data.

    Raises:
        SecureRefused: The body does not fit the key files.
        NotCertified: Its graph does not protect against as many colluders as it says.
    """
    root = Path(folder)
    nodes = _all_keys(root)
    if len(nodes) != body.classes.n:
        raise InvalidSetting(f"{root} has keys of {len(nodes)} workers; the code has {body.classes.n}.")
    body.certificate()
    seeds: dict[int, bytes] = {}
    for node in nodes:
        seeds |= seeds_of(node, body.classes)
    entries = [manifest_entry(body, c, seeds[c], data or {}) for c in range(len(body.classes))]
    manifest = Manifest(body, tuple(public for public, _ in entries), tuple(commitment for _, commitment in entries))
    for node in nodes:
        replace_file(root / f"node-{node.worker}" / MANIFEST_FILE, manifest.to_bytes())
        replace_file(root / f"node-{node.worker}" / DIGEST_FILE, manifest.digest.hex() + "\n", mode=0o600)
    return manifest


def manifest_entry(body: ManifestBody, number: int, seed: bytes, data: Mapping[int, str]) -> tuple[bytes, bytes]:
    """Returns the public key of a class and the commitment to its data, 32 bytes each, as a manifest has them.

    Args:
        body: The body.
        number: Number of the class.
        seed: Its seed.
        data: For each shard, the digest of its data, if it is known.
    """
    return public_key(private_key(seed, body.digest, number)), _commitment(body, number, seed, data)


def check_data(manifest: Manifest, seeds: Mapping[int, bytes], data: Mapping[int, str]) -> None:
    """Check that a node's data are those that the manifest's commitments were made for.

    Args:
        manifest: The manifest.
        seeds: Seeds of the node's classes.
        data: For each of its shards, the digest of its data.

    Raises:
        SecureRefused: They are not.
    """
    for c, seed in seeds.items():
        if _commitment(manifest.body, c, seed, data) != manifest.commitments[c]:
            raise SecureRefused(f"The data of class {c} are not those that the manifest was made for.")


def read_manifest(folder: str | os.PathLike[str], text: bytes | None = None) -> Manifest:
    """Returns the manifest that a node has pinned.

    Args:
        folder: The node's folder, with the pinned digest.
        text: A manifest from elsewhere, which must have this digest; by default the folder's file.

    Raises:
        InvalidSetting: A file is missing or damaged, or others can change the digest.
        SecureRefused: The manifest is another one.
    """
    root = Path(folder)
    try:
        check_own(root / DIGEST_FILE)  # who may exchange it decides what the node masks for
        digest = bytes.fromhex((root / DIGEST_FILE).read_text().strip())
        found = (root / MANIFEST_FILE).read_bytes() if text is None else text
    except InvalidSetting:
        raise
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"{root} has no pinned manifest ({type(error).__name__}): {DIGEST_FILE}.") from None
    if len(digest) != KEY_BYTES:
        raise InvalidSetting(f"{root / DIGEST_FILE} has {len(digest)} bytes instead of {KEY_BYTES}.")
    return Manifest.from_bytes(found, digest=digest)


def _commitment(body: ManifestBody, number: int, seed: bytes, data: Mapping[int, str]) -> bytes:
    shards: Sequence[int] = body.classes.members[number]
    return data_commitment(seed, body.digest, number, [(shard, data.get(shard, "")) for shard in shards])


def _all_keys(root: Path) -> list[NodeKeys]:
    nodes = sorted((read_keys(path.parent) for path in root.glob("node-*/keys.json")), key=lambda node: node.worker)
    if [node.worker for node in nodes] != list(range(len(nodes))) or not nodes:
        raise InvalidSetting(f"{root} must have the key files of all workers: {[node.worker for node in nodes]}.")
    return nodes
