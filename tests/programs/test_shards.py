"""Partitions from files: what experiments.make_shards writes and `place` brings is trained on to the same bits."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from typer.testing import CliRunner

from clients.app import app as client_app
from clients.data import load_dataset
from clients.dataset import Dataset
from clients.errors import AppConfigError
from clients.models import build_model
from clients.shards import load_shard
from experiments.make_shards import main
from fl_gradcode import Discovered, GradientCoding, fractional_repetition
from fl_gradcode.cli.app import app as command
from fl_gradcode.placement.manifest import Manifest
from fl_gradcode.testing import InProcessGrid

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
CONFIG |= {"seed": 4, "alpha": 0.5}
N = K = 6


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of digits, cut as the run config has it, with two holders each."""
    folder = tmp_path_factory.mktemp("digits")
    assert main(["--shards", str(K), "--out", str(folder / "shards"), "--alpha", "0.5", "--seed", "4"]) == 0
    line = ["place", str(folder / "shards"), str(folder / "placed"), "-n", str(N), "-s", "1"]
    assert CliRunner().invoke(command, line).exit_code == 0
    return folder / "placed"


def config_of(placed: Path, worker: int) -> dict[str, Any]:
    return {"partition-id": worker, "num-partitions": N, "shards-dir": str(placed / f"node-{worker}")}


def nowhere(*_: object, **__: object) -> Dataset:
    raise AssertionError("the node has no other data than its shards")


def model() -> ArrayRecord:
    return ArrayRecord(build_model("logistic", load_dataset("digits"), 0).state_dict())


def replies(placed: Path | None, kind: str) -> list[Any]:
    """Of plain clients, each with its own shard."""
    node_config = None if placed is None else lambda worker: config_of(placed, worker)
    with InProcessGrid(client_app, N, run_config=CONFIG, node_config=node_config) as grid:
        content = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": 1})})
        return [
            reply.content
            for reply in grid.send_and_receive([Message(content, node, kind) for node in grid.get_node_ids()])
        ]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_shard_from_its_file_is_trained_and_evaluated_to_the_same_bits(
    kind: str, placed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = replies(None, kind)
    monkeypatch.setattr("clients.app.load_dataset", nowhere)
    found = replies(placed, kind)
    for mine, theirs in zip(found, expected, strict=True):
        assert dict(mine["metrics"]) == dict(theirs["metrics"])
        if kind == "train":
            for a, b in zip(mine["arrays"].to_numpy_ndarrays(), theirs["arrays"].to_numpy_ndarrays(), strict=True):
                assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("discovered", [False, True])
def test_a_coded_run_on_placed_shards_is_the_run_on_the_app_s_own_cut(
    discovered: bool, placed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(node_config: Any, code: Any, manifest: Path | None) -> list[np.ndarray]:
        with InProcessGrid(client_app, N, run_config=CONFIG, node_config=node_config) as grid:
            strategy = GradientCoding(FedAvg(), code, on_undecodable="raise", manifest=manifest)
            result = strategy.start(grid, model(), num_rounds=2)
        return result.arrays.to_numpy_ndarrays()

    code = fractional_repetition(N, 1)
    expected = run(None, code, None)
    monkeypatch.setattr("clients.app.load_dataset", nowhere)
    wish = Discovered(k=K, s=1) if discovered else code
    for a, b in zip(
        run(lambda worker: config_of(placed, worker), wish, placed / "manifest.json"), expected, strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_the_files_hold_the_whole_training_part_once(placed: Path) -> None:
    whole = Manifest.read(placed)
    assert whole.k == K and whole.held is not None
    assert sum(shard.examples or 0 for shard in whole.shards) == len(load_dataset("digits").train_y)


def test_a_file_of_another_form_is_told(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()

    def because(number: int, **arrays: np.ndarray) -> str:
        np.savez(tmp_path / "source" / "a.npz", **arrays)  # type: ignore[arg-type]
        out = tmp_path / f"out-{number}"
        assert CliRunner().invoke(command, ["place", str(tmp_path / "source"), str(out), "-n", "2"]).exit_code == 0
        with pytest.raises(AppConfigError) as error:
            load_shard({"shards-dir": str(out / "node-0"), "partition-id": 0})
        return str(error.value)

    assert "it has to be an .npz with x, y and classes" in because(0, x=np.zeros(3), y=np.zeros(3))
    assert "has x of shape (3, 2) and y of shape (2,)" in because(
        1, x=np.zeros((3, 2)), y=np.zeros(2), classes=np.array(2)
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["--shards", "6", "--out", "{there}"], "is there and not an empty folder"),
        (["--shards", "0", "--out", "{new}"], "num-partitions is 0"),
        (["--shards", "6", "--out", "{new}", "--alpha", "-1"], "alpha is -1.0"),
        (["--shards", "6", "--out", "{new}", "--dataset", "adult", "--data-dir", "x"], "a relative path"),
    ],
)
def test_make_shards_tells_a_mistake_and_writes_nothing(
    line: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    assert main([one.format(there=tmp_path / "there", new=tmp_path / "new") for one in line]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
