"""Neither a kill nor changing data nor a repetition of `fl-gradcode place` harms what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fl_gradcode import node_folders
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.shard_files import copy_shard
from fl_gradcode.shards import Manifest, verify_folder
from tests.place.calling import placed, refused


def test_only_its_owner_may_still_read_what_only_its_owner_could(source: Path, tmp_path: Path) -> None:
    (source / "s1.csv").chmod(0o600)
    placed(source, tmp_path / "out", "-n", 2)
    assert (tmp_path / "out" / "node-0" / "s1.csv").stat().st_mode & 0o777 == 0o600


def test_other_data_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "thesis").mkdir(parents=True)
    assert "holds other data, such as thesis" in refused(source, out, "-n", 3)
    placed(source, out, "-n", 6, "--force")
    (out / "node-0" / "keys.json").write_text("secret")
    (out / "node-0" / "spent").mkdir()
    assert "holds an earlier placement" in refused(source, out, "-n", 3)
    (source / "s2.csv").unlink()
    placed(source, out, "-n", 3, "--force")
    assert {path.name for path in out.iterdir()} == {
        "thesis", "manifest.json", "assignment.json", "node-0", "node-1", "node-2"
    }  # fmt: skip
    assert (out / "node-0" / "keys.json").read_text() == "secret" and (out / "node-0" / "spent").is_dir()
    assert not (out / "node-0" / "s2.csv").exists()
    for worker in range(3):
        assert {one.kind for one in verify_folder(out / f"node-{worker}", out)} == {"right"}


KILLED = """
import os, sys
from fl_gradcode import cli, node_folders, manifest
real, left = node_folders.{function}, [{after}]
def dying(*args, **kwargs):
    if left[0] == 0:
        os._exit(9)
    left[0] -= 1
    return real(*args, **kwargs)
node_folders.{function} = dying
cli.app(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("function", "after"),
    [("copy_shard", 3), ("_clear", 0), ("_clear", 1), ("_bring", 0), ("_bring", 2), ("write_atomically", 0)],
)
def test_a_placement_that_is_killed_leaves_nothing_that_seems_whole(
    function: str, after: int, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = placed(source, out, "-n", 3)
    (source / "s1.csv").write_text("x,y\n8,8\n")
    program = KILLED.format(function=function, after=after)
    line = [sys.executable, "-c", program, "place", str(source), str(out), "-n", "3", "--force"]
    assert subprocess.run(line, check=False).returncode == 9
    if function == "copy_shard":
        assert Manifest.read(out) == Manifest.read(first["manifest"])
    else:
        with pytest.raises(InvalidSetting):
            Manifest.read(out)
    for worker in range(3):
        node = out / f"node-{worker}"
        if (node / "shards.json").exists():  # whatever has a manifest is whole
            assert {one.kind for one in verify_folder(node)} == {"right"}
    assert "holds" in refused(source, out, "-n", 3)
    placed(source, out, "-n", 3, "--force")
    assert {one.kind for one in verify_folder(out / "node-2", out)} == {"right"}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_shard_that_changes_while_it_is_copied_is_not_placed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = copy_shard

    def copy(path: Path, target: Path) -> tuple[int, str]:
        found = real(path, target)
        (source / "s1.csv").write_text("x,y\n7,7\n")
        return found

    monkeypatch.setattr(node_folders, "copy_shard", copy)
    assert "s1.csv changed while it was copied" in refused(source, tmp_path / "out", "-n", 3, "-s", 2)
    assert not (tmp_path / "out").exists()
