"""`fl-gradcode place`, as a user calls it: the folder of each node."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_gradcode.placement import splitting as cutting
from fl_gradcode.placement.manifest import Manifest
from fl_gradcode.placement.node_shards import shard_path, verify_folder
from fl_gradcode.placement.shard_files import hash_shard
from fl_gradcode.privacy import read_keys
from tests.placement.calling import call, code_of, placed, refused


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


def test_cells_with_any_line_ends_stay_one_cell(tmp_path: Path) -> None:
    cells = ["a\rb", "a\nb", "a\r\nb", 'say "x", y', "\r", ""]
    table = tmp_path / "data.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["x", "y"], *([cell, "1"] for cell in cells)])
    placed(table, tmp_path / "out", "-n", 1, "-s", 0, "--shards", 2)
    found = []
    for path in sorted((tmp_path / "out" / "node-0").glob("*.csv")):
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["x", "y"] and all(row[1] == "1" for row in rows)
        found += [row[0] for row in rows]
    assert sorted(found) == sorted(cells)


@pytest.mark.parametrize("lines", [3, 50])
def test_a_table_that_changes_while_it_is_cut_is_not_placed(
    lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "data.csv"
    table.write_text("x\n" + "1\n" * 20)
    real = cutting._split

    def split(*arguments: Any) -> Any:
        parts = real(*arguments)
        table.write_text("x\n" + "1\n" * lines)
        return parts

    monkeypatch.setattr(cutting, "_split", split)
    assert "data.csv changed while it was cut" in refused(table, tmp_path / "out", "-n", 2)
    assert not (tmp_path / "out").exists()


def test_an_array_may_have_any_name(tmp_path: Path) -> None:
    arrays = {"file": np.arange(10), "args": np.arange(20.0).reshape(10, 2)}
    np.savez(tmp_path / "plain.npz", x=np.arange(10))
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as packed:
        for name, array in arrays.items():
            with packed.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    placed(tmp_path / "data.npz", tmp_path / "out", "-n", 2, "--split", "contiguous")
    with np.load(tmp_path / "out" / "node-0" / "shard-000.npz") as shard:
        assert {name: shard[name].tolist() for name in shard.files} == {n: a[:5].tolist() for n, a in arrays.items()}
    # To the byte what NumPy writes.
    placed(tmp_path / "plain.npz", tmp_path / "same", "-n", 1, "-s", 0, "--shards", 1)
    np.savez(tmp_path / "wanted.npz", x=np.arange(10))
    written = tmp_path / "same" / "node-0" / "shard-000.npz"
    assert written.read_bytes() == (tmp_path / "wanted.npz").read_bytes()


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
