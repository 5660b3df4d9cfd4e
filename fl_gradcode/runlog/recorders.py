"""Functions for `GradientCoding(on_round_end=)` that send the numbers of each round to TensorBoard or MLflow.

strategy = GradientCoding(FedAvg(), code, on_round_end=to_tensorboard("/data/run/tensorboard"))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord

from .._files import absolute_path
from .figures import figures_of
from .rows import RoundRow

__all__ = ["Recorder", "to_mlflow", "to_tensorboard"]

#: What `GradientCoding(on_round_end=)` takes: called with the round, the current arrays and the ledger row.
Recorder = Callable[[int, ArrayRecord, dict[str, Any]], None]
#: Figures of your own, such as an accuracy: function (round, arrays) -> name -> number.
_More = Callable[[int, ArrayRecord], Mapping[str, float]]


def to_tensorboard(folder: str | os.PathLike[str], *, more: _More | None = None) -> Recorder:
    """Returns a function that writes the numbers of each round to a folder that TensorBoard reads.

    Each round is on disk when the function returns, so that TensorBoard shows a run while it goes. A resumed run may
    write to the same folder.

    Args:
        folder: Absolute path; the folder is made at the first round.
        more: Figures of your own for each round, from its number and the current arrays, such as an accuracy.

    Raises:
        InvalidSetting: The path is relative.
        ImportError: tensorboard is not installed.
    """
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise ImportError("TensorBoard is not installed: pip install 'tensorboard>=2.17'.") from error
    path = absolute_path(folder, "folder")
    opened: list[Writer] = []

    def record(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        if not opened:
            opened.append(Writer(str(path)))
        for name, value in _figures(server_round, arrays, row, more).items():
            opened[0].add_scalar(name, value, step=server_round)
        opened[0].flush()

    return record


def to_mlflow(*, more: _More | None = None) -> Recorder:
    """Returns a function that logs the numbers of each round to the active run of MLflow.

    MLflow starts a run if none is active. To name the run or its server, do so before `start`, as in any program:

        mlflow.set_tracking_uri("http://mlflow.example.org")
        with mlflow.start_run(run_name="coded"):
            strategy.start(grid, arrays, num_rounds=30)

    The run gets the tags `fl-gradcode.code` and `fl-gradcode.run`.

    Args:
        more: Figures of your own for each round, from its number and the current arrays, such as an accuracy.

    Raises:
        ImportError: MLflow is not installed.
    """
    try:
        import mlflow
    except ImportError as error:
        raise ImportError("MLflow is not installed: pip install 'mlflow-skinny>=2.14'.") from error

    def record(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        code = row["code"]
        told = f"{code['name']}, n={code['n']}, k={code['k']}, s={code['s']}"
        mlflow.set_tags({"fl-gradcode.code": told, "fl-gradcode.run": row["run"]})
        mlflow.log_metrics(_figures(server_round, arrays, row, more), step=server_round)

    return record


def _figures(server_round: int, arrays: ArrayRecord, row: dict[str, Any], more: _More | None) -> dict[str, float]:
    """Returns the figures of a row and the user's own, which come last and win."""
    own = {} if more is None else {name: float(value) for name, value in more(server_round, arrays).items()}
    return {**figures_of(RoundRow.from_json(row)), **own}
