"""Private training against SGD written by hand; what would void the claim is refused."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_gradcode.errors import InvalidSetting, PrivacyRefused
from fl_gradcode.privacy import PrivateTraining
from fl_gradcode.privacy.dp_optimizer import wrap
from fl_gradcode.privacy.key_derivation import KeyContext, PRFStream
from fl_gradcode.privacy.step_guards import Misuse, WeightGuard
from fl_gradcode.testing import inside_a_run
from tests.privacy.direct import Node, linear, move, records
from tests.privacy.private_app import model, settings

MODES: tuple[Literal["hooks", "ghost"], ...] = ("hooks", "ghost")
NO_NOISE = 1e-9
CLIP = 3.0  # some gradients are longer, some are not


@pytest.fixture(autouse=True)
def _in_a_run() -> Iterator[None]:
    with inside_a_run():
        yield


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node")


def classes(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 8, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def by_hand(net: nn.Module, x: Tensor, y: Tensor, loss: Any, batches: list[list[int]], clip: float, lr: float) -> int:
    """Plain clipped SGD, one record at a time; how many gradients were clipped."""
    size, clipped = len(x), 0
    for batch in batches:
        total = [torch.zeros_like(p) for p in net.parameters()]
        for i in batch:
            gradients = torch.autograd.grad(loss(net(x[i : i + 1]), y[i : i + 1]), [*net.parameters()])
            norm = torch.sqrt(sum((g**2).sum() for g in gradients))  # type: ignore[arg-type]
            clipped += bool(norm > clip)
            for t, g in zip(total, gradients, strict=True):
                t += g * min(1.0, clip / float(norm))
        with torch.no_grad():
            for p, t in zip(net.parameters(), total, strict=True):
                p.sub_(lr * t / size)
    return clipped


@pytest.mark.parametrize("mode", MODES)
def test_without_noise_and_sampling_it_is_clipped_sgd_by_hand(node: Node, mode: Any) -> None:
    (x, y), net, other = classes(), model(), model()
    privacy = settings(noise_multiplier=NO_NOISE, sample_rate=1.0, max_grad_norm=CLIP, grad_sample_mode=mode)
    with node.ask(net, privacy=privacy) as dp:
        batches = move(dp, net, x, y, lr=0.5, loss=nn.CrossEntropyLoss())
    assert batches == [list(range(40))] * 3
    clipped = by_hand(other, x, y, nn.CrossEntropyLoss(), batches, CLIP, 0.5)
    assert 10 < clipped < 110
    step = torch.linalg.vector_norm(flat(other) - flat(model()))
    assert step > 0.1 and torch.linalg.vector_norm(flat(net) - flat(other)) < 1e-5 * step


def test_ghost_clipping_and_hooks_agree(tmp_path: Path) -> None:
    # One stream for both: their keys differ, since the settings do.
    (x, y), updates = classes(), []
    for mode in MODES:
        net = model()
        wrapped = wrap(net, PRFStream(bytes(32)), mode=mode, noise_multiplier=0.7, max_grad_norm=1.0)
        optimizer = wrapped.optimizer(torch.optim.SGD(net.parameters(), lr=1.0), expected_batch_size=8.0)
        criterion = wrapped.criterion(nn.CrossEntropyLoss())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook")
            for batch in (range(8), range(8, 21), [], [39]):
                if not batch:
                    optimizer.take(None)
                    continue
                wrapped.batch_drawn(len(batch))
                optimizer.zero_grad()
                criterion(wrapped.model(x[[*batch]]), y[[*batch]]).backward()
                optimizer.step()
        updates.append(flat(wrapped.unwrap()) - flat(model()))
    apart = torch.linalg.vector_norm(updates[0] - updates[1])
    assert apart < 1e-5 * torch.linalg.vector_norm(updates[0])


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_is_a_step_of_noise_alone(node: Node, mode: Any) -> None:
    net = linear()
    privacy = settings(sample_rate=1e-9, steps=2, grad_sample_mode=mode, noise_multiplier=1e-9)
    x, y = records()
    with node.ask(net, privacy=privacy) as dp:
        assert move(dp, net, x, y) == []  # it has no forward pass
    # Twice sigma C / (q n) times a normal: of a size that noise alone has.
    sizes = net.weight.detach().abs().flatten() / (1e-9 / (1e-9 * 40))
    assert net.weight.isfinite().all() and 0 < float(sizes.max()) < 10


Penalty = Callable[[nn.Module], Tensor]
PENALTIES: dict[str, list[Penalty]] = {
    "L2": [lambda net: 0.3 * torch.stack([p.square().sum() for p in net.parameters()]).sum()],
    "L1 of one layer": [lambda net: 0.2 * next(net.parameters()).abs().sum()],
    "weighted by importance": [
        lambda net: torch.stack([(i * (p - 1).square()).sum() for i, p in enumerate(net.parameters())]).sum()
    ],
    "two": [
        lambda net: 0.3 * torch.stack([p.square().sum() for p in net.parameters()]).sum(),
        lambda net: next(net.parameters()).sum(),
    ],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_of_any_kind_have_their_own_gradient(node: Node, name: str, mode: Any) -> None:
    """Also in steps without records, of which there is nothing else."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    plain = copy.deepcopy(net)
    torch.stack([penalty(plain) for penalty in PENALTIES[name]]).sum().backward()
    privacy = settings(noise_multiplier=1e-9, sample_rate=1e-6, steps=1, grad_sample_mode=mode)
    before = [p.detach().clone() for p in net.parameters()]
    with node.ask(net, privacy=privacy, examples=5) as dp:
        for penalty in PENALTIES[name]:
            dp.penalty(partial(penalty, net))
        dp.optimizer(torch.optim.SGD(net.parameters(), lr=1e-3))
        assert not list(dp.batches())
    for p, start, other in zip(net.parameters(), before, plain.parameters(), strict=True):
        expected = torch.zeros_like(p) if other.grad is None else other.grad
        assert torch.allclose((start - p.detach()) / 1e-3, expected, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_stay_and_the_others_train(node: Node, mode: Any) -> None:
    net: Any = model()
    net[0].requires_grad_(False)
    x, y = classes()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with node.ask(net, privacy=settings(grad_sample_mode=mode)) as dp:
        move(dp, net, x, y, loss=nn.CrossEntropyLoss())  # its optimizer is given all parameters
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("0."), name


class Counting(nn.Module):
    """A layer that counts what it sees, in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x


def test_models_that_mix_records_or_keep_statistics_are_refused(node: Node) -> None:
    batch_norm = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(PrivacyRefused, match=r"BatchNorm.*ModuleValidator\.fix\(model\).*GroupNorm"):
        node.ask(batch_norm).__enter__()
    assert not node.ledger.exists() and not leftovers(batch_norm)
    counting: Any = nn.Sequential(Counting(), linear())
    x, y = records()
    dp = node.ask(counting)
    with (
        pytest.raises(
            PrivacyRefused, match=r"A forward pass changes '0\.seen', which is no parameter and gets no noise"
        ),
        dp,
    ):
        move(dp, counting, x, y)
    assert not leftovers(counting)


def step(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor, optimizer: Any = None) -> None:
    optimizer = optimizer or dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    optimizer.zero_grad()
    dp.criterion(nn.MSELoss())(dp.model(x), y).backward()
    optimizer.step()


def without_a_batch(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    step(dp, net, x, y)


def before_the_optimizer(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    next(dp.batches())


def without_a_loss_of_its_own(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    batch = next(dp.batches())
    valid = (y[batch] > 0).float()
    (((dp.model(x[batch]) - y[batch]) ** 2 * valid).sum() / valid.sum()).backward()
    optimizer.step()


def with_a_square_of_all_with_all(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    batch = next(dp.batches())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about the same
        nn.functional.mse_loss(dp.model(x[batch]), y[batch][:, 0]).backward()
    optimizer.step()


def with_a_penalty_in_the_loss(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    batch = next(dp.batches())
    (dp.criterion(nn.MSELoss())(dp.model(x[batch]), y[batch]) + (net.weight**2).sum()).backward()
    optimizer.step()


def with_a_factor_of_the_batch(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    batch = next(dp.batches())
    (dp.criterion(nn.MSELoss())(dp.model(x[batch]), y[batch]) / y[batch].abs().sum()).backward()
    optimizer.step()


def twice_on_one_batch(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    batch = next(dp.batches())
    step(dp, net, x[batch], y[batch], optimizer)
    step(dp, net, x[batch], y[batch], optimizer)


def on_another_batch(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    next(dp.batches())
    step(dp, net, x, y, optimizer)


def on_batches_drawn_before(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    for batch in list(dp.batches()):
        step(dp, net, x[batch], y[batch], optimizer)


def with_other_parameters(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    dp.optimizer(torch.optim.SGD([*net.parameters(), nn.Parameter(torch.zeros(1))], lr=1.0))


def without_all_parameters(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    dp.optimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))


def with_state(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    used = torch.optim.Adam(net.parameters())
    net.weight.grad = torch.ones_like(net.weight)
    used.step()
    dp.optimizer(used)


def with_an_unwrapped_loss(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    batch = next(dp.batches())
    optimizer.zero_grad()
    nn.functional.mse_loss(dp.model(x[batch]), y[batch]).backward()
    optimizer.step()


def with_a_second_loss(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    batch = next(dp.batches())
    optimizer.zero_grad()
    dp.criterion(nn.MSELoss())(dp.model(x[batch]), y[batch]).backward()
    (1000 * nn.functional.mse_loss(dp.model(x[batch]), y[batch])).backward()
    optimizer.step()


def with_another_clipping_norm(dp: PrivateTraining, net: Any, x: Tensor, y: Tensor) -> None:
    optimizer: Any = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    optimizer.max_grad_norm *= 2
    batch = next(dp.batches())
    step(dp, net, x[batch], y[batch], optimizer)


MISUSES: list[tuple[str, Callable[..., None], str]] = [
    ("both", without_a_batch, "A loss without a batch of its own"),
    ("both", before_the_optimizer, r"The optimizer comes before the batches: call optimizer\(\) first"),
    ("hooks", without_a_loss_of_its_own, r"neither one of criterion\(\) nor one of PyTorch's"),
    ("hooks", with_a_square_of_all_with_all, "compares each record with all others, since outputs and targets"),
    ("hooks", with_a_penalty_in_the_loss, r"say penalties on weights by penalty\(\)"),
    ("hooks", with_a_factor_of_the_batch, "scale losses by numbers alone"),
    ("ghost", with_a_penalty_in_the_loss, r"say penalties on weights by penalty\(\)"),
    ("ghost", with_a_factor_of_the_batch, "scale them by numbers alone"),
    ("both", twice_on_one_batch, "A loss without a batch of its own"),
    ("both", on_another_batch, "A step on another number of records than was drawn"),
    ("both", on_batches_drawn_before, "A batch without a step of its own"),
    ("both", with_another_clipping_norm, "max_grad_norm was changed: it is the run's"),
    ("both", with_other_parameters, "The optimizer has other parameters than those of the model"),
    ("both", without_all_parameters, "The optimizer has other parameters than those of the model"),
    ("both", with_state, "The optimizer keeps something of earlier steps: make a new one"),
    ("ghost", with_an_unwrapped_loss, "A step whose gradients were not clipped: .* wrap the loss by criterion"),
    ("ghost", with_a_second_loss, "A step whose gradients were not clipped"),
    ("hooks", with_a_second_loss, "Poisson sampling is not compatible with grad accumulation"),
]


@pytest.mark.parametrize(
    ("mode", "misuse", "reason"),
    [(mode, misuse, reason) for which, misuse, reason in MISUSES for mode in MODES if which in ("both", mode)],
)
def test_misuse_is_refused_and_the_model_is_plain_afterwards(
    node: Node, mode: Any, misuse: Callable[..., None], reason: str
) -> None:
    net = linear()
    x, y = records()
    dp = node.ask(net, privacy=settings(grad_sample_mode=mode))
    with pytest.raises((PrivacyRefused, ValueError), match=reason), dp:
        misuse(dp, net, x, y)
    assert not leftovers(net)
    # What was begun and not ended does not get into the next use of the model.
    fresh, again = linear(), Node(node.folder.parent / "other", node.folder.parent / "keys")
    net.load_state_dict(fresh.state_dict())
    assert again.update(net)[0].equal(Node(node.folder.parent / "third", node.folder.parent / "keys").update(fresh)[0])


@pytest.mark.parametrize("sizes", [(3, 4), (200, 200)], ids=["narrow", "wide"])
def test_a_change_of_one_bit_of_any_parameter_is_noticed(sizes: tuple[int, int]) -> None:
    net = nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], sizes[0], bias=False))
    guard = WeightGuard(net)
    guard.check()
    for parameter in net.parameters():
        for place in (0, -1):
            with torch.no_grad():
                entry = parameter.view(-1)[place]
                before = entry.item()
                entry.copy_(torch.nextafter(entry, entry + 1))
            with pytest.raises(Misuse, match="has changed the model"):
                guard.check()
            with torch.no_grad():
                parameter.view(-1)[place] = before
            guard.check()


def leftovers(net: nn.Module) -> set[str]:
    """Whatever Opacus leaves: hooks, and attributes of modules and parameters."""
    plain = {*vars(nn.Linear(1, 1)), *vars(nn.GroupNorm(1, 1)), *vars(nn.ReLU()), *vars(nn.BatchNorm1d(1)), "seen"}
    found = {name for part in net.modules() for name in vars(part)} - plain
    found |= {name for p in net.parameters() for name in vars(p)}
    for part in net.modules():
        found |= {name for name in vars(part) if name.endswith("_hooks") and vars(part)[name]}
    return found


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_plain_again_also_when_the_body_raises(node: Node, mode: Any) -> None:
    net = model()
    names, (x, y) = [*net.state_dict()], classes()
    privacy = settings(grad_sample_mode=mode)
    with node.ask(net, privacy=privacy) as dp:
        assert leftovers(net)  # so the test would see them
        move(dp, net, x, y, loss=nn.CrossEntropyLoss())
    assert [*net.state_dict()] == names and not leftovers(net)

    def broken_off(dp: PrivateTraining) -> None:
        with dp:
            dp.model(x)  # a forward pass without its backward pass
            raise KeyError("disk")

    with pytest.raises(KeyError, match="disk"):
        broken_off(node.ask(net, privacy=privacy, round=2))
    assert [*net.state_dict()] == names and not leftovers(net)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()  # and trains plainly
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    with node.ask(net, privacy=privacy, round=3) as dp:
        move(dp, net, x[:7].repeat(6, 1)[:40], y[:7].repeat(6)[:40], loss=nn.CrossEntropyLoss())


def test_an_optimizer_with_momentum_and_groups_works(node: Node) -> None:
    net: Any = model()
    x, y = classes()
    with node.ask(net) as dp:
        groups = [{"params": net[0].parameters()}, {"params": [*net[1].parameters(), *net[3].parameters()], "lr": 0.1}]
        optimizer = dp.optimizer(torch.optim.AdamW(groups, lr=0.01))
        for batch in dp.batches():
            optimizer.zero_grad()
            dp.criterion(nn.CrossEntropyLoss())(dp.model(x[batch]), y[batch]).backward()
            optimizer.step()
    assert not flat(net).equal(flat(model())) and flat(net).isfinite().all()


@pytest.mark.parametrize(
    ("examples", "delta", "error", "reason"),
    [
        (0, 1e-5, PrivacyRefused, "Shard 0 has no records; private training needs at least one"),
        (40, 0.025, PrivacyRefused, r"delta=0\.025 is not below 1 over the number of its records"),
    ],
)
def test_shards_that_cannot_be_protected_are_refused(
    node: Node, examples: int, delta: float, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        node.ask(linear(), examples=examples, privacy=settings(delta=delta)).__enter__()
    assert not node.ledger.exists()


def test_only_the_shard_that_is_trained_is_charged(node: Node) -> None:
    with pytest.raises(InvalidSetting, match="asks for shard 1, and partition-id is 0"):
        node.ask(linear(), shard=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("shard", 0.0), ("shard", False), ("round", 1.0), ("round", -1), ("round", True), ("run", 7), ("holders", 0)],
)
def test_a_request_of_another_type_is_refused(node: Node, name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting, match=f"The {name} that is asked for is {value!r}; it must be"):
        node.ask(linear(), **{name: value})


def test_without_a_folder_independent_noise_keeps_to_the_runs_budget() -> None:
    def enter(server_round: int, most: float) -> float:
        privacy = settings(noise="independent", max_epsilon=most)
        node = Node.__new__(Node)
        node.folder = Path("")
        net = linear()
        with node.ask(net, privacy=privacy, round=server_round, node_config={"privacy-dir": ""}) as dp:
            move(dp, net, *records())
        return dp.epsilon

    most = enter(2, 1e9)
    assert enter(1, most) < most == enter(2, most)
    with pytest.raises(PrivacyRefused, match="round 3: it would bring this run to epsilon .* above the budget"):
        enter(3, most)


@pytest.mark.parametrize("mode", MODES)
def test_noise_of_a_release_has_the_variance_of_theory(mode: Any) -> None:
    sigma, clip, lr, expected, size, keys = 1.3, 0.5, 0.7, 8.0, 500, 200
    x, y = torch.zeros(8, size), torch.zeros(8, 1)  # gradients of nothing: what moves is noise
    updates = np.empty((keys, size))
    context = KeyContext("r", 1, 0, bytes(32), bytes(32), bytes(32))
    for i in range(keys):
        net = linear(size)
        stream = PRFStream(context.derive(i.to_bytes(32, "big"), "noise"))
        wrapped = wrap(net, stream, mode=mode, noise_multiplier=sigma, max_grad_norm=clip)
        optimizer = wrapped.optimizer(torch.optim.SGD(net.parameters(), lr=lr), expected_batch_size=expected)
        criterion = wrapped.criterion(nn.MSELoss())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook")
            wrapped.batch_drawn(8)
            criterion(wrapped.model(x), y).backward()
            optimizer.step()
        updates[i] = net.weight.detach().numpy()
    theory = (lr * sigma * clip / expected) ** 2
    assert updates.var() == pytest.approx(theory, rel=0.03)  # five standard errors
    assert abs(updates.mean()) < 5 * np.sqrt(theory / updates.size)
    # From one key to the next, and from one parameter to the next, independent.
    for one, other in ((updates[1:], updates[:-1]), (updates[:, 1:], updates[:, :-1])):
        assert abs(np.mean(one * other)) / theory < 5 / np.sqrt(one.size)


SCRIPT = """
import sys, torch
from pathlib import Path
from fl_gradcode.testing import inside_a_run
from tests.privacy.test_dp_optimizer import digest_of
torch.manual_seed(1)
with inside_a_run():
    for threads, folder in enumerate(sys.argv[1:], 1):
        torch.set_num_threads(threads)
        print(digest_of(Path(folder)))
"""


def digest_of(folder: Path) -> str:
    """Of a private update of a wide model; the update itself lies in the folder."""
    net = model()
    x, y = classes(600)
    with Node(folder).ask(net, examples=600, privacy=settings(steps=8)) as dp:
        move(dp, net, x, y, loss=nn.CrossEntropyLoss())
    update = (flat(net) - flat(model())).numpy()
    np.save(folder / "update.npy", update)
    return hashlib.sha256(update.tobytes()).hexdigest()


def test_processes_with_equal_settings_give_the_same_bits(tmp_path: Path) -> None:
    """One of the two is this one; two threads may round otherwise."""
    keys = Node(tmp_path / "made").folder.parent / "keys"
    ours, *theirs = (Node(tmp_path / f"{i}", keys).folder for i in range(3))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, theirs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=True)
    digests = done.stdout.splitlines()
    assert len(digests) == 2 and len(digests[0]) == 64
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert digests[0] == digest_of(ours)
    finally:
        torch.set_num_threads(threads)
    one, two = (np.load(folder / "update.npy") for folder in theirs)
    assert np.linalg.norm(one - two) < 1e-5 * np.linalg.norm(one)
    (tmp_path / "other").mkdir()
    stranger = Node(tmp_path / "other" / "node")  # with other keys
    assert digest_of(stranger.folder) not in digests


def test_opacus_and_torch_are_imported_when_they_are_needed_and_leave_the_root_logger_alone() -> None:
    loaded = "print(sorted({'opacus', 'torch'} & {*sys.modules}))\n"
    logger = "print(root.handlers, root.level)\n"
    script = (
        "import logging, sys; root = logging.getLogger()\n"
        f"from fl_gradcode.privacy import DPSGD, Spent, privacy_to_json, read_keys\n{loaded}"
        f"from fl_gradcode.privacy import private_training\n{loaded}"
        f"from fl_gradcode.privacy import Spend, epsilon_of\n{loaded}"
        f"epsilon_of([Spend(1.0, 0.1, 1)], 1e-5, accountant='rdp')\n{loaded}{logger}"
        f"from fl_gradcode.privacy import wrap\n{logger}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=600)
    untouched = f"[] {logging.WARNING}"
    imported = ["[]", "['torch']", "['torch']", "['opacus', 'torch']"]
    assert done.stdout.splitlines() == [*imported, untouched, untouched]
