"""FedAvg under GradientCoding on six nodes, any two of which may be missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition

from .client import initial_arrays, load

CODE = fractional_repetition(6, 2)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; leave accuracies and the final model in files."""
    folder = Path(str(context.run_config["folder"]))
    x, y = load(folder / "test.npz")

    def measure(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        w, b = arrays.to_numpy_ndarrays()
        accuracy = float(np.mean((x @ w + b).argmax(axis=1) == y))
        with (folder / "accuracy.jsonl").open("a") as file:
            file.write(json.dumps({"round": server_round, "accuracy": accuracy}) + "\n")

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODE, ledger=folder / "ledger.jsonl", on_round_end=measure)
    rounds = int(str(context.run_config["num-server-rounds"]))
    result = strategy.start(grid, initial_arrays(), num_rounds=rounds, timeout=120.0)
    np.savez(folder / "final.npz", *result.arrays.to_numpy_ndarrays())
