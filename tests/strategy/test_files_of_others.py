"""Checkpoints and ledgers that somebody else made or writes to: nothing in them is believed, and nothing is lost."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvgM

from fl_gradcode import Ledger
from fl_gradcode._seeding import global_states
from fl_gradcode.checkpoints.checkpoint import Checkpoint
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.runlog.reader import LedgerReader
from tests.strategy.rows import round_row
from tests.strategy.test_resume import Killed, rounds_of, start


def inner() -> FedAvgM:
    return FedAvgM(server_momentum=0.9, fraction_evaluate=0.0)


def crafted(path: Path, change: Callable[[dict[str, Any]], Any], kind: int = zipfile.ZIP_STORED) -> None:
    """Write a checkpoint again with another state."""
    with zipfile.ZipFile(path) as archive:
        state = json.loads(archive.read("state.json"))
        blobs = [archive.read(str(number)) for number in range(state["blobs"])]
    change(state)
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("state.json", json.dumps(state))
        for number, blob in enumerate(blobs):
            archive.writestr(str(number), blob)


def pairs(**values: Any) -> dict[str, Any]:
    return {"type": "dict", "value": [[name, value] for name, value in values.items()]}


def sets(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """A change by which the strategy's state sets an attribute."""
    return lambda state: state["saved"].update(strategy=pairs(**{name: pairs(value=value)}))


