"""ClientApp: train the adapters on the data of one partition."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_gradcode import gradient_coding_mod

from .lora import adapters, load_adapters
from .task import create_model, load_data
from .task import train as train_fn

app = ClientApp(mods=[gradient_coding_mod])


@app.train()
def train(msg: Message, context: Context):
    """Train the adapters on local data."""
    model = create_model()
    load_adapters(model, msg.content["arrays"].to_torch_state_dict())
    partition_id = context.node_config["partition-id"]
    num_partitions = context.node_config["num-partitions"]
    trainloader = load_data(partition_id, num_partitions, context.run_config["batch-size"])
    loss = train_fn(model, trainloader, context.run_config["local-epochs"], context.run_config["learning-rate"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(trainloader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(adapters(model)), "metrics": metrics}), reply_to=msg)
