"""One record more moves the sum of clipped gradients by the clipping norm at most, for models and losses of all kinds
that are accepted; those that it would move by more are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from fl_gradcode.errors import PrivacyRefused
from fl_gradcode.privacy.dp_optimizer import wrap
from fl_gradcode.privacy.key_derivation import PRFStream

COUNT, WORDS, LENGTH, CLASSES, PAD = 12, 7, 5, 3, -100
MODES = ("hooks", "ghost")
Data = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- Data; the last record is the one more, and has a gradient far above the clipping norm -------------------------


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def vectors() -> Data:
    x = torch.randn(COUNT, 8, generator=drawn())
    x[-1] *= 1e3
    return x, torch.randint(0, CLASSES, (COUNT,), generator=drawn())


def numbers() -> Data:
    x, _ = vectors()
    y = torch.randn(COUNT, CLASSES, generator=drawn())
    y[-1] = 1e4
    return x, y


def shares() -> Data:
    x, _ = vectors()
    return x, torch.rand(COUNT, CLASSES, generator=drawn())


def signs() -> Data:
    x, _ = vectors()
    return x, 2.0 * torch.randint(0, 2, (COUNT, CLASSES), generator=drawn()) - 1


def images() -> Data:
    x = torch.randn(COUNT, 1, 6, 6, generator=drawn())
    x[-1] *= 1e3
    y = torch.randint(0, CLASSES, (COUNT,), generator=drawn())
    y[-1] = (y[-1] + 1) % CLASSES
    return x, y


def words() -> Data:
    x = torch.randint(0, WORDS, (COUNT, LENGTH), generator=drawn())
    x[-1] = 3  # one word again and again: its row's gradient adds up
    return x, torch.randint(0, CLASSES, (COUNT,), generator=drawn())


def series() -> Data:
    x = torch.randn(COUNT, LENGTH, 8, generator=drawn())
    x[-1] *= 1e2
    return x, torch.randint(0, CLASSES, (COUNT,), generator=drawn())


def sentences() -> Data:
    """Sequences of words with labels, padded, the last much longer than all others."""
    lengths = [*torch.randint(1, 4, (COUNT - 1,), generator=drawn()).tolist(), 40]
    x, y = torch.zeros(COUNT, 40, dtype=torch.long), torch.full((COUNT, 40), PAD)
    for row, length in enumerate(lengths):
        x[row, :length] = torch.randint(1, WORDS, (length,), generator=drawn())
        y[row, :length] = x[row, :length] % CLASSES
    return x, y


def flat_sentences() -> Data:
    x, y = sentences()
    return x, y.reshape(-1)


# ---- Models ---------------------------------------------------------------------------------------------------------


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), *between, nn.Tanh(), nn.Linear(6, CLASSES))


class Of(nn.Module):
    """Layers by name, and what is computed with them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def tied() -> nn.Module:
    words = nn.Embedding(WORDS, 6)
    out = nn.Linear(6, WORDS, bias=False)
    out.weight = words.weight
    return Of(lambda net, x: net.out(torch.tanh(net.words(x).mean(1))), words=words, out=out)


class Lora(nn.Module):
    """A frozen layer and a trained product of two thin ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.base(x) + self.up(self.down(x))))
        return found


class Scaled(nn.Module):
    """A layer of one's own, with a parameter that is no layer of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def frozen_norm() -> nn.Module:
    norm = nn.BatchNorm1d(6).requires_grad_(False)
    norm.running_mean = torch.randn(6, generator=drawn())
    norm.running_var = torch.rand(6, generator=drawn()) + 0.5
    return mlp(norm.eval())


def attention() -> nn.Module:
    layers = {
        "up": nn.Linear(8, 8),
        "heads": DPMultiheadAttention(8, 2, batch_first=True),
        "out": nn.Linear(8, CLASSES),
    }

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.up(x)
        found: Tensor = net.out(net.heads(x, x, x)[0].mean(1))
        return found

    return Of(run, **layers)


def recurrent(kind: Any) -> nn.Module:
    return Of(
        lambda net, x: net.out(net.cell(x)[0][:, -1]), cell=kind(8, 6, batch_first=True), out=nn.Linear(6, CLASSES)
    )


