"""What masks cost, and Flower's SecAgg+ beside them: python -m experiments.secagg_comparison.

Twenty workers with fractional repetition (s = 3), masks that withstand T = 2 colluders, stragglers in virtual time.
Nothing here is asserted: machines are noisy. CPU times are medians of ratios of runs in turns, in one process and on
one thread. Without the folder of Fashion-MNIST, the digits that scikit-learn brings are used.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from clients import training
from clients.app import train as train_shard
from clients.data import load_dataset
from clients.errors import AppConfigError
from clients.models import build_model
from fl_gradcode import GradientCoding, VirtualGrid, fractional_repetition, gradient_coding_mod
from fl_gradcode.grid import Arrival
from fl_gradcode.latency import Latency, lognormal
from fl_gradcode.privacy import read_keys, write_keys
from fl_gradcode.protocol import payload_encoding
from fl_gradcode.secagg import (
    ClassIntegers,
    SecureAggregation,
    ShardResult,
    class_keys,
    deal,
    make_body,
    masked_reply,
    seeds_of,
)
from fl_gradcode.testing import InProcessGrid

__all__ = ["secagg"]

ROOT = Path(__file__).resolve().parents[1]
WORKERS, STRAGGLERS, COLLUDERS = 20, 3, 2
CODE = fractional_repetition(WORKERS, STRAGGLERS)
_console = Console(width=120)


@dataclass(frozen=True)
class Cost:
    """CPU seconds and bytes of one round.

    Attributes:
        client: CPU of one worker besides training.
        server: CPU of the server.
        up, down: Bytes of one worker's reply, and of what it is sent.
    """

    client: float
    server: float
    up: float
    down: float


def dealt(
    folder: str, arrays: ArrayRecord, metrics: list[tuple[str, int]], largest_weight: float = 1000.0
) -> SecureAggregation:
    """Returns the settings of a secure run whose nodes have their folders below a folder."""
    write_keys(folder, [CODE.shards_of(worker) for worker in range(CODE.n)])
    layout = [(name, str(one.dtype), tuple(one.shape)) for name, one in arrays.items()]
    body = make_body(CODE, arrays=layout, metrics=metrics, colluders=COLLUDERS, largest_weight=largest_weight)
    return SecureAggregation(deal(folder, body))


class Timed:
    """A ClientApp around which CPU time is measured; `inside` is that of the app's own function."""

    def __init__(self, train: Callable[[Message, Context], Message]) -> None:
        self.total, self.inside, self.calls = 0.0, 0.0, 0
        self._app = ClientApp(mods=[gradient_coding_mod])

        @self._app.train()
        def timed(message: Message, context: Context) -> Message:
            started = time.process_time()
            reply = train(message, context)
            self.inside += time.process_time() - started
            return reply

    def __call__(self, message: Message, context: Context) -> Message:
        started = time.process_time()
        reply = self._app(message, context)
        self.total += time.process_time() - started
        self.calls += 1
        return reply


# ---- accuracy, bytes and the share of training ----