def saved(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["saved"].update(values)


def generator(kind: str) -> dict[str, Any]:
    return {"type": "Generator", "value": pairs(), "kind": kind}


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a function of numpy.random": (sets("fraction_train", generator("seed")), "is damaged"),
    "a generator that is no bit generator": (sets("fraction_train", generator("RandomState")), "is damaged"),
    "a kind that does not exist": (sets("fraction_train", {"type": "eval", "value": "1"}), "is damaged"),
    "an array of objects": (
        sets("fraction_train", {"type": "array", "value": 0, "dtype": "O", "shape": []}),
        "damaged",
    ),
    "an array with fields": (
        sets("fraction_train", {"type": "array", "value": 0, "dtype": "f4,f4", "shape": [1]}),
        "damaged",
    ),
    "a tensor of another name": (
        sets("fraction_train", {"type": "tensor", "value": 0, "dtype": "load", "shape": [1]}),
        "damaged",
    ),
    "a huge array": (
        sets("fraction_train", {"type": "array", "value": 0, "dtype": "f4", "shape": [10**15]}),
        "is damaged",
    ),
    "a member that is not there": (sets("fraction_train", {"type": "bytes", "value": -1}), "is damaged"),
    "a method": (sets("aggregate_train", 5), "sets 'aggregate_train' of FedAvgM, which is no state that FedAvgM keeps"),
    "a method of Flower's": (sets("start", 5), "sets 'start' of FedAvgM"),
    "the class": (sets("__class__", "x"), "sets '__class__' of FedAvgM"),
    "the dict": (sets("__dict__", pairs(a=1)), "sets '__dict__' of FedAvgM"),
    "an entry without a value": (saved(strategy=pairs(fraction_train=pairs(other=1))), "sets 'fraction_train'"),
    "a strategy that is none": (saved(strategy=pairs(x=pairs(strategy=pairs()))), "sets 'x' of FedAvgM"),
    "a list as strategy": (saved(strategy=[1]), "is damaged"),
    "a round in words": (saved(round="1"), "is damaged"),
    "a round below zero": (saved(round=-3), "is damaged"),
    "a round beyond all runs": (saved(round=10**30), "is damaged"),
    "true as round": (saved(round=True), "is damaged"),
    "no randomness": (saved(randomness=pairs()), "is damaged: it lacks the states of generators"),
    "randomness of one number": (saved(randomness=5), "is damaged"),
    "randomness of others": (saved(randomness=pairs(random=5, numpy=5)), "is damaged"),
    "metrics of one number": (saved(metrics=5), "is damaged"),
    "metrics without kinds": (saved(metrics=pairs(train=pairs())), "is damaged: it lacks"),
    "a fingerprint of one number": (saved(fingerprint=5), "is damaged"),
    "a fingerprint of arrays": (saved(fingerprint=pairs(strategy=[1], code=5, shards={}, seed=[])), "is damaged"),
    "a fingerprint of nothing": (saved(fingerprint=pairs()), "is of a run with another"),
    "a number as run": (saved(run=5), "is damaged"),
    "arrays of one number": (saved(arrays=5), "is damaged"),
    "an account of one number": (saved(privacy=5), "is damaged"),
    "no format": (lambda state: state.pop("format"), "is damaged"),
    "no members": (lambda state: state.update(blobs=0), "is damaged"),
    "too many members": (lambda state: state.update(blobs=10**12), "is damaged"),
    "true as members": (lambda state: state.update(blobs=True), "is damaged"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    start(folder, inner(), rounds=1)
    return folder / "run.ckpt"


@pytest.mark.parametrize("name", DAMAGED)
def test_a_checkpoint_of_somebody_else_is_refused_in_one_sentence(name: str, kept: Path, tmp_path: Path) -> None:
    change, sentence = DAMAGED[name]
    path = tmp_path / "run.ckpt"
    path.write_bytes(kept.read_bytes())
    crafted(path, change)
    content, state = path.read_bytes(), json.dumps(global_states(), default=repr)
    with pytest.raises(InvalidSetting, match=sentence) as error:
        start(tmp_path, inner(), rounds=2)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert path.read_bytes() == content
    assert json.dumps(global_states(), default=repr) == state


def test_no_function_is_called_by_name(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(np.random, "probe", lambda *_: called.append("probe"), raising=False)
    path = tmp_path / "run.ckpt"
    path.write_bytes(kept.read_bytes())
    crafted(path, sets("fraction_train", generator("probe")))
    with pytest.raises(InvalidSetting, match="is damaged"):
        Checkpoint(path).load()
    assert not called


def test_a_checkpoint_that_is_compressed_is_never_unpacked(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("state.json", "{}")
        with archive.open("0", "w", force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(1_000_000))
    assert path.stat().st_size < 10**6
    with pytest.raises(InvalidSetting, match="a member is compressed"):
        Checkpoint(path).load()
    path.write_bytes(kept.read_bytes())
    crafted(path, lambda state: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidSetting, match="a member is compressed"):
        Checkpoint(path).load()


def test_members_that_share_their_bytes_are_refused(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0", bytes(10_000))
        first = archive.infolist()[0]
        for number in range(1, 50):  # entries of the directory that lead to one and the same member
            again = zipfile.ZipInfo(str(number))
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(again, name, getattr(first, name))
            archive.filelist.append(again)
        archive.writestr("state.json", "{}")
    with pytest.raises(InvalidSetting, match="its members are larger than the file"):
        Checkpoint(path).load()


@pytest.mark.parametrize("year", [1970, 1979, 2108, 9999])
def test_a_clock_that_is_far_off_does_no_harm(year: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = time.struct_time((year, 1, 1, 0, 0, 0, 0, 1, 0))
    with monkeypatch.context() as patch:
        patch.setattr(time, "localtime", lambda *_: wrong)
        start(tmp_path, inner(), rounds=1)
    start(tmp_path, inner(), rounds=2)
    assert rounds_of(tmp_path) == [1, 2]


@pytest.mark.skipif(os.name != "posix", reason="permissions and links")
def test_files_keep_their_modes_and_drafts_follow_no_link(tmp_path: Path) -> None:
    start(tmp_path, inner(), rounds=1)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("run.ckpt", "ledger.jsonl"):
        (tmp_path / name).chmod(0o600)
    (tmp_path / "run.ckpt.new").symlink_to(victim)
    with pytest.raises(Killed):
        start(tmp_path, inner(), rounds=3, killed_in=3)
    start(tmp_path, inner(), rounds=3)  # cuts off a row, which replaces the ledger
    assert victim.read_text() == "mine"
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("run.ckpt", "ledger.jsonl")] == [0o600, 0o600]
    assert rounds_of(tmp_path) == [1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
@pytest.mark.parametrize("name", ["run.ckpt", "run.ckpt.lock", "ledger.jsonl"])
def test_a_pipe_in_the_place_of_a_file_is_a_sentence(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InvalidSetting, match="Not a regular file"):
        start(tmp_path, inner(), rounds=1)


# The ledger


def test_a_ledger_that_another_program_keeps_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    path.touch()
    code = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    monkeypatch.setattr("fl_gradcode.runlog.ledger._PATIENCE", 0.1)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(InvalidSetting, match="is locked by another program"):
            Ledger(path)
        other.communicate("")
    Ledger(path).append(round_row("r", 1))
    assert len(Ledger.read(path)) == 1


def test_runs_that_write_one_ledger_at_once_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = (
        "import sys; from fl_gradcode import Ledger; from tests.strategy.rows import round_row\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for number in range(1, 41):\n"
        "    ledger.append(round_row(sys.argv[2], number))\n"
        "    if number % 10 == 0:\n"
        "        ledger.resume(sys.argv[2], number - 1)\n"
    )
    root = Path(__file__).resolve().parents[2]
    others = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name], cwd=root, stderr=subprocess.PIPE, text=True)
        for name in ("a", "b", "c")
    ]
    for other in others:
        told = other.communicate(timeout=120)[1]
        assert other.returncode == 0, told
    rows = Ledger.read_rounds(path)
    for name in ("a", "b", "c"):
        assert [row.round for row in rows if row.run == name] == [n for n in range(1, 41) if n % 10]


def test_rows_that_were_lost_before_a_resume_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path, inner(), rounds=4)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[3]]))
    with caplog.at_level(logging.WARNING, "fl_gradcode"):
        start(tmp_path, inner(), rounds=5)
    assert "has no row of rounds 2 and 3 of run" in caplog.text
    assert rounds_of(tmp_path) == [1, 4, 5]
    caplog.clear()
    path.write_text("")
    with caplog.at_level(logging.WARNING, "fl_gradcode"):
        start(tmp_path, inner(), rounds=6)
    assert "has no row of rounds 1, 2, 3, 4 and 5 of run" in caplog.text


