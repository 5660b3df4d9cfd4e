"""Writes the folder of shards for each node and the manifest of all shards, either completely or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .._files import lock, replace_file, sync_folder
from ..errors import FlGradcodeError, InvalidSetting
from .manifest import MANIFEST, SHARDS_FILE, Manifest, Shard
from .shard_files import check_names, copy_shard, find, hash_shard, link_shard, same_mode, sizes, visible
from .splitting import count_examples

__all__ = ["ASSIGNMENT", "shards_in", "unfinished", "write_folders"]

#: Name of the file with the assignment, which `fl-gradcode keys make --assignment` reads.
ASSIGNMENT = "assignment.json"

_DRAFT = ".placing-"
_NODE = re.compile(r"node-(0|[1-9]\d*)")


def shards_in(folder: Path) -> dict[Path, int | None]:
    """Returns path -> number of examples for the shards in a folder, in natural order.

    The number is 0 for an empty shard, and None if it is not known.

    Raises:
        InvalidSetting: The folder has no shards, was already placed, or has unusable or ambiguous names.
    """
    if not folder.is_dir():
        raise InvalidSetting(f"There is no folder {folder}.")
    for name in (SHARDS_FILE, MANIFEST):
        if (folder / name).exists():
            raise InvalidSetting(f"{folder} holds {name}: it was placed already. Give the folder with the data alone.")
    entries = visible(folder)
    if not entries:
        raise InvalidSetting(f"{folder} holds no shards: each visible entry, a file or a folder, is one.")
    check_names([path.name for path in entries])
    return {path: count_examples(path) if _bytes(path) else 0 for path in entries}


@contextmanager
def unfinished(out: Path, source: Path, *, force: bool) -> Iterator[Path]:
    """Create a hidden folder in `out` for unfinished work, yield it, and always remove it at the end.

    Raises:
        InvalidSetting: `out` is not empty and must not be overwritten, or `out` and the source contain each other.
    """
    inner, outer = source.resolve(), out.resolve()
    if inner == outer or (inner.is_dir() and outer.is_relative_to(inner)) or inner.is_relative_to(outer):
        raise InvalidSetting(f"{out} and {source} lie in one another: give a folder apart from the data.")
    if out.exists() and not out.is_dir():
        raise InvalidSetting(f"{out} is a file; give a folder.")
    made = not out.exists()
    if not made:
        _refuse_other_data(out, force=force)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _refuse_other_data(out, force=force)  # checked again, since another run may have written before the lock
        yield from _draft(out, made=made)


def _refuse_other_data(out: Path, *, force: bool) -> None:
    there = visible(out)
    if there and not force:
        what = "an earlier placement" if (out / MANIFEST).exists() else f"other data, such as {there[0].name}"
        raise InvalidSetting(f"{out} holds {what}: give a new folder, or --force to replace what place writes.")
    for name in (MANIFEST, ASSIGNMENT):
        if (out / name).is_dir():
            raise InvalidSetting(f"{out / name} is a folder, and would be replaced: move it away.")
    if os.path.lexists(out / MANIFEST):
        try:
            ours = Manifest.read(out / MANIFEST).held is not None
        except FlGradcodeError:
            ours = False
        if not ours:
            raise InvalidSetting(f"{out / MANIFEST} was not placed, and would be replaced: move it away.")


def _draft(out: Path, *, made: bool) -> Iterator[Path]:
    for stale in out.glob(f"{_DRAFT}*"):  # left behind by a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=out))
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if made and not any(out.iterdir()):
            out.rmdir()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the lock of the folder, which the operating system releases if the process dies."""
    with ExitStack() as stack:
        if os.name == "posix":  # elsewhere a folder cannot be opened
            handle = os.open(out, os.O_RDONLY)
            stack.callback(os.close, handle)
            if isinstance(lock(handle), BlockingIOError):  # any other error means a file system without locks
                raise InvalidSetting(f"Another fl-gradcode place is writing to {out}: wait until it has ended.")
        yield


def write_folders(
    draft: Path,
    shards: Mapping[Path, int | None],
    held: Sequence[Sequence[int]],
    *,
    code: str = "",
    link: bool = False,
    like: Path | None = None,
) -> Manifest:
    """Write `node-0`, `node-1`, ... beside the draft, then `assignment.json`, and last `manifest.json`.

    If the function is interrupted, the `shards.json` in a node's folder still lists all shards in that folder, so that
    the next run can remove them. Incomplete folders then lack shards, and there is no `manifest.json`.

    Args:
        draft: The folder that `unfinished` yields.
        shards: Path -> number of examples (None if not known), in the order of the shards' numbers.
        held: For each worker, the shards that it receives.
        code: The code that the shards are for, as a line of Python.
        link: Whether to make hard links instead of copies.
        like: Folder of the data, whose mode the nodes' folders get.

    Returns:
        The manifest of all shards.

    Raises:
        InvalidSetting: A shard is empty or changes during the copy, the disk is full, a link is not possible, or an
            existing file that was not placed would be overwritten.
    """
    out = draft.parent
    total = _room_for(out, shards, held, link=link)
    assigned = tuple(tuple(sorted(numbers)) for numbers in held)
    described: dict[int, Shard] = {}
    nodes = [draft / f"node-{worker}" for worker in range(len(assigned))]
    names, earlier = [path.name for path in shards], _earlier(out)
    for worker, node in enumerate(nodes):
        target, new = out / node.name, [SHARDS_FILE, *(names[number] for number in assigned[worker])]
        placed = [SHARDS_FILE, *(shard.name for shard in Manifest.read(target).shards)] if target in earlier else []
        _refuse_what_is_in_the_way(target, new, placed=placed)
    for node in nodes:
        node.mkdir()
        if like is not None:
            same_mode(like, node)
    for number, (path, examples) in enumerate(shards.items()):
        targets = [nodes[worker] / path.name for worker, mine in enumerate(assigned) if number in mine]
        size, digest = _place(path, targets, link=link)
        described[number] = Shard(number, path.name, examples, size, digest)
    for worker, node in enumerate(nodes):
        listed = tuple(described[number] for number in assigned[worker])
        Manifest(len(described), listed, worker, code=code).write(node / SHARDS_FILE)
    whole = Manifest(len(described), tuple(described.values()), held=assigned, code=code)
    if sum(described[number].bytes for mine in assigned for number in mine) != total:
        raise InvalidSetting("The shards changed while they were copied: place them again once nobody writes to them.")
    replace_file(draft / ASSIGNMENT, json.dumps(assigned) + "\n")
    whole.write(draft / MANIFEST)
    # From here on files are only moved. The earlier manifest goes first, because the earlier placement is no longer
    # complete and must not appear to be.
    (out / MANIFEST).unlink(missing_ok=True)
    for folder in earlier:
        _clear(folder, draft)
    for node in nodes:
        _bring(node, out / node.name)
    for name in (ASSIGNMENT, MANIFEST):
        os.replace(draft / name, out / name)
    sync_folder(out)
    return whole