def accuracy(data: str, rounds: int) -> None:
    """A float run and a secure run on the same shards, with the same stragglers."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        config = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    try:
        dataset = load_dataset("fashion-mnist", data, 6_000)
        config |= {"dataset": "fashion-mnist", "data-dir": data, "train-examples": 6_000}
    except AppConfigError:
        dataset = load_dataset("digits")
        config |= {"dataset": "digits", "data-dir": "", "train-examples": 0}
    config |= {"model": "cnn", "partitioner": "dirichlet", "local-epochs": 1}
    model = build_model("cnn", dataset, seed=0)
    initial = ArrayRecord(model.state_dict())
    found: dict[str, tuple[float, float, Timed]] = {}
    for name in ("float32", "masked"):
        with tempfile.TemporaryDirectory() as folder:
            secure = (
                dealt(folder, initial, [("train-loss", -1)], len(dataset.train_y) / 3) if name == "masked" else None
            )
            app = Timed(train_shard)
            strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODE, secure=secure, verify=0, seed=1)
            where = {"secagg-dir": folder} if secure else {}
            with InProcessGrid(app, WORKERS, run_config={**config, **where}) as grid:  # type: ignore[arg-type]
                slow = VirtualGrid(grid, Latency(compute=lognormal(1.0, 1.0)), seed=2)
                result = strategy.start(slow, initial, num_rounds=rounds)
        model.load_state_dict(result.arrays.to_torch_state_dict())
        x, y = torch.from_numpy(dataset.test_x.copy()), torch.from_numpy(dataset.test_y.copy())
        _, correct = training.evaluate(model, x, y, torch.device("cpu"))
        rows = [row["train"] for row in strategy.ledger.rows]
        replies = sum(len(row["answered"]) for row in rows)
        found[name] = correct, sum(row["bytes-up"] for row in rows) / replies, app
        if secure:
            clipped = sum(row["secure"]["clipped"] for row in rows)
    (plain, plain_bytes, plain_app), (masked, masked_bytes, masked_app) = found["float32"], found["masked"]
    extra = masked_app.total / masked_app.calls - masked_app.inside / masked_app.calls
    extra -= (plain_app.total - plain_app.inside) / plain_app.calls
    inside = (plain_app.inside + masked_app.inside) / (plain_app.calls + masked_app.calls)
    size = sum(one.numpy().size for one in initial.values())
    _console.print(
        f"{config['dataset']}, {rounds} rounds, {size:,} parameters: accuracy {100 * plain:.2f} % with floats, "
        f"{100 * masked:.2f} % masked ([bold]{100 * (masked - plain):+.2f}[/] points, asked: within 0.2), {clipped} "
        f"entries clipped. A reply has [bold]{masked_bytes / plain_bytes:.3f}[/] times the bytes (asked: 1.02). "
        f"Masks cost a worker {1e3 * extra:.1f} ms beside {1e3 * inside:.0f} ms of training, "
        f"[bold]{100 * extra / inside:.1f} %[/] (asked: at most 5)."
    )


# ---- CPU ----


def ratio(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Returns the CPU seconds of two functions and the median of their ratios, second over first, run in turns."""
    times = []
    for _ in range(repeats):
        pair = []
        for function in (first, second):
            gc.collect()
            started = time.process_time()
            function()
            pair.append(time.process_time() - started)
        times.append(pair)
    one, other = (statistics.median(pair[side] for pair in times) for side in (0, 1))
    return one, other, statistics.median(b / a for a, b in times)


def encoding(size: int, repeats: int) -> tuple[float, float, float]:
    """Clip, weigh, round and mask the updates of a worker, over weighing and adding float32 vectors in place."""
    rng = np.random.default_rng(0)
    updates = [(0.001 * rng.standard_normal(size)).astype(np.float32) for _ in CODE.shards_of(0)]
    plain = payload_encoding(None, CODE.k)

    def added() -> None:
        total: Any = None
        for update in updates:
            update *= np.float32(1.0)
            total, _ = plain.add_update(total, update, (1.0,))
        plain.sent(total)

    with tempfile.TemporaryDirectory() as folder:
        manifest = dealt(folder, ArrayRecord({"w": Array(updates[0])}), []).manifest
        assert manifest is not None  # a dealer has made it
        seeds = seeds_of(read_keys(Path(folder) / "node-0"), manifest.body.classes)
    (number,) = manifest.body.classes.sent_by(0)
    keys = class_keys(manifest, 0, seeds)

    def masked() -> None:
        integers = ClassIntegers(manifest.body, number, seeds[number], bytes(32))
        for shard, update in zip(CODE.shards_of(0), updates, strict=True):
            integers.add(shard, ShardResult(update, 400.0, np.zeros(0)))
        masked_reply(keys, bytes(32), {number: integers.parts()}).payload()

    return ratio(added, masked, repeats)


