"""`fl-gradcode leakage`, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_gradcode.cli.app import app
from fl_gradcode.codes import fractional_repetition, reed_solomon
from fl_gradcode.secagg.manifest import canonical, parsed
from tests.secagg.samples import body_of, sealed


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["leakage", *map(str, arguments)], env={"COLUMNS": "120"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "secagg-manifest.json"
    path.write_bytes(sealed(body_of(fractional_repetition(12, 1), colluders=2)).to_bytes())
    return path


def test_the_sum_and_nothing_else(manifest: Path) -> None:
    code, out, _ = call(manifest)
    assert code == 0
    assert out.strip().splitlines()[-1] == (
        "The server learns the sum of the updates of 12 shards (0, 1, 2, 3, 4, 5, 6 and 5 more), and nothing else."
    )
    assert "harary 3: 9 edges, at most 3 mask streams a worker" in out
    assert "any 2 workers (repetition)" in out


def test_colluders_and_missing_replies(manifest: Path) -> None:
    code, out, _ = call(manifest, "--colluders", "0,2", "--missing", "5")
    assert code == 0 and "The server and workers 0 and 2 learn, besides what they hold themselves, the sum of" in out
    code, out, _ = call(manifest, "--missing", "5,11")
    assert code == 0 and "The server learns nothing from these replies." in out
    code, out, _ = call(manifest, "--colluders", "1,3,5")  # one more than the graph is made for
    assert code == 1 and "the sum of the updates of shards" in out and "alone, which should be hidden" in out
    found = json.loads(call(manifest, "--colluders", "1,3,5", "--json")[1])
    assert found["protects"] is False and found["colluders"] == [1, 3, 5]
    assert sum(map(len, found["components"])) == 6
    code, out, _ = call(manifest, "--colluders", "0,1,2,3,4,5")
    assert code == 0 and "hold all shards themselves" in out


def test_blocks_of_the_sum_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "body.json"
    path.write_bytes(body_of(reed_solomon(4, 1, m=2), colluders=0).text)
    code, out, _ = call(path, "--missing", "0,1")
    assert (
        code == 0 and "The server learns 1 of 2 combinations of the blocks of the sum of the updates of 4 shards" in out
    )


def test_a_manifest_that_promises_too_much_is_told(tmp_path: Path) -> None:
    path = tmp_path / "body.json"
    weak = {**parsed(body_of(fractional_repetition(12, 1), colluders=2).text), "graph": ["path"]}
    path.write_bytes(canonical(weak))
    code, out, _ = call(path)
    assert code == 0 and "NOT as it says" in out
    code, out, _ = call(path, "--colluders", "2")
    assert code == 1 and "the sum of the updates of 4 shards (0, 1, 6 and 7) and the sum" in out


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, manifest: Path) -> None:
    for arguments, told in (
        ([manifest, "--colluders", "a"], "--colluders 'a' must be workers' numbers"),
        ([manifest, "--missing", "12"], "Worker 12 does not exist"),
        ([tmp_path / "none.json"], "No such file"),
        ([Path(__file__)], "not canonical JSON"),
    ):
        code, out, error = call(*arguments)
        assert (code, out) == (2, "") and told in error
