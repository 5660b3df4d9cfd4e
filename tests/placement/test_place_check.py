"""`fl-gradcode place --check`: whether a folder is what its manifest says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fl_gradcode.placement.manifest import Manifest, checked_path
from fl_gradcode.placement.node_shards import shard_path
from tests.placement.calling import call, placed, refused


def test_check_tells_what_is_right_wrong_missing_and_extra(source: Path, tmp_path: Path) -> None:
    placed(source, tmp_path / "out", "-n", 2)
    node = tmp_path / "out" / "node-1"
    (node / "keys.json").touch()
    (node / ".DS_Store").touch()
    assert call("place", "--check", node)[:2] == (0, f"6 of 6 shards in {node} are right.\n")
    (node / "more.csv").touch()
    code, out, _ = call("place", "--check", node)
    assert code == 0 and "extra    more.csv" in out and "keys.json" not in out
    (node / "s1.csv").write_text("x,y\n1,9\n")
    (node / "s2.csv").write_text("x,y\n")
    (node / "s3.csv").unlink()
    code, out, _ = call("place", "--check", node)
    assert code == 1
    assert "wrong    shard 0 (s1.csv): its SHA-256 is" in out
    assert "wrong    shard 1 (s2.csv): it has 4 bytes instead of 12" in out
    assert "missing  shard 2 (s3.csv)" in out
    assert f"3 of 6 shards in {node} are right." in out and "Fetch the folder node-1 again" in out
    code, out, _ = call("place", "--check", node, "--json")
    told = json.loads(out)
    assert code == 1 and told["right"] is False
    assert [one["kind"] for one in told["findings"]] == ["wrong", "wrong", "missing", *["right"] * 3, "extra"]


def test_check_reads_every_byte_whatever_was_verified_before(source: Path, tmp_path: Path) -> None:
    placed(source, tmp_path / "out", "-n", 2)
    node = tmp_path / "out" / "node-0"
    os.utime(node / "s1.csv", (10**9, 10**9))
    path = shard_path({"shards-dir": str(node), "partition-id": 0})
    remembered = (node / ".verified.json").read_text()
    path.write_text("x,y\n1,9\n")
    os.utime(path, (10**9, 10**9))
    (node / ".verified.json").write_text(remembered)
    assert call("place", "--check", node)[0] == 1


def test_check_compares_with_the_manifest_of_all(source: Path, tmp_path: Path) -> None:
    placed(source, tmp_path / "old", "-n", 3, "--code", "assignment")
    (source / "s1.csv").write_text("x,y\n5,5\n")
    placed(source, tmp_path / "new", "-n", 6, "-s", 2)
    node, against = tmp_path / "old" / "node-0", tmp_path / "new" / "manifest.json"
    assert call("place", "--check", node)[0] == 0
    mine, theirs = Manifest.read(node), Manifest.read(against)
    assert theirs.held is not None
    code, out, _ = call("place", "--check", node, "--against", against, "--json")
    findings = {one["number"]: one for one in json.loads(out)["findings"]}
    assert code == 1
    for number in range(6):
        mine_holds, theirs_hold = number in mine.digests, number in theirs.held[0]
        if mine_holds and not theirs_hold:
            assert "does not assign it to worker 0" in findings[number]["told"]
        elif mine_holds and mine.digests[number] != theirs.digests[number]:
            assert "of other data" in findings[number]["told"]
        elif mine_holds:
            assert findings[number]["kind"] == "right"
        elif theirs_hold:
            assert findings[number]["kind"] == "missing"
    assert {one["kind"] for one in findings.values()} == {"right", "wrong", "missing"}
    assert "holds the folders of all nodes" in refused("--check", tmp_path / "new")
    assert "of all shards" in refused("--check", node, "--against", node)


def test_a_folder_whose_name_looks_like_markup_is_checked(source: Path, tmp_path: Path) -> None:
    placed(source, tmp_path / "out", "-n", 3)
    node = tmp_path / "x[" / "y]"
    node.parent.mkdir()
    (tmp_path / "out" / "node-0").rename(node)
    assert f"in {node} are right." in call("place", "--check", node)[1]
    told = json.loads((node / "shards.json").read_text())
    (node / "shards.json").write_text(json.dumps({**told, "worker": None, "k": 10**9}))
    (node / told["shards"][0]["name"]).unlink()
    code, out, _ = call("place", "--check", node)
    assert code == 1 and "Fetch its folder again" in out


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"s1.csv": 3}'])
def test_a_broken_memory_of_what_was_verified_is_no_matter(text: str, source: Path, tmp_path: Path) -> None:
    placed(source, tmp_path / "out", "-n", 3)
    node = tmp_path / "out" / "node-0"
    (node / ".verified.json").write_text(text)
    assert checked_path(node, Manifest.read(node).shards[0].number).exists()
