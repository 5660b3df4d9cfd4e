"""Runs masked rounds whose keys no dealer has made, waits for a new node after the second, and tells what happened."""

from __future__ import annotations

import json
import time
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
    """Run, and write the model and the rows."""
    config: Any = context.run_config
    folder, known = Path(config["folder"]), {*grid.get_node_ids()}

    def wait(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        until = time.monotonic() + float(config["patience"])
        while server_round == 2 and time.monotonic() < until and {*grid.get_node_ids()} <= known:
            time.sleep(0.5)

    strategy = GradientCoding(
        FedAvg(),
        fractional_repetition(4, 1),
        secure=SecureAggregation(folder / "nodes" / "secagg-body.json"),
        ledger=folder / "ledger.jsonl",
        on_round_end=wait,
    )
    result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(5))}), num_rounds=int(config["rounds"]))
    model: Any = result.arrays["w"]
    told = {"run": strategy.run, "model": model.numpy().tolist(), "rows": [*strategy.ledger.rows]}
    (folder / "told.json").write_text(json.dumps(told))