class Round:
    """Rounds of synthetic updates, whose messages, replies and CPU are looked at one by one."""

    def __init__(self, size: int, folder: str | None) -> None:
        self._size, self._count = size, 0
        self._moved = [np.full(size, 0.0001 * (shard + 1), np.float32) for shard in range(CODE.k)]
        self._initial = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
        self._secure = None if folder is None else dealt(folder, self._initial, [])
        self.app = Timed(self._train)
        where = {} if folder is None else {"secagg-dir": folder}
        self._grid = InProcessGrid(self.app, WORKERS, run_config=where)  # type: ignore[arg-type]
        self.cost = Cost(0, 0, 0, 0)

    def _train(self, message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content = {"arrays": ArrayRecord({"w": Array(self._moved[shard])})}
        return Message(
            RecordDict({**content, "metrics": MetricRecord({"num-examples": 400})}),
            reply_to=message,
        )

    def run(self) -> tuple[float, float]:
        """Returns CPU seconds of one worker's message and of the server's part of one more round."""
        self._count += 1
        run = f"round-{self._count}"
        strategy: Any = GradientCoding(FedAvg(), CODE, secure=self._secure, verify=0, run=run)
        with self._grid as grid:
            messages = list(strategy.configure_train(1, self._initial, ConfigRecord(), grid))
            phase, workers = strategy._run.phase, grid.known_workers()
            groups = {CODE.shards_of(workers[message.metadata.dst_node_id]): message for message in messages}
            before = self.app.total, self.app.inside
            replies = [*grid.pull_messages(grid.push_messages(groups.values()))]
            client = (self.app.total - before[0] - self.app.inside + before[1]) / len(groups)
            gc.collect()
            started = time.process_time()
            for reply in replies:
                phase.offer(Arrival("", reply.metadata.src_node_id, 0.0), reply, 0.0)
            phase.collected = True
            arrays, _ = strategy.aggregate_train(1, [])
            server = time.process_time() - started
        assert arrays is not None
        self.cost = Cost(client, server, _bytes(replies[0].content), _bytes(messages[0].content))
        return client, server


def _bytes(content: Mapping[str, Any]) -> int:
    total = 0
    for record in content.values():
        for key, value in record.items():
            total += len(key) + (len(value.data) if isinstance(value, Array) else len(str(value)))
    return total


def whole(size: int, repeats: int) -> tuple[Cost, Cost, float, float]:
    """Returns the costs of a float round and a masked one, and the ratios of client and of server CPU."""
    with tempfile.TemporaryDirectory() as folder:
        plain, masked = Round(size, None), Round(size, folder)
        pairs = [(plain.run(), masked.run()) for _ in range(repeats + 1)][1:]
    costs = []
    for side, one in enumerate((plain, masked)):
        client, server = (statistics.median(pair[side][what] for pair in pairs) for what in (0, 1))
        costs.append(Cost(client, server, one.cost.up, one.cost.down))
    ratios = [statistics.median(pair[1][what] / pair[0][what] for pair in pairs) for what in (0, 1)]
    return costs[0], costs[1], ratios[0], ratios[1]


def secagg_plus(size: int) -> dict[str, float]:
    """Returns what one round of Flower's SecAgg+ costs, from a process of its own."""
    command = [sys.executable, "-m", "experiments.secagg_plus", "--size", str(size), "--dropped", str(STRAGGLERS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"SecAgg+ did not finish: {done.stderr[-500:]}")
    told: dict[str, float] = json.loads(lines[0].removeprefix("RESULT "))
    return told


def secagg(data: str = "", size: int = 1_000_000, rounds: int = 10, repeats: int = 15, simulated: bool = True) -> None:
    """Print accuracy, bytes and CPU of masked rounds beside float rounds, and SecAgg+ in the same table."""
    for name in ("flwr", "fl_gradcode"):  # a line a round, and a warning that simulated keys protect nothing
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if rounds:
        accuracy(data or str(ROOT.parent / "shared" / "data" / "fashion_mnist"), rounds)
    added, masked, times = encoding(size, repeats)
    _console.print(
        f"{size / 1e6:g} M entries, {len(CODE.shards_of(0))} shards, {COLLUDERS + 1} edges: clip, weigh, round and "
        f"mask {1e3 * masked:.1f} ms CPU, weigh and add float32 {1e3 * added:.1f} ms, [bold]{times:.1f} times[/] "
        "(asked: 3)."
    )
    plain, ours, client, server = whole(size, repeats)
    table = Table("", "stages", "MB up", "MB down", "client CPU, ms", "server CPU, ms", title="One round")
    for name, cost in (("float32, coded", plain), ("masked, coded", ours)):
        figures = (cost.up / 1e6, cost.down / 1e6, 1e3 * cost.client, 1e3 * cost.server)
        table.add_row(name, "1", *(f"{figure:.2f}" for figure in figures))
    if simulated:
        told = secagg_plus(size)
        figures = (
            told["client_up"] / 1e6,
            told["client_down"] / 1e6,
            1e3 * told["client_cpu"],
            1e3 * told["server_cpu"],
        )
        name = f"SecAgg+ of Flower, {STRAGGLERS} clients gone"
        table.add_row(name, f"{told['stages']:.0f}", *(f"{figure:.2f}" for figure in figures))
    _console.print(table)
    _console.print(
        f"From the arrays that train() returned to the reply, a masked client takes [bold]{client:.1f} times[/] the "
        f"CPU; from the replies to the mean, its server [bold]{server:.1f} times[/] (asked: 2.5)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", default="", help="folder of Fashion-MNIST; by default ../shared/data/fashion_mnist"
    )
    parser.add_argument("--size", type=int, default=1_000_000, help="entries of the updates whose CPU is measured")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the two runs that are compared; 0: none")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of runs whose CPU is compared")
    parser.add_argument("--no-simulation", action="store_true", help="leave SecAgg+ in the simulation engine out")
    asked = parser.parse_args()
    secagg(asked.data_dir, asked.size, asked.rounds, asked.repeats, not asked.no_simulation)


if __name__ == "__main__":
    main()
