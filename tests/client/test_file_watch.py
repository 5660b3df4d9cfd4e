"""Which files a call reads and rewrites: state kept on disk, and no caches, logs or checkpoints of the call."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fl_gradcode.client.file_watch import watching_files


def counted(folder: Path) -> None:
    path = folder / "state"
    count = int(path.read_text()) if path.exists() else 0
    path.write_text(str(count + 1))


def renamed(folder: Path) -> None:
    path = folder / "state"
    momentum = np.load(path) if path.exists() else np.zeros(3)
    with (folder / "new").open("wb") as file:
        np.save(file, momentum + 1)
    (folder / "new").replace(path)


def in_place(folder: Path) -> None:
    path = folder / "state"
    if not path.exists():
        path.write_text("0")
        return
    with path.open("r+") as file:
        file.write(str(int(file.read()) + 1))


def saved_by_torch(folder: Path) -> None:
    import torch

    path = folder / "state"
    count = torch.load(path) if path.exists() else torch.zeros(1)
    torch.save(count + 1, path)


def in_a_database(folder: Path) -> None:
    with sqlite3.connect(folder / "state") as base:
        base.execute("create table if not exists t (x)")
        base.execute("insert into t values (1)")
    base.close()


@pytest.mark.parametrize("call", [counted, renamed, in_place, saved_by_torch, in_a_database])
def test_a_state_in_a_file_is_seen_in_the_second_call(call: Callable[[Path], None], tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        with watching_files() as files:
            call(tmp_path)
        seen.append(files.rewritten)
        time.sleep(0.02)  # clocks of file systems are coarse
    assert seen[0] == () and seen[1] == seen[2] == ("state",)


def cached(folder: Path) -> None:
    path = folder / "cache.npy"
    if not path.exists():
        np.save(path, np.arange(5))
    np.load(path)


def logged(folder: Path) -> None:
    with (folder / "log").open("a") as file:
        file.write("round\n")


def best_of_the_call(folder: Path) -> None:
    path = folder / "best.json"
    for epoch in range(3):
        path.write_text(json.dumps(epoch))
        json.loads(path.read_text())


def best_of_the_call_by_torch(folder: Path) -> None:
    import torch

    path = folder / "best.pt"
    time.sleep(0.02)  # clocks of file systems are coarse
    for epoch in range(3):
        torch.save(epoch, path)  # in C++, where Python hears nothing of it
        torch.load(path)


def read_only(folder: Path) -> None:
    for name in ("a", "b"):
        if not (folder / name).exists():
            (folder / name).write_text(name)
    (folder / "a").read_text()


def scratch(folder: Path) -> None:
    for _ in range(2):
        (folder / "scratch").write_text("x")
        (folder / "scratch").read_text()
        (folder / "scratch").unlink()


@pytest.mark.parametrize("call", [cached, logged, best_of_the_call, best_of_the_call_by_torch, read_only, scratch])
def test_caches_logs_and_files_of_one_call_are_no_state(call: Callable[[Path], None], tmp_path: Path) -> None:
    for _ in range(3):
        with watching_files() as files:
            call(tmp_path)
        assert files.rewritten == ()
        time.sleep(0.02)


def test_other_threads_are_not_heard(tmp_path: Path) -> None:
    counted(tmp_path)
    time.sleep(0.02)
    with watching_files() as files:
        other = threading.Thread(target=counted, args=(tmp_path,))
        other.start()
        other.join()
    assert files.rewritten == ()


def test_nothing_is_heard_after_the_block_and_errors_of_the_app_pass(tmp_path: Path) -> None:
    counted(tmp_path)
    with pytest.raises(FileNotFoundError), watching_files() as files:
        (tmp_path / "missing").read_text()
    counted(tmp_path)
    assert files.rewritten == ()
