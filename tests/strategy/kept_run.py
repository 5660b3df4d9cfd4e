"""A coded run that keeps itself in a checkpoint, as a process that a test can kill: kept_run.py FOLDER ROUNDS."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import numpy as np
from flwr.serverapp.strategy import FedAdam

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    random.seed(5)  # what the first start draws from; a later one goes on where that was
    strategy = GradientCoding(
        FedAdam(fraction_train=0.5, min_train_nodes=1, fraction_evaluate=0.5, min_evaluate_nodes=1),
        fractional_repetition(6, 1),
        ledger=folder / "ledger.jsonl",
        checkpoint=folder / "run.ckpt",
        on_round_end=lambda *_: time.sleep(0.01),
    )
    with InProcessGrid(toy_app(), 6) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=rounds)
    np.savez(folder / "final.npz", *result.arrays.to_numpy_ndarrays())
    (folder / "metrics").write_text(repr([result.train_metrics_clientapp, result.evaluate_metrics_clientapp]))


if __name__ == "__main__":
    main()
