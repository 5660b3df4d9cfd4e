"""Peak memory of server and client, in vectors of 11.7 M float32, as JSON lines: memory_use.py server|client CASE...

What is there before is subtracted: interpreter, libraries, the model that is sent, and at the server the replies.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import (
    EarlyStopGrid,
    GradientCode,
    GradientCoding,
    cyclic_repetition,
    fractional_repetition,
    gradient_coding_mod,
    uncoded,
)
from fl_gradcode._seeding import generators_restored, seed_generators
from fl_gradcode.codes import reed_solomon
from fl_gradcode.codes.prime_field import P
from fl_gradcode.grid.arrivals import Arrival
from fl_gradcode.grid.stop_rule import Wait
from fl_gradcode.protocol.encoding import payload_encoding
from fl_gradcode.protocol.packing import as_array
from fl_gradcode.protocol.records import ARRAYS, METRICS, UPDATE, Plan, Reply
from fl_gradcode.protocol.sketch import folded_sums
from fl_gradcode.testing import InProcessGrid

WORKERS = 32
# ResNet-18 with 1000 classes, roughly: most of it in a few large arrays, and many small ones.
SHAPES = [(512, 512, 3, 3)] * 3 + [(512, 256, 3, 3), (1000, 512)] + [(256, 256, 3, 3)] * 3 + [(64,)] * 40
SHAPES.append((11_700_000 - sum(int(np.prod(shape)) for shape in SHAPES),))
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
VECTOR = 4 * SIZE

AT_THE_SERVER: dict[str, Callable[[], GradientCode]] = {
    "fractional": lambda: fractional_repetition(WORKERS, 3),
    "cyclic": lambda: cyclic_repetition(WORKERS, 2, rng=np.random.default_rng(0)),
    "two-blocks": lambda: fractional_repetition(WORKERS, 2, m=2),
    "field": lambda: reed_solomon(WORKERS, 3),
}
AT_THE_CLIENT: dict[str, Callable[[], GradientCode | None]] = {
    "plain": lambda: None,
    "one-shard": lambda: uncoded(3),
    "three-shards": lambda: fractional_repetition(3, 2),
    "three-cyclic": lambda: cyclic_repetition(5, 2, rng=np.random.default_rng(0)),
    "three-two-blocks": lambda: fractional_repetition(3, 1, m=2),
    "three-field": lambda: reed_solomon(5, 2),
}


class Peak:
    """The largest resident size since it was made, above the size then."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def vectors(self) -> float:
        return (_status("VmHWM") - self.before) / VECTOR

    def now(self) -> float:
        return (_status("VmRSS") - self.before) / VECTOR


class Watching(FedAvg):
    """Notes what is there when it is given the decoded reply, and what it needs itself."""

    def __init__(self, peak: Callable[[], Peak]) -> None:
        super().__init__()
        self._peak, self.at_entry = peak, 0.0

    def aggregate_train(self, *args: Any, **kwargs: Any) -> Any:
        self.at_entry = self._peak().now()
        return super().aggregate_train(*args, **kwargs)


def server(case: str) -> dict[str, float]:
    """From replies in memory to the new model."""
    if case == "plain":
        return _flower_alone()
    if case == "plain-32":
        return _flower_on_all()
    if case == "as-returned":
        return _records_as_returned()
    watched: list[Peak] = []
    inner = Watching(lambda: watched[0])
    strategy = GradientCoding(inner, AT_THE_SERVER[case](), sees="mean")
    with InProcessGrid(ClientApp(), WORKERS) as grid:
        plan = list(strategy.configure_train(1, model(), ConfigRecord(), grid))
        replies = [coded_reply(message, worker) for worker, message in enumerate(plan)]
        assert strategy._run is not None and strategy._run.phase is not None
        phase = strategy._run.phase
        del plan
        watched.append(Peak())
        while replies:
            reply = replies.pop()
            phase.offer(Arrival("", reply.metadata.src_node_id, 0.0), reply, 0.0)
        del reply
        phase.finish(Wait())
        del phase  # as in a run, where nobody but the strategy has it
        arrays, _ = strategy.aggregate_train(1, [])
        assert arrays is not None and len(arrays) == len(SHAPES)
    row = strategy._run.row
    assert row is not None and row.train is not None
    return {"peak": watched[0].vectors(), "at-entry": inner.at_entry, "used": len(row.train.used)}


