"""Runs three masked rounds, and leaves what happened in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.secagg import SecureAggregation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, and write the model, the rows and the metrics."""
    folder = Path(str(context.run_config["folder"]))
    secure = SecureAggregation(folder / "keys" / "secagg-manifest.json")
    strategy = GradientCoding(FedAvg(), fractional_repetition(6, 1), secure=secure)
    result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(5))}), num_rounds=3)
    model: Any = result.arrays["w"]
    told = {
        "model": model.numpy().tolist(),
        "rows": [*strategy.ledger.rows],
        "metrics": dict(result.train_metrics_clientapp[3]),
    }
    (folder / "told.json").write_text(json.dumps(told))
