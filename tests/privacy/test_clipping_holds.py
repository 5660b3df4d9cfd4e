"""No record moves an update by more than the clipping norm, and nothing leaves but noisy steps, all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_gradcode.errors import PrivacyRefused
from fl_gradcode.privacy import PrivateTraining
from fl_gradcode.privacy.dp_optimizer import wrap
from fl_gradcode.privacy.key_derivation import PRFStream
from fl_gradcode.testing import inside_a_run
from tests.privacy.direct import Node, linear, move, records
from tests.privacy.private_app import settings

MODES = ("hooks", "ghost")
CLIP, COUNT = 0.5, 12


@pytest.fixture(autouse=True)
def _in_a_run() -> Iterator[None]:
    with inside_a_run(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node")


def net_of(outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs))


def summed(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    mode: Any,
    *,
    loss: Any = None,
    clip: float = CLIP,
    change: Callable[[Any], Any] = lambda loss: loss,
) -> Tensor:
    """The sum of clipped gradients in one step without noise, flat."""
    wrapped = wrap(net, PRFStream(bytes(32)), mode=mode, noise_multiplier=1e-12, max_grad_norm=clip)
    optimizer = wrapped.optimizer(torch.optim.SGD(net.parameters(), lr=1.0), expected_batch_size=1.0)
    criterion = wrapped.criterion(loss or nn.MSELoss())
    wrapped.batch_drawn(len(x))
    optimizer.zero_grad()
    change(criterion(wrapped.model(x), y)).backward()
    optimizer.step()
    wrapped.unwrap()
    return torch.cat([torch.as_tensor(p.grad).flatten() for p in net.parameters()])


def by_hand(net: nn.Module, x: Tensor, y: Tensor, loss: Any) -> Tensor:
    total: Any = 0
    for i in range(len(x)):
        one = torch.autograd.grad(loss(net(x[i : i + 1]), y[i : i + 1]), [*net.parameters()])
        gradient = torch.cat([g.flatten() for g in one])
        total = total + gradient * min(1.0, CLIP / float(gradient.norm()))
    return torch.as_tensor(total)


def targets(loss: nn.Module, outputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.randint(0, outputs, (COUNT,), generator=generator)
    values = 9 * torch.randn(COUNT, outputs, generator=generator)
    return (values > 0).float() if isinstance(loss, nn.BCEWithLogitsLoss) else values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        *((loss, outputs) for loss in (nn.MSELoss(), nn.L1Loss(), nn.BCEWithLogitsLoss()) for outputs in (1, 3)),
        (nn.CrossEntropyLoss(), 3),
    ],
    ids=str,
)
def test_each_loss_is_clipped_record_by_record(loss: nn.Module, outputs: int, mode: str) -> None:
    x, y = 9 * records(COUNT)[0], targets(loss, outputs)
    found, expected = summed(net_of(outputs), x, y, mode, loss=loss), by_hand(net_of(outputs), x, y, loss)
    assert torch.linalg.vector_norm(found - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert torch.linalg.vector_norm(found) <= COUNT * CLIP


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_record_more_changes_the_sum_by_at_most_the_clipping_norm(outputs: int, mode: str) -> None:
    x, y = records(COUNT)[0], targets(nn.MSELoss(), outputs)
    x[-1] *= 1e3
    apart = summed(net_of(outputs), x, y, mode) - summed(net_of(outputs), x[:-1], y[:-1], mode)
    assert 0.9 * CLIP < torch.linalg.vector_norm(apart) < CLIP * (1 + 1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("label", [0, -100])
def test_class_weights_and_ignored_labels_do_not_scale_the_gradients_of_other_records(label: int, mode: str) -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1000.0, 1.0, 2.0]))
    x, y = records(COUNT)[0], 1 + torch.arange(COUNT) % 2
    y[-1] = label
    few = [summed(net_of(3), x[:count], y[:count], mode, loss=loss, clip=5.0) for count in (COUNT - 1, COUNT)]
    assert torch.linalg.vector_norm(few[1] - few[0]) <= 5.0 * (1 + 1e-4)
    assert torch.allclose(few[0], summed(net_of(3), x[:-1], y[:-1], "hooks", loss=loss, clip=5.0), rtol=1e-5, atol=1e-6)
    if label < 0:
        assert torch.allclose(few[0], few[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_sum_over_records_is_refused(mode: str) -> None:
    with pytest.raises(PrivacyRefused, match="The loss is a sum over records: give criterion"):
        summed(net_of(1), *records(COUNT), mode, loss=nn.MSELoss(reduction="sum"))


def test_losses_under_ghost_clipping_are_added_and_scaled_as_under_hooks() -> None:
    x, y = records(COUNT)
    one, other = (summed(net_of(1), x, y, mode, change=lambda loss: (2 * loss + 1.0 - loss / 4) * 3) for mode in MODES)
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_loss_with_gradients_that_ghost_clipping_does_not_see_is_refused() -> None:
    def penalty(net: nn.Module) -> Tensor:
        return sum(((p**2).sum() for p in net.parameters()), torch.zeros(()))

    x, y = records(COUNT)
    changes: list[Callable[[Any, nn.Module], Any]] = [
        lambda loss, net: loss + penalty(net),
        lambda loss, net: penalty(net) - loss,
        lambda loss, _: loss * torch.ones(COUNT, 1),
    ]
    for change in changes:
        net = net_of(1)
        with pytest.raises(PrivacyRefused, match="Ghost clipping sees no gradients of what is added"):
            summed(net, x, y, "ghost", change=lambda loss, net=net, change=change: change(loss, net))  # type: ignore[misc]


class Scalar(nn.Module):
    """A loss that has its mean whatever `reduction` says."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return ((one - other) ** 2).mean()


