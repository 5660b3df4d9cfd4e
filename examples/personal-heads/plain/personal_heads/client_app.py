"""ClientApp: fit the head, train the body under it, and send the body."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .task import create_body, fit_head, load_data
from .task import test as test_fn
from .task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the body on local data."""
    body, head, trainset, _ = load(msg, context)
    loss = train_fn(
        body,
        head,
        trainset,
        context.run_config["body-epochs"],
        context.run_config["batch-size"],
        context.run_config["learning-rate"],
    )
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(trainset)})
    return Message(RecordDict({"arrays": ArrayRecord(body.state_dict()), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Test the body under the head of this partition."""
    body, head, _, testset = load(msg, context)
    loss, accuracy = test_fn(body, head, testset)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(testset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


def load(msg, context):
    """The body that the server sent, the head of this partition, and its data."""
    body = create_body()
    body.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    trainset, testset = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    return body, fit_head(body, trainset, context.run_config["head-steps"]), trainset, testset