def _flower_alone() -> dict[str, float]:
    """FedAvg on one reply: what it needs itself for the decoded one."""
    with InProcessGrid(ClientApp(), 1) as grid:
        (message,) = FedAvg(min_train_nodes=1, min_available_nodes=1).configure_train(1, model(), ConfigRecord(), grid)
        content = RecordDict({"arrays": model(), "metrics": MetricRecord({"num-examples": 1})})
        replies = [Message(content, reply_to=message)]
        peak = Peak()
        FedAvg().aggregate_train(1, replies)
        return {"peak": peak.vectors()}


def _returned(message: Message, worker: int, **records: Any) -> Message:
    """A model of its own in memory, as `train()` returns it."""
    arrays = ArrayRecord({f"layer-{i}": as_array(np.full(shape, worker, np.float32)) for i, shape in enumerate(SHAPES)})
    content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": worker + 1}), **records}
    return Message(RecordDict(content), reply_to=message)


def _flower_on_all() -> dict[str, float]:
    """FedAvg on all replies, as in plain Flower."""
    with InProcessGrid(ClientApp(), WORKERS) as grid:
        messages = FedAvg().configure_train(1, model(), ConfigRecord(), grid)
        replies = [_returned(message, worker) for worker, message in enumerate(messages)]
        peak = Peak()
        FedAvg().aggregate_train(1, replies)
        return {"peak": peak.vectors()}


def _records_as_returned() -> dict[str, float]:
    """The same through one shard a message, in which the strategy sees each reply."""
    strategy = GradientCoding(FedAvg(), fractional_repetition(WORKERS, 3), send="shards")
    with InProcessGrid(ClientApp(), WORKERS) as grid:
        messages = list(strategy.configure_train(1, model(), ConfigRecord(), EarlyStopGrid(grid)))
        assert strategy._run is not None and strategy._run.phase is not None
        phase = strategy._run.phase
        replies = []
        for message in messages:
            worker = grid.known_workers()[message.metadata.dst_node_id]
            plan = phase.plan
            told = Reply(plan.run, plan.round, plan.kind, worker, "returned", shards=(worker,))
            replies.append(_returned(message, worker, **told.content()))
        peak = Peak()
        while replies:
            reply = replies.pop()
            phase.offer(Arrival("", reply.metadata.src_node_id, 0.0), reply, 0.0)
        del reply
        phase.finish(Wait())
        del phase
        arrays, _ = strategy.aggregate_train(1, [])
        assert arrays is not None and len(arrays) == len(SHAPES)
    return {"peak": peak.vectors()}


def client(case: str, *, sparing: bool) -> dict[str, float]:
    """One message through the ClientApp."""
    code = AT_THE_CLIENT[case]()
    app = ClientApp(mods=[gradient_coding_mod] if code else [])
    app.train()(train_sparingly if sparing else train)
    workers = code.n if code else 3
    with InProcessGrid(app, workers) as grid:
        strategy: Any = GradientCoding(FedAvg(), code) if code else FedAvg()
        message = next(iter(strategy.configure_train(1, model(), ConfigRecord(), grid)))
        with generators_restored():
            seed_generators(
                0, 0, 0
            )  # the mod imports torch where it is installed: that is no matter of the update's size
        context = Context(1, 1, {"partition-id": 0, "num-partitions": workers}, RecordDict(), {})
        peak = Peak()
        reply = app(message, context)
        assert reply.has_content()
        return {"peak": peak.vectors()}


