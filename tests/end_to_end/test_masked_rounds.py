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
from fl_gradcode import fractional_repetition
from fl_gradcode.cli.app import app as command_line
from fl_gradcode.privacy import SHARDS_SPENT, BudgetLedger
from tests.end_to_end.conftest import on_engine

pytestmark = [pytest.mark.slow, on_engine("simulation")]
APP = Path(__file__).resolve().parent / "apps" / "masked"
NODES, ROUNDS = 6, 3


def run(engine: Engine, folder: Path, layout: dict[str, Any], options: str, **more: Any) -> dict[str, Any]:
    """Make keys and a manifest by the command line, and run the app; returns what its server has left."""
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "layout.json").write_text(json.dumps(layout))
    make = f"secure make {folder / 'keys'} --layout {folder / 'layout.json'} --workers {NODES} --stragglers 1 {options}"
    assert CliRunner().invoke(command_line, make.split()).exit_code == 0
    config = {"folder": str(folder), "secagg-dir": str(folder / "keys"), **more}
    outcome = engine.run(folder / "app", config, timeout=300.0, nodes=NODES, cpus=2)
    assert outcome.completed, outcome.log
    return json.loads((folder / "told.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def told(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    layout = {"arrays": [["w", "float64", [5]]], "metrics": {"keys-seen": -1}}
    return run(engine, tmp_path_factory.mktemp("masked"), layout, "--largest-weight 6 --bound 4")


def test_integer_noise_in_the_simulation_engine(engine: Engine, tmp_path: Path) -> None:
    """Nodes keep a ledger of what their shards have spent, and the model is the noisy mean of clipped updates."""
    layout, multiplier, rounds = {"arrays": [["w", "float64", [5]]]}, 0.01, 2
    told = run(
        engine,
        tmp_path,
        layout,
        f"--noise-multiplier {multiplier} --clipping-norm 2",
        **{"noise-multiplier": multiplier, "rounds": rounds},
    )
    assert [row["train"]["outcome"] for row in told["rows"]] == ["exact"] * rounds
    updates = [np.random.default_rng(shard).standard_normal(5) for shard in range(NODES)]
    clipped = np.mean([one * min(1.0, 2.0 / float(np.linalg.norm(one))) for one in updates], axis=0)
    deviation = np.sqrt(rounds * NODES) * multiplier * 2.0 / NODES
    off = np.array(told["model"]) - rounds * clipped
    assert 0 < np.abs(off).max() < 8 * deviation  # one run in 10^14 is; without the clip all would
    assert told["rows"][-1]["train"]["privacy"]["noise"] == "integer"
    assert told["metrics"]["fl-gradcode.epsilon"] > 100 and "keys-seen" not in told["metrics"]
    for worker in range(NODES):
        ledger = BudgetLedger(tmp_path / "keys" / f"node-{worker}" / SHARDS_SPENT)
        for shard in fractional_repetition(NODES, 1).shards_of(worker):
            entries = ledger.entries(shard)
            assert len({one.round for one in entries}) == len(entries) <= rounds
            assert all(one.spend.noise_multiplier == pytest.approx(multiplier) for one in entries)


def test_holders_compare_before_each_round_in_the_simulation_engine(engine: Engine, tmp_path: Path) -> None:
    layout, rounds = {"arrays": [["w", "float64", [5]]], "metrics": {"keys-seen": -1}}, 2
    told = run(engine, tmp_path, layout, "--largest-weight 6 --bound 4 --agree-always", rounds=rounds)
    assert [row["train"]["outcome"] for row in told["rows"]] == ["exact"] * rounds
    updates = [np.random.default_rng(shard).standard_normal(5) for shard in range(NODES)]
    plain = rounds * np.average(updates, axis=0, weights=np.arange(1, NODES + 1))
    assert 0 < np.abs(np.array(told["model"]) - plain).max() < 1e-5


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
