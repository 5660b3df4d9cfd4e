"""`fl-gradcode place`, as a user calls it: each node's folder, and whether one is what its manifest says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fl_gradcode import cyclic_repetition, fractional_repetition, node_folders
from fl_gradcode.cli import app
from fl_gradcode.codes import GradientCode, for_assignment
from fl_gradcode.cutting import count_examples
from fl_gradcode.errors import InvalidSetting, ShardMismatch
from fl_gradcode.key_files import read_keys
from fl_gradcode.shard_files import copy_shard, hash_shard
from fl_gradcode.shards import Manifest, shard_path, verify_folder
from fl_gradcode.watched import WatchedConfig


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def placed(*arguments: object) -> dict[str, Any]:
    code, out, error = call("place", *arguments, "--json")
    assert code == 0, error
    told: dict[str, Any] = json.loads(out)
    return told


def refused(*arguments: object) -> str:
    code, out, error = call("place", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("fl-gradcode: ") and error.count("\n") == 1
    return error


def code_of(line: str) -> GradientCode:
    """The code of the line to paste for the server."""

    class FedAvg:
        pass

    def strategy(inner: object, code: GradientCode, manifest: str) -> GradientCode:
        assert Manifest.read(manifest).k == code.k
        return code

    names = {
        "GradientCoding": strategy,
        "FedAvg": FedAvg,
        "np": np,
        "Manifest": Manifest,
        "for_assignment": for_assignment,
    }
    names |= {"fractional_repetition": fractional_repetition, "cyclic_repetition": cyclic_repetition}
    made = eval(line, names)
    assert isinstance(made, GradientCode)
    return made


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six shards: five .csv and a folder of images."""
    folder = tmp_path / "source"
    (folder / "s10" / "cats").mkdir(parents=True)
    for i in range(1, 6):
        (folder / f"s{i}.csv").write_text("x,y\n" + "1,2\n" * i)
    (folder / "s10" / "cats" / "1.png").write_bytes(b"meow")
    (folder / ".DS_Store").write_text("x")
    (folder / "s10" / ".DS_Store").write_text("x")
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    rng = np.random.default_rng(0)
    np.savez(path, x=np.arange(120).reshape(60, 2), y=rng.integers(0, 4, 60))
    return path


def test_each_node_receives_the_shards_of_its_row(source: Path, tmp_path: Path) -> None:
    told = placed(source, tmp_path / "out", "--workers", 6, "--s", 2)
    code = code_of(told["server"])
    assert (code.n, code.k, code.s) == (6, 6, 2)
    names = ["s1.csv", "s2.csv", "s3.csv", "s4.csv", "s5.csv", "s10"]
    whole = Manifest.read(tmp_path / "out")
    assert [shard.name for shard in whole.shards] == names
    assert [shard.examples for shard in whole.shards] == [1, 2, 3, 4, 5, 1]
    assert whole.held == tuple(code.shards_of(worker) for worker in range(6))
    for worker in range(6):
        node = tmp_path / "out" / f"node-{worker}"
        assert {path.name for path in node.iterdir()} == {"shards.json", *(names[j] for j in code.shards_of(worker))}
        assert {one.kind for one in verify_folder(node, tmp_path / "out" / "manifest.json")} == {"right"}
        for shard in code.shards_of(worker):
            config = {"shards-dir": str(node), "partition-id": shard}
            assert hash_shard(shard_path(config)) == hash_shard(source / names[shard])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json", "assignment.json", *(f"node-{i}" for i in range(6))
    }  # fmt: skip
    assert told["bytes-that-travel"] == 3 * told["bytes"] == sum(row["bytes"] for row in told["workers"])


def test_the_table_says_what_a_person_needs(source: Path, tmp_path: Path) -> None:
    code, out, _ = call("place", source, tmp_path / "out", "-n", 6, "-s", 2)
    assert code == 0
    assert "3 times the data" in out and "agree" in out
    assert f"fractional_repetition(6, 2), manifest='{tmp_path / 'out' / 'manifest.json'}')" in out
    assert "num-partitions=6 shards-dir=" in out


