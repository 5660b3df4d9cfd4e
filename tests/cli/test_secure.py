"""`fl-gradcode secure`, as a dealer and as a node's owner call it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_gradcode.cli.app import app
from fl_gradcode.codes import fractional_repetition, reed_solomon
from fl_gradcode.privacy import IntegerNoise
from fl_gradcode.secagg import MANIFEST_FILE, SecureAggregation, read_manifest
from tests.secagg.rounds import start


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "120"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    path = tmp_path / "layout.json"
    values = {"arrays": [["0", "float32", [3, 2]], ["1", "float32", [5]]], "metrics": {"pair": 2, "loss": -1}}
    path.write_text(json.dumps(values))
    return path


def test_key_files_and_three_words_make_a_run(tmp_path: Path, layout: Path) -> None:
    keys = tmp_path / "keys"
    assert call("keys", "make", keys, "--workers", 8, "--stragglers", 1)[0] == 0
    before = (keys / "node-3" / "keys.json").read_bytes()
    make = ("secure", "make", keys, "--layout", layout, "-n", 8, "-s", 1, "--largest-weight", 8, "--pin-machine")
    code, out, _ = call(*make)
    assert code == 0 and "A manifest for 8 workers" in out and "any 1 colluding workers" in out
    assert (keys / "node-3" / "keys.json").read_bytes() == before
    manifest = read_manifest(keys / "node-3")
    assert manifest.digest.hex() in out
    found = SecureAggregation(keys / MANIFEST_FILE).manifest
    assert found is not None and found.digest == manifest.digest
    assert dict(manifest.body.versions).keys() == {"numpy"} and manifest.body.environment
    strategy, _, _ = start(fractional_repetition(8, 1), keys)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"
    told = [call("secure", "check", keys / f"node-{worker}")[1] for worker in range(8)]
    assert sum("answered    1 requests, last round 1" in one for one in told) >= 4
    # Another manifest is another digest, which the server has to be told too.
    assert call(*make, "--bound", 2)[0] == 0
    assert read_manifest(keys / "node-3").digest != manifest.digest


def test_a_manifest_for_single_shards_and_evaluation(tmp_path: Path, layout: Path) -> None:
    keys = tmp_path / "keys"
    layout.write_text(json.dumps({**json.loads(layout.read_text()), "evaluation": {"loss": -1, "accuracy": -1}}))
    make = ("secure", "make", keys, "--layout", layout, "-n", 8, "-s", 1, "--largest-weight", 8)
    code, out, error = call(*make, "--send", "shards")
    assert code == 0, error
    assert "one shard a message, for training and evaluation" in out and "send='shards'" in out
    body = read_manifest(keys / "node-3").body
    assert body.classes.sending == "shardwise" and body.evaluation == (("accuracy", -1), ("loss", -1))
    assert SecureAggregation(keys / MANIFEST_FILE).send == "shards"
    code, _, error = call(*make, "--send", "halves")
    assert code != 0 and "'halves' must be one of coded, shards" in error
    code, _, error = call(*make, "--send", "shards", "--code", "reed-solomon", "-m", 2)
    assert code != 0 and "sends them whole" in error


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "secure-aggregation.md").read_text()
    layout, updates = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    commands, noise, _ = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)  # test_enrolment.py runs the last block
    monkeypatch.chdir(tmp_path)
    Path("layout.json").write_text(layout)
    Path("updates.json").write_text(updates)
    for line in [*commands.splitlines(), *noise.splitlines()]:
        program, *arguments = shlex.split(line)
        code, _, error = call(*arguments)
        assert program == "fl-gradcode" and code == 0, error


def test_keys_are_made_where_there_are_none(tmp_path: Path, layout: Path) -> None:
    keys = tmp_path / "keys"
    code, out, error = call(
        *("secure", "make", keys, "--layout", layout, "-n", 6, "-s", 1, "-m", 2, "--code", "reed-solomon"),
        *("--largest-weight", 8, "--colluders", 0, "--pin", ""),
    )
    assert code == 0, error
    assert "Keys and a manifest for 6 workers" in out
    strategy, _, _ = start(reed_solomon(6, 1, m=2), keys)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


def test_what_cannot_be_made_is_refused_with_one_sentence(tmp_path: Path, layout: Path) -> None:
    base = ("secure", "make", tmp_path / "keys", "--layout", layout, "-s", 1, "--largest-weight", 8)
    for more, said in (
        (("-n", 8, "--code", "cyclic"), "--code 'cyclic' must be one of fractional, reed-solomon."),
        (("-n", 8, "-m", 2), "-m 2 needs --code reed-solomon"),
        (("-n", 8, "--colluders", 3), "colluders"),
        (("-n", 8, "--layout", tmp_path / "none.json"), "must hold, as JSON"),
    ):
        code, _, error = call(*base, *more)
        assert code != 0 and said in " ".join(error.split()), error
    assert call(*base, "-n", 8)[0] == 0
    code, _, error = call(*base, "-n", 10)
    assert code != 0 and "10" in error
    node = tmp_path / "keys" / "node-0"
    (node / "secagg-digest").write_text("00" * 32 + "\n")
    code, _, error = call("secure", "check", node)
    assert code != 0 and "another one than this node has pinned" in " ".join(error.split())


def test_a_manifest_with_integer_noise_and_the_line_for_the_server(tmp_path: Path, layout: Path) -> None:
    keys = tmp_path / "keys"
    layout.write_text(json.dumps({"arrays": json.loads(layout.read_text())["arrays"]}))
    make = ("secure", "make", keys, "--layout", layout, "-n", 8, "-s", 1)
    code, out, error = call(*make, "--noise-multiplier", 4, "--clipping-norm", 2)
    assert code == 0, error
    assert "privacy=IntegerNoise(noise_multiplier=4, clipping_norm=2)" in out
    assert "4 times what a shard changes, by each shard alone" in out and "(norm)" in out
    noise = IntegerNoise(noise_multiplier=4, clipping_norm=2)
    start(fractional_repetition(8, 1), keys, privacy=noise)
    told = [call("secure", "check", keys / f"node-{worker}")[1] for worker in range(8)]
    assert sum(f"epsilon {noise.epsilon(1):.3g} at most, delta 1e-05, of a shard" in one for one in told) >= 4
    summed = ("--noise-multiplier", 4, "--clipping-norm", 2, "--scope", "sum")
    for options, wrong in (
        (("--noise-multiplier", 4), "--noise-multiplier needs --clipping-norm"),
        (("--clipping-norm", 4), "say --noise-multiplier too"),
        (
            ("--noise-multiplier", 4, "--clipping-norm", 2, "--bound", 1),
            "leave --bound, --clip and --largest-weight out",
        ),
        ((*summed,), "needs a rehearsal or agree='always'"),
        ((*summed, "--rehearsal", "--first-use"), "--first-use does not go with this body"),
        ((*summed, "--rehearsal", "--agree-always"), "leave rehearsal= out"),
        (("--noise-multiplier", 4, "--clipping-norm", 2, "--scope", "all"), "scope='all'"),
        ((), "--largest-weight is missing"),
    ):
        code, _, error = call(*make, *options)
        assert code == 2 and wrong in error.replace("\n", " "), options
    layout.write_text(json.dumps({**json.loads(layout.read_text()), "metrics": {"loss": -1}}))
    code, _, error = call(*make, "--noise-multiplier", 4, "--clipping-norm", 2)
    assert code == 2 and "no metric leaves a node" in error


def test_privacy_tells_what_integer_noise_costs() -> None:
    code, out, error = call("privacy", "--integer", "--rounds", 10, "--noise-multiplier", 4, "--json")
    assert code == 0, error
    (found,) = json.loads(out)["modes"]
    assert found["noise"] == "integer"
    assert found["epsilon"] == pytest.approx(IntegerNoise(noise_multiplier=4, clipping_norm=1).epsilon(10))
    code, out, _ = call("privacy", "--integer", "--rounds", 10, "--epsilon", 2)
    assert code == 0 and "privacy=IntegerNoise(noise_multiplier=" in out and "a whole shard" in out
    assert "say one" in call("privacy", "--integer", "--central", "--rounds", 10, "--epsilon", 2)[2]
