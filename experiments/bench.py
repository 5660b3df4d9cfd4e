"""What coding costs: ratios against Flower's own work in the same run, and absolute figures beside them.

Nothing here is asserted: machines are noisy. Each line prints what was asked for, what was measured, and how.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from rich.console import Console

from clients.app import app as client_app
from clients.data import load_dataset
from clients.models import build_model
from experiments.bench_codes import bandwidth, field, vectors
from experiments.bench_matmul import products
from experiments.bench_privacy import private_encoding, private_step
from experiments.bench_verification import verification
from experiments.bench_votes import votes
from experiments.bound import bound
from experiments.scale import scale
from experiments.secagg_comparison import secagg
from fl_gradcode import GradientCode, GradientCoding, VirtualGrid, cyclic_repetition, fractional_repetition, uncoded
from fl_gradcode.codes import combine
from fl_gradcode.grid import Arrival
from fl_gradcode.latency import Latency, lognormal
from fl_gradcode.testing import InProcessGrid

ROOT = Path(__file__).resolve().parents[1]
_console = Console()


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks that are named, or all."""
    benchmarks: dict[str, Callable[[], object]] = {
        "aggregation": aggregation,
        "encoding": encoding,
        "decodable": decodable,
        "rounds": rounds,
        "vectors": vectors,
        "field": field,
        "bandwidth": bandwidth,
        "private_step": private_step,
        "private_encoding": private_encoding,
        "products": products,
        "verification": verification,
        "votes": votes,
        "secagg": secagg,
        "bound": bound,
        "scale": scale,
    }
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*benchmarks, []], help="which; all by default")
    names = parser.parse_args(arguments).names or list(benchmarks)
    for name in names:
        _console.rule(name)
        benchmarks[name]()


def aggregation(workers: int = 32, repeats: int = 5) -> None:
    """Server: from Messages to the arrays handed to the inner FedAvg, against FedAvg's own aggregation."""
    shapes = _resnet18_shapes()
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    rng = np.random.default_rng(0)
    before = ArrayRecord({name: Array(np.zeros(shape, np.float32)) for name, shape in shapes.items()})
    values = [rng.standard_normal(size, dtype=np.float32) for _ in range(workers)]
    ours, theirs, memory = [], [], []
    with InProcessGrid(client_app, workers) as grid:
        for _ in range(repeats):
            strategy = GradientCoding(FedAvg(), uncoded(workers))
            plan = list(strategy.configure_train(1, before, ConfigRecord(), grid))
            replies = [_coded_reply(message, before, values) for message in plan]
            started = time.perf_counter()
            assert strategy._run is not None and strategy._run.phase is not None
            phase = strategy._run.phase
            for reply in replies:
                phase.offer(Arrival("", reply.metadata.src_node_id, 0.0), reply, 0.0)
            decoded = phase.decode()
            ours.append(time.perf_counter() - started)
            mean: Any = getattr(decoded, "arrays", None)
            assert mean is not None
            del replies, phase, strategy, decoded
            gc.collect()

            plain = [_plain_reply(message, shapes, values, number) for number, message in enumerate(plan)]
            started = time.perf_counter()
            arrays, _ = FedAvg().aggregate_train(1, plain)
            theirs.append(time.perf_counter() - started)
            assert arrays is not None
            del plain
            gc.collect()
            started = time.perf_counter()
            combine(values, np.ones(workers))
            memory.append(workers * values[0].nbytes / (time.perf_counter() - started))
    assert arrays is not None
    error = max(float(np.abs(mean[name].numpy() - arrays[name].numpy()).max()) for name in shapes)
    a, b = statistics.median(ours), statistics.median(theirs)
    _console.print(
        f"{workers} replies of {size / 1e6:.1f} M float32, uncoded: {a:.2f} s against FedAvg's {b:.2f} s, ratio "
        f"[bold]{a / b:.2f}[/] (asked: at most 0.6); the means differ by at most {error:.1e}.\n"
        f"Decoding alone reads {statistics.median(memory) / 1e9:.1f} GB/s."
    )


def encoding(repeats: int = 15) -> None:
    """Client: four shards through the mod in one message, against four plain messages; CNN on digits."""
    config = _run_config(model="cnn", partitioner="iid")
    arrays = ArrayRecord(build_model("cnn", load_dataset("digits"), seed=0).state_dict())
    coded, plain = [], []
    with InProcessGrid(client_app, 4, run_config=config) as grid:
        for _ in range(repeats):
            strategy = GradientCoding(FedAvg(), fractional_repetition(4, 3))
            (message, *_) = strategy.configure_train(1, arrays, ConfigRecord(), grid)
            coded.append(_seconds(grid, [message]))
            plain.append(_seconds(grid, list(FedAvg().configure_train(1, arrays, ConfigRecord(), grid))))
    a, b = statistics.median(coded), statistics.median(plain)
    _console.print(
        f"Four shards of 359 images, one epoch: {1e3 * a:.1f} ms coded, {1e3 * b:.1f} ms plain: coding adds "
        f"[bold]{a / b - 1:+.1%}[/] (asked: at most 5 %)."
    )


