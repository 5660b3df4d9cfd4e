"""What it costs to compare copies: on the server beside aggregation, and over a run beside its rounds."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from experiments.compare.problems import LAWS
from fl_gradcode import GradientCoding, VirtualGrid, fractional_repetition, gradient_coding_mod
from fl_gradcode.grid import Arrival
from fl_gradcode.latency import Latency
from fl_gradcode.protocol import ARRAYS, METRICS, UPDATE, Plan, Reply, as_array
from fl_gradcode.testing import InProcessGrid

__all__ = ["verification"]

_console = Console()
_SIZE = 11_700_000


def verification() -> None:
    """Both costs."""
    _on_the_server()
    _over_a_run()


def _on_the_server(workers: int = 32, repeats: int = 25) -> None:
    """Replies read, decoded and aggregated, with copies compared and without, in turns."""
    before = ArrayRecord({"w": Array(np.zeros(_SIZE, np.float32))})
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(_SIZE, dtype=np.float32) for _ in range(workers // 2)]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    compared = 0
    with InProcessGrid(_app(), workers) as grid:
        for repeat in range(2 * repeats):
            compares = repeat % 2 == 0
            strategy: Any = GradientCoding(FedAvg(), fractional_repetition(workers, 1))
            messages = list(strategy.configure_train(1, before, ConfigRecord(), grid))
            replies = [
                _reply(message, grid.known_workers()[message.metadata.dst_node_id], values) for message in messages
            ]
            phase = strategy._run.phase
            if not compares:
                phase.copies._sketcher = None
            started = time.perf_counter()
            for reply in replies:
                phase.offer(Arrival("", reply.metadata.src_node_id, 0.0), reply, 0.0)
            phase.collected = True
            arrays, _ = strategy.aggregate_train(1, [])
            seconds[compares].append(time.perf_counter() - started)
            assert arrays is not None
            compared += len(phase.copies.compared) * compares
            del replies, phase, strategy, arrays
            gc.collect()
    assert compared == repeats * workers
    with_it, without = statistics.median(seconds[True]), statistics.median(seconds[False])
    paired = statistics.median(a / b for a, b in zip(seconds[True], seconds[False], strict=True))
    _console.print(
        f"Server, {workers} replies of {_SIZE / 1e6:.1f} M float32, two of each: aggregation takes {with_it:.2f} s "
        f"with copies compared and {without:.2f} s without, [bold]{100 * (paired - 1):+.1f} %[/] (asked: at most 5 %)."
    )


def _over_a_run(rounds: int = 50, seeds: int = 6, n: int = 12, s: int = 3) -> None:
    """Virtual time of runs whose first rounds wait for second copies, over that of runs that do not."""
    table = Table(title=f"{rounds} rounds, n = {n}, s = {s}, {seeds} seeds: longer by (mean and its standard error)")
    for column in ("law", "coded vectors", "shards seen twice", "one shard a message", "shards seen twice"):
        table.add_column(column)
    for label, latency in LAWS.values():
        cells = []
        for send in ("coded", "shards"):
            longer, seen = [], 0
            for seed in range(seeds):
                with_it, row_shards = _virtual_run(latency(), seed, rounds, n, s, send, verify=3)
                without, _ = _virtual_run(latency(), seed, rounds, n, s, send, verify=0)
                longer.append(100 * (with_it / without - 1))
                seen += row_shards
            error = statistics.stdev(longer) / len(longer) ** 0.5
            cells += [f"{statistics.mean(longer):+.2f} % ± {error:.2f}", f"{seen / seeds / n:.0%}"]
        table.add_row(label, *cells)
    _console.print(table, "asked: at most 2 % longer")


def _virtual_run(
    latency: Latency, seed: int, rounds: int, n: int, s: int, send: Any, *, verify: int
) -> tuple[float, int]:
    """The virtual seconds of a run, and the number of shards whose copies were compared in time."""
    code = fractional_repetition(n, s)
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, send=send, verify=verify)
    with InProcessGrid(_app(), n) as nodes:
        grid = VirtualGrid(nodes, latency, seed=seed)
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros(3))}), num_rounds=rounds)
    return grid.now(), len({shard for row in strategy.ledger.rows for shard in row["train"]["compared"]})


def _app() -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        record: Any = message.content["arrays"]
        arrays = ArrayRecord({"w": Array(record["w"].numpy() + shard + 1.0)})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def _reply(message: Message, worker: int, values: list[Any]) -> Message:
    plan = Plan.find_in(message.content)
    assert plan is not None
    row = plan.rows[worker]
    reply = Reply(
        run=plan.run,
        round=plan.round,
        kind=plan.kind,
        worker=worker,
        outcome="coded",
        shards=row.shards,
        layout=(("w", "float32", (_SIZE,)),),
        metrics_layout=(("num-examples", -1, True),),
        arrays_name="arrays",
        metrics_name="metrics",
    )
    update = as_array(values[min(row.shards) // 2])
    arrays = ArrayRecord({ARRAYS: update, METRICS: as_array(np.array([2.0]))})
    return Message(reply.content(**{UPDATE: arrays}), reply_to=message)
