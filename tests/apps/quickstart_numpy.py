"""An app whose model is a list of NumPy arrays: least squares by gradient steps. It knows nothing of coding."""
# As users write it: nobody narrows what a record holds.
# mypy: disable-error-code="arg-type, union-attr"

import random

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

RUN_CONFIG = {"num-server-rounds": 3, "noise": 0.0}


def load_data(partition_id):
    """Partition i has 10 (i + 1) examples."""
    rng = np.random.default_rng(partition_id)
    x = rng.standard_normal((10 * (partition_id + 1), 5))
    return x, x @ np.arange(5) + 0.1 * rng.standard_normal(len(x)) + partition_id


app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Ten gradient steps; with noise, from NumPy's and Python's own generators."""
    w, b = msg.content["arrays"].to_numpy_ndarrays()
    partition_id = context.node_config["partition-id"]
    x, y = load_data(partition_id)
    noise = context.run_config["noise"]
    for _ in range(10):
        draw = np.random.standard_normal(len(y))  # noqa: NPY002  # as users write it
        error = x @ w + b - y + noise * (draw + random.random())
        w, b = w - 0.1 * x.T @ error / len(y), b - 0.1 * error.mean(keepdims=True)
    metrics = MetricRecord({"num-examples": len(y), "loss": float(np.mean((x @ w + b - y) ** 2))})
    return Message(content=RecordDict({"arrays": ArrayRecord([w, b]), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """The loss on local data."""
    w, b = msg.content["arrays"].to_numpy_ndarrays()
    partition_id = context.node_config["partition-id"]
    x, y = load_data(partition_id)
    metrics = MetricRecord({"num-examples": len(y), "loss": float(np.mean((x @ w + b - y) ** 2))})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


def main(grid: Grid, context: Context) -> Result:
    """The ServerApp's main function."""
    strategy = FedAvg()
    return strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(5), np.zeros(1)]),
        num_rounds=context.run_config["num-server-rounds"],
    )
