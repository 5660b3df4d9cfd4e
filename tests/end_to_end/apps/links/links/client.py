"""A model of 2 MB that moves by noise: its replies cannot be compressed."""
# As users write it: nobody narrows what a record holds.
# mypy: disable-error-code="arg-type, union-attr"

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_gradcode import gradient_coding_mod

PARAMETERS = 500_000

_here = {"worker": -1}


def note_the_worker(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Which node is which worker, said by the client itself: inside train() `partition-id` is a shard."""
    worker = _here["worker"] = int(context.node_config["partition-id"])
    note(str(context.run_config["folder"]), what="began", worker=worker, node=context.node_id)
    reply = gradient_coding_mod(message, context, call_next)
    note(str(context.run_config["folder"]), what="done", worker=worker, node=context.node_id)
    return reply


app = ClientApp(mods=[note_the_worker])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Noise of this shard and round; shard j has j + 1 examples."""
    shard = int(context.node_config["partition-id"])
    server_round = int(message.content["config"]["server-round"])
    (model,) = message.content["arrays"].to_numpy_ndarrays()
    noise = np.random.default_rng((server_round, shard)).standard_normal(model.size, dtype=np.float32)
    new = model + noise
    if _here["worker"] == context.run_config["slow"]:
        # Another processor, which rounds otherwise: Flower uploads no object that the SuperLink has, and the partner's
        # reply would be the same in every bit.
        new = np.nextafter(new, np.float32(np.inf))
    metrics = MetricRecord({"num-examples": shard + 1})
    return Message(RecordDict({"arrays": ArrayRecord([new]), "metrics": metrics}), reply_to=message)


def initial_arrays() -> ArrayRecord:
    """A model of ones."""
    return ArrayRecord([np.ones(PARAMETERS, np.float32)])


def note(folder: str, **event: Any) -> None:
    """Add a line to the events of the run, with the time."""
    if folder:
        with (Path(folder) / "events.jsonl").open("a") as file:
            file.write(json.dumps({**event, "time": time.time()}) + "\n")
