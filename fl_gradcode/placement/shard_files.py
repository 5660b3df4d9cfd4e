"""Shards as files or folders on disk: which entries count, how they are hashed, copied, and checked for changes."""

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
_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}  # visible files that file browsers leave behind
#: Files of a node's folder that are no shards: the manifest, and the keys and ledger of privacy.
RESERVED = ("shards.json", "keys.json", "spent")


class Stamp(NamedTuple):
    """A stamp that shows whether a shard has changed, without reading its data.

    Attributes:
        size: Size in bytes.
        newest: Time of the last change of its newest file, in nanoseconds.
        text: Hash of the names, sizes and times of all files.
    """

    size: int
    newest: int
    text: str


def visible(folder: Path) -> list[Path]:
    """Returns the entries of a folder in natural order (shard-2 before shard-10), without hidden and system files."""
    entries = [path for path in folder.iterdir() if not _ignored(path.name)]
    return sorted(entries, key=lambda path: (_natural(path.name), path.name))


def check_names(names: Sequence[str]) -> None:
    """Refuse names that lead out of a folder, or that a file system might take for the same.

    Raises:
        InvalidSetting: A name cannot be used. The message contains it.
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
    """Returns the entry with this name, even if the file system stores accents in another form, or None."""
    path = folder / name
    if path.exists():
        return path
    if not name.isascii() and folder.is_dir():
        wanted = unicodedata.normalize("NFC", name)
        return next((entry for entry in folder.iterdir() if unicodedata.normalize("NFC", entry.name) == wanted), None)
    return None


def hash_shard(shard: Path) -> tuple[int, str]:
    """Returns the size in bytes and the SHA-256 of a file or folder.

    The SHA-256 of a folder covers the sorted relative paths, each with the SHA-256 of its file.
    """
    return _over_files(shard, _hash_file)


def copy_shard(shard: Path, target: Path) -> tuple[int, str]:
    """Copy a file or folder without its hidden files; returns the size in bytes and the SHA-256 of the copy."""

    def copied(path: Path) -> tuple[int, bytes]:
        to = _folder_for(path, shard, target)
        with to.open("xb") as file:
            written = _hash_file(path, file.write)  # files are not synced, since verification finds losses
        shutil.copymode(path, to)  # a file that only its owner can read stays private
        return written

    return _over_files(shard, copied)


def link_shard(shard: Path, target: Path) -> None:
    """Make hard links to the files of a shard at the target."""
    for path in _files(shard):
        os.link(path.resolve(), _folder_for(path, shard, target))


def _folder_for(path: Path, shard: Path, target: Path) -> Path:
    """Returns the target path of a file of the shard, after creating its folders with the modes of the shard's."""
    if path is shard:
        return target
    inside = path.relative_to(shard)
    for folder in [*inside.parents][::-1]:
        if not (target / folder).exists():
            (target / folder).mkdir()
            same_mode(shard / folder, target / folder)
    return target / inside


def same_mode(folder: Path, other: Path) -> None:
    """Give another folder the mode of this one, plus full access for its owner."""
    other.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IRWXU)


def sizes(shard: Path) -> tuple[int, int]:
    """Returns the number of files of a shard and their total size in bytes."""
    each = [path.stat().st_size for path in _files(shard)]
    return len(each), sum(each)


def stamp_of(shard: Path) -> Stamp:
    """Returns the present stamp of the shard, from the file system's data about its files."""
    digest, size, newest = hashlib.sha256(), 0, 0
    for path in _files(shard):
        state = path.stat()
        size += state.st_size
        newest = max(newest, state.st_mtime_ns)
        digest.update(f"{_relative(shard, path)}\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}\0".encode())
    return Stamp(size, newest, digest.hexdigest())


def _over_files(shard: Path, each: Callable[[Path], tuple[int, bytes]]) -> tuple[int, str]:
    files = _files(shard)
    if not shard.is_dir():
        size, hashed = each(shard)
        return size, hashed.hex()
    digest, total = hashlib.sha256(), 0
    for path in files:
        size, hashed = each(path)
        total += size
        digest.update(_relative(shard, path).encode() + b"\0" + hashed)
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
    """Returns the file itself, or the files of the folder sorted by their relative paths."""
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
            if path.is_symlink():  # the link may point to a parent folder
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
