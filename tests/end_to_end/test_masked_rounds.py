"""Secure aggregation in Flower's simulation engine, with folders that the command line has made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.engine import Engine
from fl_gradcode.cli.app import app as command_line
from tests.end_to_end.conftest import on_engine

pytestmark = [pytest.mark.slow, on_engine("simulation")]
APP = Path(__file__).resolve().parent / "apps" / "masked"
NODES, ROUNDS = 6, 3


@pytest.fixture(scope="module")
def told(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("masked")
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    layout = folder / "layout.json"
    layout.write_text(json.dumps({"arrays": [["w", "float64", [5]]], "metrics": {"keys-seen": -1}}))
    make = (
        f"secure make {folder / 'keys'} --layout {layout} --workers {NODES} --stragglers 1 --largest-weight 6 --bound 4"
    )
    assert CliRunner().invoke(command_line, make.split()).exit_code == 0
    config = {"folder": str(folder), "secagg-dir": str(folder / "keys")}
    outcome = engine.run(folder / "app", config, timeout=300.0, nodes=NODES, cpus=2)
    assert outcome.completed, outcome.log
    return json.loads((folder / "told.json").read_text())  # type: ignore[no-any-return]


def test_the_model_is_that_of_plain_flower_up_to_rounding(told: dict[str, Any]) -> None:
    updates = [np.random.default_rng(shard).standard_normal(5) for shard in range(NODES)]
    plain = ROUNDS * np.average(updates, axis=0, weights=np.arange(1, NODES + 1))
    bound = sum(row["train"]["quantisation-error"] for row in told["rows"])
    assert 0 < np.abs(np.array(told["model"]) - plain).max() <= bound < 1e-5


def test_every_round_was_masked_and_the_rows_say_that_a_simulation_protects_nothing(told: dict[str, Any]) -> None:
    assert [row["train"]["outcome"] for row in told["rows"]] == ["exact"] * ROUNDS
    assert all(row["evaluate"] is None and row["train"]["secure"]["simulated"] for row in told["rows"])
    assert not any(row["train"]["rejected"] for row in told["rows"])
    assert told["metrics"]["keys-seen"] == 0.0  # the app is not shown where they are
