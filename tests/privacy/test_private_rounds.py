"""Private rounds: whoever answers, the sum of the shards' private updates, released once."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import (
    GradientCode,
    GradientCoding,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    uncoded,
)
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat
from tests.privacy.private_app import initial, keys_for, private_app, settings

CODES = {
    "fractional": fractional_repetition(6, 2),
    "cyclic": cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
}


def run(
    code: GradientCode, folder: Path, silent: tuple[int, ...] = (), rounds: int = 1, **kwargs: Any
) -> tuple[ArrayRecord, list[dict[str, Any]]]:
    if not (folder / "node-0").exists():
        keys_for(code, folder)
    privacy = kwargs.pop("privacy", settings())
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, privacy=privacy, run="r", **kwargs)
    latency = Latency(compute=scaled(lognormal(), dict.fromkeys(silent, float("inf"))))
    with InProcessGrid(private_app(), code.n, run_config={"privacy-dir": str(folder)}) as inner:
        result = strategy.start(VirtualGrid(inner, latency, seed=1), initial(), num_rounds=rounds, timeout=1000.0)
    return result.arrays, strategy.ledger.rows


@pytest.mark.parametrize("name", CODES)
def test_any_four_of_six_decode_to_the_sum_of_the_private_updates(name: str, tmp_path: Path) -> None:
    code = CODES[name]
    keys_for(code, tmp_path / "keys")
    # The oracle: every shard trained once, by one holder, with the same secrets.
    shutil.copytree(tmp_path / "keys", tmp_path / "one")
    expected, _ = run(uncoded(6), tmp_path / "one")
    start = flat(initial())
    for silent in itertools.combinations(range(6), 2):
        arrays, rows = run(code, tmp_path / "keys", silent)
        assert rows[0]["train"]["outcome"] == "exact"
        assert not set(rows[0]["train"]["used"]) & set(silent)
        a, b = flat(arrays) - start, flat(expected) - start
        assert np.linalg.norm(a - b) < 1e-6 * np.linalg.norm(b), silent
