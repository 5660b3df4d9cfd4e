"""Writes each node's folder of shards, and the manifest of all: whole or not at all."""

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

#: Name of the file that `fl-gradcode keys make --assignment` reads.
ASSIGNMENT = "assignment.json"

_DRAFT = ".placing-"
_NODE = re.compile(r"node-(0|[1-9]\d*)")


def shards_in(folder: Path) -> dict[Path, int | None]:
    """The entries of a folder as shards, in natural order, and how many examples each has.

    Raises:
        InvalidSetting: There are none, one is empty, or two have names that are alike.
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
    """A hidden folder in `out` for what is not complete yet; gone at the end, whatever happens.

    Raises:
        InvalidSetting: `out` holds something and is not to be overwritten, or lies in the source.
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
        _refuse_other_data(out, force=force)  # another run may have placed meanwhile
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
    for stale in out.glob(f"{_DRAFT}*"):  # of a run that was killed
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
    """One run at a time; a process that dies lets go."""
    with ExitStack() as stack:
        if os.name == "posix":  # elsewhere a folder cannot be opened
            handle = os.open(out, os.O_RDONLY)
            stack.callback(os.close, handle)
            if isinstance(lock(handle), BlockingIOError):  # any other error: a file system without locks
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
    """Write `node-0`, `node-1`, ... beside the draft, `assignment.json`, and last `manifest.json`.

    Whenever it is cut off, what lies in a node's folder is listed in the folder's `shards.json`, so that the next run
    can take it away; a folder that is not complete has shards that are missing, and there is no `manifest.json`.

    Args:
        draft: Of `unfinished`.
        shards: Paths in the order of their numbers, and how many examples each has, where that is known.
        held: Of each worker, the shards that it receives.
        code: The code they are for, as a line of Python.
        link: Hard links instead of copies.
        like: The folder of the data: nodes' folders get its mode.

    Raises:
        InvalidSetting: A shard is empty or changes meanwhile, the disk is too full, or a link is not possible; or
            something is in the way that was not placed.
    """
    out = draft.parent
    total = _room_for(out, shards, held, link=link)
    assigned = tuple(tuple(sorted(one)) for one in held)
    found: dict[int, Shard] = {}
    nodes = [draft / f"node-{worker}" for worker in range(len(assigned))]
    names, earlier = [path.name for path in shards], _earlier(out)
    for worker, node in enumerate(nodes):
        target, new = out / node.name, [SHARDS_FILE, *(names[number] for number in assigned[worker])]
        placed = [SHARDS_FILE, *(one.name for one in Manifest.read(target).shards)] if target in earlier else []
        _refuse_what_is_in_the_way(target, new, placed=placed)
    for node in nodes:
        node.mkdir()
        if like is not None:
            same_mode(like, node)
    for number, (path, examples) in enumerate(shards.items()):
        targets = [nodes[worker] / path.name for worker, one in enumerate(assigned) if number in one]
        told = _place(path, targets, link=link)
        found[number] = Shard(number, path.name, examples, *told)
    for worker, node in enumerate(nodes):
        listed = tuple(found[number] for number in assigned[worker])
        Manifest(len(found), listed, worker, code=code).write(node / SHARDS_FILE)
    whole = Manifest(len(found), tuple(found.values()), held=assigned, code=code)
    if sum(found[number].bytes for one in assigned for number in one) != total:
        raise InvalidSetting("The shards changed while they were copied: place them again once nobody writes to them.")
    replace_file(draft / ASSIGNMENT, json.dumps(assigned) + "\n")
    whole.write(draft / MANIFEST)
    # From here on nothing is written, only moved. An earlier placement is no longer there as a whole, and must not
    # seem to be.
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
    """The bytes of all copies, if there is room for them."""
    size = [_bytes(path) for path in shards]
    for number, (path, examples) in enumerate(shards.items()):
        if size[number] == 0 or examples == 0:
            raise InvalidSetting(f"Shard {number} ({path.name}) is empty: fill it, or remove it from the data.")
    total = sum(size[number] for one in held for number in one)
    free = shutil.disk_usage(out).free
    if not link and total > free:
        raise InvalidSetting(
            f"The copies take {total / 1e6:.4g} MB, and {out} has {free / 1e6:.4g} MB free: make room, or --link "
            "instead of copying."
        )
    return total


def _place(path: Path, targets: Sequence[Path], *, link: bool) -> tuple[int, str]:
    """Bytes and SHA-256 of what lies at all targets now."""
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
    """Folders of nodes that an earlier run placed here; copies of them are none.

    Raises:
        InvalidSetting: What was placed in one of them is not known, or lies elsewhere: it could not be taken away.
    """
    found = []
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
        found.append(path)
    return found


def _refuse_what_is_in_the_way(node: Path, names: Sequence[str], *, placed: Sequence[str]) -> None:
    """Before anything is changed: what an earlier run did not place is not replaced."""
    if node.is_symlink() or (node.exists() and not node.is_dir()):
        raise InvalidSetting(f"{node} is no folder of its own: move it away, or give another folder.")
    for name in names:
        there = find(node, name) or node / name
        if name not in placed and os.path.lexists(there):
            raise InvalidSetting(f"{there} was not placed, and would be replaced: move it away.")


def _clear(folder: Path, draft: Path) -> None:
    """Take away the shards of an earlier placement and nothing else: keys and what privacy spent stay.

    The manifest goes last: whatever is left when this is cut off is still listed.
    """
    earlier = Manifest.read(folder / SHARDS_FILE).shards
    away = Path(tempfile.mkdtemp(prefix="earlier-", dir=draft))  # goes with the draft
    for shard in earlier:
        if (path := find(folder, shard.name)) is not None:
            os.replace(path, away / shard.name)
    (folder / ".verified.json").unlink(missing_ok=True)
    (folder / SHARDS_FILE).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _bring(node: Path, target: Path) -> None:
    """Move a node's folder to its place; into one with other things its manifest first, which lists what comes."""
    if not target.exists():
        node.rename(target)
        return
    target.chmod(stat.S_IMODE(target.stat().st_mode & node.stat().st_mode) | stat.S_IRWXU)
    for path in sorted(node.iterdir(), key=lambda path: path.name != SHARDS_FILE):
        os.replace(path, target / path.name)


def _bytes(path: Path) -> int:
    return sizes(path)[1]
