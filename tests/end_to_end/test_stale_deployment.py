"""Six SuperNodes with bounded staleness, of which one is 30 s late in each round; the ServerApp is killed once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from experiments.engine import Engine
from fl_gradcode import Ledger
from tests.conftest import flat
from tests.end_to_end.apps.straggling.straggling import client
from tests.end_to_end.conftest import copy_of_the_app, distance, prepared, saved_arrays

pytestmark = [pytest.mark.slow, pytest.mark.stress]

NODES, ROUNDS, SLEEPER, LATE = 6, 7, 1, 30.0
_PATIENCE = 300.0  # seconds


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with prepared(Engine(NODES, deployed=True, database=True, folder=tmp_path_factory.mktemp("stale"))) as engine:
        yield engine


def trained(model: NDArray[np.float64], shard: int) -> NDArray[np.float64]:
    """What the app's train() does, by hand."""
    x, y = client._data(shard)
    w, b = model[:-1].copy(), model[-1:].copy()
    for _ in range(5):
        error = 1 / (1 + np.exp(-(x @ w + b))) - y
        w, b = w - 0.5 * x.T @ error / len(y), b - 0.5 * error.mean(keepdims=True)
    return np.concatenate([w, b])


def by_hand(rows: list[dict[str, Any]]) -> NDArray[np.float64]:
    """The model that the ledger tells of: in each round the weighted mean of updates of the rounds that it names."""
    weights = np.array([len(client._data(j)[1]) for j in range(NODES)], float)
    models = [flat(client.initial_arrays())]
    for row in rows:
        used = np.full(NODES, row["round"])
        for one in row["train"]["filled-in"]:
            used[one["shards"]] = one["round"]
        updates = [trained(models[t - 1], j) - models[t - 1] for j, t in enumerate(used)]
        models.append(models[-1] + np.average(updates, axis=0, weights=weights))
    return models[-1]


def test_a_killed_server_goes_on_with_the_same_last_updates(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    app, ledger = copy_of_the_app(folder), folder / "ledger.jsonl"
    config: dict[str, Any] = {
        "num-server-rounds": ROUNDS,
        "nodes": NODES,
        "fraction-evaluate": 0.0,
        "staleness": 3,
        "sleeper": SLEEPER,
        "sleep-seconds": LATE,
        "sleeps-from": 2,
        "checkpoint": str(folder / "run.ckpt"),
        "folder": str(folder),
        "pauses": "4",
    }
    run_id = engine.submit(app, config)
    deadline = time.monotonic() + _PATIENCE
    while not (ledger.exists() and len(Ledger.read(ledger)) == 4):
        assert time.monotonic() < deadline, engine.flwr.log(run_id)
        time.sleep(0.2)
    engine.kill_serverapp()  # in the pause after round 4, before its model is saved
    outcome = engine.wait(engine.submit(app, {**config, "pauses": ""}), _PATIENCE)
    (folder / "wake-up").touch()
    assert outcome.completed, outcome.log
    rows = Ledger.read(ledger)
    assert [row["round"] for row in rows] == [*range(1, ROUNDS + 1)]
    assert all(row["train"]["outcome"] in ("exact", "stale") for row in rows)
    assert all(len(row["train"]["ages"]) <= 4 for row in rows)
    assert distance(saved_arrays(folder / "final.npz"), by_hand(rows)) < 1e-5
