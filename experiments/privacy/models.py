"""Small models of the kinds that people train, each with synthetic data whose signal is known to be learnable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["EXAMPLES", "MODELS", "SHARDS", "ModelTask", "Split"]

SHARDS, EXAMPLES, _TEST = 6, 150, 1500
_WORDS, _LENGTH, _PAD = 20, 12, 0
_CLASSES = 4

Split = tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModelTask:
    """A model, its data, and how it is trained.

    Attributes:
        title: What it is called in the table.
        make: Returns the model, from a generator of its own; the same for the same seed.
        draw: Returns records and labels, from a number of records and a generator.
        learning_rate: Of plain SGD.
        chance: Accuracy of a guess.
        skewed: Whether the shards have unequal shares of the labels.
        mu: Weight of the proximal term.
    """

    title: str
    make: Callable[[int], nn.Module]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    learning_rate: float
    chance: float
    skewed: bool = False
    mu: float = 0.0

    def split(self, seed: int) -> Split:
        """Returns records and labels of each shard, and of the test set; another draw for each seed."""
        generator = torch.Generator().manual_seed(seed)
        x, y = self.draw(SHARDS * EXAMPLES, generator)
        if self.skewed:  # half of the records by label, the others as they come
            half = len(y) // 2
            order = torch.argsort(y[:half], stable=True)
            parts = [
                torch.cat([one, other])
                for one, other in zip(order.chunk(SHARDS), torch.arange(half, len(y)).chunk(SHARDS), strict=True)
            ]
        else:
            parts = list(torch.arange(len(y)).chunk(SHARDS))
        return [(x[part], y[part]) for part in parts], self.draw(_TEST, generator)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def made(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    return made


# ---- A convolutional network that flattens by view(n, -1) ------------------------------------------------------------


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6 * 4 * 4, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv(x)), 2)
        found: Tensor = self.out(x.view(x.size(0), -1))
        return found


def _images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A bright bar, level or upright, in one half of the picture, under noise."""
    y = torch.randint(0, _CLASSES, (count,), generator=generator)
    place = torch.randint(0, 4, (count,), generator=generator) + 4 * (y % 2)
    x = 0.7 * torch.randn(count, 8, 8, generator=generator)
    level = 1.5 * F.one_hot(place, 8).float().unsqueeze(2).expand(-1, 8, 8)
    return (x + torch.where((y < 2)[:, None, None], level, level.mT)).unsqueeze(1), y


# ---- A transformer block ---------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Words and places, one block of attention and feed-forward layers, and the mean over words that are no padding."""

    def __init__(self, size: int = 12) -> None:
        super().__init__()
        from opacus.layers import DPMultiheadAttention

        self.words = nn.Embedding(_WORDS, size, padding_idx=_PAD)
        self.places = nn.Embedding(_LENGTH, size)
        self.heads = DPMultiheadAttention(size, 2, batch_first=True)
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.out = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        padding = x == _PAD
        h = self.words(x) + self.places(torch.arange(_LENGTH, device=x.device).expand(len(x), -1))
        h = self.first(h + self.heads(h, h, h, key_padding_mask=padding, need_weights=False)[0])
        h = self.second(h + self.down(torch.relu(self.up(h))))
        there = (~padding).unsqueeze(-1)
        found: Tensor = self.out((h * there).sum(1) / there.sum(1))
        return found


def _sentences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words of unequal number; those of the first half are more frequent in one class."""
    y = torch.randint(0, 2, (count,), generator=generator)
    length = torch.randint(4, _LENGTH + 1, (count,), generator=generator)
    likely = torch.rand(count, _LENGTH, generator=generator) < 0.75
    half = (_WORDS - 1) // 2
    word = 1 + torch.randint(0, half, (count, _LENGTH), generator=generator)
    x = word + half * (likely ^ (y == 0)[:, None]).long()
    x[torch.arange(_LENGTH)[None] >= length[:, None]] = _PAD
    return x, y


# ---- Low-rank adapters on a frozen base ------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen linear layer and a trained product of two thin ones beside it (Hu et al., "LoRA", ICLR 2022)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.up(self.down(x))
        return found


_INPUTS = 16


@cache
def _base() -> tuple[nn.Linear, nn.Linear]:
    """Two layers that were trained on public data of a related task, in which the classes have other names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = nn.Linear(_INPUTS, 24), nn.Linear(24, _CLASSES)
    net = nn.Sequential(first, nn.Tanh(), second)
    x, y = _clusters(1000, torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), (y + 1) % _CLASSES).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return first, second


def _lora() -> nn.Module:
    first, second = copy.deepcopy(_base())
    return nn.Sequential(Adapted(first), nn.Tanh(), Adapted(second))


def _clusters(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clouds of points around a centre for each class, which lie in two pieces each."""
    centres = torch.randn(2, _CLASSES, _INPUTS, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, _CLASSES, (count,), generator=generator)
    piece = torch.randint(0, 2, (count,), generator=generator)
    return centres[piece, y] + 1.2 * torch.randn(count, _INPUTS, generator=generator), y


MODELS: dict[str, ModelTask] = {
    "cnn": ModelTask("CNN, `view(n, -1)`", _seeded(Cnn), _images, 1.0, 1 / _CLASSES),
    "transformer": ModelTask("transformer block, `padding_idx`", _seeded(Transformer), _sentences, 1.0, 1 / 2),
    "lora": ModelTask("LoRA on a frozen base", _seeded(_lora), _clusters, 1.0, 1 / _CLASSES),
    "fedprox": ModelTask(
        "FedProx by `dp.penalty`, skewed shards",
        _seeded(lambda: nn.Sequential(nn.Linear(_INPUTS, 16), nn.Tanh(), nn.Linear(16, _CLASSES))),
        _clusters,
        1.0,
        1 / _CLASSES,
        skewed=True,
        mu=0.3,
    ),
}
