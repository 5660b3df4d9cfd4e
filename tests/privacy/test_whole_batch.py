"""What a loop computes from a whole batch goes neither into the model nor into the loss: one record would move the
gradients of all others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_gradcode.errors import PrivacyRefused
from fl_gradcode.testing import inside_a_run
from tests.privacy.direct import Node
from tests.privacy.private_app import settings

COUNT, SIZE, CLASSES = 40, 6, 3
#: A loss of private training, the loss that is given to criterion(), records, labels and lengths.
Loss = Callable[[Any, Any, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with inside_a_run(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Node(tmp_path / "node")


def train(node: Node, loss: Loss) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, SIZE, generator=generator)
    y = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    lengths = torch.randint(1, SIZE + 1, (COUNT,), generator=generator)
    net = nn.Linear(SIZE, CLASSES)
    with node.ask(net, examples=COUNT, privacy=settings(sample_rate=0.5)) as dp:
        optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
        criterion = dp.criterion(nn.CrossEntropyLoss())
        for batch in dp.batches():
            optimizer.zero_grad()
            loss(dp, criterion, x[batch], y[batch], lengths[batch]).backward()
            optimizer.step()


def terms(dp: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(dp.model(x), y, reduction="none")


def frequent(y: Tensor) -> Tensor:
    return 1 / torch.bincount(y, minlength=CLASSES).clamp(min=1).float()


MIXED: dict[str, Loss] = {
    "inputs standardised by the batch": lambda dp, c, x, y, n: c(dp.model((x - x.mean(0)) / x.std(0)), y),
    "inputs over the largest": lambda dp, c, x, y, n: c(dp.model(x / x.abs().max()), y),
    "inputs over the largest of each column": lambda dp, c, x, y, n: c(dp.model(x / x.max(0).values), y),
    "inputs changed in place": lambda dp, c, x, y, n: c(dp.model(x.sub_(x.mean(0))), y),
    "inputs cut at a quantile": lambda dp, c, x, y, n: c(dp.model(x.clamp(max=x.quantile(0.9))), y),
    "weights by the batch's classes": lambda dp, c, x, y, n: F.cross_entropy(dp.model(x), y, weight=frequent(y)),
    "weights of records by the batch's classes": lambda dp, c, x, y, n: (terms(dp, x, y) * frequent(y)[y]).mean(),
    "terms over the longest": lambda dp, c, x, y, n: (terms(dp, x, y) * n / n.max()).mean(),
    "mean over the sum of lengths": lambda dp, c, x, y, n: (terms(dp, x, y) * n).mean() / n.sum(),
    "targets less their mean": lambda dp, c, x, y, n: F.mse_loss(dp.model(x)[:, 0], y - y.float().mean()),
    "targets of criterion() less their mean": lambda dp, c, x, y, n: dp.criterion(nn.MSELoss())(
        dp.model(x)[:, 0], y - y.float().mean()
    ),
}
ALONE: dict[str, Loss] = {
    "inputs standardised by the record": lambda dp, c, x, y, n: c(
        dp.model((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)), y
    ),
    "inputs cut at the record's length": lambda dp, c, x, y, n: c(dp.model(x * (torch.arange(SIZE) < n[:, None])), y),
    "terms times the record's length": lambda dp, c, x, y, n: (terms(dp, x, y) * n).mean(),
    "a number that is printed": lambda dp, c, x, y, n: (c(dp.model(x), y), f"{x.max():.3f}")[0],
}


@pytest.mark.parametrize("name", MIXED)
def test_it_is_refused(name: str, node: Node) -> None:
    with pytest.raises(PrivacyRefused, match=r"computed from the whole batch|neither one of criterion\(\) nor"):
        train(node, MIXED[name])


@pytest.mark.parametrize("name", ALONE)
def test_what_each_record_has_alone_is_not(name: str, node: Node) -> None:
    train(node, ALONE[name])
