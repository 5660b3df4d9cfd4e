"""Handwritten digits by softmax regression in NumPy: quick to start, since each message starts a process."""
# As users write it: nobody narrows what a record holds.
# mypy: disable-error-code="arg-type, union-attr"

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_gradcode import gradient_coding_mod

PIXELS, DIGITS = 64, 10

app = ClientApp(mods=[gradient_coding_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Ten steps of gradient descent on this shard; the node config may slow it down."""
    time.sleep(float(context.node_config.get("seconds-per-shard", 0.0)))
    shard = int(context.node_config["partition-id"])
    x, y = load(Path(str(context.node_config["data"])) / f"shard-{shard}.npz")
    w, b = (array.astype(np.float64) for array in message.content["arrays"].to_numpy_ndarrays())
    for _ in range(10):
        error = softmax(x @ w + b) - np.eye(DIGITS)[y]
        w, b = w - 0.5 * x.T @ error / len(y), b - 0.5 * error.mean(axis=0)
    arrays = ArrayRecord([w.astype(np.float32), b.astype(np.float32)])
    metrics = MetricRecord({"num-examples": len(y)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def initial_arrays() -> ArrayRecord:
    """A model of zeros."""
    return ArrayRecord([np.zeros((PIXELS, DIGITS), np.float32), np.zeros(DIGITS, np.float32)])


def load(file: Path) -> tuple[Any, Any]:
    """Images and digits."""
    with np.load(file) as saved:
        return saved["x"], saved["y"]


def softmax(z: Any) -> Any:
    """Probabilities, row by row."""
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
