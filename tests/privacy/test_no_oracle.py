"""Whatever a server sends, what a node answers does not depend on single records: neither its kind, nor its text, nor
its shape, nor what is charged."""

from __future__ import annotations

import logging
import math
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.nn import functional as F

from fl_gradcode import gradient_coding_mod
from fl_gradcode.privacy import DPSGD, BudgetLedger, private_training, write_keys
from fl_gradcode.protocol import Plan, Row
from fl_gradcode.testing import inside_a_run

MESSAGES, PARTS = 2000, 10
COUNT = 10  # records of the smaller data set
LABELS = 3


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 3), nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.relu(self.conv(x.view(-1, 1, 4, 4))).view(len(x), -1))
        return found


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.words(x[:, :6].nan_to_num(9.0).clamp(-1, 9).long()).mean(1))  # 9 is no word
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, LABELS),
    "mlp": lambda: nn.Sequential(nn.Linear(16, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, LABELS)),
    "dropout": lambda: nn.Sequential(nn.Linear(16, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, LABELS)),
    "cnn": Cnn,
    "words": Words,
}


def strict_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(outputs, labels)
    if not math.isfinite(loss.item()) or loss.item() > 50:
        raise ValueError(f"the loss is {loss.item()}")
    return loss


LOSSES: list[Callable[[Any], Any]] = [
    lambda dp: dp.criterion(nn.CrossEntropyLoss()),
    lambda dp: dp.criterion(strict_loss),
]


def app_of(make: Callable[[], nn.Module], loss_of: Callable[[Any], Any], data: tuple[Tensor, Tensor]) -> ClientApp:
    app, (x, y) = ClientApp(mods=[gradient_coding_mod]), data

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content: Any = message.content
        net = make()
        net.load_state_dict(content["arrays"].to_torch_state_dict())
        context.node_config["partition-id"]
        with private_training(message, context, net, examples=len(y)) as dp:
            optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=float(content["config"]["lr"])))
            criterion = loss_of(dp)
            for batch in dp.batches():
                optimizer.zero_grad()
                criterion(dp.model(x[batch]), y[batch]).backward()
                optimizer.step()
        metrics = MetricRecord({"num-examples": len(y)})
        records: Any = {"arrays": ArrayRecord(net.state_dict()), "metrics": metrics, "privacy": dp.record}
        return Message(RecordDict(records), reply_to=message)

    return app


def neighbours(draw: random.Random, words: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    x = torch.randn(COUNT + 1, 16, generator=generator)
    if words:
        x = torch.randint(0, 5, (COUNT + 1, 16), generator=generator).float()
    y = torch.randint(0, LABELS, (COUNT + 1,), generator=generator)
    kind = draw.choice(["one more", "huge", "NaN", "infinite", "another label", "no label"])
    if kind in ("huge", "NaN", "infinite"):
        x[-1, draw.randrange(16)] = {"huge": 3e38, "NaN": math.nan, "infinite": math.inf}[kind]
    if kind == "another label":
        y[-1] = (y[-1] + 1) % LABELS
    if kind == "no label":
        y[-1] = 77  # PyTorch raises
    return (x[:COUNT], y[:COUNT]), (x, y)


def settings_of(draw: random.Random) -> list[dict[str, Any]]:
    """Settings that a server may ask for, and some that it may not."""
    found = []
    for _ in range(60):
        values: dict[str, Any] = {
            "noise_multiplier": 10 ** draw.uniform(-6, 4),
            "max_grad_norm": 10 ** draw.uniform(-6, 6),
            "sample_rate": draw.choice([1e-3, 0.1, 0.5, 1.0]),
            "steps": draw.choice([1, 2, 3]),
        }
        found.append({**values, "accountant": "rdp", "delta": 1e-5})
    for name, wrong in [
        ("max_grad_norm", [1e25, 1e-30, math.inf, math.nan, 0.0, -1.0]),
        ("noise_multiplier", [1e30, 0.0, math.nan, 1e-300]),
        ("sample_rate", [0.0, 2.0, math.nan, 1e-40]),
        ("steps", [0, -1, 10**9, 1.5]),
    ]:
        found += [{**found[0], name: value} for value in wrong]
    return found


def weights_of(draw: random.Random, net: nn.Module) -> ArrayRecord:
    size = draw.choice([0.0, 1e-30, 1e-3, 1.0, 1.0, 1.0, 1e3, 1e10, 1e19, 1e30, 1e38])
    state = {name: size * value for name, value in net.state_dict().items()}
    if draw.random() < 0.2:
        name = draw.choice([*state])
        state[name].view(-1)[draw.randrange(state[name].numel())] = draw.choice([math.nan, math.inf, -3e38])
    return ArrayRecord(state)


def answer(app: ClientApp, arrays: ArrayRecord, privacy: str, lr: float, folder: Path, keys: Path) -> Any:
    """What a server can tell, but for the numbers that have noise, and what was charged."""
    shutil.copytree(keys / "node-0", folder)
    plan = Plan(
        "r", 0, 1, "train", 1, 1, "num-examples", "arrays", {0: Row((0,), ((1.0,),))}, privacy=privacy,
        releases={0: (1, ())},
    )  # fmt: skip
    content = plan.add_to(RecordDict({"arrays": ArrayRecord(dict(arrays)), "config": ConfigRecord({"lr": lr})}))
    message = Message(content, dst_node_id=1, message_type="train")
    node: Any = {"partition-id": 0, "num-partitions": 1, "privacy-dir": str(folder), "max-epsilon": 1e30}
    try:
        reply = app(message, Context(1, 1, node, RecordDict(), {}))
    except Exception as error:
        told: Any = (type(error).__name__, str(error))
    else:
        updates: Any = reply.content["fl-gradcode.update"]
        told = sorted(reply.content), {name: (one.dtype, tuple(one.shape)) for name, one in updates.items()}
    charged = [replace(one, context="", data="") for one in BudgetLedger(folder / "spent").entries(0)]
    shutil.rmtree(folder)
    return told, charged


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    with inside_a_run(), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.stress) for part in range(1, PARTS))])
def test_outcome_text_shape_and_charge_are_the_same_for_neighbouring_data(part: int, tmp_path: Path) -> None:
    draw = random.Random(part)
    write_keys(tmp_path / "keys", [[0]])
    settings, kinds = settings_of(draw), set()
    for number in range(MESSAGES // PARTS):
        name = draw.choice([*MODELS])
        values = draw.choice(settings)
        text = _as_text({**values, "grad_sample_mode": draw.choice(["hooks", "ghost"])})
        arrays, loss = weights_of(draw, MODELS[name]()), draw.choice(LOSSES)
        lr = draw.choice([*[0.0, 1e-3, 1.0, 1e3, 1e6] * 5, 1e7, -1.0, math.nan])
        told = [
            answer(app_of(MODELS[name], loss, data), arrays, text, lr, tmp_path / "node", tmp_path / "keys")
            for data in neighbours(draw, name == "words")
        ]
        assert told[0] == told[1], (number, name, values, lr)
        kinds.add(told[0][0][0] if isinstance(told[0][0][0], str) else "answered")
    assert "answered" in kinds and len(kinds) > 1


def _as_text(values: dict[str, Any]) -> str:
    """Settings as a server might write them that does not check them."""
    import json

    whole = vars(DPSGD(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, steps=1))
    return json.dumps({"kind": "dp-sgd", **{key: whole[key] for key in whole}, **values})