def test_a_resume_with_all_rows_says_nothing_of_lost_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fl_gradcode"):
        with pytest.raises(Killed):
            start(tmp_path, inner(), killed_in=3)
        start(tmp_path, inner())
    assert "has no row" not in caplog.text


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"\n", "is blank"),
        (b"   \n", "is blank"),
        (b"\xff\xfe{}\n", "is not JSON: byte 0 is not valid UTF-8"),
        (b"\xef\xbb\xbf{}\n", "is not JSON"),
        (b"[" * 100_000 + b"\n", "is not JSON: it is nested too deeply"),
        (b"9" * 5000 + b"\n", "is not JSON"),
        (b"NaN\n", "is not JSON: NaN is not a number"),
        (b"5\n", "(is not a ledger row: each line is one JSON object|This is not a ledger row)"),
        (b'"text"\n', "not a ledger row"),
        (b"[]\n", "not a ledger row"),
        (b"\x00\x00\n", "is not JSON"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_number(line: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(round_row("r", 1))
    path.write_bytes(path.read_bytes() + line + path.read_bytes())
    for read in (Ledger.read, Ledger.read_rounds, lambda path: LedgerReader(path).read()):
        with pytest.raises(InvalidSetting, match=f"^Line 2 of the ledger .*{sentence}") as error:
            read(path)
        assert len(str(error.value)) < 500 + len(str(path))
