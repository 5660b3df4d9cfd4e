"""What a process loads before it does anything: a deployed node starts one for each message."""

from __future__ import annotations

import json
import subprocess
import sys

SERVER_FOLDERS = {"strategy", "grid", "runlog", "planning", "latency", "matmul", "cli"}


def loaded_by(statement: str) -> set[str]:
    """Names of the modules that a fresh process has after a statement."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_a_coded_server_starts_without_the_planner_and_its_statistics() -> None:
    modules = loaded_by("from fl_gradcode import GradientCoding, fractional_repetition")
    assert "fl_gradcode.strategy.run" in modules
    assert "scipy.stats" not in modules and "torch" not in modules
    planning = {name for name in modules if name.startswith("fl_gradcode.planning.")}
    hand_out_rule = {"fl_gradcode.planning.work_queue", "fl_gradcode.planning.job_times"}
    assert planning == hand_out_rule


def test_a_client_loads_no_folder_of_the_server() -> None:
    modules = loaded_by("from fl_gradcode import gradient_coding_mod")
    folders = {name.split(".")[1] for name in modules if name.startswith("fl_gradcode.")}
    assert "client" in folders
    assert folders & SERVER_FOLDERS == set()
    assert "scipy.stats" not in modules and "torch" not in modules and "opacus" not in modules


def test_the_package_itself_loads_nothing() -> None:
    modules = {name for name in loaded_by("import fl_gradcode") if name.startswith("fl_gradcode")}
    assert modules == {"fl_gradcode", "fl_gradcode._lazy"}