def _room_for(out: Path, shards: Mapping[Path, int | None], held: Sequence[Sequence[int]], *, link: bool) -> int:
    """Returns the size of all copies in bytes, after checking that no shard is empty and the disk has room for them."""
    size = [_bytes(path) for path in shards]
    for number, (path, examples) in enumerate(shards.items()):
        if size[number] == 0 or examples == 0:
            raise InvalidSetting(f"Shard {number} ({path.name}) is empty: fill it, or remove it from the data.")
    total = sum(size[number] for numbers in held for number in numbers)
    free = shutil.disk_usage(out).free
    if not link and total > free:
        raise InvalidSetting(
            f"The copies take {total / 1e6:.4g} MB, and {out} has {free / 1e6:.4g} MB free: make room, or --link "
            "instead of copying."
        )
    return total


def _place(path: Path, targets: Sequence[Path], *, link: bool) -> tuple[int, str]:
    """Copy or link a shard to all targets; returns its size in bytes and its SHA-256."""
    if link:
        for target in targets:
            try:
                link_shard(path, target)
            except OSError as error:
                raise InvalidSetting(
                    f"{path} cannot be linked to {target.parent.parent.parent} ({error.strerror}): leave out --link."
                ) from None
        return hash_shard(path)
    written = {copy_shard(path, target) for target in targets}
    if len(written) > 1:
        raise InvalidSetting(f"{path} changed while it was copied: place again once nobody writes to it.")
    return written.pop()


def _earlier(out: Path) -> list[Path]:
    """Returns the nodes' folders that an earlier run has written here, without copies of such folders.

    Raises:
        InvalidSetting: The contents of a folder are not known, or it is a link or on another disk, so that its shards
            cannot be removed.
    """
    folders = []
    for path in sorted(out.iterdir()):
        if not _NODE.fullmatch(path.name) or not os.path.lexists(path / SHARDS_FILE):
            continue
        try:
            manifest = Manifest.read(path / SHARDS_FILE)
        except FlGradcodeError as error:
            raise InvalidSetting(f"What was placed in {path} is not known: move it away. ({error})") from None
        if f"node-{manifest.worker}" != path.name:
            continue
        if path.is_symlink() or path.stat().st_dev != out.stat().st_dev:
            raise InvalidSetting(f"{path} is a link, or on another disk: move it away, or give another folder.")
        folders.append(path)
    return folders


def _refuse_what_is_in_the_way(node: Path, names: Sequence[str], *, placed: Sequence[str]) -> None:
    """Refuse to replace files that no earlier run has placed; called before anything is changed."""
    if node.is_symlink() or (node.exists() and not node.is_dir()):
        raise InvalidSetting(f"{node} is not a folder of its own: move it away, or give another folder.")
    for name in names:
        there = find(node, name) or node / name
        if name not in placed and os.path.lexists(there):
            raise InvalidSetting(f"{there} was not placed, and would be replaced: move it away.")


def _clear(folder: Path, draft: Path) -> None:
    """Remove the shards of an earlier placement and nothing else, so that keys and privacy ledgers stay.

    The manifest is removed last, so that after an interruption all remaining shards are still listed.
    """
    earlier = Manifest.read(folder / SHARDS_FILE).shards
    away = Path(tempfile.mkdtemp(prefix="earlier-", dir=draft))  # removed together with the draft
    for shard in earlier:
        if (path := find(folder, shard.name)) is not None:
            os.replace(path, away / shard.name)
    (folder / ".verified.json").unlink(missing_ok=True)
    (folder / SHARDS_FILE).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _bring(node: Path, target: Path) -> None:
    """Move a node's folder to its place.

    If the target already has other files, the manifest is moved first, because it lists the shards that follow.
    """
    if not target.exists():
        node.rename(target)
        return
    target.chmod(stat.S_IMODE(target.stat().st_mode & node.stat().st_mode) | stat.S_IRWXU)
    for path in sorted(node.iterdir(), key=lambda path: path.name != SHARDS_FILE):
        os.replace(path, target / path.name)


def _bytes(path: Path) -> int:
    return sizes(path)[1]
