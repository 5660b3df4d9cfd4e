"""Central evaluation: accuracy on the test set, whole and by class, and a file of results over the rounds."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord

from clients.data import Dataset
from clients.models import build_model
from clients.training import evaluate_by_class

__all__ = ["CentralEvaluation"]


class CentralEvaluation:
    """Called by Flower before the first round and after each one.

    Args:
        dataset: Its test part is used.
        model: Name of the model.
        now: Seconds on the clock that the run is measured by, virtual or real.
        path: File for one JSON line a round, or None. A run that goes on after a restart keeps what is there of the
            rounds before.
    """

    def __init__(self, dataset: Dataset, model: str, *, now: Callable[[], float], path: str | None) -> None:
        self._dataset = dataset
        self._model = build_model(model, dataset, seed=0)
        self._now = now
        self._path = Path(path) if path else None
        self._started = time.perf_counter()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._kept = False

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Test loss, test accuracy and the accuracy on the worst class."""
        self._model.load_state_dict(arrays.to_torch_state_dict())
        x, y = torch.tensor(self._dataset.test_x), torch.tensor(self._dataset.test_y)
        loss, accuracy, by_class = evaluate_by_class(self._model, x, y, self._dataset.classes, self._device)
        if self._path is not None:
            row: dict[str, Any] = {
                "round": server_round,
                "seconds": self._now(),
                "real-seconds": time.perf_counter() - self._started,
                "loss": loss,
                "accuracy": accuracy,
                # A class without test examples has none: null, since JSON knows no NaN.
                "class-accuracies": [None if np.isnan(a) else float(a) for a in by_class],
            }
            if not self._kept:
                _keep_rounds_before(server_round, self._path)
                self._kept = True
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return MetricRecord(
            {"test-loss": loss, "test-accuracy": accuracy, "worst-class-accuracy": float(np.nanmin(by_class))}
        )


def _keep_rounds_before(server_round: int, path: Path) -> None:
    """Leave out what will be measured again, and what was being written when a process was killed."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["round"] < server_round:
                kept.append(line + "\n")
    path.write_text("".join(kept))
