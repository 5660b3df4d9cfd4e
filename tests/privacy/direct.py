"""Private training without mod and grid: one message to one node, answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor, nn

from fl_gradcode.privacy import DPSGD, PrivateTraining, private_training, write_keys
from fl_gradcode.privacy.records import Asked, Spent
from tests.privacy.private_app import settings

__all__ = ["Node", "linear", "move", "records"]


def linear(size: int = 6, value: float = 0.0) -> nn.Linear:
    """A linear model without bias; all its weights are `value`."""
    net = nn.Linear(size, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(value)
    return net


def records(count: int = 40, size: int = 6, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator), torch.randn(count, 1, generator=generator)


def move(
    dp: PrivateTraining, net: nn.Module, x: Tensor, y: Tensor, *, lr: float = 1.0, loss: Any = None
) -> list[list[int]]:
    """The loop that users write; the batches."""
    batches = []
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=lr))
    criterion = dp.criterion(nn.MSELoss() if loss is None else loss)
    for batch in dp.batches():
        batches.append(batch.tolist())
        optimizer.zero_grad()
        criterion(dp.model(x[batch]), y[batch]).backward()
        optimizer.step()
    return batches


class Node:
    """A node with keys for shards 0 and 1; two with one `keys` are holders of the same shards."""

    def __init__(self, folder: Path, keys: Path | None = None) -> None:
        self.folder = folder
        if not (folder / "keys.json").exists():
            if keys is None:
                keys = folder.parent / "keys"
            if not keys.exists():
                write_keys(keys, [[0, 1]])
            folder.mkdir(parents=True)
            (folder / "keys.json").touch(mode=0o600)
            (folder / "keys.json").write_bytes((keys / "node-0" / "keys.json").read_bytes())

    @property
    def ledger(self) -> Path:
        return self.folder / "spent" / "shard-0.jsonl"

    def ask(
        self,
        net: nn.Module,
        *,
        privacy: DPSGD | None = None,
        examples: int = 40,
        run_config: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        node_config: dict[str, Any] | None = None,
        message_type: str = "train",
        binding: dict[str, Any] | None = None,
        manifest: str = "",
        records: dict[str, Any] | None = None,
        **asked: Any,
    ) -> PrivateTraining:
        values: dict[str, Any] = {"run": "r", "round": 1, "shard": 0, "worker": 0, "holders": 3, **asked}
        content = RecordDict(
            {"arrays": ArrayRecord(net.state_dict()), "config": ConfigRecord({**(config or {})}), **(records or {})}
        )
        Asked(privacy or settings(), **values).add_to(content)
        node = {"partition-id": 0, "num-partitions": 2, "privacy-dir": str(self.folder), **(node_config or {})}
        message = Message(content, dst_node_id=1, message_type=message_type)
        context = Context(1, 1, node, RecordDict(), dict(run_config or {}))
        return private_training(message, context, net, examples=examples, binding=binding, manifest=manifest)

    def update(
        self, net: nn.Module, data: tuple[Tensor, Tensor] | None = None, *, lr: float = 1.0, **asked: Any
    ) -> tuple[Tensor, Spent]:
        """What the server gets: the update, float64 and flat, and what was spent."""
        x, y = records() if data is None else data
        before = torch.cat([p.detach().double().flatten() for p in net.parameters()])
        with self.ask(net, examples=len(x), **asked) as dp:
            move(dp, net, x, y, lr=lr)
        spent = Spent.find_in(RecordDict({"privacy": dp.record}))
        assert spent is not None
        return torch.cat([p.detach().double().flatten() for p in net.parameters()]) - before, spent