def test_keys_follow_the_assignment(source: Path, tmp_path: Path) -> None:
    told = placed(source, tmp_path / "out", "-n", 6)
    assert call("keys", "make", tmp_path / "keys", "--assignment", told["assignment"])[0] == 0
    for row in told["workers"]:
        assert sorted(read_keys(tmp_path / "keys" / f"node-{row['worker']}").secrets) == row["shards"]


CODES = {
    "fractional, other k": ("-n 4 -s 1", 4, 1, 1),
    "fractional, m": ("-n 6 -s 1 -m 2", 6, 1, 2),
    "cyclic": ("-n 6 -s 2 --code cyclic", 6, 2, 1),
    "capacities": ("--capacities 6,6,3,3 -s 1", 4, 1, 1),
    "capacities, m": ("--capacities 6,6,3,3 -s 1 -m 2", 4, 1, 2),
    "domains": ("-n 4 --domains a,a,b,b -s 1", 4, 1, 1),
    "assignment": ("-n 4 --code assignment -s 1", 4, 1, 1),
}


@pytest.mark.parametrize(("options", "n", "s", "m"), CODES.values(), ids=CODES)
def test_the_line_for_the_server_makes_the_code_that_was_placed_for(
    options: str, n: int, s: int, m: int, source: Path, tmp_path: Path
) -> None:
    told = placed(source, tmp_path / "out", *options.split())
    code = code_of(told["server"])
    assert (code.n, code.k, code.s, code.m) == (n, 6, s, m)
    assert [row["shards"] for row in told["workers"]] == [list(code.shards_of(worker)) for worker in range(n)]
    if "domains" in options:
        for shard in range(6):
            assert {worker // 2 for worker in code.holders_of(shard)} == {0, 1}


def test_an_assignment_of_one_s_own(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[[0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4, 5]]")
    told = placed(source, tmp_path / "out", "--assignment", tmp_path / "a.json")
    assert [row["shards"] for row in told["workers"]] == json.loads((tmp_path / "a.json").read_text())
    assert code_of(told["server"]).s == 1
    error = refused(source, tmp_path / "other", "--assignment", tmp_path / "a.json", "-s", 2)
    assert "Shard 0 has 2 holders" in error and "s=2 at m=1 needs 3" in error
    for text in ("{}", "[", "[]", '[["a"]]', "[[0.5]]", "[[-1]]", "[[true]]"):
        (tmp_path / "a.json").write_text(text)
        assert "must hold, as JSON," in refused(source, tmp_path / "other", "--assignment", tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[[0, 1, 2, 3, 4, 5, 6]]")
    assert "Shard 6 in the assignment does not exist" in refused(
        source, tmp_path / "other", "--assignment", tmp_path / "a.json", "-s", 0
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("split", ["iid", "contiguous", "label:y", "dirichlet:y:0.5", "by:y"])
@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_a_file_is_cut_such_that_every_example_is_in_one_shard(
    split: str, kind: str, table: Path, tmp_path: Path
) -> None:
    with np.load(table) as file:
        x, y = file["x"], file["y"]
    source = table
    if kind == "csv":
        source = tmp_path / "data.csv"
        rows = [f'{a},"{b}, he said",{label}' for (a, b), label in zip(x, y, strict=True)]
        source.write_text("\ufeff" + "\n".join(["a,b,y", *rows]) + "\n", encoding="utf-8")
    arguments = (source, "-n", 4, "--split", split, "--seed", 3)
    told = placed(arguments[0], tmp_path / "out", *arguments[1:])
    assert told["k"] == 4
    seen: Counter[int] = Counter()
    labels = []
    for shard in Manifest.read(tmp_path / "out").shards:
        path = next(path for path in (tmp_path / "out").glob(f"node-*/{shard.name}"))
        if kind == "npz":
            with np.load(path) as file:
                ids, these = file["x"][:, 0].tolist(), file["y"].tolist()
                assert [y[i // 2] for i in ids] == these
        else:
            lines = path.read_text().splitlines()
            assert lines[0] == "a,b,y" and all(" he said" in line for line in lines[1:])
            ids, these = [int(line.split(",")[0]) for line in lines[1:]], [int(line[-1]) for line in lines[1:]]
        assert shard.examples == len(ids) > 0
        seen.update(ids)
        labels.append({*these})
    assert seen == Counter(x[:, 0].tolist())
    if split == "by:y":
        assert labels == [{0}, {1}, {2}, {3}]
    if split == "label:y":
        assert sum(map(len, labels)) <= 7  # sorted: each cut adds one at most
    again = placed(arguments[0], tmp_path / "again", *arguments[1:])
    assert Manifest.read(again["manifest"]).digests == Manifest.read(told["manifest"]).digests
    other = placed(arguments[0], tmp_path / "other", *arguments[1:-1], 4)
    same = Manifest.read(other["manifest"]).digests == Manifest.read(told["manifest"]).digests
    assert same == (split not in ("iid", "dirichlet:y:0.5"))


WRONG = {
    "no workers": ("{source} {out}", "The number of workers is missing"),
    "workers differ": ("{source} {out} -n 3 --capacities 6,6", "differ in the number of workers: --workers 3"),
    "zero": ("{source} {out} -n 0", "--workers 0 must be at least 1"),
    "tolerance": ("{source} {out} -n 3 -s 3", "s=3"),
    "code": ("{source} {out} -n 3 --code best", "--code 'best' must be one of"),
    "fixed code": ("{source} {out} --capacities 6,6,6 --code cyclic", "leave out --capacities"),
    "cyclic": ("{source} {out} -n 3 --code cyclic", "as many shards as workers"),
    "capacity": ("{source} {out} --capacities 1,1,1", "holder"),
    "numbers": ("{source} {out} --capacities a,b", "must be whole numbers"),
    "no source": ("{out} {out} -n 3", "There is no"),
    "nothing": ("", "Say what to place, and where"),
    "against alone": ("{source} {out} -n 3 --against x", "Say what to place, and where"),
    "both": ("{source} --check {source}", "--check verifies one folder"),
    "cut a folder": ("{source} {out} -n 3 --shards 3", "cut a file"),
    "inside": ("{source} {source}/out -n 3", "lie in one another"),
    "itself": ("{source} {source} -n 3 --force", "lie in one another"),
    "above": ("{source} {source}/.. -n 3 --force", "lie in one another"),
    "a file": ("{source} {table} -n 3", "is a file; give a folder"),
    "other file": ("{source}/s10/cats/1.png {out} -n 3", "cannot be cut: give a .npz"),
    "split": ("{table} {out} -n 3 --split fair", "--split 'fair' must be one of"),
    "split column": ("{table} {out} -n 3 --split label", "must be one of"),
    "split iid": ("{table} {out} -n 3 --split iid:y", "must be one of"),
    "column": ("{table} {out} -n 3 --split by:z", "has no array 'z'; it has x, y"),
    "matrix": ("{table} {out} -n 3 --split by:x", "must be one column"),
    "alpha": ("{table} {out} -n 3 --split dirichlet:y:no", "needs a number above 0"),
    "no alpha": ("{table} {out} -n 3 --split dirichlet:y", "must be one of"),
    "by": ("{table} {out} -n 3 --split by:y --shards 3", "has 4 values"),
    "too many": ("{table} {out} -n 3 --shards 61", "has 60 examples: it cannot be cut into 61"),
    "seed": ("{table} {out} -n 3 --seed -1", "The seed is -1"),
    "a node": ("--check {source}", "shards.json cannot be read"),
}


@pytest.mark.parametrize(("line", "told"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_told_in_one_sentence_and_leaves_nothing(
    line: str, told: str, source: Path, table: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    assert told in refused(*line.format(source=source, table=table, out=tmp_path / "out").split())
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


def test_what_cannot_be_a_shard_is_refused(source: Path, tmp_path: Path) -> None:
    def because(*options: object) -> str:
        error = refused(source, tmp_path / "out", "-n", 3, *options)
        assert not (tmp_path / "out").exists()
        return error

    (source / "S1.CSV").write_text("x\n1\n")
    assert "are the same on file systems" in because()
    (source / "S1.CSV").write_bytes(b"")
    (source / "S1.CSV").rename(source / "s6.csv")
    assert "Shard 5 (s6.csv) is empty" in because()
    (source / "s6.csv").write_text("x,y\n")  # a header alone
    assert "Shard 5 (s6.csv) is empty" in because()
    (source / "s6.csv").unlink()
    (source / "s6").mkdir()
    assert "Shard 5 (s6) is empty" in because("--link")
    (source / "s6" / ".DS_Store").write_text("x")
    assert "Shard 5 (s6) is empty" in because()
    shutil.rmtree(source / "s6")
    (source / "s6").symlink_to(tmp_path / "nowhere")
    assert "s6 is a symbolic link that leads nowhere" in because()
    (source / "s6").unlink()
    os.mkfifo(source / "pipe")
    assert "pipe is neither a file nor a folder" in because()
    (source / "pipe").unlink()
    (source / "shards.json").write_text("{}")
    assert "it was placed already" in because()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / ".hidden").touch()
    assert "holds no shards" in refused(tmp_path / "bare", tmp_path / "out", "-n", 3)


def test_files_that_cannot_be_cut_are_told(tmp_path: Path) -> None:
    def because(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return refused(tmp_path / name, tmp_path / "out", "-n", 2)

    assert "cannot be read as a .npz" in because("a.npz", b"no zip")
    assert "is empty: it needs a header" in because("a.csv", b"")
    assert "is not in UTF-8" in because("a.csv", "x,y\nä,1\n".encode("latin-1"))
    assert "has 0 examples" in because("a.csv", b"x,y\n")
    np.savez(tmp_path / "b.npz", x=np.zeros(3), y=np.zeros(4))
    assert "must have one first dimension" in refused(tmp_path / "b.npz", tmp_path / "out", "-n", 2)
    np.savez(tmp_path / "b.npz", x=np.array([{}]))
    assert "cannot be read as a .npz" in refused(tmp_path / "b.npz", tmp_path / "out", "-n", 2)


def test_names_of_all_languages_and_links_are_placed(source: Path, tmp_path: Path) -> None:
    (source / "größe 1 [x].csv").write_text("x\n1\n")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "1").write_text("data")
    (source / "データ").symlink_to(tmp_path / "far")
    placed(source, tmp_path / "out", "-n", 2)
    node = tmp_path / "out" / "node-0"
    assert (node / "データ" / "1").read_text() == "data" and not (node / "データ").is_symlink()
    assert {one.kind for one in verify_folder(node)} == {"right"}
    (node / "größe 1 [x].csv").write_text("x\n2\n")
    assert "größe 1 [x].csv" in call("place", "--check", node)[1]


def test_a_thousand_shards(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("x\n" + "".join(f"{i}\n" for i in range(3000)))
    told = placed(tmp_path / "data.csv", tmp_path / "out", "-n", 2, "-s", 0, "--shards", 1000, "--split", "contiguous")
    assert told["k"] == 1000
    node = tmp_path / "out" / "node-1"
    assert shard_path({"shards-dir": str(node), "partition-id": 999}).read_text() == "x\n2997\n2998\n2999\n"
    assert {one.kind for one in verify_folder(node)} == {"right"}


def test_links_take_no_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "make room, or --link" in refused(source, tmp_path / "out", "-n", 6)
    assert not (tmp_path / "out").exists()
    told = placed(source, tmp_path / "out", "-n", 6, "--link")
    for path in Path(told["workers"][0]["folder"]).glob("*.csv"):
        assert path.samefile(source / path.name)
    assert {one.kind for one in verify_folder(tmp_path / "out" / "node-0")} == {"right"}


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


# --check


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
    assert f"3 of 6 shards in {node} are right." in out and "Fetch the folder node-1 anew" in out
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


# What an app's train() calls


def test_the_shard_of_a_node_is_chosen_by_partition_id(source: Path, tmp_path: Path) -> None:
    placed(source, tmp_path / "out", "-n", 2)
    config = WatchedConfig({"shards-dir": str(tmp_path / "out" / "node-0"), "partition-id": 5})
    assert shard_path(config).name == "s10"
    assert config.was_read


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shards-dir": None}, "does not say where its shards lie: start its SuperNode with --node-config"),
        ({"shards-dir": "out/node-0"}, "shards-dir='out/node-0' is a relative path"),
        ({"partition-id": None}, "partition-id in the node config is None"),
        ({"partition-id": True}, "partition-id in the node config is True"),
        ({"shards-dir": "/nowhere"}, "/nowhere cannot be read"),
    ],
)
def test_a_node_config_that_cannot_be_used_is_told(
    change: dict[str, Any], told: str, source: Path, tmp_path: Path
) -> None:
    placed(source, tmp_path / "out", "-n", 2)
    config = {"shards-dir": str(tmp_path / "out" / "node-0"), "partition-id": 0, **change}
    with pytest.raises(InvalidSetting, match=told):
        shard_path({key: value for key, value in config.items() if value is not None})


def test_a_shard_that_the_node_does_not_hold_is_told(source: Path, tmp_path: Path) -> None:
    placed(source, tmp_path / "out", "-n", 3, "--code", "assignment")
    node = tmp_path / "out" / "node-0"
    absent = next(j for j in range(6) if j not in Manifest.read(node).digests)
    with pytest.raises(ShardMismatch, match=f"shard {absent} is not listed"):
        shard_path({"shards-dir": str(node), "partition-id": absent})


def test_examples_are_counted_where_the_form_is_known(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((7, 2)), y=np.zeros(7), classes=np.array(10))
    np.savez(tmp_path / "b.npz", x=np.zeros(7), y=np.zeros(6))
    np.savez(tmp_path / "c.npz", x=np.array([{}, {}]))
    np.save(tmp_path / "d.npy", np.zeros((5, 1)))
    (tmp_path / "e.csv").write_text('x,y\n1,"a\nb"\n\n2,c\n')
    (tmp_path / "f.csv").write_text("1,2\n3,4\n")
    (tmp_path / "g.jsonl").write_text("{}\n\n{}\n")
    (tmp_path / "h.parquet").write_text("?")
    (tmp_path / "i.npz").write_text("no zip")
    (tmp_path / "j.csv").write_bytes(b"x\n\xff\n")
    counts = {path.name[0]: count_examples(path) for path in sorted(tmp_path.iterdir())}
    assert counts == {"a": 7, "b": None, "c": 2, "d": 5, "e": 2, "f": 2, "g": 2, "h": None, "i": None, "j": None}


def test_into_a_folder_with_keys_the_manifest_comes_last(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "out" / "node-0"
    placed(source, tmp_path / "out", "-n", 2)
    (node / "keys.json").write_text("secret")
    moved, real = [], os.replace

    def full(path: Any, target: Any) -> None:
        if Path(target).parent == node:
            moved.append(Path(target).name)
            if len(moved) == 4:
                raise OSError(28, "No space left on device")
        real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "No space left" in refused(source, tmp_path / "out", "-n", 2, "--force")
    assert len(moved) == 4 and not (node / "shards.json").exists()
    placed(source, tmp_path / "out", "-n", 2, "--force")
    assert {one.kind for one in verify_folder(node)} == {"right"} and (node / "keys.json").read_text() == "secret"
