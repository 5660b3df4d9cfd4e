"""Four SuperNodes with integer noise under masks, that compare before each vector; one is killed while it trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from experiments.engine import Engine
from fl_gradcode.cli.app import app as command_line
from fl_gradcode.privacy import SHARDS_SPENT, BudgetLedger, IntegerNoise
from fl_gradcode.secagg import read_manifest
from tests.end_to_end.conftest import prepared

pytestmark = pytest.mark.slow
APP = Path(__file__).resolve().parent / "apps" / "masked"
NODES, ROUNDS, SIZE, KILLED = 4, 1, 4000, 2
STRAGGLERS = 2  # three of the four hold each shard, and without one of them two are left: more than half
NOISE = IntegerNoise(noise_multiplier=4.0, clipping_norm=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("noisy")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    """One node trains until it is killed, so that another one has to answer for its shard."""
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "layout.json").write_text(json.dumps({"arrays": [["w", "float64", [SIZE]]]}))
    make = f"secure make {folder / 'keys'} --layout {folder / 'layout.json'} -n {NODES} -s {STRAGGLERS}"
    make += f" --code reed-solomon --agree-always --noise-multiplier {NOISE.noise_multiplier}"
    make += f" --clipping-norm {NOISE.clipping_norm} --colluders 0"
    found = CliRunner().invoke(command_line, make.split())
    assert found.exit_code == 0, found.output
    notes = [folder / f"notes-{worker}" for worker in range(NODES)]
    for path in notes:
        path.mkdir()
    (notes[KILLED] / "wait-1").touch()

    def node_config(number: int) -> str:
        own = folder / "keys" / f"node-{number}"
        return f'secagg-dir="{own}" secagg-app-config="notes-dir" notes-dir="{notes[number]}"'

    engine = prepared(Engine(NODES, deployed=True, folder=folder / "engine", node_config=node_config))
    killed: list[int] = []

    def look() -> None:
        if not killed and any(notes[KILLED].glob("1-*")):
            killed.append(KILLED)
            engine.kill_node(KILLED)

    config = {"folder": str(folder), "nodes": NODES, "rounds": ROUNDS, "size": SIZE}
    config |= {"code": "reed-solomon", "stragglers": STRAGGLERS}
    with engine:
        outcome = engine.run(
            folder / "app",
            {**config, "noise-multiplier": NOISE.noise_multiplier},
            timeout=400.0,
            while_waiting=look,
        )
    assert outcome.completed, outcome.log
    assert killed
    return json.loads((folder / "told.json").read_text())  # type: ignore[no-any-return]


def clipped(shard: int) -> NDArray[np.float64]:
    update = np.random.default_rng(shard).standard_normal(SIZE)
    return update * min(1.0, NOISE.clipping_norm / float(np.linalg.norm(update)))


def test_the_round_decodes_without_the_killed_node(told: dict[str, Any]) -> None:
    trains = [row["train"] for row in told["rows"]]
    assert [train["outcome"] for train in trains] == ["exact"] * ROUNDS
    assert KILLED not in trains[0]["used"]
    assert not any(train["secure"]["simulated"] or train["secure"]["clipped"] is not None for train in trains)


def test_the_model_has_the_noise_of_every_shard_once(told: dict[str, Any], folder: Path) -> None:
    """The variance of all entries, which is 2.2 % wide: it would be a third less if a shard's noise were missing."""
    quantiser = read_manifest(folder / "keys" / "node-0").body.quantiser
    largest_change = NOISE.clipping_norm + np.sqrt(SIZE) * 2.0**-quantiser.fraction_bits
    variance = ROUNDS * NODES * (NOISE.noise_multiplier * largest_change / NODES) ** 2
    noise = np.array(told["model"]) - ROUNDS * np.mean([clipped(shard) for shard in range(NODES)], axis=0)
    assert abs(float(noise.var()) / variance - 1) < 8 * np.sqrt(2 / SIZE)
    assert abs(float(noise.mean())) < 8 * np.sqrt(variance / SIZE)


def test_the_rows_and_the_nodes_say_what_was_spent(told: dict[str, Any], folder: Path) -> None:
    for number, row in enumerate(told["rows"], start=1):
        line = row["train"]["privacy"]
        assert (line["unit"], line["noise"], line["noise-multiplier"]) == ("shard", "integer", NOISE.noise_multiplier)
        assert line["epsilon"] == pytest.approx(NOISE.epsilon(number))
    trained = [path.name.split("-")[1] for path in (folder / f"notes-{KILLED}").glob("1-*")]
    spent: dict[tuple[int, int], list[int]] = {}
    for worker in range(NODES):
        ledger = BudgetLedger(folder / "keys" / f"node-{worker}" / SHARDS_SPENT)
        for shard in range(NODES):
            spent[worker, shard] = [entry.round for entry in ledger.entries(shard)]
    assert all(rounds in ([], [1]) for rounds in spent.values())
    assert {shard for (_, shard), rounds in spent.items() if rounds} == {*range(NODES)}
    # What it was killed in the midst of is charged there, and was answered for by another node, which charged it too.
    (unfinished,) = {int(shard) for shard in trained}
    assert spent[KILLED, unfinished] and any(spent[worker, unfinished] for worker in (0, 1))