class Flat(nn.Module):
    """A loss of one number for each output, with records no longer apart."""

    reduction = "mean"

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return ((one - other) ** 2).flatten()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", [Scalar(), Flat(), lambda one, other: ((one - other) ** 2).mean()])
def test_a_loss_of_ones_own_is_taken_record_by_record(loss: Any, mode: str) -> None:
    x, y = records(COUNT)[0], targets(nn.MSELoss(), 3)
    found = summed(net_of(3), x, y, mode, loss=loss)
    assert torch.allclose(found, summed(net_of(3), x, y, mode, loss=nn.MSELoss()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_record_without_a_finite_gradient_counts_as_one_with_none(bad: float, mode: str) -> None:
    x, y = records(COUNT)
    without = summed(net_of(1), x[:-1], y[:-1], "hooks")
    y[-1] = bad
    found = summed(net_of(1), x, y, mode)
    assert without.isfinite().all() and torch.linalg.vector_norm(without) > 0.1
    assert torch.allclose(found, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e-30, 1e10, 1e17, 1e19, 1e25, 1e30])
def test_gradients_of_any_size_are_clipped_to_the_norm_and_not_beyond(size: float, mode: str) -> None:
    x, y = records(COUNT)
    y[-1] = size
    for clip in (1e-6, CLIP, 1e6):
        apart = summed(net_of(1), x, y, mode, clip=clip) - summed(net_of(1), x[:-1], y[:-1], mode, clip=clip)
        length = float(torch.linalg.vector_norm(apart.double()))
        assert length <= clip * (1 + 1e-5)
        if size > 1e6 * clip:
            assert length >= 0.99 * clip


class Functional(nn.Module):
    """A layer, and its weight once more past it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(value=0.01)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(1e-3 * x) + nn.functional.linear(x, self.layer.weight)
        return out


def test_a_weight_that_is_used_past_its_layer_does_not_escape() -> None:
    x, y = 10 * torch.ones(COUNT, 6), torch.full((COUNT, 1), 50.0)
    for mode in MODES:
        with pytest.raises(PrivacyRefused, match=r"are not those of the model: a weight is used past its layer"):
            summed(Functional(), x, y, mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_half_precision_are_refused(node: Node, dtype: torch.dtype) -> None:
    with pytest.raises(PrivacyRefused, match=r"must be float32 or float64: .*model\.float\(\) first"):
        wrap(linear().to(dtype), PRFStream(bytes(32)), mode="hooks", noise_multiplier=1.0, max_grad_norm=1.0)
    x, y = records(COUNT)
    found = summed(net_of(1).double(), x.double(), y.double(), "hooks")
    assert found.dtype == torch.float64


def test_under_autocast_hooks_clip_in_the_parameters_precision_and_ghost_refuses() -> None:
    x, y = records(COUNT)
    for i in range(COUNT):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one = summed(net_of(1), 9 * x[i : i + 1], 99 * y[i : i + 1], "hooks")
        assert torch.linalg.vector_norm(one) <= CLIP * (1 + 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(PrivacyRefused, match="another precision"):
        summed(net_of(1), x, y, "ghost")


# ---- Steps ----------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "adam, each by itself": lambda parameters: torch.optim.Adam(parameters, lr=0.1, foreach=False),
    "adam, fused": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
}


def train(
    dp: PrivateTraining,
    net: nn.Module,
    make: Callable[[Any], torch.optim.Optimizer],
    at: Callable[[int, torch.optim.Optimizer], str] = lambda step, inner: "",
) -> None:
    """The loop that users write; at each step something may happen: "skip" takes no step, "stop" ends it."""
    x, y = records()
    inner = make(net.parameters())
    optimizer = dp.optimizer(inner)
    criterion = dp.criterion(nn.MSELoss())
    for number, batch in enumerate(dp.batches()):
        optimizer.zero_grad()
        criterion(dp.model(x[batch]), y[batch]).backward()
        done = at(number, inner)
        if done == "stop":
            break
        if done != "skip":
            optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_of_every_kind_move_weights_and_nothing_else_may(node: Node, make: Any, mode: Any) -> None:
    net = net_of(1)
    privacy = settings(grad_sample_mode=mode)
    with node.ask(net, privacy=privacy) as dp:
        train(dp, net, make)
    assert dp.record["fl-gradcode.privacy"]
    assert not next(net.parameters()).equal(next(net_of(1).parameters()))

    def past_the_noise(number: int, inner: torch.optim.Optimizer) -> str:
        if number == 2:  # the last step: there is no further batch that would be refused
            inner.step()
        return ""

    dp = node.ask(net, privacy=privacy, round=2)
    with pytest.raises(PrivacyRefused, match=r"Something other than a step of the optimizer that optimizer\(\)"), dp:
        train(dp, net, make, past_the_noise)
    with pytest.raises(PrivacyRefused, match="only after its with block"):
        _ = dp.record


def test_only_steps_of_the_inner_optimizer_are_no_steps(node: Node) -> None:
    def unwrapped(_: int, inner: torch.optim.Optimizer) -> str:
        inner.step()
        return "skip"

    net = linear()
    dp = node.ask(net)
    with pytest.raises(PrivacyRefused, match="A batch without a step of its own"), dp:
        train(dp, net, OPTIMIZERS["sgd"], unwrapped)


def edit(net: nn.Linear) -> None:
    net.weight.data += 1e-3


def replace(net: nn.Linear) -> None:
    net.weight = nn.Parameter(net.weight.detach() + 1)


def widen(net: nn.Linear) -> None:
    net.double()


@pytest.mark.parametrize(("change", "when"), [(edit, "before"), (edit, "after"), (replace, "after"), (widen, "after")])
def test_weights_that_something_else_changed_do_not_leave(
    node: Node, change: Callable[[nn.Linear], None], when: str
) -> None:
    def body(dp: PrivateTraining) -> None:
        if when == "before":
            change(net)
        move(dp, net, *records())
        if when == "after":
            change(net)

    net = linear()
    dp = node.ask(net)
    with pytest.raises(PrivacyRefused, match="Something other than a step of the optimizer"), dp:
        body(dp)
    with pytest.raises(PrivacyRefused):
        _ = dp.record


def test_weights_that_are_not_finite_are_compared_bit_by_bit(node: Node) -> None:
    net = linear(value=float("nan"))
    with node.ask(net) as dp:
        move(dp, net, *records())
    assert dp.record


def test_moving_the_model_to_another_device_changes_nothing(node: Node) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no other device")
    net = linear().cuda()
    with node.ask(net) as dp:
        dp.model.cpu()
        move(dp, net, *records())
        dp.model.cuda()
    assert dp.record


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_batch_without_its_step_is_refused(node: Node, number: int, mode: Any) -> None:
    net = linear()
    reason = "A batch without a step of its own"
    dp = node.ask(net, privacy=settings(grad_sample_mode=mode))
    with pytest.raises(PrivacyRefused, match=reason), dp:
        train(dp, net, OPTIMIZERS["sgd"], lambda step, _: "skip" if step == number else "")


def test_training_that_ends_early_says_what_to_do(node: Node) -> None:
    net = linear()
    dp = node.ask(net)
    with (
        pytest.raises(PrivacyRefused, match=r"one step for each batch .*fewer by DPSGD\(steps=\.\.\.\)"),
        dp,
    ):
        train(dp, net, OPTIMIZERS["sgd"], lambda step, _: "stop" if step == 1 else "")
    with pytest.raises(PrivacyRefused):
        _ = dp.record


def test_an_error_of_the_body_is_the_one_that_is_told(node: Node) -> None:
    with pytest.raises(KeyError, match="disk"), node.ask(linear()):
        raise KeyError("disk")


def test_the_record_is_there_after_the_block_alone(node: Node) -> None:
    net = linear()
    dp = node.ask(net)
    with pytest.raises(PrivacyRefused, match="reply after the block"):
        _ = dp.record
    with dp:
        move(dp, net, *records())
        with pytest.raises(PrivacyRefused, match="reply after the block"):
            _ = dp.record
    assert dp.record


def test_a_batch_is_not_cut_into_steps_that_are_skipped(node: Node) -> None:
    def parts(dp: PrivateTraining) -> None:
        optimizer: Any = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
        optimizer.signal_skip_step(True)
        batch = next(dp.batches())
        nn.functional.mse_loss(dp.model(x[batch]), y[batch]).backward()
        optimizer.step()

    net = linear()
    x, y = records()
    dp = node.ask(net)
    with pytest.raises(PrivacyRefused, match="not parts of one"), dp:
        parts(dp)


@pytest.mark.parametrize("mode", MODES)
def test_refusals_hold_no_number_of_records(node: Node, mode: Any) -> None:
    def on_others(dp: PrivateTraining) -> None:
        optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
        drawn = len(next(dp.batches()))
        others = 3 if drawn != 3 else 4  # the key, and with it the draw, is another one each time
        dp.criterion(nn.MSELoss())(dp.model(x[:others]), y[:others]).backward()
        optimizer.step()

    net = linear()
    x, y = records()
    dp = node.ask(net, privacy=settings(grad_sample_mode=mode))
    with pytest.raises(PrivacyRefused, match="another number of records than was drawn") as told, dp:
        on_others(dp)
    assert not any(character.isdigit() for character in str(told.value))
