"""ClientApp: train on the data of one partition."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .task import create_model, load_data

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model = create_model(msg.content["arrays"].to_numpy_ndarrays())
    x, y = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    for _ in range(context.run_config["local-epochs"]):
        model.partial_fit(x, y, classes=np.arange(10))
    metrics = MetricRecord({"train_accuracy": model.score(x, y), "num-examples": len(y)})
    return Message(
        RecordDict({"arrays": ArrayRecord([model.coef_, model.intercept_]), "metrics": metrics}), reply_to=msg
    )
