"""Coded private training of four kinds of models under stragglers, against Opacus' own training loop.

    python -m experiments.privacy.against_opacus --seeds 20

Both train the same shards from the same weights, for the same rounds and steps, with the same sample rate, clipping
norm and noise multiplier, so with the same epsilon. Opacus' loop is `PrivacyEngine.make_private` as in its tutorials,
once for each shard, with its own noise, batches and optimizer; after a round a line of PyTorch averages the weights of
the shards. All shards are there. A centralised loop would be another algorithm: local steps and averages are part
of what is learned. Coded training has six nodes. One never answers, one is late, and the fastest one fails in every
third round.

Noise is another in each run, so accuracies agree in distribution: the table has paired differences over seeds and their
standard errors. Nothing here is asserted; the test of a smaller size does that.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedProx
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from experiments.privacy.measures import Paired
from experiments.privacy.models import EXAMPLES, MODELS, SHARDS, ModelTask
from fl_gradcode import GradientCoding, VirtualGrid, fractional_repetition, gradient_coding_mod
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.privacy import DPSGD, private_training, write_keys
from fl_gradcode.testing import InProcessGrid

__all__ = ["ROUNDS", "SILENT", "Trained", "coded", "main", "opacus_loop", "promised", "table"]

ROUNDS, STEPS, CLIP, DELTA = 10, 5, 1.0, 1e-5
_BATCH = EXAMPLES // STEPS  # of Opacus' loader, whose epoch is one round
_EPSILON = 3.0
_S = 2
SILENT, FAILING, LATE = 5, 0, 1
_FAILED = 2  # Flower's error code for an exception in the ClientApp


@dataclass(frozen=True)
class Trained:
    """What a run came to.

    Attributes:
        accuracy: Of the last model on the test set.
        outcomes: Of the rounds.
        used: Workers whose replies were decoded, for each round.
        failed: Number of replies that were errors.
        epsilon: That the run's ledger says was spent.
    """

    accuracy: float
    outcomes: tuple[str, ...] = ()
    used: tuple[tuple[int, ...], ...] = ()
    failed: int = 0
    epsilon: float = 0.0


def promised(epsilon: float = _EPSILON, rounds: int = ROUNDS) -> DPSGD:
    """Returns the settings of both loops: the least noise that keeps an epsilon over all rounds."""
    return DPSGD.for_epsilon(
        epsilon, rounds=rounds, delta=DELTA, max_grad_norm=CLIP, sample_rate=1 / STEPS, steps=STEPS
    )


def _accuracy(net: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((net(test[0]).argmax(1) == test[1]).float().mean())


# ---- Coded -----------------------------------------------------------------------------------------------------------


def _app(task: ModelTask, seed: int, shards: list[tuple[Tensor, Tensor]]) -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content: Any = message.content
        net = task.make(seed)
        net.load_state_dict(content["arrays"].to_torch_state_dict())
        x, y = shards[int(context.node_config["partition-id"])]
        with private_training(message, context, net, examples=len(y)) as dp:
            trained = [p for p in net.parameters() if p.requires_grad]
            if task.mu:
                mu, start = float(content["config"]["proximal-mu"]), [p.detach().clone() for p in trained]
                dp.penalty(lambda: _proximal(mu, trained, start))
            optimizer = dp.optimizer(torch.optim.SGD(trained, lr=task.learning_rate))
            criterion = dp.criterion(nn.CrossEntropyLoss())
            for batch in dp.batches():
                optimizer.zero_grad()
                criterion(dp.model(x[batch]), y[batch]).backward()
                optimizer.step()
        metrics = MetricRecord({"num-examples": len(y)})
        records: Any = {"arrays": ArrayRecord(net.state_dict()), "metrics": metrics, "privacy": dp.record}
        return Message(RecordDict(records), reply_to=message)

    return app


def _proximal(mu: float, now: list[nn.Parameter], start: list[Tensor]) -> Tensor:
    return mu / 2 * torch.stack([((p - s) ** 2).sum() for p, s in zip(now, start, strict=True)]).sum()


def _fails(worker: int, message: Message, reply: Message) -> Message:
    """One node's reply is an error in every third round."""
    if worker == FAILING and int(message.metadata.group_id or 0) % 3 == 0:
        return Message(Error(_FAILED, "out of memory"), reply_to=message)
    return reply


