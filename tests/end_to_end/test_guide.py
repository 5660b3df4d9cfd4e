"""The commands of the guide's first section are run as they stand, but for ports, folders and what takes long."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from experiments.engine import free_port
from experiments.processes import Processes
from fl_gradcode import Ledger
from tests.end_to_end.conftest import ROOT
from tests.end_to_end.flower_commands import write_commands

MARK = "<!-- run by tests/end_to_end/test_guide.py -->\n```bash\n"


@pytest.mark.slow
def test_the_commands_of_the_guide(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    commands = text.split(MARK)[1].split("```")[0]
    ports = " ".join(str(free_port()) for _ in range(4))
    for ours, here in {
        "$PWD/.venv/bin": f"{write_commands(tmp_path / 'commands')}:{Path(sys.executable).parent}",
        "$PWD/out": str(tmp_path),
        "8000": str(free_port()),
        "910$i": "${ports[i]}",
        "num-server-rounds=2": "num-server-rounds=1 fraction-evaluate=0.0",
    }.items():
        assert ours in commands
        commands = commands.replace(ours, here)
    (tmp_path / "commands.sh").write_text(f"set -e\ncd '{ROOT}'\nports=({ports})\n{commands}")
    processes = Processes(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        shell = processes.start(["bash", str(tmp_path / "commands.sh")], "guide")
        assert shell.wait(timeout=540) == 0, processes.log("guide")
    finally:
        processes.stop_all(patience=0.5)
    rows = Ledger.read(tmp_path / "lab" / "ledger.jsonl")
    assert [row["train"]["outcome"] for row in rows] == ["exact"]
    assert "1 round: 1 exact" in processes.log("guide")