def tagger(flat: bool = False) -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        scores = net.out(net.words(x))
        found: Tensor = scores.reshape(-1, CLASSES) if flat else scores.transpose(1, 2)
        return found

    return Of(run, words=nn.Embedding(WORDS, 6, padding_idx=0), out=nn.Linear(6, CLASSES))


def words_mean(**settings: Any) -> Any:
    layers = {"words": nn.Embedding(WORDS, 6, **settings), "out": nn.Linear(6, CLASSES)}
    return Of(lambda net, x: net.out(net.words(x).mean(1)), **layers)


def cnn(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), *between, nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


def by_view() -> nn.Module:
    layers = {"conv": nn.Conv2d(1, 4, 3), "out": nn.Linear(64, CLASSES)}
    return Of(lambda net, x: net.out(torch.relu(net.conv(x)).view(x.size(0), -1)), **layers)


def masked_mean(outputs: Tensor, labels: Tensor) -> Tensor:
    terms = F.cross_entropy(outputs, labels, ignore_index=PAD, reduction="none")
    return terms.sum() / (labels != PAD).sum()


# ---- What is accepted -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Any = None  # given to criterion()
    plain: Any = None  # called without it
    modes: tuple[str, ...] = MODES


CE = nn.CrossEntropyLoss
ACCEPTED: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(8, CLASSES), vectors, CE()),
    "mlp": Case(mlp, vectors, CE()),
    "group norm": Case(lambda: mlp(nn.GroupNorm(2, 6)), vectors, CE()),
    "layer norm": Case(lambda: mlp(nn.LayerNorm(6)), vectors, CE()),
    "dropout in eval": Case(lambda: mlp(nn.Dropout().eval()), vectors, CE()),
    "frozen part": Case(lambda: nn.Sequential(nn.Linear(8, 8).requires_grad_(False), mlp()), vectors, CE()),
    "frozen batch norm": Case(frozen_norm, vectors, CE()),
    "own layer": Case(lambda: mlp(Scaled()), vectors, CE()),
    "weight norm": Case(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), mlp_of(6)), vectors, CE()
    ),
    "lora": Case(Lora, vectors, CE()),
    "layer used twice": Case(
        lambda: Of(lambda net, x: net.out(net.mid(net.mid(x))), mid=nn.Linear(8, 8), out=nn.Linear(8, CLASSES)),
        vectors,
        CE(),
        modes=("hooks",),
    ),
    "tied weights": Case(tied, words, CE(), modes=("hooks",)),
    "cnn": Case(cnn, images, CE()),
    "cnn with view": Case(by_view, images, CE()),
    "cnn with group norm": Case(lambda: cnn(nn.GroupNorm(2, 4)), images, CE()),
    "cnn with instance norm": Case(lambda: cnn(nn.InstanceNorm2d(4, affine=True)), images, CE()),
    "conv with groups": Case(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, CLASSES)),
        images,
        CE(),
    ),
    "conv over time": Case(
        lambda: Of(
            lambda net, x: net.out(net.conv(x).mean(2)), conv=nn.Conv1d(LENGTH, 4, 3), out=nn.Linear(4, CLASSES)
        ),
        series,
        CE(),
    ),
    "embedding": Case(words_mean, words, CE()),
    "embedding with padding": Case(lambda: words_mean(padding_idx=3), words, CE()),
    "linear over time": Case(
        lambda: Of(
            lambda net, x: net.out(torch.tanh(net.up(x))).mean(1), up=nn.Linear(8, 6), out=nn.Linear(6, CLASSES)
        ),
        series,
        CE(),
    ),
    "attention": Case(attention, series, CE()),
    "lstm": Case(lambda: recurrent(DPLSTM), series, CE()),
    "gru": Case(lambda: recurrent(DPGRU), series, CE()),
    "padded sentences": Case(tagger, sentences, CE(ignore_index=PAD)),
    "padded sentences, flat": Case(lambda: tagger(flat=True), flat_sentences, CE(ignore_index=PAD)),
    "padded sentences, by F": Case(tagger, sentences, F.cross_entropy),
    "padded sentences, plain F": Case(tagger, sentences, plain=F.cross_entropy, modes=("hooks",)),
    "padded sentences, plain module": Case(tagger, sentences, plain=CE(ignore_index=PAD), modes=("hooks",)),
    "padded sentences, own loss": Case(tagger, sentences, lambda out, y: masked_mean(out, y)),
    "class weights": Case(mlp, vectors, CE(weight=torch.tensor([1e3, 1.0, 2.0]))),
    "label smoothing": Case(mlp, vectors, CE(label_smoothing=0.1)),
    "soft labels": Case(mlp, shares, CE()),
    "squares": Case(mlp, numbers, nn.MSELoss()),
    "absolute": Case(mlp, numbers, nn.L1Loss()),
    "huber": Case(mlp, numbers, nn.HuberLoss()),
    "two classes": Case(mlp, shares, nn.BCEWithLogitsLoss()),
    "margins": Case(mlp, signs, nn.SoftMarginLoss()),
    "negative log-likelihood": Case(lambda: nn.Sequential(mlp(), nn.LogSoftmax(1)), vectors, nn.NLLLoss()),
    "divergence": Case(lambda: nn.Sequential(mlp(), nn.LogSoftmax(1)), shares, nn.KLDivLoss(reduction="batchmean")),
    "poisson": Case(mlp, shares, nn.PoissonNLLLoss()),
    "plain squares": Case(mlp, numbers, plain=F.mse_loss, modes=("hooks",)),
    "plain arithmetic": Case(mlp, numbers, plain=lambda out, y: ((out - y) ** 2).mean(), modes=("hooks",)),
    "plain terms": Case(
        mlp, vectors, plain=lambda out, y: F.cross_entropy(out, y, reduction="none").mean(), modes=("hooks",)
    ),
    "sum of losses": Case(
        mlp,
        vectors,
        plain=lambda out, y: 2 * F.cross_entropy(out, y) + F.multi_margin_loss(out, y) / 3,
        modes=("hooks",),
    ),
    "own loss": Case(mlp, numbers, lambda out, y: ((out - y) ** 2).mean()),
}


