"""ClientApp: train privately on the data of one partition."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_gradcode import gradient_coding_mod
from fl_gradcode.privacy import private_training

from .task import create_model, load_data

app = ClientApp(mods=[gradient_coding_mod])


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data: each record's gradient is clipped, and noise is added to their sum."""
    config = context.run_config
    model = create_model()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    x, y = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    with private_training(msg, context, model, examples=len(y)) as dp:
        optimizer = dp.optimizer(torch.optim.SGD(model.parameters(), lr=config["learning-rate"]))
        criterion = dp.criterion(torch.nn.CrossEntropyLoss())
        for batch in dp.batches():
            optimizer.zero_grad()
            criterion(dp.model(x[batch]), y[batch]).backward()
            optimizer.step()
    metrics = MetricRecord({"num-examples": len(y)})
    records = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics, "privacy": dp.record}
    return Message(RecordDict(records), reply_to=msg)
