"""Apps that break the contract, in Flower's simulation engine: it is told, or the model is plain Flower's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import on_engine

pytestmark = [pytest.mark.slow, on_engine("simulation")]
APP = Path(__file__).resolve().parent / "apps" / "contract"
NODES, ROUNDS = 4, 2


@pytest.fixture(scope="module")
def told(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("contract")
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    outcome = engine.run(folder / "app", {"folder": str(folder)}, timeout=300.0, nodes=NODES, cpus=NODES)
    assert outcome.completed, outcome.log
    return json.loads((folder / "told.json").read_text())  # type: ignore[no-any-return]


def plain() -> Any:
    weights = np.arange(1, NODES + 1)
    updates = [np.random.default_rng(shard).standard_normal(5) for shard in range(NODES)]
    return ROUNDS * np.average(updates, axis=0, weights=weights)


@pytest.mark.parametrize("fault", ["none", "config"])
def test_the_model_is_that_of_plain_flower_and_nothing_is_told(told: dict[str, Any], fault: str) -> None:
    assert told[fault]["outcomes"] == ["exact"] * ROUNDS
    assert np.allclose(told[fault]["model"], plain(), rtol=1e-6, atol=1e-9)
    assert not [
        text for text in told[fault]["warnings"] if "sent different updates" in text or "sent the same update" in text
    ]


@pytest.mark.parametrize("fault", ["loader", "file"])
def test_what_is_kept_is_told_by_holders_and_shards(told: dict[str, Any], fault: str) -> None:
    assert any("both hold shard" in text and "different updates" in text for text in told[fault]["warnings"])
    assert any(told[fault]["compared"])
