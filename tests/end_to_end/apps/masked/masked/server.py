"""Runs masked rounds, and leaves what happened in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.codes import reed_solomon
from fl_gradcode.privacy import IntegerNoise
from fl_gradcode.secagg import SecureAggregation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, and write the model, the rows and the metrics."""
    config = context.run_config
    folder, nodes, rounds = Path(str(config["folder"])), int(config["nodes"]), int(config["rounds"])
    family = reed_solomon if config["code"] == "reed-solomon" else fractional_repetition
    code = family(nodes, int(config["stragglers"]))
    noise = float(config["noise-multiplier"])
    secure = SecureAggregation(folder / "keys" / "secagg-manifest.json")
    strategy = GradientCoding(
        FedAvg(),
        code,
        send=secure.send,
        privacy=IntegerNoise(noise_multiplier=noise, clipping_norm=2.0) if noise else None,
        secure=secure,
        ledger=folder / "ledger.jsonl",
        checkpoint=folder / "run.ckpt",
    )
    result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(int(config["size"])))}), num_rounds=rounds)
    model: Any = result.arrays["w"]
    told = {
        "model": model.numpy().tolist(),
        "rows": [*strategy.ledger.rows],
        "metrics": dict(result.train_metrics_clientapp[rounds]),
        "evaluated": [dict(metrics) for metrics in result.evaluate_metrics_clientapp.values()],
    }
    (folder / "told.json").write_text(json.dumps(told))
