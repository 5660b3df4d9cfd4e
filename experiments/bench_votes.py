"""What it costs to count equal copies, or to use a code's checks, before a round is decoded."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from rich.console import Console

from fl_gradcode import GradientCode, GradientCoding, fractional_repetition
from fl_gradcode.codes import reed_solomon
from fl_gradcode.grid import Arrival
from fl_gradcode.protocol import ARRAYS, METRICS, UPDATE, Plan, Reply, as_array, payload_encoding
from fl_gradcode.testing import InProcessGrid

__all__ = ["votes"]

_console = Console()
_SIZE = 3_000_000
_CODES: dict[str, Callable[[int], GradientCode]] = {
    "fractional repetition": lambda e: fractional_repetition(20, 2 * e + 1),
    "Reed-Solomon": lambda e: reed_solomon(20, 2 * e + 1),
}


def votes(repeats: int = 9) -> None:
    """Server time of a round with votes over that of the same replies without, in turns."""
    for name, make in _CODES.items():
        for e in (1, 2):
            code = make(e)
            payloads = _payloads(code)
            seconds: dict[int, list[float]] = {0: [], e: []}
            for _ in range(repeats):
                for count in seconds:
                    seconds[count].append(_round(code, payloads, count))
            ratio = statistics.median(a / b for a, b in zip(seconds[e], seconds[0], strict=True))
            with_it, without = (statistics.median(seconds[count]) for count in (e, 0))
            _console.print(
                f"{name}, n = {code.n}, s = {code.s}, {_SIZE / 1e6:.0f} M entries: all replies read, decoded and "
                f"aggregated in {with_it:.3f} s with votes={e} and {without:.3f} s without, [bold]{ratio:.2f} times[/]."
            )


def _payloads(code: GradientCode) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Each worker's coded update and coded metrics."""
    encoding = payload_encoding(getattr(code.numbers, "fraction_bits", None), code.k)
    updates = np.random.default_rng(0).standard_normal((code.k, _SIZE), dtype=np.float32)
    payloads = []
    for worker in range(code.n):
        total: Any = None
        metrics: Any = None
        for shard in code.shards_of(worker):
            coefficients = (float(code.B[worker, shard]),)
            total, _ = encoding.add_update(total, updates[shard].copy(), coefficients)
            metrics = encoding.add_metrics(metrics, np.array([2.0]), coefficients)
        payloads.append((encoding.sent(total), encoding.sent(metrics)))
    return payloads


def _round(code: GradientCode, payloads: list[tuple[NDArray[Any], NDArray[Any]]], count: int) -> float:
    before = ArrayRecord({"w": Array(np.zeros(_SIZE, np.float32))})
    strategy: Any = GradientCoding(FedAvg(), code, votes=count, verify=0)
    with InProcessGrid(ClientApp(), code.n) as grid:
        messages = list(strategy.configure_train(1, before, ConfigRecord(), grid))
        phase = strategy._run.phase
        phase.copies._sketcher = None  # sketches are measured elsewhere
        phase.plan = replace(phase.plan, figures=False)
        phase.replies.plan = phase.copies.plan = phase.plan
        workers = grid.known_workers()
        replies = [_reply(phase.plan, message, workers[message.metadata.dst_node_id], payloads) for message in messages]
        started = time.perf_counter()
        for reply in replies:
            phase.offer(Arrival("", reply.metadata.src_node_id, 0.0), reply, 0.0)
        phase.collected = True
        arrays, _ = strategy.aggregate_train(1, [])
        seconds = time.perf_counter() - started
    assert arrays is not None
    del replies, phase, strategy, arrays
    gc.collect()
    return seconds


def _reply(plan: Plan, message: Message, worker: int, payloads: list[tuple[NDArray[Any], NDArray[Any]]]) -> Message:
    told = Reply(
        run=plan.run,
        round=plan.round,
        kind=plan.kind,
        worker=worker,
        outcome="coded",
        shards=plan.rows[worker].shards,
        layout=(("w", "float32", (_SIZE,)),),
        metrics_layout=(("num-examples", -1, True),),
        arrays_name="arrays",
        metrics_name="metrics",
    )
    update, metrics = payloads[worker]
    arrays = ArrayRecord({ARRAYS: as_array(update), METRICS: as_array(metrics)})
    return Message(told.content(**{UPDATE: arrays}), reply_to=message)
