"""FedAvg under GradientCoding on four nodes; the test may make it pause between rounds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition

from .client import initial_arrays, note

_PATIENCE = 200.0  # seconds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; leave the final arrays in a file."""
    config: Any = context.run_config
    folder = Path(str(config["folder"]))
    pauses = {int(part) for part in str(config["pauses"]).split(",") if part}

    def between(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        note(str(folder), what="ended", round=server_round)
        deadline = time.monotonic() + _PATIENCE
        while server_round in pauses and not (folder / f"go-{server_round}").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"The test never let round {server_round + 1} begin.")
            time.sleep(0.1)
        note(str(folder), what="went on", round=server_round)

    strategy = GradientCoding(
        FedAvg(fraction_evaluate=config["fraction-evaluate"]),
        fractional_repetition(4, 1),
        send=config["send"],
        ledger=folder / "ledger.jsonl",
        on_round_end=between,
    )
    note(str(folder), what="went on", round=0)
    result = strategy.start(grid, initial_arrays(), num_rounds=config["num-server-rounds"])
    np.savez(folder / "final.npz", *result.arrays.to_numpy_ndarrays())
