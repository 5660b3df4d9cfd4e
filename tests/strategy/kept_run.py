"""A coded run that keeps itself in a checkpoint, as a process that a test can kill.

Each line "ROUNDS FOLDER" of the input starts one, and prints its process id and, when it has ended, its exit status. It
is forked from this process, which has imported everything and does nothing else.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
from flwr.serverapp.strategy import FedAdam

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app


def run(folder: Path, rounds: int) -> None:
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


def main() -> None:
    for line in sys.stdin:
        rounds, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if child == 0:
            try:
                run(Path(folder), int(rounds))
            except BaseException:
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
