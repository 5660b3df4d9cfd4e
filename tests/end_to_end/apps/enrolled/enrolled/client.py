"""Training that adds a known vector for each shard."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_gradcode import gradient_coding_mod

app = ClientApp(mods=[gradient_coding_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Add the data of the partition."""
    record: Any = message.content["arrays"]
    shard = int(context.node_config["partition-id"])
    update = np.random.default_rng(shard).standard_normal(5)
    arrays = ArrayRecord({"w": Array(record["w"].numpy() + update)})
    metrics = MetricRecord({"num-examples": shard + 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
