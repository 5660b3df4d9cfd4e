"""The commands of a set-up through the server, and the page that shows them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_gradcode import fractional_repetition
from fl_gradcode.cli.app import app
from fl_gradcode.enrolment import agreed_body, allow_list, allow_list_digest
from tests.enrolment.fleet import start

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = {"arrays": [["0", "float32", [3, 2]], ["1", "float32", [5]]], "metrics": {"pair": 2, "loss": -1}}


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "120"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(LAYOUT))
    return path


def test_the_commands_of_the_page_make_a_run(tmp_path: Path, layout: Path) -> None:
    page = (ROOT / "docs" / "secure-aggregation.md").read_text()
    block = page.split("<!-- set-up -->\n```bash\n")[1].split("```")[0]
    commands = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert len(commands) <= 10 and not re.search(r"\b(sudo|rm|curl)\b", block)
    shim = tmp_path / "bin" / "fl-gradcode"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from fl_gradcode.cli.app import main; main()" "$@"\n')
    shim.chmod(0o755)
    env = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-e"], input=block, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    digests = re.findall(r"body +([0-9a-f]{64})\n +allow-list +([0-9a-f]{64})", done.stdout)
    assert len(digests) == 8 and len({*digests}) == 1  # of `make`, of each `agree`, and of `check`
    assert "keys        none yet" in done.stdout
    (tmp_path / "nodes" / "secagg-body.json").write_bytes((tmp_path / "shared" / "secagg-body.json").read_bytes())
    owner = {"secagg-allow-list": str(tmp_path / "allow-list")}
    strategy, _, _ = start(fractional_repetition(6, 1), tmp_path / "nodes", rounds=2, owner=owner)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    code, out, _ = call("secure", "check", tmp_path / "nodes" / "node-4")
    manifest = strategy.ledger.rows[0]["train"]["secure"]["manifest"]
    assert code == 0 and f"of epoch 1 of run run-1, manifest {manifest}" in out and "worker      4" in out


def make(folder: Path, layout: Path, *more: object) -> tuple[int, str, str]:
    return call("secure", "make", folder, "--layout", layout, "-n", 6, "-s", 1, "--largest-weight", 8, *more)


def test_an_identity_is_made_once_and_its_private_key_is_not_printed(tmp_path: Path) -> None:
    code, out, _ = call("secure", "identity", tmp_path / "node-3", "--worker", 3)
    private = json.loads((tmp_path / "node-3" / "identity.json").read_text())["private"]
    assert code == 0 and re.fullmatch(r"3 ed25519 [0-9a-f]{64}\n", out) and private not in out
    assert (tmp_path / "node-3" / "identity.json").stat().st_mode & 0o777 == 0o600
    code, _, error = call("secure", "identity", tmp_path / "node-3", "--worker", 3)
    assert code == 2 and "already exists" in error
    assert call("secure", "identity", tmp_path / "x", "--worker", -1)[0] == 2


def test_an_allow_list_has_one_key_of_each_worker(tmp_path: Path) -> None:
    lines = [call("secure", "identity", tmp_path / f"node-{i}", "--worker", i)[1] for i in range(3)]
    path = tmp_path / "list"
    path.write_text("# ours\n\n" + lines[2] + lines[0] + lines[1].strip() + "  # of the clinic\n")
    keys = allow_list(path)
    assert [f"{i} ed25519 {key}\n" for i, key in enumerate(keys)] == lines
    assert allow_list_digest(keys) != allow_list_digest(keys[::-1])
    key = lines[0].split()[2]
    for text, match in (
        (lines[0] + lines[2], "no line of worker 1"),
        ("".join(lines) + lines[1], "two lines of worker 1"),
        (lines[0] + f"1 ed25519 {key}\n", "one key for workers 0 and 1"),
        (lines[0] + "1 rsa 00\n", "Line 2 of the allow-list"),
        (lines[0] + f"1 ed25519 {key[:-1]}\n", "Line 2 of the allow-list"),
        ("", "no line of worker 0"),
        ("é", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            allow_list(path)


def test_a_body_needs_an_allow_list_of_all_workers_or_first_use(tmp_path: Path, layout: Path) -> None:
    lines = [call("secure", "identity", tmp_path / f"node-{i}", "--worker", i)[1] for i in range(6)]
    path = tmp_path / "allow-list"
    path.write_text("".join(lines[:5]))
    code, _, error = make(tmp_path / "shared", layout, "--allow-list", path)
    assert code == 2 and "has 5 workers; -n is 6" in error
    path.write_text("".join(lines))
    code, _, error = make(tmp_path / "shared", layout, "--allow-list", path, "--first-use")
    assert code == 2 and "--first-use" in error
    code, _, error = make(tmp_path / "shared", layout, "--allow-list", path, "--data", path)
    assert code == 2 and "--data is for a dealer" in error
    code, out, _ = make(tmp_path / "open", layout, "--first-use")
    assert code == 0 and "the first identities are trusted" in out
    body = tmp_path / "open" / "secagg-body.json"
    code, _, error = call("secure", "agree", tmp_path / "node-1", body)
    assert code == 2 and "pass --first-use" in error
    code, _, error = call("secure", "agree", tmp_path / "node-1", body, "--allow-list", path)
    assert code == 2 and "names no identities" in error
    code, out, _ = call("secure", "agree", tmp_path / "node-1", body, "--first-use")
    assert code == 0 and agreed_body(tmp_path / "node-1").digest.hex() in out
    code, _, error = call("secure", "agree", tmp_path / "node-1", tmp_path / "nothing", "--first-use")
    assert code == 2 and "cannot be read" in error
