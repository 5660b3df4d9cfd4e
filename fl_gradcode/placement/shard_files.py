"""Shards on disk: what counts as one, its SHA-256, whether it changed, and how it is copied."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from ..errors import InvalidSetting

__all__ = [
    "RESERVED",
    "Stamp",
    "check_names",
    "copy_shard",
    "find",
    "hash_shard",
    "link_shard",
    "same_mode",
    "sizes",
    "stamp_of",
    "visible",
]

_BLOCK = 1 << 20
_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}  # what file browsers leave behind; the other ones are hidden
#: Files of a node's folder that are no shards: the manifest, and what privacy keeps there.
RESERVED = ("shards.json", "keys.json", "spent")


class Stamp(NamedTuple):
    """What tells, without reading it, that a shard changed.

    Attributes:
        size: Bytes.
        newest: Time of the last change of its newest file, nanoseconds.
        text: Differs if any file's name, size or times do.
    """

    size: int
    newest: int
    text: str


def visible(folder: Path) -> list[Path]:
    """The entries of a folder in natural order (shard-2 before shard-10), without hidden and system files."""
    entries = [path for path in folder.iterdir() if not _ignored(path.name)]
    return sorted(entries, key=lambda path: (_natural(path.name), path.name))


def check_names(names: Sequence[str]) -> None:
    """Refuse names that lead out of a folder, or that some file system would take for one another.

    Raises:
        InvalidSetting: With the name.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not name or name != Path(name).name or _strange(name):
            raise InvalidSetting(
                f"{name!r} cannot name a shard: it must be the plain name of a file or folder, not hidden, in UTF-8."
            )
        if name.casefold() in RESERVED:
            raise InvalidSetting(
                f"A shard cannot be called {name!r}, which has a meaning in a node's folder; rename it."
            )
        if (alike := _alike(name)) in seen:
            raise InvalidSetting(
                f"The names {seen[alike]!r} and {name!r} are the same on file systems that ignore case or the form of "
                "accents; rename one."
            )
        seen[alike] = name


def find(folder: Path, name: str) -> Path | None:
    """The entry of that name, also where a file system writes its accents in another form; None: there is none."""
    path = folder / name
    if path.exists():
        return path
    if not name.isascii() and folder.is_dir():
        wanted = unicodedata.normalize("NFC", name)
        return next((one for one in folder.iterdir() if unicodedata.normalize("NFC", one.name) == wanted), None)
    return None


def hash_shard(shard: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, or of a folder: over relative paths, sorted, each with its file's SHA-256."""
    return _over_files(shard, _hash_file)


def copy_shard(shard: Path, target: Path) -> tuple[int, str]:
    """Copy a file or folder without what is hidden; bytes and SHA-256 of what was written."""

    def copied(path: Path) -> tuple[int, bytes]:
        to = _folder_for(path, shard, target)
        with to.open("xb") as file:
            found = _hash_file(path, file.write)  # not synced, file by file: what a power cut takes, verifying finds
        shutil.copymode(path, to)  # what only its owner could read stays so
        return found

    return _over_files(shard, copied)


def link_shard(shard: Path, target: Path) -> None:
    """Hard links to the same bytes."""
    for path in _files(shard):
        os.link(path.resolve(), _folder_for(path, shard, target))


def _folder_for(path: Path, shard: Path, target: Path) -> Path:
    """Where a file of the shard goes; its folders are there then, open to no more users than the shard's."""
    if path is shard:
        return target
    inside = path.relative_to(shard)
    for folder in [*inside.parents][::-1]:
        if not (target / folder).exists():
            (target / folder).mkdir()
            same_mode(shard / folder, target / folder)
    return target / inside


def same_mode(folder: Path, other: Path) -> None:
    """Give another folder the mode of this one; its owner may always write to it."""
    other.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IRWXU)


def sizes(shard: Path) -> tuple[int, int]:
    """Files and bytes of a shard."""
    found = [path.stat().st_size for path in _files(shard)]
    return len(found), sum(found)


def stamp_of(shard: Path) -> Stamp:
    """The shard as the file system describes it now."""
    digest, size, newest = hashlib.sha256(), 0, 0
    for path in _files(shard):
        told = path.stat()
        size += told.st_size
        newest = max(newest, told.st_mtime_ns)
        digest.update(f"{_relative(shard, path)}\0{told.st_size} {told.st_mtime_ns} {told.st_ctime_ns}\0".encode())
    return Stamp(size, newest, digest.hexdigest())


def _over_files(shard: Path, each: Callable[[Path], tuple[int, bytes]]) -> tuple[int, str]:
    files = _files(shard)
    if not shard.is_dir():
        size, found = each(shard)
        return size, found.hex()
    digest, total = hashlib.sha256(), 0
    for path in files:
        size, found = each(path)
        total += size
        digest.update(_relative(shard, path).encode() + b"\0" + found)
    return total, digest.hexdigest()


def _hash_file(path: Path, write: Callable[[bytes], object] = lambda block: None) -> tuple[int, bytes]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            write(block)
            size += len(block)
    return size, digest.digest()


def _files(shard: Path) -> list[Path]:
    """The file, or the files of the folder, sorted by their relative paths."""
    if shard.is_dir():
        return sorted(_below(shard), key=lambda path: (_relative(shard, path).encode(), path.name))
    if not shard.is_file():
        raise InvalidSetting(
            f"{shard} is a symbolic link that leads nowhere."
            if shard.is_symlink()
            else f"{shard} is neither a file nor a folder."
        )
    return [shard]


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if _ignored(path.name):
            continue
        if path.is_dir():
            if path.is_symlink():  # it may lead back up
                raise InvalidSetting(f"{path} is a symbolic link to a folder: bring its files here, or remove it.")
            yield from _below(path)
        elif path.is_file():
            try:
                path.name.encode()
            except UnicodeEncodeError:
                raise InvalidSetting(f"The name of {os.fsencode(path)!r} is not in UTF-8; rename it.") from None
            yield path
        else:
            raise InvalidSetting(f"{path} is neither a file nor a folder, or a symbolic link that leads nowhere.")


def _relative(shard: Path, path: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(shard).as_posix())


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SYSTEM_FILES


def _strange(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return _ignored(name) or "\\" in name or "\0" in name or bool(PureWindowsPath(name).drive)


def _alike(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
