"""Neither a kill nor changing data nor a repetition of `fl-gradcode place` harms what is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_gradcode.errors import InvalidSetting
from fl_gradcode.placement import node_folders
from fl_gradcode.placement.manifest import Manifest
from fl_gradcode.placement.node_shards import verify_folder
from fl_gradcode.placement.shard_files import copy_shard
from tests.placement.calling import placed, refused, tree


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("link", [False, True])
def test_only_its_owner_may_still_read_what_only_its_owner_could(
    link: bool, source: Path, table: Path, tmp_path: Path
) -> None:
    (source / "s1.csv").chmod(0o600)
    (source / "s10" / "cats").chmod(0o500)
    source.chmod(0o700)
    placed(source, tmp_path / "out", "-n", 2, *(["--link"] if link else []))
    node = tmp_path / "out" / "node-0"
    assert (mode(node), mode(node / "s1.csv"), mode(node / "s10" / "cats")) == (0o700, 0o600, 0o700)
    table.chmod(0o640)
    placed(table, tmp_path / "cut", "-n", 2)
    assert mode(tmp_path / "cut" / "node-0" / "shard-000.npz") == 0o640


def test_what_an_operator_put_there_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    placed(source, out, "-n", 3)
    shutil.copytree(out / "node-0", out / "node-0.bak")
    before = tree(out)
    (source / "s3.csv").rename(tmp_path / "s3.csv")
    placed(source, out, "-n", 3, "--force")
    (tmp_path / "s3.csv").rename(source / "s3.csv")
    for worker in range(3):
        (out / f"node-{worker}" / "s3.csv").mkdir()
        (out / f"node-{worker}" / "s3.csv" / "thesis").write_text("x")
    seen = tree(out)
    assert "s3.csv was not placed, and would be replaced" in refused(source, out, "-n", 3, "--force")
    assert tree(out) == seen
    assert {path: data for path, data in tree(out).items() if ".bak" in path} == {
        path: data for path, data in before.items() if ".bak" in path
    }


def test_a_node_s_folder_that_lies_elsewhere_is_refused_before_anything_is_changed(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    placed(source, out, "-n", 3)
    (out / "node-1").rename(tmp_path / "elsewhere")
    (out / "node-1").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    for n in (1, 3):  # whether it is to be filled anew, or only cleared
        assert "node-1 is a link, or on another disk" in refused(source, out, "-n", n, "-s", 0, "--force")
        assert tree(tmp_path) == before
    (out / "node-1").unlink()
    (out / "node-1").symlink_to(tmp_path / "nowhere")
    assert "node-1 is not a folder of its own" in refused(source, out, "-n", 3, "--force")


@pytest.mark.parametrize("text", ["", "[", '{"format": "fl-gradcode shards 99"}'])
@pytest.mark.parametrize("worker", [0, 2])
def test_what_was_placed_and_is_not_known_any_more_is_not_left_behind(
    worker: int, text: str, source: Path, tmp_path: Path
) -> None:
    """It would be brought to a node that must not have it."""
    out = tmp_path / "out"
    placed(source, out, "-n", 3)
    (out / f"node-{worker}" / "shards.json").write_text(text)
    before = tree(out)
    assert f"What was placed in {out / f'node-{worker}'} is not known" in refused(source, out, "-n", 2, "--force")
    assert tree(out) == before


def test_copies_of_a_node_s_folder_stay(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    placed(source, out, "-n", 3)
    for copy in ("node-20261127", "node-007"):
        shutil.copytree(out / "node-0", out / copy)
    placed(source, out, "-n", 2, "--force")
    assert {path.name for path in out.glob("node-*")} == {"node-0", "node-1", "node-20261127", "node-007"}
    assert tree(out / "node-007") == tree(out / "node-20261127") != {}


def test_what_place_did_not_write_is_not_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    placed(source, out, "-n", 3)
    (source / "s9.csv").write_text("x,y\n9,9\n")
    for worker in range(3):
        (out / f"node-{worker}" / "s9.csv").symlink_to(tmp_path / "nowhere")
    assert "s9.csv was not placed, and would be replaced" in refused(source, out, "-n", 3, "--force")
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "my web app"}')
    assert "manifest.json was not placed, and would be replaced" in refused(source, other, "-n", 3, "--force")
    (other / "manifest.json").unlink()
    (other / "assignment.json").mkdir()
    assert "assignment.json is a folder, and would be replaced" in refused(source, other, "-n", 3, "--force")


def test_a_folder_that_stays_is_open_to_no_more_users_than_before(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    placed(source, out, "-n", 3)
    for worker in range(3):
        (out / f"node-{worker}" / "keys.json").write_text("secret")
    (out / "node-1").chmod(0o700)
    source.chmod(0o750)
    placed(source, out, "-n", 3, "--force")
    assert [mode(out / f"node-{worker}") for worker in range(3)] == [0o750, 0o700, 0o750]


def test_nothing_is_written_once_an_earlier_placement_is_taken_away(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full by then would leave neither."""
    out = tmp_path / "out"
    placed(source, out, "-n", 3)
    real = node_folders._clear

    def clear(*arguments: Any) -> None:
        monkeypatch.setattr(node_folders, "replace_file", None)
        monkeypatch.setattr("fl_gradcode.placement.manifest.replace_file", None)
        real(*arguments)

    monkeypatch.setattr(node_folders, "_clear", clear)
    placed(source, out, "-n", 2, "--force")
    assert Manifest.read(out).held is not None and len(Manifest.read(out).held or ()) == 2


