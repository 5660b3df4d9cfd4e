"""ClientApp: train privately on the data of one partition."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

from .task import create_model, load_data

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data: each record's gradient is clipped, and noise is added to their sum."""
    config = context.run_config
    model = create_model()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    x, y = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    optimizer = torch.optim.SGD(model.parameters(), lr=config["learning-rate"])
    criterion = torch.nn.CrossEntropyLoss()
    private_model, optimizer, batches = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=round(config["sample-rate"] * len(y))),
        noise_multiplier=config["noise-multiplier"],
        max_grad_norm=config["max-grad-norm"],
    )
    for _, (images, labels) in zip(range(config["local-steps"]), batches, strict=False):
        optimizer.zero_grad()
        criterion(private_model(images), labels).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(y)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=msg)