def train(message: Message, context: Context) -> Message:
    """As examples have it: all arrays out, all arrays in."""
    content: Any = message.content
    shard = int(context.node_config["partition-id"])
    arrays = [array + np.float32(shard + 1) for array in content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"num-examples": shard + 1})
    named = {name: Array(array) for name, array in zip(content["arrays"], arrays, strict=True)}
    return Message(RecordDict({"arrays": ArrayRecord(named), "metrics": metrics}), reply_to=message)


def train_sparingly(message: Message, context: Context) -> Message:
    """Array by array: nothing is there twice."""
    content: Any = message.content
    shard = int(context.node_config["partition-id"])
    new = {name: as_array(array.numpy() + np.float32(shard + 1)) for name, array in content["arrays"].items()}
    metrics = MetricRecord({"num-examples": shard + 1})
    return Message(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=message)


def model() -> ArrayRecord:
    """Zeros, in memory of its own."""
    return ArrayRecord({f"layer-{i}": as_array(np.zeros(shape, np.float32)) for i, shape in enumerate(SHAPES)})


def coded_reply(message: Message, worker: int) -> Message:
    """As the mod sends it: noise of the right length and type, figures, and a weight of 1 a shard."""
    plan = Plan.find_in(message.content)
    assert plan is not None
    row, encoding = plan.rows[worker], payload_encoding(plan.fraction_bits, plan.k)
    metrics: Any = None
    for coefficients in row.coefficients:
        metrics = encoding.add_metrics(metrics, np.ones(1), coefficients[:1])
    m = len(row.coefficients[0])
    length, drawn = -(-SIZE // m), 1 << 16  # and repeated: drawing it all would take longer than decoding
    # Each block of shard j's update is j + 1 times the same noise, so that holders agree.
    rng, times = np.random.default_rng(0), [shard + 1 for shard in row.shards]
    factor = sum(sum(mine) * number for mine, number in zip(row.coefficients, times, strict=True))
    if plan.fraction_bits is None:
        noise: Any = np.resize(rng.standard_normal(drawn, dtype=np.float32), length)
        sums, beginning = folded_sums(noise, np.float64), (float(np.linalg.norm(noise)), 0.0)
        figures = [(*(number * x for x in (*beginning, *(m * [*sums]))), 1.0) for number in times]
        noise *= np.float32(factor)
    else:
        whole = rng.integers(0, 1000, drawn)
        sums = folded_sums(np.resize(whole, length), np.int64)
        figures = [(float(number),) * 4 + tuple(float(number * x % P) for x in sums) + (1.0,) for number in times]
        noise = np.resize((whole * int(factor) % P).astype(np.uint32), length)
    reply = Reply(
        run=plan.run,
        round=plan.round,
        kind=plan.kind,
        worker=worker,
        outcome="coded",
        shards=row.shards,
        layout=tuple((f"layer-{i}", "float32", shape) for i, shape in enumerate(SHAPES)),
        metrics_layout=(("num-examples", -1, True),),
        arrays_name="arrays",
        metrics_name="metrics",
        figures=tuple(figures) if plan.figures else (),
    )
    arrays: dict[str, Array] = {ARRAYS: as_array(noise), METRICS: as_array(encoding.sent(metrics))}
    return Message(reply.content(**{UPDATE: ArrayRecord(arrays)}), reply_to=message)


def _status(name: str) -> int:
    """Bytes of a line in the kernel's account of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return 1024 * int(line.split()[1])


def main() -> None:
    """A line for each case that is named."""
    side, *cases = sys.argv[1:]
    for case in cases:
        if side == "server":
            found = server(case)
        else:
            found = client(case.removeprefix("sparing-"), sparing=case.startswith("sparing-"))
        print(json.dumps({"case": case, **found}), flush=True)


if __name__ == "__main__":
    main()
