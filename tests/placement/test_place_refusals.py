"""What `fl-gradcode place` refuses, in one sentence that leaves nothing behind."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.placement.calling import refused, tree

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
    "nothing": ("", "Give the source and the output folder"),
    "against alone": ("{source} {out} -n 3 --against x", "Give the source and the output folder"),
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
    "s": ("{source} {out} --assignment {lists} -s -1", "--s -1 must be at least 0"),
    "m": ("{source} {out} --assignment {lists} -m 0", "--m 0 at least 1"),
    "one array": ("{one_array} {out} -n 2", "cannot be read as a .npz: it is one array without a name"),
    "damaged": ("{damaged} {out} -n 2", "cannot be read as a .npz"),
    "encrypted": ("{encrypted} {out} -n 2", "cannot be read as a .npz"),
    "huge": ("{huge} {out} -n 2", "cannot be read as a .npz"),
    "infinite": ("{source} {out} --assignment {infinite}", "must hold, as JSON, for each worker"),
    "nested": ("{source} {out} --assignment {nested}", "must hold, as JSON, for each worker"),
    "nested manifest": ("--check {deep}", "is not JSON"),
    "a node": ("--check {source}", "shards.json cannot be read"),
}


def broken_files(folder: Path) -> dict[str, Path]:
    """What somebody may give instead of what is wanted."""
    files = {name: folder / file for name, file in {
        "lists": "lists.json", "one_array": "one.npz", "damaged": "bad.npz", "nested": "nested.json", "deep": "deep",
        "encrypted": "encrypted.npz", "huge": "huge.npz", "infinite": "infinite.json"
    }.items()}  # fmt: skip
    files["lists"].write_text("[[0, 1, 2], [3, 4, 5]]")
    with files["one_array"].open("wb") as file:
        np.save(file, np.arange(3))
    np.savez_compressed(files["damaged"], x=np.random.default_rng(0).integers(0, 9, 5000))
    data = bytearray(files["damaged"].read_bytes())
    data[100:400] = b"\xff" * 300
    files["damaged"].write_bytes(data)
    files["infinite"].write_text("[[0, Infinity], [1], [2]]")
    np.savez(files["encrypted"], x=np.arange(9))
    data = bytearray(files["encrypted"].read_bytes())
    for at in (6, data.rindex(b"PK\x01\x02") + 8):
        data[at] |= 1
    files["encrypted"].write_bytes(data)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(files["huge"], "w") as packed:
        packed.writestr("x.npy", header.getvalue())
    files["nested"].write_text("[" * 100_000)
    files["deep"].mkdir()
    (files["deep"] / "shards.json").write_text("[" * 100_000)
    return files


@pytest.mark.parametrize(("line", "told"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_told_in_one_sentence_and_leaves_nothing(
    line: str, told: str, source: Path, table: Path, tmp_path: Path
) -> None:
    files = broken_files(tmp_path)
    before = tree(tmp_path)
    assert told in refused(*line.format(source=source, table=table, out=tmp_path / "out", **files).split())
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