def mlp_of(size: int) -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Linear(size, CLASSES))


def clipped_sum(case: Case, mode: Any, count: int, clip: float, autocast: bool = False) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = case.make()
    x, y = case.data()
    x, y = x[:count], y[: count * (len(y) // len(x))]
    wrapped = wrap(net, PRFStream(bytes(32)), mode=mode, noise_multiplier=1e-30, max_grad_norm=clip)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = wrapped.optimizer(torch.optim.SGD(trained, lr=1.0), expected_batch_size=1.0)
    try:
        with wrapped.losses, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = wrapped.criterion(case.loss) if case.plain is None else case.plain
            wrapped.batch_drawn(count)
            optimizer.zero_grad()
            loss(wrapped.model(x), y).backward()
            optimizer.step()
    finally:
        wrapped.unwrap()
    return torch.cat([torch.as_tensor(p.grad).flatten() for p in trained]).double()


def test_a_verdict_on_one_model_is_none_on_another_of_the_same_layers() -> None:
    """What was found fit is not tried again, but only that."""
    fit, unfit = (
        Case(of_linear(run), vectors, CE())
        for run in (lambda net, x: net.out(net.layer(x)), lambda net, x: net.out(net.layer(x) - x.mean(0)))
    )
    clipped_sum(fit, "hooks", COUNT, 0.1)
    with pytest.raises(PrivacyRefused, match="The model mixes records"):
        clipped_sum(unfit, "hooks", COUNT, 0.1)


@pytest.mark.parametrize("count", [1, COUNT])
def test_outputs_may_lose_an_axis_of_length_one(count: int) -> None:
    case = Case(
        lambda: mlp_of(8),
        vectors,
        plain=lambda out, y: F.mse_loss(out[:, :1].squeeze(), out.detach()[:, 1].squeeze() + y),
    )
    assert float(clipped_sum(case, "hooks", count, 0.1).norm()) > 0


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, case in ACCEPTED.items() for mode in case.modes])
def test_one_record_more_moves_the_sum_by_the_clipping_norm_at_most(name: str, mode: str) -> None:
    case = ACCEPTED[name]
    for clip in (1e-3, 0.1):
        moved = clipped_sum(case, mode, COUNT, clip) - clipped_sum(case, mode, COUNT - 1, clip)
        assert float(moved.norm()) <= 1.000001 * clip
        assert float(moved.norm()) >= 0.02 * clip  # it was not left out


