"""What keyed noise costs: a private step against the same step with Opacus' own noise, and encoding private updates.

PyTorch has one thread. The noise of a large model is drawn by a thread of its own while a step computes, so steps are
measured by the clock, several in a row, and both kinds in turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from torch import nn

from clients.app import app as client_app
from clients.data import load_dataset
from clients.dataset import Dataset
from clients.models import build_model
from experiments.compare.synchronous import quiet
from experiments.privacy.tasks import PROBLEMS
from fl_gradcode import GradientCoding, fractional_repetition, uncoded
from fl_gradcode.privacy import DPSGD, PRFStream, wrap, write_keys
from fl_gradcode.testing import InProcessGrid

__all__ = ["private_encoding", "private_step"]

_BATCH = 64
_SHAPE = (1, 28, 28)
_NOISE, _CLIP = 1.0, 1.0
_ROW = 6  # steps in a row
_MOST = {"hooks": 1.15, "ghost": 1.25}
_console = Console()
Mode = Literal["hooks", "ghost"]


def private_step(repeats: int = 150) -> None:
    """Client: one step of DP-SGD with keyed noise and with Opacus' own, in turns."""
    images = Dataset(*(np.zeros((1, *_SHAPE), np.float32), np.zeros(1, np.int64)) * 2, classes=10)
    makers: dict[str, Callable[[], nn.Module]] = {
        "small-cnn": lambda: build_model("small-cnn", images, seed=0),
        "cnn": lambda: build_model("cnn", images, seed=0),
        "MLP": _mlp,
    }
    cases: list[tuple[str, Mode]] = [("small-cnn", "hooks"), ("cnn", "hooks"), ("MLP", "hooks"), ("MLP", "ghost")]
    for name, mode in cases:
        size = sum(p.numel() for p in makers[name]().parameters())
        ours, theirs = _steps(makers[name], mode, repeats if size < 100_000 or mode == "ghost" else repeats // 3)
        a, b = statistics.median(ours), statistics.median(theirs)
        _console.print(
            f"{name}, {size:,} parameters, {mode}, batch {_BATCH}: {1e3 * a:.2f} ms a step with keyed noise, "
            f"{1e3 * b:.2f} ms with Opacus' own, ratio [bold]{a / b:.3f}[/] (asked: at most {_MOST[mode]}); median of "
            f"ratios of neighbours {statistics.median(x / y for x, y in zip(ours, theirs, strict=True)):.3f}."
        )


def private_encoding(repeats: int = 15) -> None:
    """Client: three shards trained privately and encoded in one message, against three plain messages of one shard."""
    problem = PROBLEMS["digits"].problem
    privacy = DPSGD(noise_multiplier=_NOISE, max_grad_norm=_CLIP, sample_rate=0.16, steps=5, accountant="rdp")
    arrays = ArrayRecord(build_model(problem.model, load_dataset(problem.dataset), seed=0).state_dict())
    times: dict[str, list[float]] = {"coded": [], "alone": []}
    codes = {"coded": fractional_repetition(3, 2), "alone": uncoded(3)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        grids = {}
        for name, code in codes.items():
            write_keys(f"{folder}/{name}", [code.shards_of(worker) for worker in range(3)])
            config = {**problem.run_config("", 0), "privacy-dir": f"{folder}/{name}"}
            grids[name] = stack.enter_context(InProcessGrid(client_app, 3, run_config=config))
        for number in range(repeats):
            privacy.epsilon(number + 1)  # what ledgers ask for: remembered by the process, and paid by whoever is first
            for name, code in codes.items():  # in turns, so that both meet the machine's moods
                strategy = GradientCoding(FedAvg(**quiet), code, privacy=privacy, run=f"run-{number}")
                messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grids[name]))
                messages = messages[:1] if name == "coded" else messages
                started = time.process_time()
                replies = grids[name].send_and_receive(messages)
                times[name].append(time.process_time() - started)
                assert not any(reply.has_error() for reply in replies)
    a, b = (statistics.median(times[name]) for name in codes)
    _console.print(
        f"Three shards of digits, {privacy.steps} private steps each: {1e3 * a:.0f} ms coded in one reply, "
        f"{1e3 * b:.0f} ms in a reply each, ratio [bold]{a / b:.2f}[/]; keys, ledgers on disk and encoding included."
    )


def _steps(make: Callable[[], nn.Module], mode: Mode, repeats: int) -> tuple[list[float], list[float]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(_BATCH, *_SHAPE, generator=generator)
    y = torch.randint(0, 10, (_BATCH,), generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = [_keyed(make(), mode, x, y), _plain(make(), mode, x, y)]
        times: list[list[float]] = [[], []]
        for number in range(repeats // _ROW + 1):
            for which in (0, 1) if number % 2 else (1, 0):  # in turns, so that both meet the machine's moods
                started = time.perf_counter()
                for _ in range(_ROW):
                    steps[which]()
                if number:
                    times[which].append((time.perf_counter() - started) / _ROW)
    finally:
        torch.set_num_threads(threads)
    return times[0], times[1]


def _keyed(model: nn.Module, mode: Mode, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    wrapped = wrap(
        model, PRFStream(bytes(range(32))), mode=mode, noise_multiplier=_NOISE, max_grad_norm=_CLIP, steps=10**6
    )
    optimizer = wrapped.optimizer(torch.optim.SGD(model.parameters(), lr=0.01), expected_batch_size=_BATCH)
    step = _step(wrapped.model, optimizer, wrapped.criterion(nn.CrossEntropyLoss()), x, y)

    def one() -> None:
        wrapped.batch_drawn(len(y))
        with wrapped.losses:
            step()

    return one


def _plain(model: nn.Module, mode: Mode, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Opacus as it comes, with a generator of torch's: fast, and no secret (32 bits of its seed count)."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    ghost = mode == "ghost"
    kind = DPOptimizerFastGradientClipping if ghost else DPOptimizer
    wrapped: Any
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=_CLIP)
    else:
        wrapped = GradSampleModule(model)
    optimizer = kind(
        torch.optim.SGD(model.parameters(), lr=0.01),
        noise_multiplier=_NOISE,
        max_grad_norm=_CLIP,
        expected_batch_size=_BATCH,
        generator=torch.Generator().manual_seed(1),
    )
    criterion: Any = nn.CrossEntropyLoss()
    if ghost:
        criterion = DPLossFastGradientClipping(wrapped, optimizer, criterion)
    return _step(wrapped, optimizer, criterion, x, y)


def _step(model: Any, optimizer: Any, criterion: Any, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    def one() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    return one


def _mlp() -> nn.Module:
    """407,050 parameters, nearly all of them in one wide layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
