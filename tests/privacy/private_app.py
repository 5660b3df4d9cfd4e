"""A small app that trains privately: shard j has 40 + 10 j records of a task of its own."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_gradcode import GradientCode, gradient_coding_mod
from fl_gradcode.privacy import DPSGD, asks_for_privacy, private_training, write_keys

LEARNING_RATE = 1.0  # an update as large as the weights: float32 weights would hide a small one


def model() -> nn.Module:
    return copy.deepcopy(_model(torch.get_default_dtype()))  # torch takes longer to seed its generators than to copy


@cache
def _model(dtype: torch.dtype) -> nn.Module:
    """Of the default dtype, which is named so that each has a model of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Linear(16, 3))


def shard_data(shard: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + shard)
    count = 40 + 10 * shard
    return torch.randn(count, 8, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def train_privately(message: Message, context: Context) -> Message:
    net = model()
    content: Any = message.content
    net.load_state_dict(content["arrays"].to_torch_state_dict())
    x, y = shard_data(int(context.node_config["partition-id"]))
    with private_training(message, context, net, examples=len(y)) as dp:
        optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=LEARNING_RATE))
        criterion = dp.criterion(nn.CrossEntropyLoss())
        for batch in dp.batches():
            optimizer.zero_grad()
            criterion(dp.model(x[batch]), y[batch]).backward()
            optimizer.step()
    metrics = MetricRecord({"num-examples": len(y), "secret-loss": 0.123})
    records: dict[str, Any] = {"arrays": ArrayRecord(net.state_dict()), "metrics": metrics, "privacy": dp.record}
    return Message(RecordDict(records), reply_to=message)


def train_plainly(message: Message, context: Context) -> Message:
    net = model()
    content: Any = message.content
    net.load_state_dict(content["arrays"].to_torch_state_dict())
    x, y = shard_data(int(context.node_config["partition-id"]))
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    metrics = MetricRecord({"num-examples": len(y), "secret-loss": 0.123})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


def private_app(mods: Any = (gradient_coding_mod,)) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return (train_privately if asks_for_privacy(message, context) else train_plainly)(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 40 + 10 * int(context.node_config["partition-id"]), "accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def initial() -> ArrayRecord:
    return ArrayRecord(model().state_dict())


def settings(**changes: Any) -> DPSGD:
    values: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.2, "steps": 3}
    return DPSGD(**{**values, "accountant": "rdp", **changes})


def keys_for(code: GradientCode, folder: Path) -> dict[str, Any]:
    """New keys; the run config that says where they are."""
    write_keys(folder, [code.shards_of(i) for i in range(code.n)])
    return {"privacy-dir": str(folder)}
