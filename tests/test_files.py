"""Files are replaced whole or not at all, names survive a power cut, and paths are absolute."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fl_gradcode._files import (
    absolute_path,
    make_folder,
    parse_json,
    put_in_place,
    read_file,
    replace_file,
    replacing,
)
from fl_gradcode.errors import InvalidSetting


class Disk:
    """Notes what is synced, by inode, so that a power cut can be thought through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[tuple[int, list[str]]] = []
        real = os.fsync

        def fsync(handle: int) -> None:
            found = os.fstat(handle)
            names = os.listdir(handle) if stat.S_ISDIR(found.st_mode) else []
            self.synced.append((found.st_ino, names))
            real(handle)

        monkeypatch.setattr("os.fsync", fsync)

    def has_name(self, path: Path) -> bool:
        """Whether the folder was synced while it had the name."""
        folder = path.parent.stat().st_ino
        return any(one == folder and path.name in names for one, names in self.synced)

    def has_content(self, path: Path) -> bool:
        return any(one == path.stat().st_ino for one, _ in self.synced)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_replaced_file_survives_a_power_cut(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    replace_file(path, "after: ü\n")
    assert path.read_text(encoding="utf-8") == "after: ü\n"
    assert disk.has_content(path) and disk.has_name(path)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_moved_file_keeps_its_name_after_a_power_cut(tmp_path: Path, disk: Disk) -> None:
    (tmp_path / "draft").write_text("x")
    put_in_place(tmp_path / "draft", tmp_path / "file")
    assert disk.has_name(tmp_path / "file")


def test_new_folders_keep_their_names_after_a_power_cut(tmp_path: Path, disk: Disk) -> None:
    folder = tmp_path / "a" / "b" / "c"
    make_folder(folder, mode=0o700)
    assert all(disk.has_name(one) for one in (folder, folder.parent, folder.parent.parent))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    disk.synced.clear()
    make_folder(folder)
    assert disk.synced == []


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_text("before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "after")
    assert path.read_text() == "before" and [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_private_file_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            modes.append(stat.S_IMODE(os.fstat(handle).st_mode))
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)
    path = tmp_path / "secret"
    path.write_text("open to all")
    path.chmod(0o644)
    replace_file(path, "secret", mode=0o600)
    assert modes == [0o600] and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_relative_path_is_refused_with_its_setting(tmp_path: Path) -> None:
    assert absolute_path(str(tmp_path), "ledger") == tmp_path
    with pytest.raises(InvalidSetting, match=r"^ledger='run\.jsonl' is a relative path; .* Give an absolute path\.$"):
        absolute_path("run.jsonl", "ledger")


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_replaced_file_keeps_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for umask in (0o022, 0o077, 0o000):
        before = os.umask(umask)
        try:
            for mode in (0o600, 0o640, 0o444):
                path.unlink(missing_ok=True)
                path.write_text("before")
                path.chmod(mode)
                replace_file(path, "after")
                assert stat.S_IMODE(path.stat().st_mode) == mode
            path.unlink()
            replace_file(path, "new")
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        finally:
            os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_draft_takes_the_place_of_a_link_and_follows_it_nowhere(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    draft = tmp_path / "file.new"
    draft.symlink_to(victim)
    with replacing(path, draft) as file:
        file.write(b"content")
    assert victim.read_text() == "mine" and path.read_text() == "content" and not draft.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_only_regular_files_are_read_and_none_beyond_a_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(bytes(100))
    for name, text in (("pipe", "Not a regular file"), (".", "Is a directory"), ("none", "No such file")):
        with pytest.raises(OSError, match=text):
            read_file(tmp_path / name, 1000)
    with pytest.raises(OSError, match="Not a regular file"):
        read_file(Path("/dev/zero"), 1000)
    assert read_file(tmp_path / "file", 100) == bytes(100)
    with pytest.raises(OSError, match="More than 99 bytes"):
        read_file(tmp_path / "file", 99)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"\xff", "byte 0 is not valid UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[NaN]", "NaN is not a number"),
        (b"-Infinity", "-Infinity is not a number"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"9" * 5000, "integer string"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_json_is_a_value_error(text: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        parse_json(text)
    assert len(str(error.value)) < 200


def test_infinite_numbers_are_read_where_a_file_of_ours_has_them() -> None:
    assert parse_json(b'[Infinity, -Infinity, "x"]', finite=False) == [float("inf"), float("-inf"), "x"]
