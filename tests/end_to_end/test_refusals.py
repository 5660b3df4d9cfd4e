"""Nodes that must not take part say why and what to do: other data, an older version, no registered key."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.engine import Engine
from fl_gradcode import fractional_repetition
from fl_gradcode._versions import library_version
from fl_gradcode.cli.app import app as command_line
from fl_gradcode.protocol import records
from fl_gradcode.protocol.records import PROTOCOL
from tests.end_to_end.conftest import ROOT, Run, distance, plain_fedavg, prepared, run_straggling

pytestmark = pytest.mark.slow

NODES, ROUNDS = 4, 3
CODE = fractional_repetition(NODES, 1)
# The groups of the code are (0, 2) and (1, 3): with one of each refused, the two others decode.
WRONG, OLDER = 0, 1


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fl-gradcode place` wrote; then one byte of one node changed on its way."""
    folder = tmp_path_factory.mktemp("placed")
    (folder / "shards").mkdir()
    for shard in range(CODE.k):
        np.savez(folder / "shards" / f"shard-{shard}.npz", x=np.full(1000, shard, np.float32))
    arguments = ["place", str(folder / "shards"), str(folder / "placed"), "--workers", str(NODES), "--s", "1"]
    done = CliRunner().invoke(command_line, arguments)
    assert done.exit_code == 0, done.output
    file = next((folder / "placed" / f"node-{WRONG}").glob("*.npz"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return folder / "placed"


def older_version(folder: Path) -> Path:
    """A path on which the library is of the protocol before today's."""
    shutil.copytree(ROOT / "fl_gradcode", folder / "fl_gradcode", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / Path(records.__file__).relative_to(ROOT)
    text = file.read_text()
    assert f"\nPROTOCOL = {PROTOCOL}\n" in text
    file.write_text(text.replace(f"\nPROTOCOL = {PROTOCOL}\n", f"\nPROTOCOL = {PROTOCOL - 1}\n"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture(scope="module")
def run(placed: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    engine = Engine(
        NODES,
        deployed=True,
        secure=True,
        folder=folder / "engine",
        node_config=lambda number: f'shards-dir="{placed / f"node-{number}"}"',
    )
    with prepared(engine):
        engine.stop_node(OLDER)
        engine.environment["PYTHONPATH"] = str(older_version(tmp_path_factory.mktemp("older")))
        engine.restart_node(OLDER)
        config = {
            "num-server-rounds": ROUNDS,
            "nodes": NODES,
            "manifest": str(placed / "manifest.json"),
            "fraction-evaluate": 0.0,
        }
        yield run_straggling(engine, folder / "run", config, while_waiting=lambda events: None)


def reasons(run: Run) -> list[str]:
    """All that the ledger says of nodes that failed."""
    told = [one["reason"] for row in run.rows for one in [*row["train"]["rejected"], *row["train"]["late"]]]
    return sorted({reason for reason in told if reason})


def test_the_run_goes_on_with_the_others(run: Run) -> None:
    assert run.outcome.completed, run.outcome.log
    assert [row["train"]["outcome"] for row in run.rows] == ["exact"] * ROUNDS
    assert all(not {WRONG, OLDER} & {*row["train"]["used"]} for row in run.rows)
    assert distance(run.final, plain_fedavg(ROUNDS, NODES)) < 1e-6


def test_each_refusal_is_one_sentence_that_says_what_to_do(run: Run, placed: Path) -> None:
    other_data, other_version = reasons(run)
    folder, today = placed / f"node-{WRONG}", library_version()
    assert other_data == (
        f"error 2: ShardMismatch: Worker {WRONG}: Shard 0 (shard-0.npz) in {folder} is not what the manifest says, its "
        f"SHA-256 is another: fetch the folder node-{WRONG} again, and verify it by fl-gradcode place --check {folder}."
    )
    assert other_version == (
        f"error 2: VersionMismatch: Worker {OLDER}: The node has fl-gradcode {today} (protocol {PROTOCOL - 1}), and "
        f"the server {today} (protocol {PROTOCOL}). Install the same one on the node (pip install "
        f"'fl-gradcode=={today}') and start its SuperNode again."
    )


def test_status_names_both(run: Run, folder: Path) -> None:
    said = CliRunner().invoke(command_line, ["status", str(folder / "run" / "ledger.jsonl"), "--no-plan"])
    assert said.exit_code == 0
    text = " ".join(said.output.split())
    assert all(f"Mismatch: Worker {worker}:" in text for worker in (WRONG, OLDER))


def test_the_command_that_is_named_says_what_is_wrong(placed: Path) -> None:
    said = CliRunner().invoke(command_line, ["place", "--check", str(placed / f"node-{WRONG}")])
    assert said.exit_code == 1 and "shard-0.npz" in said.output