def decodable(n: int = 1000) -> None:
    """Server: "decodable now?" after each arrival."""
    for code in (fractional_repetition(n, 10), cyclic_repetition(n, 10, rng=np.random.default_rng(0))):
        started = time.perf_counter()
        code.decodable([])
        preparation = time.perf_counter() - started
        times = _arrival_times(code)
        _console.print(
            f"{code!r}: after each arrival median {1e3 * statistics.median(times):.3f} ms, mean "
            f"[bold]{1e3 * statistics.mean(times):.3f} ms[/], longest {1e3 * max(times):.1f} ms (asked: about 1); "
            f"once a code {preparation:.2f} s."
        )


def rounds(number: int = 100, workers: int = 64) -> None:
    """Simulation: real time of virtual rounds, coded against plain; no update is shared between workers."""
    for model, count in (("cnn", number), ("logistic", number)):
        plain, coded, plain_trained, coded_trained = 0.0, 0.0, 0, 0
        for _ in range(5):  # in turns, so that both meet the machine's moods
            seconds, trained = _virtual_rounds(model, count // 5, workers, None)
            plain, plain_trained = plain + seconds, plain_trained + trained
            seconds, trained = _virtual_rounds(model, count // 5, workers, fractional_repetition(workers, 3))
            coded, coded_trained = coded + seconds, coded_trained + trained
        asked = " (asked: at most 1.1)" if model == "cnn" else ""
        _console.print(
            f"{count} rounds of {workers} workers, digits, {model}: {coded:.1f} s coded (s = 3), {plain:.1f} s FedAvg, "
            f"ratio [bold]{coded / plain:.2f}[/]{asked}; shards worked on: {coded_trained} and {plain_trained}."
        )


def _virtual_rounds(model: str, count: int, workers: int, code: GradientCode | None) -> tuple[float, int]:
    arrays = ArrayRecord(build_model(model, load_dataset("digits"), seed=0).state_dict())
    strategy: Any = FedAvg() if code is None else GradientCoding(FedAvg(), code, verify=0)
    with InProcessGrid(client_app, workers, run_config=_run_config(model=model)) as grid:
        virtual = VirtualGrid(grid, Latency(compute=lognormal()))
        started = time.perf_counter()
        strategy.start(virtual, arrays, num_rounds=count)
        seconds = time.perf_counter() - started
        load = 1 if code is None else len(code.shards_of(0))
        return seconds, load * sum(grid.calls)


def _arrival_times(code: GradientCode) -> list[float]:
    decoder = code.incremental()
    times = []
    for worker in np.random.default_rng(1).permutation(code.n):
        started = time.perf_counter()
        done = decoder.add(int(worker))
        times.append(time.perf_counter() - started)
        if done:
            break
    return times


def _seconds(grid: InProcessGrid, messages: list[Message]) -> float:
    started = time.perf_counter()
    replies = grid.send_and_receive(messages)
    elapsed = time.perf_counter() - started
    assert not any(reply.has_error() for reply in replies)
    return elapsed


def _coded_reply(message: Message, before: ArrayRecord, values: list[Any]) -> Message:
    from fl_gradcode.protocol import ARRAYS, METRICS, UPDATE, Plan, Reply, as_array

    plan = Plan.find_in(message.content)
    assert plan is not None
    worker = int(message.metadata.dst_node_id) if len(plan.rows) == 1 else _turn(message)
    (shard,) = plan.rows[worker].shards
    reply = Reply(
        run=plan.run,
        round=plan.round,
        kind=plan.kind,
        worker=worker,
        outcome="coded",
        shards=(shard,),
        layout=tuple((name, "float32", tuple(array.shape)) for name, array in before.items()),
        metrics_layout=(("num-examples", -1, True),),
        arrays_name="arrays",
        metrics_name="metrics",
    )
    arrays = ArrayRecord({ARRAYS: as_array(values[worker]), METRICS: as_array(np.array([1.0]))})
    return Message(reply.content(**{UPDATE: arrays}), reply_to=message)


def _turn(message: Message) -> int:
    """Any distinct number will do for a worker: here the node's place among all nodes."""
    _nodes.setdefault(message.metadata.dst_node_id, len(_nodes))
    return _nodes[message.metadata.dst_node_id]


_nodes: dict[int, int] = {}


def _plain_reply(message: Message, shapes: dict[str, tuple[int, ...]], values: list[Any], number: int) -> Message:
    pieces, start = {}, 0
    for name, shape in shapes.items():
        stop = start + int(np.prod(shape))
        pieces[name] = Array(values[number][start:stop].reshape(shape))
        start = stop
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(pieces), "metrics": metrics}), reply_to=message)


def _run_config(**changes: Any) -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        defaults = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    return {**defaults, **changes}


def _resnet18_shapes() -> dict[str, tuple[int, ...]]:
    """Parameters of ResNet-18 with 1000 classes: 11.7 M in 62 arrays."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7), "bn1.w": (64,), "bn1.b": (64,)}
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1"] = (channels, width, 3, 3)
            shapes[f"{name}.conv2"] = (channels, channels, 3, 3)
            if width != channels:
                shapes[f"{name}.down"] = (channels, width, 1, 1)
                shapes[f"{name}.bn3.w"] = shapes[f"{name}.bn3.b"] = (channels,)
            for norm in ("bn1", "bn2"):
                shapes[f"{name}.{norm}.w"] = shapes[f"{name}.{norm}.b"] = (channels,)
            width = channels
    return {**shapes, "fc.w": (1000, 512), "fc.b": (1000,)}


if __name__ == "__main__":
    import logging

    for name in ("flwr", "fl_gradcode"):
        logging.getLogger(name).setLevel(logging.ERROR)
    main()
