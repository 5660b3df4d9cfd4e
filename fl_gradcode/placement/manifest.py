"""Which shards there are, or lie in a node's folder, with their SHA-256; and whether what lies there is that.

A node's folder, as `fl-gradcode place` writes it, holds `shards.json` and one entry for each shard, a file or a folder.
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

from .._files import replace_file
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

#: Name of the manifest in a node's folder, and of the whole one.
SHARDS_FILE, MANIFEST = "shards.json", "manifest.json"
#: Stands for a SHA-256 that a node does not tell.
WITHHELD = "withheld"

_NAME, _VERSION = "fl-gradcode shards", 1
_VERIFIED = ".verified.json"
_RECENT = 2_000_000_000  # nanoseconds: the coarsest clock of a file system in use (FAT)


@dataclass(frozen=True)
class Shard:
    """One shard's data.

    Attributes:
        number: 0..k-1, the column of `B`.
        name: Of its file or folder.
        examples: How many, where that is known.
        bytes: Of its file, or of all files of the folder.
        sha256: Of its bytes, hexadecimal; of a folder over relative paths, sorted, and contents.
    """

    number: int
    name: str
    examples: int | None
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The shards of a node's folder, or all of them.

    Attributes:
        k: Number of shards of the whole data set.
        shards: Those listed here, by number.
        worker: Whose folder it is; None: all shards.
        held: Of each worker, the shards it was assigned; None in a node's folder.
        code: The code they were placed for, as a line of Python.
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
        """Of a manifest's file, or of the folder that it lies in.

        Raises:
            InvalidSetting: There is none, or it cannot be understood.
        """
        file = Path(path)
        if file.is_dir():
            file = next((file / name for name in (SHARDS_FILE, MANIFEST) if (file / name).exists()), file / SHARDS_FILE)
        try:
            told = file.stat()
            return _parsed(file, (told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns))
        except OSError as error:
            raise InvalidSetting(
                f"{file} cannot be read ({error.strerror}): it comes with the folder that fl-gradcode place wrote for "
                "this node."
            ) from None

    @classmethod
    def for_all_shards(cls, manifest: Manifest | str | os.PathLike[str], k: int) -> Manifest:
        """Returns the server's manifest, which must list all k shards.

        Raises:
            InvalidSetting: It cannot be read, or lists other shards than 0..k-1.
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
        """Of a manifest's file.

        Raises:
            OSError: It cannot be read.
            InvalidSetting: It cannot be understood.
        """
        try:
            told = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            raise InvalidSetting(f"{file} is not JSON, perhaps cut off while it was copied: bring it anew.") from None
        try:
            name, _, version = str(told["format"]).rpartition(" ")
            newer = name == _NAME and int(version) > _VERSION
            if not newer and (name, version) != (_NAME, str(_VERSION)):
                raise ValueError(told["format"])
            found = None if newer else _from_json(told)
        except InvalidSetting as error:
            raise InvalidSetting(f"{file}: {error}") from None
        except (KeyError, ValueError, TypeError, AttributeError):
            raise InvalidSetting(f"{file} is no manifest of shards; fl-gradcode place writes them.") from None
        if found is None:
            raise InvalidSetting(
                f"{file} has format {version}, and this version of fl-gradcode reads up to {_VERSION}: update "
                "fl-gradcode here."
            )
        return found

    def write(self, path: str | os.PathLike[str]) -> None:
        """Whole or not at all."""
        listed = [{key: getattr(shard, key) for key in Shard.__dataclass_fields__} for shard in self.shards]
        told: dict[str, Any] = {"format": f"{_NAME} {_VERSION}", "k": self.k, "worker": self.worker}
        if self.held is not None:
            told |= {"n": len(self.held), "held": self.held}
        replace_file(Path(path), json.dumps({**told, "code": self.code, "shards": listed}, indent=1) + "\n")

    @cached_property
    def digests(self) -> dict[int, str]:
        """Shard -> SHA-256."""
        return {shard.number: shard.sha256 for shard in self.shards}

    def shard(self, number: int) -> Shard:
        """The shard of that number.

        Raises:
            ShardMismatch: It is not listed.
        """
        for one in self.shards:
            if one.number == number:
                return one
        numbers = listed((one.number for one in self.shards), 11)
        raise ShardMismatch(f"Shard {number} is not listed; shards {numbers or '(none)'} of {self.k} are.")