def coded(task: ModelTask, seed: int, privacy: DPSGD, *, rounds: int = ROUNDS) -> Trained:
    """Train by `GradientCoding` with shared noise, in virtual time, with nodes that fail or are late.

    Args:
        task: Model and data.
        seed: Of data, initial weights and latencies. Keys, and with them noise and batches, are new in each run.
        privacy: The settings.
        rounds: Number of rounds.
    """
    shards, test = task.split(seed)
    code = fractional_repetition(SHARDS, _S)
    inner: Any = FedAvg(fraction_evaluate=0.0)
    if task.mu:
        inner = FedProx(fraction_evaluate=0.0, proximal_mu=task.mu)
    strategy = GradientCoding(inner, code, privacy=privacy)
    latency = Latency(compute=scaled(lognormal(), {SILENT: float("inf"), LATE: 20.0, FAILING: 0.1}))
    with tempfile.TemporaryDirectory() as folder:
        write_keys(folder, [code.shards_of(worker) for worker in range(code.n)])
        config = {"privacy-dir": folder}
        with InProcessGrid(_app(task, seed, shards), code.n, run_config=config, tamper=_fails) as nodes:
            initial = ArrayRecord(task.make(seed).state_dict())
            grid = VirtualGrid(nodes, latency, seed=seed)
            result = strategy.start(grid, initial, num_rounds=rounds, timeout=1000.0)
    net = task.make(seed)
    net.load_state_dict(result.arrays.to_torch_state_dict())
    rows = [row["train"] for row in strategy.ledger.rows]
    return Trained(
        _accuracy(net, test),
        tuple(row["outcome"] for row in rows),
        tuple(tuple(row["used"]) for row in rows),
        sum(len(row["rejected"]) for row in rows),
        float(rows[-1]["privacy"]["epsilon"]),
    )


# ---- Opacus' own -----------------------------------------------------------------------------------------------------


def opacus_loop(task: ModelTask, seed: int, privacy: DPSGD, *, rounds: int = ROUNDS) -> Trained:
    """Train each shard by Opacus' engine, all in each round, and average their weights.

    Args:
        task: Model and data.
        seed: Of data, initial weights, noise and batches.
        privacy: The settings.
        rounds: Number of rounds.
    """
    from opacus import PrivacyEngine

    shards, test = task.split(seed)
    net = task.make(seed)
    torch.manual_seed(seed)
    engines: list[tuple[Any, Any, Any]] = []
    for x, y in shards:
        local = task.make(seed)
        sgd = torch.optim.SGD([p for p in local.parameters() if p.requires_grad], lr=task.learning_rate)
        loader = DataLoader(TensorDataset(x, y), batch_size=_BATCH)
        private: Any = PrivacyEngine(accountant="rdp").make_private(
            module=local.train(),
            optimizer=sgd,
            data_loader=loader,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
        )
        engines.append(private)
    for _ in range(rounds):
        found = []
        for model, optimizer, loader in engines:
            plain = model._module
            plain.load_state_dict(net.state_dict())
            start = [p.detach().clone() for p in optimizer.params]
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                if optimizer.pre_step():
                    for p, s in zip(optimizer.params, start, strict=True):
                        p.grad += task.mu * (p.detach() - s)  # Opacus would drop a penalty in the loss
                    optimizer.original_optimizer.step()
            found.append({name: value.clone() for name, value in plain.state_dict().items()})
        net.load_state_dict({name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]})
    return Trained(_accuracy(net, test))


# ---- Table -----------------------------------------------------------------------------------------------------------


def table(runs: dict[str, list[tuple[Trained, Trained]]]) -> str:
    """Returns the table in Markdown.

    Args:
        runs: For each model the pairs of coded run and Opacus' loop, one a seed.
    """
    rows = [
        "| model | chance (%) | coded (%) | Opacus' loop (%) | difference (points) | 95 % interval | rounds exact |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    every = [pair for pairs in runs.values() for pair in pairs]
    for title, chance, pairs in [
        *((MODELS[name].title, f"{100 * MODELS[name].chance:.0f}", pairs) for name, pairs in runs.items()),
        ("all", "", every),
    ]:
        ours, theirs = (Paired(tuple(100 * one.accuracy for one in side)) for side in zip(*pairs, strict=True))
        apart = Paired(tuple(100 * (one.accuracy - other.accuracy) for one, other in pairs))
        low, high = apart.interval
        outcomes = [outcome for one, _ in pairs for outcome in one.outcomes]
        rows.append(
            f"| {title} | {chance} | {ours.mean:.1f} ± {ours.error:.1f} | "
            f"{theirs.mean:.1f} ± {theirs.error:.1f} | {apart.mean:+.1f} ± {apart.error:.1f} | "
            f"{low:+.1f} to {high:+.1f} | {outcomes.count('exact')} of {len(outcomes)} |"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.privacy.against_opacus", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="runs of each model and loop")
    parser.add_argument("--epsilon", type=float, default=_EPSILON)
    parser.add_argument("--models", nargs="*", choices=tuple(MODELS), default=[*MODELS])
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    privacy = promised(options.epsilon)
    started = time.perf_counter()
    runs: dict[str, list[tuple[Trained, Trained]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' engine warns that its generator is not a secure one
        for name in options.models:
            runs[name] = [
                (coded(MODELS[name], seed, privacy), opacus_loop(MODELS[name], seed, privacy))
                for seed in track(range(options.seeds), description=name, console=console, transient=True)
            ]
    first = next(iter(runs.values()))[0][0]
    console.print(table(runs), markup=False)
    console.print(
        f"{options.seeds} seeds; epsilon {first.epsilon:.2f} at delta {DELTA:g}, noise multiplier "
        f"{privacy.noise_multiplier:.3f}; {first.failed} replies of {ROUNDS} rounds were errors; "
        f"{time.perf_counter() - started:.0f} s.",
        markup=False,
    )


if __name__ == "__main__":
    main()
