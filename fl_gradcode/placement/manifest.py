"""Manifests, which list shards with their SHA-256, and the verification of a node's folder against its manifest.

A node's folder, as `fl-gradcode place` writes it, contains `shards.json` and one file or folder for each shard.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from .._files import MEGABYTE, parse_json, read_file, replace_file
from .._text import listed
from ..errors import InvalidSetting, ShardMismatch
from .shard_files import Stamp, check_names, find, hash_shard, stamp_of

__all__ = [
    "MANIFEST",
    "SHARDS_FILE",
    "WITHHELD",
    "Manifest",
    "Shard",
    "checked_path",
    "held_digests",
    "remember",
]

#: File name of the manifest in a node's folder, and of the manifest of all shards.
SHARDS_FILE, MANIFEST = "shards.json", "manifest.json"
#: Replaces a SHA-256 that a node keeps secret.
WITHHELD = "withheld"

_NAME, _VERSION = "fl-gradcode shards", 1
_VERIFIED = ".verified.json"
_LARGEST = 64 * MEGABYTE  # of a file of ours; a manifest of 100,000 shards has a third
_MOST = 10**15  # of counts: more bytes than anybody stores
_RECENT = 2_000_000_000  # nanoseconds, the resolution of the coarsest file system clock in use (FAT)


@dataclass(frozen=True)
class Shard:
    """The description of one shard's data.

    Attributes:
        number: Number of the shard, 0..k-1, which is its column of `B`.
        name: Name of its file or folder.
        examples: Number of examples; None if not known.
        bytes: Size of its file, or of all files of its folder, in bytes.
        sha256: SHA-256 of its file, hexadecimal. For a folder, it covers the sorted relative paths and the contents.
    """

    number: int
    name: str
    examples: int | None
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A list of the shards of one node's folder, or of all shards.

    Attributes:
        k: Number of shards of the whole data set.
        shards: The listed shards, ascending by number.
        worker: Worker that the folder belongs to; None for the manifest of all shards.
        held: For each worker, the shards that it was assigned; None in a node's folder.
        code: The code that the shards were placed for, as a line of Python.

    Raises:
        InvalidSetting: Shards are listed twice, do not exist, or have unusable names.
    """

    k: int
    shards: tuple[Shard, ...]
    worker: int | None = None
    held: tuple[tuple[int, ...], ...] | None = None
    code: str = ""

    def __post_init__(self) -> None:
        numbers = [shard.number for shard in self.shards]
        wrong = [j for j, times in Counter(numbers).items() if times > 1 or not 0 <= j < self.k]
        if wrong:
            raise InvalidSetting(f"Shard {wrong[0]} is listed twice, or is not among the shards 0..{self.k - 1}.")
        check_names([shard.name for shard in self.shards])
        for worker, held in enumerate(self.held or ()):
            unknown = {*held} - {*numbers}
            if unknown:
                raise InvalidSetting(f"Worker {worker} holds shard {min(unknown)}, which is not listed.")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Manifest:
        """Returns the manifest of a file, or of the folder that contains the file.

        Raises:
            InvalidSetting: There is no manifest, or it cannot be read.
        """
        file = Path(path)
        if file.is_dir():
            file = next((file / name for name in (SHARDS_FILE, MANIFEST) if (file / name).exists()), file / SHARDS_FILE)
        try:
            state = file.stat()
            return _parsed(file, (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
        except OSError as error:
            raise InvalidSetting(
                f"{file} cannot be read ({error.strerror}): it comes with the folder that fl-gradcode place wrote for "
                "this node."
            ) from None

    @classmethod
    def for_all_shards(cls, manifest: Manifest | str | os.PathLike[str], k: int) -> Manifest:
        """Returns the server's manifest, which must list all k shards.

        Raises:
            InvalidSetting: The manifest cannot be read, or does not list exactly the shards 0..k-1.
        """
        whole = manifest if isinstance(manifest, Manifest) else cls.read(Path(manifest))
        if sorted(whole.digests) != list(range(k)):
            raise InvalidSetting(
                f"The manifest lists {len(whole.digests)} shards, and the code has k={k}: give the manifest.json that "
                "fl-gradcode place wrote for this code."
            )
        return whole

    @classmethod
    def parse(cls, file: Path) -> Manifest:
        """Returns the manifest in a file.

        Raises:
            OSError: The file cannot be read.
            InvalidSetting: The file is not a manifest, or of a newer format.
        """
        try:
            values = parse_json(read_file(file, _LARGEST))
        except ValueError:
            raise InvalidSetting(f"{file} is not JSON, perhaps cut off while it was copied: copy it again.") from None
        try:
            name, _, version = str(values["format"]).rpartition(" ")
            newer = name == _NAME and int(version) > _VERSION
            if not newer and (name, version) != (_NAME, str(_VERSION)):
                raise ValueError(values["format"])
            manifest = None if newer else _from_json(values)
        except InvalidSetting as error:
            raise InvalidSetting(f"{file}: {error}") from None
        except (KeyError, ValueError, TypeError, AttributeError):
            raise InvalidSetting(f"{file} is not a manifest of shards; fl-gradcode place writes them.") from None
        if manifest is None:
            raise InvalidSetting(
                f"{file} has format {version}, and this version of fl-gradcode reads up to {_VERSION}: update "
                "fl-gradcode here."
            )
        return manifest

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest to a file, which is replaced atomically."""
        listed = [{key: getattr(shard, key) for key in Shard.__dataclass_fields__} for shard in self.shards]
        values: dict[str, Any] = {"format": f"{_NAME} {_VERSION}", "k": self.k, "worker": self.worker}
        if self.held is not None:
            values |= {"n": len(self.held), "held": self.held}
        replace_file(Path(path), json.dumps({**values, "code": self.code, "shards": listed}, indent=1) + "\n")

    @cached_property
    def digests(self) -> dict[int, str]:
        """Shard -> SHA-256 of its data, for the listed shards."""
        return {shard.number: shard.sha256 for shard in self.shards}

    def shard(self, number: int) -> Shard:
        """Returns the shard with this number.

        Raises:
            ShardMismatch: The shard is not listed.
        """
        for shard in self.shards:
            if shard.number == number:
                return shard
        numbers = listed((shard.number for shard in self.shards), 11)
        raise ShardMismatch(f"Shard {number} is not listed; shards {numbers or '(none)'} of {self.k} are.")


@lru_cache(maxsize=8)
def _parsed(file: Path, stamp: tuple[int, ...]) -> Manifest:
    """Returns the manifest in a file, cached because a node reads it for each shard and parsing takes time."""
    return Manifest.parse(file)


def held_digests(folder: str | os.PathLike[str]) -> dict[int, str]:
    """Returns shard -> SHA-256 from the manifest of a node's folder, without verifying any data.

    Raises:
        InvalidSetting: The folder has no readable manifest.
    """
    return dict(Manifest.read(folder).digests)


def checked_path(folder: str | os.PathLike[str], number: int) -> Path:
    """Returns the path of a shard after verifying its data against the manifest of the folder.

    A successful verification is stored in the folder, if the folder can be written to. It stays valid until the size or
    the times of the shard's files change.

    Raises:
        ShardMismatch: The folder does not hold the shard, or its data differ. The message says what to do.
        InvalidSetting: The folder has no readable manifest.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    try:
        shard = manifest.shard(number)
    except ShardMismatch as error:
        raise ShardMismatch(
            f"{folder} does not hold what is asked for: {str(error)[0].lower()}{str(error)[1:-1]}. Bring this node the "
            "folder that fl-gradcode place wrote for it."
        ) from None
    source = "its folder" if manifest.worker is None else f"the folder node-{manifest.worker}"
    path = find(folder, shard.name)
    if path is None:
        raise ShardMismatch(
            f"Shard {number} ({shard.name}) is missing in {folder}: fetch {source} again, and verify it by "
            f"fl-gradcode place --check {folder}."
        )
    stamp = stamp_of(path)
    if _verified(folder).get(shard.name) == _entry(stamp, shard.sha256):
        return path
    size, digest = hash_shard(path) if stamp.size == shard.bytes else (stamp.size, "")
    if digest != shard.sha256:
        why = f"it has {size} bytes instead of {shard.bytes}" if size != shard.bytes else "its SHA-256 is another"
        raise ShardMismatch(
            f"Shard {number} ({shard.name}) in {folder} is not what the manifest says, {why}: fetch {source} again, "
            f"and verify it by fl-gradcode place --check {folder}."
        )
    remember(folder, {shard.name: (stamp, digest)})
    return path


def remember(folder: Path, found: Mapping[str, tuple[Stamp, str]]) -> None:
    """Store in the folder which shards were verified, if the folder can be written to.

    Args:
        folder: The node's folder.
        found: Name -> the stamp from before the verification, and the SHA-256 that was found.
    """
    now = time.time_ns()
    # A file that changed just now may change again within one tick of the file system's clock, unnoticed.
    settled = {name: _entry(stamp, digest) for name, (stamp, digest) in found.items() if stamp.newest < now - _RECENT}
    if settled:
        with contextlib.suppress(OSError):
            replace_file(folder / _VERIFIED, json.dumps({**_verified(folder), **settled}))


def _verified(folder: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_file(folder / _VERIFIED, _LARGEST))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _entry(stamp: Stamp, sha256: str) -> list[Any]:
    return [*stamp, sha256]


def _from_json(values: dict[str, Any]) -> Manifest:
    shards = tuple(_shard(entry) for entry in values["shards"])
    held, worker = values.get("held"), values.get("worker")
    return Manifest(
        k=_count(values["k"]),
        shards=tuple(sorted(shards, key=lambda shard: shard.number)),
        worker=None if worker is None else _count(worker),
        held=None if held is None else tuple(tuple(_count(shard) for shard in mine) for mine in held),
        code=str(values.get("code", "")),
    )


def _shard(values: dict[str, Any]) -> Shard:
    examples, sha256 = values.get("examples"), str(values["sha256"])
    if not isinstance(values["name"], str):
        raise TypeError(values["name"])
    if len(sha256) != 64 or sha256 != sha256.lower() or bytes.fromhex(sha256).hex() != sha256:
        raise ValueError(sha256)
    return Shard(
        number=_count(values["number"]),
        name=values["name"],
        examples=None if examples is None else _count(examples),
        bytes=_count(values["bytes"]),
        sha256=sha256,
    )


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError("a count")
    return value