@lru_cache(maxsize=8)
def _parsed(file: Path, stamp: tuple[int, ...]) -> Manifest:
    """A node asks for each of its shards; parsing a thousand takes a while."""
    return Manifest.parse(file)


def held_digests(folder: str | os.PathLike[str]) -> dict[int, str]:
    """Shard -> SHA-256, as the manifest of a node's folder lists them; nothing is verified.

    Raises:
        InvalidSetting: There is no manifest that can be read.
    """
    return dict(Manifest.read(folder).digests)


def checked_path(folder: str | os.PathLike[str], number: int) -> Path:
    """Where the shard lies, after its bytes were compared with the manifest of the folder.

    What was found right is remembered in the folder, if it can be written to, and believed until size or times change.

    Raises:
        ShardMismatch: The folder does not hold that shard, or its bytes are others; says what to do.
        InvalidSetting: There is no manifest that can be read.
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
            f"Shard {number} ({shard.name}) is missing in {folder}: fetch {source} anew, and verify it by "
            f"fl-gradcode place --check {folder}."
        )
    stamp = stamp_of(path)
    if _verified(folder).get(shard.name) == _entry(stamp, shard.sha256):
        return path
    size, digest = hash_shard(path) if stamp.size == shard.bytes else (stamp.size, "")
    if digest != shard.sha256:
        told = f"it has {size} bytes instead of {shard.bytes}" if size != shard.bytes else "its SHA-256 is another"
        raise ShardMismatch(
            f"Shard {number} ({shard.name}) in {folder} is not what the manifest says, {told}: fetch {source} anew, "
            f"and verify it by fl-gradcode place --check {folder}."
        )
    remember(folder, {shard.name: (stamp, digest)})
    return path


def remember(folder: Path, found: Mapping[str, tuple[Stamp, str]]) -> None:
    """Note what was verified, with the stamp it had before; in vain where the folder cannot be written to."""
    now = time.time_ns()
    # What changed just now may change again within one tick of the file system's clock.
    settled = {name: _entry(*one) for name, one in found.items() if one[0].newest < now - _RECENT}
    if settled:
        with contextlib.suppress(OSError):
            replace_file(folder / _VERIFIED, json.dumps({**_verified(folder), **settled}))


def _verified(folder: Path) -> dict[str, Any]:
    try:
        told = json.loads((folder / _VERIFIED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _entry(stamp: Stamp, sha256: str) -> list[Any]:
    return [*stamp, sha256]


def _from_json(told: dict[str, Any]) -> Manifest:
    shards = tuple(_shard(one) for one in told["shards"])
    held, worker = told.get("held"), told.get("worker")
    return Manifest(
        k=_count(told["k"]),
        shards=tuple(sorted(shards, key=lambda shard: shard.number)),
        worker=None if worker is None else _count(worker),
        held=None if held is None else tuple(tuple(_count(shard) for shard in one) for one in held),
        code=str(told.get("code", "")),
    )


def _shard(told: dict[str, Any]) -> Shard:
    examples, sha256 = told.get("examples"), str(told["sha256"])
    if not isinstance(told["name"], str):
        raise TypeError(told["name"])
    if len(sha256) != 64 or sha256 != sha256.lower() or bytes.fromhex(sha256).hex() != sha256:
        raise ValueError(sha256)
    return Shard(
        number=_count(told["number"]),
        name=told["name"],
        examples=None if examples is None else _count(examples),
        bytes=_count(told["bytes"]),
        sha256=sha256,
    )


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value