def test_so_many_models_and_losses_are_accepted() -> None:
    assert len(ACCEPTED) >= 40


@pytest.mark.parametrize("name", ACCEPTED)
def test_so_it_is_under_autocast_and_ghost_clipping_refuses_that(name: str) -> None:
    case, clip = ACCEPTED[name], 0.1
    moved = clipped_sum(case, "hooks", COUNT, clip, autocast=True)
    moved -= clipped_sum(case, "hooks", COUNT - 1, clip, autocast=True)
    assert float(moved.norm()) <= 1.000001 * clip
    if "ghost" in case.modes:
        with pytest.raises(PrivacyRefused, match="of another precision than the parameters'"):
            clipped_sum(case, "ghost", COUNT, clip, autocast=True)


# ---- What is refused ------------------------------------------------------------------------------------------------


class OwnBatchNorm(nn.BatchNorm1d):
    pass


class Waking(nn.Module):
    """Sets a layer to training in its forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer.train()(x)
        return found


def of_linear(run: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Of(run, layer=nn.Linear(8, 8), out=nn.Linear(8, CLASSES))


def terms(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


def contrast(one: Tensor, other: Tensor) -> Tensor:
    scores = one @ other.mT
    return F.cross_entropy(scores, torch.arange(len(one)))


REFUSED: dict[str, tuple[Case, str]] = {
    "batch norm": (Case(lambda: mlp(nn.BatchNorm1d(6)), vectors, CE()), "is BatchNorm"),
    "batch norm without parameters": (
        Case(lambda: mlp(nn.BatchNorm1d(6, affine=False, track_running_stats=False)), vectors, CE()),
        "is BatchNorm",
    ),
    "batch norm without statistics in eval": (
        Case(lambda: mlp(nn.BatchNorm1d(6, affine=False, track_running_stats=False).eval()), vectors, CE()),
        "is BatchNorm",
    ),
    "trained batch norm in eval": (Case(lambda: mlp(nn.BatchNorm1d(6).eval()), vectors, CE()), "is BatchNorm"),
    "batch norm of one's own": (Case(lambda: mlp(OwnBatchNorm(6, affine=False)), vectors, CE()), "is BatchNorm"),
    "mean of the batch": (
        Case(of_linear(lambda net, x: net.out(net.layer(x) - net.layer(x).mean(0))), vectors, CE()),
        "",
    ),
    "largest of the batch": (
        Case(of_linear(lambda net, x: net.out(net.layer(x / x.abs().max()))), vectors, CE()),
        "The model mixes records",
    ),
    "softmax over the batch": (
        Case(of_linear(lambda net, x: net.out(torch.softmax(net.layer(x), 0))), vectors, CE()),
        "The model mixes records",
    ),
    "attention over the batch": (
        Case(of_linear(lambda net, x: net.out(torch.softmax(x @ x.mT, 1) @ net.layer(x))), vectors, CE()),
        "The model mixes records",
    ),
    "the largest entry of the batch alone": (
        Case(of_linear(lambda net, x: net.out(net.layer(x) * (x >= x.max()))), vectors, CE()),
        "The model mixes records",
    ),
    "mixing beside a large record alone": (
        Case(
            of_linear(lambda net, x: net.out(net.layer(x - x.mean(0) if float(x.abs().max()) > 50 else x))),
            vectors,
            CE(),
        ),
        "The model mixes records",
    ),
    "mixing in a large batch alone": (
        Case(of_linear(lambda net, x: net.out(net.layer(x - x.mean(0) if len(x) > 4 else x))), vectors, CE()),
        "The model mixes records",
    ),
    "batch norm by a function": (
        Case(of_linear(lambda net, x: net.out(F.batch_norm(net.layer(x), None, None, training=True))), vectors, CE()),
        "The model mixes records",
    ),
    "frozen batch norm that forward() sets to training": (
        Case(lambda: mlp(Waking(nn.BatchNorm1d(6).requires_grad_(False).eval())), vectors, CE()),
        "The model mixes records",
    ),
    "running statistics of each record": (
        Case(lambda: cnn(nn.InstanceNorm2d(4, track_running_stats=True)), images, CE()),
        "A forward pass changes",
    ),
    "neighbour": (
        Case(of_linear(lambda net, x: net.out(net.layer(x) + torch.roll(x, 1, 0))), vectors, CE()),
        "The model mixes records",
    ),
    "weight past its layer": (
        Case(of_linear(lambda net, x: net.out(net.layer(x) + F.linear(x, net.layer.weight))), vectors, CE()),
        "a weight is used past its layer",
    ),
    "contrastive loss": (Case(mlp, numbers, contrast), "The loss mixes records"),
    "mean of the batch in a loss": (
        Case(mlp, numbers, lambda a, b: ((a - a.mean(0) - b) ** 2).mean()),
        "The loss mixes",
    ),
    "sum": (Case(mlp, numbers, nn.MSELoss(reduction="sum")), "is a sum over records"),
    "plain sum": (
        Case(mlp, numbers, plain=lambda a, b: F.mse_loss(a, b, reduction="sum"), modes=("hooks",)),
        "neither one of",
    ),
    "plain masked mean": (Case(tagger, sentences, plain=masked_mean, modes=("hooks",)), "neither one of"),
    "plain chosen terms": (
        Case(
            tagger,
            sentences,
            plain=lambda a, b: F.cross_entropy(a, b, reduction="none")[b != PAD].mean(),
            modes=("hooks",),
        ),
        "neither one of",
    ),
    "plain contrast": (Case(mlp, numbers, plain=contrast, modes=("hooks",)), ""),
    "plain difference to the mean": (
        Case(mlp, numbers, plain=lambda a, b: ((a - a.mean(0)) ** 2).mean(), modes=("hooks",)),
        "neither one of",
    ),
    "plain square of all with all": (
        Case(mlp, numbers, plain=lambda a, b: ((a[:, :1] - b[:, 0]) ** 2).mean(), modes=("hooks",)),
        "neither one of",
    ),
    "product of losses": (
        Case(mlp, vectors, plain=lambda a, b: F.cross_entropy(a, b) * F.cross_entropy(a, b), modes=("hooks",)),
        "neither one of",
    ),
    "tied weights": (Case(tied, words, CE(), modes=("ghost",)), "two layers share a weight"),
    "changes its input": (Case(lambda: mlp(nn.ReLU(inplace=True)), vectors, CE()), "in place"),
    "lstm of PyTorch": (Case(lambda: recurrent(nn.LSTM), series, CE()), "cannot be trained"),
    "half precision": (Case(lambda: mlp().bfloat16(), vectors, CE()), "must be float32 or float64"),
}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, (case, _) in REFUSED.items() for mode in case.modes])
def test_whatever_would_move_it_by_more_is_refused(name: str, mode: str) -> None:
    case, reason = REFUSED[name]
    with pytest.raises(PrivacyRefused, match=reason):
        clipped_sum(case, mode, COUNT, 0.1)


def test_the_row_of_padding_gets_neither_gradient_nor_noise() -> None:
    net = words_mean(padding_idx=3)
    before = net.words.weight.detach().clone()
    wrapped = wrap(net, PRFStream(bytes(32)), mode="hooks", noise_multiplier=1.0, max_grad_norm=1.0)
    optimizer = wrapped.optimizer(torch.optim.SGD(net.parameters(), lr=1.0), expected_batch_size=1.0)
    optimizer.take(None)
    wrapped.unwrap()
    moved = (net.words.weight.detach() - before).abs().sum(1)
    assert float(moved[3]) == 0 and bool((moved[:3] > 0).all() and (moved[4:] > 0).all())
