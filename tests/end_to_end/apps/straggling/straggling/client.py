"""Logistic regression in NumPy alone; one node sleeps in train(), another raises, if the run-config says so."""
# As users write it: nobody narrows what a record holds.
# mypy: disable-error-code="arg-type, union-attr"

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_gradcode import gradient_coding_mod

FEATURES = 12


@dataclass
class _Visit:
    """Which worker the current message makes us, until train() has taken notice."""

    worker: int = -1
    new: bool = False


_visit = _Visit()


def know_the_worker(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Inside train() `partition-id` is a shard: out here, around the mod for coding, it is the worker."""
    _visit.worker, _visit.new = int(context.node_config["partition-id"]), True
    return gradient_coding_mod(message, context, call_next)


app = ClientApp(mods=[know_the_worker])


@app.train()
def train(message: Message, context: Context) -> Message:
    """A few steps of gradient descent on this shard; trouble comes first."""
    server_round = int(message.content["config"]["server-round"])
    if _visit.new:
        _visit.new = False
        _make_trouble(context.run_config, _visit.worker, server_round, message.content["config"])
    x, y = _data(int(context.node_config["partition-id"]))
    w, b = (array.astype(np.float64) for array in message.content["arrays"].to_numpy_ndarrays())
    for _ in range(5):
        error = 1 / (1 + np.exp(-(x @ w + b))) - y
        w, b = w - 0.5 * x.T @ error / len(y), b - 0.5 * error.mean(keepdims=True)
    metrics = MetricRecord({"num-examples": len(y), "loss": _loss(x, y, w, b)})
    arrays = ArrayRecord([w.astype(np.float32), b.astype(np.float32)])
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The loss on this shard."""
    x, y = _data(int(context.node_config["partition-id"]))
    w, b = message.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": len(y), "loss": _loss(x, y, w, b)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def initial_arrays() -> ArrayRecord:
    """A model of zeros."""
    return ArrayRecord([np.zeros(FEATURES, np.float32), np.zeros(1, np.float32)])


def note(folder: str, **event: Any) -> None:
    """Add a line to the events of the run, with the time."""
    if folder:
        with (Path(folder) / "events.jsonl").open("a") as file:
            file.write(json.dumps({**event, "time": time.time()}) + "\n")


def read_notes(folder: Path) -> list[dict[str, Any]]:
    """All events so far."""
    file = folder / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _make_trouble(config: Any, worker: int, server_round: int, asked: Any) -> None:
    folder = str(config["folder"])
    more = {"block": asked["block"]} if "block" in asked else {}
    note(folder, what="began", worker=worker, round=server_round, **more)
    if worker == config["sleeper"] and server_round >= config["sleeps-from"] and asked.get("asleep", True):
        note(folder, what="asleep", worker=worker, round=server_round, **more)
        until = time.monotonic() + float(config["sleep-seconds"])
        # a file comes when the sleep has lasted long enough for the test: nobody need wait for what is left of it
        names = ["wake-up", f"wake-up-round-{server_round}", *(f"wake-up-block-{block}" for block in more.values())]
        files = [Path(folder) / name for name in names]
        while time.monotonic() < until and not any(file.exists() for file in files):
            time.sleep(0.2)
        note(folder, what="awake", worker=worker, round=server_round, **more)
    if worker == config["raiser"]:
        raise RuntimeError(f"worker {worker} is out of disk")


def _data(shard: int) -> tuple[Any, Any]:
    """Shard j has 20 + 10 j examples, shifted by j: the shards pull in different directions."""
    rng = np.random.default_rng((7, shard))
    x = rng.standard_normal((20 + 10 * shard, FEATURES)) + 0.3 * shard
    return x, (x[:, shard] + 0.5 * rng.standard_normal(len(x)) > 0).astype(np.float64)


def _loss(x: Any, y: Any, w: Any, b: Any) -> float:
    z = x @ w + b
    return float(np.mean(np.logaddexp(0, z) - y * z))
