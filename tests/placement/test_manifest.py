"""Manifests of shards, and whether what lies in a node's folder is what its manifest says."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from fl_gradcode.errors import InvalidSetting, ShardMismatch
from fl_gradcode.placement import shard_files
from fl_gradcode.placement.manifest import SHARDS_FILE, Manifest, Shard, checked_path, held_digests
from fl_gradcode.placement.shard_files import check_names, copy_shard, hash_shard, visible

LONG_AGO = 10**9


def old(path: Path, seconds: int = LONG_AGO) -> Path:
    """As if it had lain there for long: what changed just now is never remembered."""
    for one in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(one, (seconds, seconds))
    return path


def listed(folder: Path, *names: str, k: int = 12, worker: int | None = 3) -> Manifest:
    """Write the manifest of these entries of a folder."""
    shards = [Shard(2 * i, name, None, *hash_shard(folder / name)) for i, name in enumerate(names)]
    manifest = Manifest(k, tuple(shards), worker)
    manifest.write(folder / SHARDS_FILE)
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A node's folder: shard 0 is a file, shard 2 a folder with files."""
    node = tmp_path / "node-3"
    (node / "images" / "cats").mkdir(parents=True)
    (node / "a.csv").write_text("x,y\n1,2\n")
    (node / "images" / "cats" / "1.png").write_bytes(b"meow")
    (node / "images" / "2.png").write_bytes(b"woof")
    old(node)
    listed(node, "a.csv", "images")
    return node


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards that are read from now on."""
    found: list[Path] = []

    def spying(path: Path) -> tuple[int, str]:
        found.append(path)
        return hash_shard(path)

    monkeypatch.setattr("fl_gradcode.placement.manifest.hash_shard", spying)
    return found


def test_a_manifest_is_read_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    node = Manifest.read(folder)
    assert node == Manifest.read(str(folder / SHARDS_FILE))
    assert (node.k, node.worker, node.held) == (12, 3, None)
    assert node.digests == held_digests(folder) == {0: node.shard(0).sha256, 2: node.shard(2).sha256}
    assert node.shard(0).bytes == 8 and node.shard(2).bytes == 8
    whole = Manifest(3, node.shards[:1], held=((0,), (), (0,)), code="some_code(3)")
    whole.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "node-3"]


def test_the_sha256_of_a_file_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_shard(tmp_path / "a") == (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


def test_a_file_of_many_blocks_is_hashed_and_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(os.urandom(1000))
    whole = hash_shard(tmp_path / "a")
    monkeypatch.setattr(shard_files, "_BLOCK", 7)
    assert hash_shard(tmp_path / "a") == copy_shard(tmp_path / "a", tmp_path / "b") == whole
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("change", ["content", "name", "moved", "added", "removed", "swapped"])
def test_the_sha256_of_a_folder_tells_every_change_of_its_files(folder: Path, change: str) -> None:
    images = folder / "images"
    before = hash_shard(images)
    match change:
        case "content":
            (images / "2.png").write_bytes(b"wooF")
        case "name":
            (images / "2.png").rename(images / "3.png")
        case "moved":
            (images / "2.png").rename(images / "cats" / "2.png")
        case "added":
            (images / "3.png").touch()
        case "removed":
            (images / "2.png").unlink()
        case "swapped":
            (images / "cats" / "1.png").write_bytes(b"woof")
            (images / "2.png").write_bytes(b"meow")
    assert hash_shard(images)[1] != before[1]


def test_hidden_and_system_files_are_no_data(folder: Path) -> None:
    before = hash_shard(folder / "images")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / "images" / name).write_text("x")
        (folder / name).write_text("x")
    assert hash_shard(folder / "images") == before
    assert [path.name for path in visible(folder)] == ["a.csv", "images", "shards.json"]
    copy_shard(folder / "images", folder / "copy")
    assert sorted(path.name for path in (folder / "copy").iterdir()) == ["2.png", "cats"]


def test_shards_are_in_the_order_that_a_person_counts(tmp_path: Path) -> None:
    for name in ("s10", "s2", "s1.csv", "s1", "a", "7", "10", "²"):
        (tmp_path / name).touch()
    assert [path.name for path in visible(tmp_path)] == ["7", "10", "a", "s1", "s1.csv", "s2", "s10", "²"]


def test_what_was_verified_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = hashed(monkeypatch)
    for _ in range(3):
        assert checked_path(folder, 0) == folder / "a.csv"
        assert checked_path(folder, 2) == folder / "images"
    assert read == [folder / "a.csv", folder / "images"]


def test_another_time_of_the_file_has_it_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = hashed(monkeypatch)
    checked_path(folder, 0)
    checked_path(folder, 2)
    old(folder / "a.csv", LONG_AGO + 1)  # as on another machine
    old(folder / "images" / "cats" / "1.png", LONG_AGO - 1)
    checked_path(folder, 0)
    checked_path(folder, 2)
    assert len(read) == 4


def test_what_changed_just_now_is_not_taken_for_settled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = hashed(monkeypatch)
    os.utime(folder / "a.csv")
    checked_path(folder, 0)
    checked_path(folder, 0)
    assert len(read) == 2


@pytest.mark.parametrize("cache", ["[]", "{", "null", '{"a.csv": "yes"}', '{"a.csv": []}'])
def test_a_broken_memory_of_what_was_verified_does_not_matter(folder: Path, cache: str) -> None:
    (folder / ".verified.json").write_text(cache)
    assert checked_path(folder, 0) == folder / "a.csv"
    (folder / ".verified.json").write_text(cache)
    (folder / "a.csv").write_text("x,y\n1,3\n")
    with pytest.raises(ShardMismatch):
        checked_path(folder, 0)


def test_a_folder_that_cannot_be_written_to_is_read_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = hashed(monkeypatch)
    (folder / ".verified.json").mkdir()  # root may write into a read-only folder: this stands for one
    for _ in range(2):
        assert checked_path(folder, 0) == folder / "a.csv"
    assert len(read) == 2
    assert sorted(path.name for path in folder.iterdir()) == [".verified.json", "a.csv", "images", "shards.json"]


@pytest.mark.parametrize("settled", [False, True])
def test_one_changed_byte_is_refused_with_what_to_do(folder: Path, settled: bool) -> None:
    checked_path(folder, 0)
    (folder / "a.csv").write_text("x,y\n1,3\n")
    if settled:
        old(folder / "a.csv")  # size and time of the last change as before, as rsync --times leaves them
    with pytest.raises(
        ShardMismatch, match=r"Shard 0 \(a.csv\) .* SHA-256 is another: fetch the folder node-3 again"
    ) as e:
        checked_path(folder, 0)
    assert str(e.value).endswith(f"fl-gradcode place --check {folder}.")


def test_an_interrupted_copy_is_refused_without_reading_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = hashed(monkeypatch)
    (folder / "a.csv").write_text("x,y\n")
    with pytest.raises(ShardMismatch, match="it has 4 bytes instead of 8"):
        checked_path(folder, 0)
    assert read == []


def test_a_shard_that_is_not_there_is_told_apart_from_one_that_was_never_meant_to_be(folder: Path) -> None:
    (folder / "a.csv").unlink()
    with pytest.raises(ShardMismatch, match=r"Shard 0 \(a.csv\) is missing in .*node-3: fetch the folder node-3 again"):
        checked_path(folder, 0)
    with pytest.raises(ShardMismatch, match=r"shard 5 is not listed; shards 0 and 2 of 12 are. Bring this node"):
        checked_path(folder, 5)


def test_a_folder_moved_elsewhere_is_still_right(folder: Path, tmp_path: Path) -> None:
    checked_path(folder, 0)
    folder.rename(tmp_path / "elsewhere")
    assert checked_path(tmp_path / "elsewhere", 0) == tmp_path / "elsewhere" / "a.csv"


def test_accents_in_another_form_are_the_same_name(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Spitäler") for form in ("NFC", "NFD"))
    (tmp_path / composed).mkdir()
    (tmp_path / composed / f"{composed}.csv").write_text("1")
    listed(tmp_path, composed)
    (tmp_path / composed / f"{composed}.csv").rename(tmp_path / composed / f"{decomposed}.csv")
    (tmp_path / composed).rename(tmp_path / decomposed)
    assert checked_path(tmp_path, 0).exists()


BAD_NAMES = [
    "../x",
    "a/b",
    "/etc/passwd",
    "..",
    ".",
    "",
    ".hidden",
    "c:x",
    "a\\b",
    "a\0b",
    "\udcff",
    "shards.json",
    "spent",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_manifest_names_nothing_outside_its_folder(folder: Path, name: str) -> None:
    with pytest.raises(InvalidSetting, match="cannot name a shard|cannot be called"):
        check_names(["fine", name])
    told = json.loads((folder / SHARDS_FILE).read_text())
    told["shards"][0]["name"] = name
    (folder / SHARDS_FILE).write_text(json.dumps(told))
    with pytest.raises(InvalidSetting, match=r"shards\.json: "):
        checked_path(folder, 0)


@pytest.mark.parametrize(
    "pair", [("A.csv", "a.csv"), ("ä", unicodedata.normalize("NFD", "ä")), ("ß", "ss"), ("x", "x")]
)
def test_names_that_some_file_systems_take_for_one_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(InvalidSetting, match="are the same on file systems"):
        check_names(pair)


def test_links_to_files_count_as_the_files_and_links_to_folders_are_refused(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    shard.mkdir()
    (tmp_path / "far").write_text("data")
    (shard / "near").symlink_to(tmp_path / "far")
    assert hash_shard(shard)[0] == 4
    copy_shard(shard, tmp_path / "copy")
    assert not (tmp_path / "copy" / "near").is_symlink() and hash_shard(tmp_path / "copy") == hash_shard(shard)
    (shard / "loop").symlink_to(tmp_path)
    with pytest.raises(InvalidSetting, match="loop is a symbolic link to a folder"):
        hash_shard(shard)
    (shard / "loop").unlink()
    (shard / "dead").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidSetting, match="leads nowhere"):
        hash_shard(shard)
    with pytest.raises(InvalidSetting, match="is a symbolic link that leads nowhere"):
        hash_shard(shard / "dead")


def test_a_manifest_of_a_newer_version_says_to_update(folder: Path) -> None:
    told = json.loads((folder / SHARDS_FILE).read_text())
    (folder / SHARDS_FILE).write_text(json.dumps({"format": "fl-gradcode shards 2", "shards": "of another form"}))
    with pytest.raises(InvalidSetting, match=r"has format 2, and this version .* up to 1: update fl-gradcode"):
        held_digests(folder)
    told["more"] = "than we know of"
    (folder / SHARDS_FILE).write_text(json.dumps(told))
    assert sorted(held_digests(folder)) == [0, 2]


BROKEN: dict[str, Any] = {
    "format": {"format": "fl-gradcode keys 1"},
    "no k": {"k": None},
    "k": {"k": -1},
    "flag": {"k": True},
    "shards": {"shards": {"0": "a.csv"}},
    "number": {"shards": [{"number": "0"}]},
    "held": {"held": [["a"]]},
    "worker": {"worker": "three"},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_what_is_no_manifest_is_refused_in_one_sentence(folder: Path, change: dict[str, Any]) -> None:
    told = json.loads((folder / SHARDS_FILE).read_text())
    (folder / SHARDS_FILE).write_text(json.dumps({**told, **change}))
    with pytest.raises(InvalidSetting, match=r"shards\.json is not a manifest of shards"):
        Manifest.read(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sha256", "0"), ("sha256", "z" * 64), ("sha256", "A" * 64), ("bytes", -1), ("examples", 1.5), ("name", 7)],
)
def test_a_shard_s_line_is_checked(folder: Path, key: str, value: object) -> None:
    told = json.loads((folder / SHARDS_FILE).read_text())
    told["shards"][0][key] = value
    (folder / SHARDS_FILE).write_text(json.dumps(told))
    with pytest.raises(InvalidSetting, match=r"shards\.json is not a manifest of shards"):
        Manifest.read(folder)


def test_a_manifest_that_is_cut_off_or_not_there_is_told(folder: Path) -> None:
    (folder / SHARDS_FILE).write_text((folder / SHARDS_FILE).read_text()[:50])
    with pytest.raises(InvalidSetting, match="is not JSON, perhaps cut off"):
        Manifest.read(folder)
    (folder / SHARDS_FILE).unlink()
    with pytest.raises(InvalidSetting, match=r"shards\.json cannot be read \(No such file"):
        Manifest.read(folder)


@pytest.mark.parametrize(("numbers", "k"), [((0, 0), 2), ((0, 2), 2)])
def test_shards_are_listed_once_and_exist(numbers: tuple[int, int], k: int) -> None:
    with pytest.raises(InvalidSetting, match=f"Shard {numbers[1]} is listed twice, or is not among"):
        Manifest(k, tuple(Shard(j, f"s{i}", None, 1, "0" * 64) for i, j in enumerate(numbers)))


def test_nobody_holds_a_shard_that_is_not_listed() -> None:
    with pytest.raises(InvalidSetting, match="Worker 1 holds shard 1, which is not listed"):
        Manifest(2, (Shard(0, "a", None, 1, "0" * 64),), held=((0,), (0, 1)))


def test_a_manifest_is_parsed_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Path] = []
    real = Manifest.parse

    def parse(file: Path) -> Manifest:
        parsed.append(file)
        return real(file)

    monkeypatch.setattr(Manifest, "parse", parse)
    told = json.loads((folder / SHARDS_FILE).read_text())
    for _ in range(3):
        checked_path(folder, 0)
        held_digests(folder)
    assert len(parsed) <= 1  # the fixture may have had it read
    assert Manifest.read(folder).k == told["k"]
    Manifest(told["k"] + 1, Manifest.read(folder).shards, told["worker"]).write(folder / SHARDS_FILE)
    assert Manifest.read(folder).k == told["k"] + 1