def test_a_placement_that_was_made_meanwhile_is_seen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = node_folders._alone

    def alone(folder: Path) -> Any:
        monkeypatch.setattr(node_folders, "_alone", real)
        placed(source, out, "-n", 3, "--force")
        return real(folder)

    monkeypatch.setattr(node_folders, "_alone", alone)
    assert "holds an earlier placement" in refused(source, out, "-n", 2)
    assert len(Manifest.read(out).held or ()) == 3


def test_two_at_once_do_not_mix(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    placed(source, out, "-n", 3)
    before = tree(out)
    with node_folders.unfinished(out, source, force=True):
        assert "Another fl-gradcode place is writing to" in refused(source, out, "-n", 3, "--force")
    assert tree(out) == before
    placed(source, out, "-n", 2, "--force")


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


DYING = """
import json, os, sys
from fl_gradcode.cli.app import app
from fl_gradcode.placement import node_folders
for request in sys.stdin:
    function, after, line = json.loads(request)
    child = os.fork()
    if child == 0:
        place = os if function == "replace" else node_folders
        real, left = getattr(place, function), [after]
        def dying(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*args, **kwargs)
        setattr(place, function, dying)
        try:
            app(line)
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed() -> Iterator[Callable[..., int]]:
    """Runs a command line in a process of its own, which ends in the call of `function` behind the first `after`.

    The processes are forked from one that has imported the command.
    """
    with subprocess.Popen(
        [sys.executable, "-c", DYING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdin is not None and one.stdout is not None
        requests, answers = one.stdin, one.stdout

        def run(function: str, after: int, *line: object) -> int:
            print(json.dumps([function, after, [*map(str, line)]]), file=requests, flush=True)
            return int(answers.readline())

        yield run
        requests.close()


@pytest.mark.parametrize(
    ("function", "after"),
    [("copy_shard", 3), ("_clear", 0), ("_clear", 1), ("_bring", 0), ("_bring", 2), ("replace_file", 0)],
)
def test_a_placement_that_is_killed_leaves_nothing_that_seems_whole(
    function: str, after: int, killed: Callable[..., int], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = placed(source, out, "-n", 3)
    (source / "s1.csv").write_text("x,y\n8,8\n")
    assert killed(function, after, "place", source, out, "-n", 3, "--force") == 9
    if function in ("copy_shard", "replace_file"):  # nothing was taken away yet
        assert Manifest.read(out) == Manifest.read(first["manifest"])
    else:
        with pytest.raises(InvalidSetting):
            Manifest.read(out)
    for node in out.glob("node-*"):  # whatever lies there is listed
        assert {one.kind for one in verify_folder(node)} <= {"right", "missing"}
    assert "holds" in refused(source, out, "-n", 3)
    placed(source, out, "-n", 3, "--force")
    assert {one.kind for one in verify_folder(out / "node-2", out)} == {"right"}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_wherever_it_is_killed_nothing_is_left_that_the_next_run_does_not_take_away(
    killed: Callable[..., int], source: Path, tmp_path: Path
) -> None:
    """Data would stay with a node that must not have them."""
    out = tmp_path / "out"
    placed(source, out, "-n", 3)
    for worker in range(3):
        (out / f"node-{worker}" / "keys.json").write_text("secret")  # so that folders stay, and are filled anew
    (source / "s2.csv").unlink()
    (source / "s7.csv").write_text("x,y\n7,7\n")
    for after in (4, 6, 9, 12, 16, 19, 22):  # while manifests are written, cleared away, brought
        assert killed("replace", after, "place", source, out, "-n", 3, "--force") == 9
        for node in out.glob("node-*"):
            if (node / "shards.json").exists():
                assert {one.kind for one in verify_folder(node)} <= {"right", "missing"}
            else:
                assert [path.name for path in node.iterdir()] == ["keys.json"]
    for name in ("s4.csv", "s5.csv", "s7.csv"):
        (source / name).unlink()
    placed(source, out, "-n", 3, "--force")
    for node in out.glob("node-*"):
        assert {one.kind for one in verify_folder(node, out)} == {"right"}
        assert (node / "keys.json").read_text() == "secret"


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
