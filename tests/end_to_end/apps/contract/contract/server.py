"""Runs each fault, plain and coded, and leaves what happened in a file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition

_NODES = 4
app = ServerApp()


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the faults one after the other."""
    told = {}
    for fault, send in [("none", "coded"), ("loader", "coded"), ("file", "coded"), ("config", "shards")]:
        told[fault] = _run(grid, fault, send)
    (Path(str(context.run_config["folder"])) / "told.json").write_text(json.dumps(told))


def _run(grid: Grid, fault: str, send: Any) -> dict[str, Any]:
    heard, logger = _Heard(), logging.getLogger("fl_gradcode")
    logger.addHandler(heard)
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(_NODES, 1), send=send)
    arrays = ArrayRecord({"w": Array(np.zeros(5))})
    result = strategy.start(grid, arrays, num_rounds=2, train_config=ConfigRecord({"fault": fault}))
    logger.removeHandler(heard)
    model: Any = result.arrays["w"]
    rows = [row["train"] for row in strategy.ledger.rows]
    return {
        "warnings": heard.texts,
        "model": model.numpy().tolist(),
        "compared": [row["compared"] for row in rows],
        "outcomes": [row["outcome"] for row in rows],
    }
