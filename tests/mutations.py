"""Files as somebody else may leave them: seeded mutations of good ones.

    for path in mutated(good_file, folder, count=200, seed=0):
        ...                                          # each is the only one at its place; the next replaces it

How many are tried is set by the environment variable FL_GRADCODE_MUTATIONS (200 by default, 2,000 for the full test).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["COUNT", "limited", "mutated", "state_of"]

#: Number of mutated files for each reader.
COUNT = int(os.environ.get("FL_GRADCODE_MUTATIONS", "200"))

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 5, 2**31, 2**63, 10**30, 10**300, -(10**25), 0.5, -0.0, 1e308, 1e-320, "", "x", "5",
    "-1", "../../etc/passwd", "/etc/passwd", "\x00", "\x1b[31m", "\ud800", "ü" * 50, "long " * 2000, [], {}, [[]], [0],
    [None], {"type": "x"}, {"type": "dict", "value": []}, {"a": {"b": []}}, [1] * 300,
)  # fmt: skip
_WORDS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"null",
    b'"',
    b"\\u0000",
)
_NAMES = ("state.json", "0", "1", "x", "../x", "a/b", "", "times.npy", "times", "\x00")


def mutated(good: Path, folder: Path, *, count: int, seed: int) -> Iterator[Path]:
    """Yields the path of one mutated file after another, made of a good file; some are links, folders and pipes."""
    rng = random.Random(seed)
    content, path = good.read_bytes(), folder / good.name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        _remove(path)
        if number < len(_PLACES):
            _PLACES[number](path, good)
        else:
            path.write_bytes(_mutation(content, rng))
            path.chmod(stat.S_IMODE(good.stat().st_mode))
        yield path
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _loop(path: Path, good: Path) -> None:
    path.symlink_to(path)


_PLACES: tuple[Callable[[Path, Path], Any], ...] = (
    lambda path, good: path.mkdir(),
    lambda path, good: os.mkfifo(path, 0o600),
    lambda path, good: path.symlink_to(good),
    lambda path, good: path.symlink_to(path.parent),
    lambda path, good: path.symlink_to(path.parent / "nothing"),
    _loop,
    lambda path, good: path.symlink_to("/dev/zero"),
    lambda path, good: path.write_bytes(b""),
    lambda path, good: path.write_bytes(b"\xef\xbb\xbf" + good.read_bytes()),
    lambda path, good: path.write_bytes(good.read_bytes().decode("latin-1").encode("utf-16")),
    lambda path, good: path.write_bytes(b"\n" + good.read_bytes()),
    lambda path, good: path.write_bytes(good.read_bytes() + b"\n\n"),
    lambda path, good: path.write_bytes(bytes(100_000)),
    lambda path, good: path.write_bytes(b"\xff" * 1000),
)


def _mutation(content: bytes, rng: random.Random) -> bytes:
    ways = [_bytes, _bytes, _cut, _doubled, _word]
    if content[:2] == b"PK":
        ways += [_members, _members, _sizes, _sizes]
    elif content[:1] in b"[{":
        ways += [_json, _json, _json, _json]
    else:
        ways += [_cells, _cells]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(ways)(content, rng)
    return content


def _bytes(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4, 32))):
        if changed:
            at = rng.randrange(len(changed))
            changed[at] = changed[at] ^ (1 << rng.randrange(8)) if rng.random() < 0.5 else rng.randrange(256)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:last] if rng.random() < 0.5 else content[:first] + content[last:]


def _doubled(content: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:last] + content[first:last] * rng.choice((1, 1, 20)) + content[last:]


def _word(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(_WORDS) + content[at + rng.choice((0, 0, 1, 5)) :]


def _cells(content: bytes, rng: random.Random) -> bytes:
    """Another cell in a table of text."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    cells = lines[at].split(b",")
    cells[rng.randrange(len(cells))] = rng.choice(
        (*_WORDS[:5], b"", b"-1", b"x", b'"', b"\x00", b"1e-320", b"1e308", b" 1")
    )
    lines[at] = b",".join(cells * rng.choice((1, 1, 2)))
    return b"\n".join(lines)


