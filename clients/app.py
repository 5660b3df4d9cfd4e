"""The Flower ClientApp: train and evaluate on the partition that the node config names."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import Tensor, nn

from clients import training
from clients.data import Dataset, load_dataset
from clients.errors import AppConfigError
from clients.models import build_model
from clients.shards import load_shard
from fl_gradcode import gradient_coding_mod
from fl_gradcode.privacy import asks_for_privacy, private_training

__all__ = ["app", "evaluate", "train"]

# One thread: sums then have one order, so the same training gives the same bits in every process,
# however many cores its machine has; and models this small are slower with more.
torch.set_num_threads(1)
# for the same reason on an accelerator
torch.backends.cudnn.deterministic = True
torch.backends.cudnn.benchmark = False

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_EVALUATION_SHARE = 0.2  # of each partition
_RUN, _NODE, _MESSAGE = "run config", "node config", "message config"  # for error sentences

app = ClientApp(mods=[gradient_coding_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on this partition and reply with the new one."""
    local = _local(context)
    config = _config(message)
    server_round = _integer(config, "server-round", _MESSAGE)
    model = _received_model(message, context, local.dataset)
    x, y = local.examples(local.train_indices)
    if asks_for_privacy(message, context):
        return _train_privately(message, context, local, model)
    loss = training.train(
        model,
        x,
        y,
        epochs=_positive(context.run_config, "local-epochs", _RUN),
        batch_size=_positive(context.run_config, "batch-size", _RUN),
        learning_rate=_number(context.run_config, "learning-rate", _RUN),
        proximal_mu=_number(config, "proximal-mu", _MESSAGE) if "proximal-mu" in config else 0.0,
        work_share=_share(config),
        seed=training.local_seed(local.seed, server_round, local.partition_id),
        device=_DEVICE,
    )
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(y), "train-loss": loss}),
        }
    )
    return Message(content, reply_to=message)


def _train_privately(message: Message, context: Context, local: "_Local", model: nn.Module) -> Message:
    if "proximal-mu" in _config(message):
        raise AppConfigError("Private training has no proximal term: take another strategy than fedprox, or no dp.")
    x, y = local.examples(local.train_indices)
    with private_training(message, context, model, examples=len(y), manifest=local.manifest) as dp:
        training.train_privately(
            dp, x, y, learning_rate=_number(context.run_config, "learning-rate", _RUN), device=_DEVICE
        )
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(y)}),
            "privacy": dp.record,
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the received model on the held-out part of this partition."""
    local = _local(context)
    x, y = local.examples(local.evaluation_indices)
    loss, accuracy = training.evaluate(_received_model(message, context, local.dataset), x, y, _DEVICE)
    metrics = MetricRecord({"num-examples": len(y), "eval-loss": loss, "eval-accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@dataclass(frozen=True)
class _Local:
    """What this node works on: one partition of one data set, cut into training and evaluation."""

    dataset: Dataset
    partition_id: int
    seed: int
    train_indices: NDArray[np.int64]
    evaluation_indices: NDArray[np.int64]

    @property
    def manifest(self) -> str:
        """A digest of the examples that are trained on: holders with others get other keys."""
        digest = hashlib.sha256()
        for tensor in self.examples(self.train_indices):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()

    def examples(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        x, y = self.dataset.train_x[indices], self.dataset.train_y[indices]
        return torch.from_numpy(x), torch.from_numpy(y)


def _local(context: Context) -> _Local:
    # read at every call, never kept: one process may serve several nodes and partitions
    partition_id = _integer(context.node_config, "partition-id", _NODE)
    num_partitions = _integer(context.node_config, "num-partitions", _NODE)
    if not 0 <= partition_id < num_partitions:
        raise AppConfigError(
            f"partition-id is {partition_id}; with num-partitions {num_partitions} it is between 0 and "
            f"{num_partitions - 1}. Correct the node config."
        )
    run_config = context.run_config
    seed = _integer(run_config, "seed", _RUN)
    if "shards-dir" in context.node_config:
        dataset = load_shard(context.node_config)
        indices = np.arange(len(dataset.train_y))
    else:
        dataset, indices = _cut(run_config, partition_id, num_partitions, seed)
    if len(indices) == 1:
        return _Local(dataset, partition_id, seed, indices, indices)
    # a draw of its own: partitions may come sorted by label
    shuffled = np.random.default_rng((seed, partition_id)).permutation(indices)
    held_out = max(1, round(_EVALUATION_SHARE * len(indices)))
    return _Local(dataset, partition_id, seed, shuffled[held_out:], shuffled[:held_out])


def _cut(
    run_config: Mapping[str, object], partition_id: int, num_partitions: int, seed: int
) -> tuple[Dataset, NDArray[np.int64]]:
    """The whole data set, and which of its examples are this partition's."""
    from clients.partition import partition_indices  # two seconds, which a node with a shards-dir does not need

    dataset = load_dataset(
        _text(run_config, "dataset", _RUN),
        _text(run_config, "data-dir", _RUN),
        _integer(run_config, "train-examples", _RUN) if "train-examples" in run_config else 0,
        seed=seed,
    )
    parts = partition_indices(
        dataset,
        num_partitions,
        partitioner=_text(run_config, "partitioner", _RUN),
        alpha=_number(run_config, "alpha", _RUN),
        seed=seed,
        owners=_integer(run_config, "owners", _RUN),
    )
    return dataset, parts[partition_id]


def _received_model(message: Message, context: Context, dataset: Dataset) -> nn.Module:
    arrays = message.content["arrays"]
    if not isinstance(arrays, ArrayRecord):
        raise AppConfigError(f"arrays in the message is {type(arrays).__name__}; it has to be an ArrayRecord.")
    # any seed: its values are overwritten at once
    model = build_model(_text(context.run_config, "model", _RUN), dataset, seed=0)
    model.load_state_dict(arrays.to_torch_state_dict())  # casts: adaptive servers send float64
    return model


def _config(message: Message) -> ConfigRecord:
    config = message.content["config"]
    if not isinstance(config, ConfigRecord):
        raise AppConfigError(f"config in the message is {type(config).__name__}; it has to be a ConfigRecord.")
    return config


def _integer(values: Mapping[str, object], key: str, place: str) -> int:
    value = _present(values, key, place)
    if not isinstance(value, int) or isinstance(value, bool):
        raise AppConfigError(f"{key} in the {place} is {value!r}; it has to be a whole number.")
    return value


def _positive(values: Mapping[str, object], key: str, place: str) -> int:
    value = _integer(values, key, place)
    if value < 1:
        raise AppConfigError(f"{key} in the {place} is {value}; it has to be 1 or more.")
    return value


def _share(config: ConfigRecord) -> float:
    share = _number(config, "work-share", _MESSAGE) if "work-share" in config else 1.0
    if not 0 < share <= 1:
        raise AppConfigError(f"work-share in the {_MESSAGE} is {share}; it has to be above 0 and at most 1.")
    return share


def _number(values: Mapping[str, object], key: str, place: str) -> float:
    value = _present(values, key, place)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise AppConfigError(f"{key} in the {place} is {value!r}; it has to be a number.")
    return float(value)


def _text(values: Mapping[str, object], key: str, place: str) -> str:
    value = _present(values, key, place)
    if not isinstance(value, str):
        raise AppConfigError(f"{key} in the {place} is {value!r}; it has to be a text.")
    return value


def _present(values: Mapping[str, object], key: str, place: str) -> object:
    if key not in values:
        there = ", ".join(sorted(values)) or "nothing"
        raise AppConfigError(f"The {place} has no {key!r}; it has {there}. Add {key!r}.")
    return values[key]
