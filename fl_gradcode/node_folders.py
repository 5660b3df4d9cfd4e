"""Writes each node's folder of shards, and the manifest of all: whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .cutting import count_examples
from .errors import FlGradcodeError, InvalidSetting
from .manifest import MANIFEST, SHARDS_FILE, Manifest, Shard, write_atomically
from .shard_files import check_names, copy_shard, find, hash_shard, link_shard, sizes, visible

__all__ = ["ASSIGNMENT", "shards_in", "unfinished", "write_folders"]

#: Name of the file that `fl-gradcode keys make --assignment` reads.
ASSIGNMENT = "assignment.json"

_DRAFT = ".placing-"


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
    if out.is_dir() and not force and (there := visible(out)):
        what = "an earlier placement" if (out / MANIFEST).exists() else f"other data, such as {there[0].name}"
        raise InvalidSetting(f"{out} holds {what}: give a new folder, or --force to replace what place writes.")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(f"{_DRAFT}*"):  # of a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=out))
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if made and not any(out.iterdir()):
            out.rmdir()


def write_folders(
    draft: Path,
    shards: Mapping[Path, int | None],
    held: Sequence[Sequence[int]],
    *,
    code: str = "",
    link: bool = False,
) -> Manifest:
    """Write `node-0`, `node-1`, ... beside the draft, `assignment.json`, and last `manifest.json`.

    Args:
        draft: Of `unfinished`.
        shards: Paths in the order of their numbers, and how many examples each has, where that is known.
        held: Of each worker, the shards that it receives.
        code: The code they are for, as a line of Python.
        link: Hard links instead of copies.

    Raises:
        InvalidSetting: A shard is empty or changes meanwhile, the disk is too full, or a link is not possible.
    """
    out = draft.parent
    total = _room_for(out, shards, held, link=link)
    assigned = tuple(tuple(sorted(one)) for one in held)
    found: dict[int, Shard] = {}
    nodes = [draft / f"node-{worker}" for worker in range(len(assigned))]
    for node in nodes:
        node.mkdir()
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
    # From here on an earlier placement is no longer there as a whole, and must not seem to be.
    (out / MANIFEST).unlink(missing_ok=True)
    for earlier in out.glob("node-*"):
        _clear(earlier)
    for node in nodes:
        _bring(node, out / node.name)
    write_atomically(out / ASSIGNMENT, json.dumps(assigned) + "\n")
    whole.write(out / MANIFEST)
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


def _clear(folder: Path) -> None:
    """Remove the shards of an earlier placement and nothing else: keys and what privacy spent stay."""
    try:
        earlier = Manifest.read(folder / SHARDS_FILE)
    except FlGradcodeError:
        return
    (folder / SHARDS_FILE).unlink()  # first: what is left over when this is cut off is no node's folder
    (folder / ".verified.json").unlink(missing_ok=True)
    for shard in earlier.shards:
        if (path := find(folder, shard.name)) is not None:
            _remove(path)
    if not any(folder.iterdir()):
        folder.rmdir()


def _bring(node: Path, target: Path) -> None:
    """Move a node's folder to its place; into one with other things, its manifest last."""
    if not target.exists():
        node.rename(target)
        return
    for path in sorted(node.iterdir(), key=lambda path: path.name == SHARDS_FILE):
        if (target / path.name).exists():
            _remove(target / path.name)
        os.replace(path, target / path.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _bytes(path: Path) -> int:
    return sizes(path)[1]