def _json(content: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in one JSON text, or in one line of several."""
    whole = _parsed(content)
    if whole is not None:
        return _changed(whole, rng)
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    value = _parsed(lines[at])
    if value is not None:
        lines[at] = _changed(value, rng)
    elif lines[at]:
        lines[at] = _bytes(lines[at], rng)
    if rng.random() < 0.2:
        rng.shuffle(lines)
    return b"\n".join(lines)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _changed(value: Any, rng: random.Random) -> bytes:
    holder: Any = {"": value}
    at: Any = ""
    while True:
        inner = holder[at]
        keys: list[Any] = (
            [*inner] if isinstance(inner, dict) else [*range(len(inner))] if isinstance(inner, list) else []
        )
        if not keys or rng.random() < 0.15:
            break
        holder, at = inner, rng.choice(keys)
    how = rng.random()
    if how < 0.1 and holder[at] is not value:
        del holder[at]
    elif how < 0.2 and isinstance(holder, dict) and holder[at] is not value:
        holder[rng.choice((*holder, "x", "__class__", "aggregate_train"))] = holder.pop(at)
    elif how < 0.3 and isinstance(holder[at], list):
        holder[at] = [*holder[at], *holder[at]]
    elif how < 0.35:
        holder[at] = {
            "type": rng.choice(("Generator", "array", "tensor", "set", "deque", "Random", "ArrayRecord")),
            "value": holder[at],
        }
    else:
        holder[at] = rng.choice(_VALUES)
    root = holder[""] if "" in holder and len(holder) == 1 and isinstance(holder, dict) else value
    try:
        return json.dumps(root).encode()
    except (ValueError, RecursionError):
        return b"[]"


def _members(content: bytes, rng: random.Random) -> bytes:
    """Other members in a zip archive, with other content, names or compression."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(one.filename, archive.read(one)) for one in archive.infolist()]
    except Exception:
        return _bytes(content, rng)
    for _ in range(rng.choice((1, 1, 2))):
        if not members:
            break
        at = rng.randrange(len(members))
        name, data = members[at]
        match rng.randrange(6):
            case 0:
                members.pop(at)
            case 1:
                members.append((rng.choice(_NAMES), data))
            case 2:
                members[at] = (rng.choice(_NAMES), data)
            case 3:
                members[at] = (name, _bytes(data, rng))
            case 4:
                members[at] = (name, _cut(data, rng))
            case _:
                members[at] = (name, _json(data, rng) if data[:1] in b"[{" else _word(data, rng))
    if rng.random() < 0.1:
        members.append(("bomb", bytes(30_000_000)))
    kind = rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    made = io.BytesIO()
    with contextlib.suppress(Exception), zipfile.ZipFile(made, "w", kind, compresslevel=1) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name or "_"), data, compress_type=kind)
    return made.getvalue()


def _sizes(content: bytes, rng: random.Random) -> bytes:
    """False sizes, counts and flags in the headers of a zip archive."""
    changed = bytearray(content)
    for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"):
        at = changed.find(mark)
        while at >= 0 and rng.random() < 0.7:
            field = at + rng.choice((6, 8, 10, 14, 16, 18, 20, 22, 24, 26, 28, 42))
            changed[field : field + 4] = rng.choice((0, 1, 100, 2**31, 2**32 - 1, 10**9)).to_bytes(4, "little")
            at = changed.find(mark, at + 4)
    return bytes(changed)


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of change of all that lies below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found


@contextlib.contextmanager
def limited(seconds: int, megabytes: int) -> Iterator[None]:
    """Ends a test that hangs, and refuses it memory beyond what the process has now; POSIX, in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 1_000_000, before[1]))
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)
