"""An app as in Flower's quickstart for PyTorch: a small network on digits. It knows nothing of coding."""
# As users write it: nobody narrows what a record holds.
# mypy: disable-error-code="arg-type, union-attr"

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RUN_CONFIG = {"num-server-rounds": 3, "local-epochs": 1, "batch-size": 32, "shuffle": False, "dropout": 0.0}


class Net(nn.Module):
    """A hidden layer of 32 units."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


def load_data(partition_id, num_partitions, batch_size, shuffle):
    """Loaders of the training and the test part of one partition."""
    digits = load_digits()
    x = torch.tensor(digits.data[partition_id::num_partitions] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[partition_id::num_partitions])
    split = int(0.8 * len(y))
    trainloader = DataLoader(TensorDataset(x[:split], y[:split]), batch_size=batch_size, shuffle=shuffle)
    testloader = DataLoader(TensorDataset(x[split:], y[split:]), batch_size=batch_size)
    return trainloader, testloader


def train_net(net, trainloader, epochs, lr):
    """Train with SGD and momentum; the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(trainloader))


def test_net(net, testloader):
    """Mean loss and accuracy."""
    net.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in testloader:
            outputs = net(images)
            loss += F.cross_entropy(outputs, labels).item()
            correct += (outputs.argmax(dim=1) == labels).sum().item()
    return loss / len(testloader), correct / len(testloader.dataset)


app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model = Net(context.run_config["dropout"])
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    partition_id = context.node_config["partition-id"]
    num_partitions = context.node_config["num-partitions"]
    batch_size, shuffle = context.run_config["batch-size"], context.run_config["shuffle"]
    trainloader, _ = load_data(partition_id, num_partitions, batch_size, shuffle)
    train_loss = train_net(model, trainloader, context.run_config["local-epochs"], msg.content["config"]["lr"])
    model_record = ArrayRecord(model.state_dict())
    metric_record = MetricRecord({"train_loss": train_loss, "num-examples": len(trainloader.dataset)})
    return Message(content=RecordDict({"arrays": model_record, "metrics": metric_record}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    partition_id = context.node_config["partition-id"]
    num_partitions = context.node_config["num-partitions"]
    _, testloader = load_data(partition_id, num_partitions, context.run_config["batch-size"], False)
    eval_loss, eval_acc = test_net(model, testloader)
    metric_record = MetricRecord(
        {"eval_loss": eval_loss, "eval_acc": eval_acc, "num-examples": len(testloader.dataset)}
    )
    return Message(content=RecordDict({"metrics": metric_record}), reply_to=msg)


def main(grid: Grid, context: Context) -> Result:
    """The ServerApp's main function."""
    torch.manual_seed(1)
    strategy = FedAvg()
    return strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        train_config=ConfigRecord({"lr": 0.1}),
    )
