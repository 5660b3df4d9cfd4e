"""Training that adds a known vector for each shard, and an evaluation that returns a known number."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_gradcode import gradient_coding_mod

app = ClientApp(mods=[gradient_coding_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Add the data of the partition. With a `notes-dir`, note what is trained, and wait in the round that waits."""
    record: Any = message.content["arrays"]
    config: Any = message.content["config"]
    shard, server_round = int(context.node_config["partition-id"]), int(config["server-round"])
    if "notes-dir" in context.node_config:
        notes = Path(str(context.node_config["notes-dir"]))
        (notes / f"{server_round}-{shard}-{uuid.uuid4().hex}").touch()
        waits = notes / f"wait-{server_round}"
        while waits.exists():  # the test takes it away
            time.sleep(0.1)
    model = record["w"].numpy()
    arrays = ArrayRecord({"w": Array(model + np.random.default_rng(shard).standard_normal(model.size))})
    metrics = MetricRecord({"num-examples": shard + 1, "keys-seen": float("secagg-dir" in context.run_config)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Return the number of the shard."""
    shard = int(context.node_config["partition-id"])
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "shard": float(shard)})}), reply_to=message)
