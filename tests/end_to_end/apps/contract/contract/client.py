"""Training that depends on more than the message and the shard, in the way that the message names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_gradcode import gradient_coding_mod

app = ClientApp(mods=[gradient_coding_mod])
_kept: dict[str, Any] = {}


@app.train()
def train(message: Message, context: Context) -> Message:
    """Add the data of the partition, or what the fault makes of them."""
    record: Any = message.content["arrays"]
    config: Any = message.content["config"]
    fault, shard = str(config["fault"]), int(context.node_config["partition-id"])
    update = np.random.default_rng(shard).standard_normal(5)
    if fault == "loader":
        update = _kept.setdefault("data", update)
    if fault == "file":
        path = Path(str(context.run_config["folder"])) / f"state-{shard}"
        count = len(path.read_text()) if path.exists() else 0
        path.write_text("." * (count + 1))
        update = update * (1 + count)
    more = {"told": ConfigRecord({"steps": 3})} if fault == "config" else {}
    arrays = ArrayRecord({"w": Array(record["w"].numpy() + update)})
    metrics = MetricRecord({"num-examples": shard + 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics, **more}), reply_to=message)
