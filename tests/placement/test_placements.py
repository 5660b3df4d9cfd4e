"""Real data (embedded digits where it is not at hand) on unequal clients: shorter uploads, and everybody's model."""

from __future__ import annotations

import gzip
import tomllib
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from clients.app import app as client_app
from clients.data import load_dataset
from clients.models import build_model
from fl_gradcode import GradientCode, GradientCoding, VirtualGrid
from fl_gradcode.codes import for_assignment, reed_solomon
from fl_gradcode.latency import Latency, Law
from fl_gradcode.placement.assignment import assign
from fl_gradcode.testing import InProcessGrid
from tests.conftest import relative
from tests.once import Once

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
HOSPITALS = [4, 4, 2, 2]  # how many hospitals' data each hospital may keep: 12 places for 4 shards, 3 each


def config(**changes: Any) -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return {**tomllib.load(file)["tool"]["flwr"]["app"]["config"], **changes}


def silent(workers: Sequence[int]) -> Latency:
    return Latency(compute=Law("silent", lambda seed, worker, tick: float("inf") if worker in workers else 1.0))


def model_of(settings: dict[str, Any]) -> ArrayRecord:
    dataset = load_dataset(settings["dataset"], settings["data-dir"])
    return ArrayRecord(build_model(settings["model"], dataset, seed=0).state_dict())


def run(settings: dict[str, Any], n: int, app: Any, code: GradientCode | None, stragglers: Sequence[int]) -> Any:
    """One round; what comes out, and the ledger's row of its training."""
    inner = FedAvg(fraction_evaluate=0.0)
    with InProcessGrid(app, n, run_config=settings) as grid:
        if code is None:
            return inner.start(grid, model_of(settings), num_rounds=1).arrays, {}
        strategy = GradientCoding(inner, code, run="placements")
        result = strategy.start(VirtualGrid(grid, silent(stragglers)), model_of(settings), num_rounds=1, timeout=60)
        return result.arrays, strategy.ledger.rows[0]["train"]


def sizes(app: Once) -> set[int]:
    """Bytes of the coded vectors that were sent."""
    vectors: Any = [content["fl-gradcode.update"] for content in app.known.values()]
    return {len(record["arrays"].data) for record in vectors}


@pytest.fixture(scope="module")
def hospitals() -> dict[str, Any]:
    folder = REAL / "heart_disease"
    if not folder.is_dir():
        return config()  # digits, which need no files
    return config(dataset="heart-disease", **{"data-dir": str(folder), "partitioner": "natural"})


@pytest.mark.parametrize("m", [1, 2])
def test_hospitals_of_unequal_capacity_train_as_if_all_took_part(hospitals: dict[str, Any], m: int) -> None:
    plan = assign(4, HOSPITALS, owners=range(4))
    assert (plan.loads, plan.replication, plan.largest_m(1)) == ((4, 4, 2, 2), 3, 2)
    expected, _ = run(hospitals, 4, client_app, None, [])
    app = Once(client_app)
    for missing in [(), *combinations(range(4), 1)]:
        actual, row = run(hospitals, 4, app, for_assignment(plan, s=1, m=m), missing)
        assert row["outcome"] == "exact" and not set(missing) & set(row["used"])
        assert relative(actual, expected) < 1e-5


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first 6,000 and 1,000 images of Fashion-MNIST; 20 clients with Dirichlet shares of them."""
    source = REAL / "fashion_mnist"
    if not source.is_dir():
        return config(partitioner="dirichlet", alpha=0.3)  # digits, which need no files
    folder = tmp_path_factory.mktemp("fashion")
    for file in source.glob("*.gz"):
        raw = gzip.decompress(file.read_bytes())
        count, header = (6000 if "train" in file.name else 1000), 4 + 4 * raw[3]
        entries = int(np.prod(np.frombuffer(raw, ">u4", raw[3] - 1, 8))) if raw[3] > 1 else 1
        kept = raw[:4] + count.to_bytes(4, "big") + raw[8 : header + count * entries]
        (folder / file.name).write_bytes(gzip.compress(kept, 1))
    return config(dataset="fashion-mnist", **{"data-dir": str(folder), "partitioner": "dirichlet", "alpha": 0.3})


CAPACITIES = [12] * 6 + [8] * 8 + [5] * 6  # 166 places for 20 shards: 8 holders each, 160 places
FAMILIES: dict[str, Callable[[Any, int], GradientCode]] = {
    "universal": lambda plan, m: for_assignment(plan, s=3, m=m),
    "Reed-Solomon": lambda plan, m: reed_solomon(20, 3, m=m, assignment=plan),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_clients_of_three_capacities_upload_a_fraction(clothes: dict[str, Any], family: str) -> None:
    plan = assign(20, CAPACITIES, owners=range(20))
    assert (plan.replication, plan.largest_m(3)) == (8, 5)
    assert all(load <= capacity for load, capacity in zip(plan.loads, CAPACITIES, strict=True))
    expected, _ = run(clothes, 20, client_app, None, [])
    weight, rng = {}, np.random.default_rng(0)
    for m in (1, 2, 4):
        app, code = Once(client_app), FAMILIES[family](plan, m)
        sets = [(0, 1, 2), (17, 18, 19), *(tuple(rng.choice(20, 3, replace=False).tolist()) for _ in range(4))]
        for missing in sets:
            actual, row = run(clothes, 20, app, code, missing)
            assert row["outcome"] == "exact" and not set(missing) & set(row["used"])
            assert relative(actual, expected) < 1e-5, (m, missing, row["kappa"])
        (weight[m],) = sizes(app)
    entries = sum(array.size for array in model_of(clothes).to_numpy_ndarrays())
    for m in (1, 2, 4):
        print(f"{family}, m = {m}: {weight[m]} bytes a reply, ratio {weight[1] / weight[m]:.3f}")
        assert weight[m] == 128 + 4 * -(-entries // m)  # a header, and float32 or field elements
