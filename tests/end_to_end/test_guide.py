"""The commands of the guide's first section are run as they stand there, but for ports and folders."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from experiments.engine import free_port
from experiments.processes import Processes
from fl_gradcode import Ledger
from tests.end_to_end.conftest import ROOT

MARK = "<!-- run by tests/end_to_end/test_guide.py -->\n```bash\n"


@pytest.mark.slow
def test_the_commands_of_the_guide(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    commands = text.split(MARK)[1].split("```")[0]
    commands = commands.replace("127.0.0.1:8000", f"127.0.0.1:{(port := free_port())}").replace("8000", str(port))
    commands = commands.replace("$PWD/.venv/bin", str(Path(sys.executable).parent)).replace("$PWD/out", str(tmp_path))
    for number, other in enumerate([free_port() for _ in range(4)]):
        commands = f"PORT_{number}={other}\n" + commands
    commands = re.sub(r"--port 910\$i", '--port "$(eval echo \\\\$PORT_$i)"', commands)
    (tmp_path / "commands.sh").write_text(f"set -e\ncd {ROOT}\n{commands}")
    processes = Processes(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        shell = processes.start(["bash", str(tmp_path / "commands.sh")], "guide")
        assert shell.wait(timeout=240) == 0, processes.log("guide")
    finally:
        processes.stop_all(patience=0.5)
    rows = Ledger.read(tmp_path / "lab" / "ledger.jsonl")
    assert [row["train"]["outcome"] for row in rows] == ["exact", "exact"]
    assert "2 rounds: 2 exact" in processes.log("guide")
