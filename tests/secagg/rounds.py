"""Secure rounds in one process: folders of nodes, an app with known updates, and what they should add up to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fl_gradcode import GradientCode, GradientCoding, VirtualGrid, gradient_coding_mod
from fl_gradcode.latency import Latency
from fl_gradcode.privacy import read_keys, write_keys
from fl_gradcode.secagg import (
    ClassIntegers,
    Manifest,
    SecureAggregation,
    ShardResult,
    deal,
    make_body,
    read_manifest,
    seeds_of,
)
from fl_gradcode.testing import InProcessGrid, inside_a_run
from tests.conftest import flat, initial_arrays

__all__ = ["ask", "dealt", "grid_of", "known_app", "mean_of_integers", "start", "update_for"]

ARRAYS = [("0", "float32", (3, 2)), ("1", "float32", (5,))]
METRICS = [("loss", -1), ("pair", 2)]
SIZE = 11


def update_for(server_round: int, shard: int) -> NDArray[np.float32]:
    return (0.5 * np.random.default_rng((server_round, shard)).standard_normal(SIZE)).astype(np.float32)


def known_app(
    update: Callable[[int, int], NDArray[np.float32]] = update_for,
    *,
    weight: Callable[[int], float] = lambda shard: shard + 1,
    loss: Callable[[int], float] = float,
    before: Callable[[int, Message, Context], None] = lambda shard, message, context: None,
    evaluated: Callable[[int, Message], MetricRecord] | None = None,
) -> ClientApp:
    """An app that moves the model by `update(round, shard)`; `before` is called with the shard first.

    `evaluated` returns the metrics of a shard's evaluation.
    """
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        before(shard, message, context)
        content: Any = message.content
        moves = update(int(content["config"]["server-round"]), shard)
        old = content["arrays"].to_numpy_ndarrays()
        ends = np.cumsum([array.size for array in old])[:-1]
        new = [a + m.reshape(a.shape) for a, m in zip(old, np.split(moves, ends), strict=True)]
        metrics = MetricRecord({"num-examples": weight(shard), "loss": loss(shard), "pair": [1.0, loss(shard)]})
        return Message(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=message)

    app.train("other")(train)

    @app.query()
    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        assert evaluated is not None, "nobody is asked to evaluate"
        found = evaluated(int(context.node_config["partition-id"]), message)
        return Message(RecordDict({"metrics": found}), reply_to=message)

    return app


def dealt(folder: Path, code: GradientCode, *, data: dict[int, str] | None = None, **settings: Any) -> Manifest:
    """Keys and manifest of a code, in a folder for each worker."""
    write_keys(folder, [code.shards_of(worker) for worker in range(code.n)])
    named: dict[str, Any] = {
        "colluders": 0,
        "bound": 4.0,
        "largest_weight": 16.0,
        "metrics": METRICS,
        "arrays": ARRAYS,
        **settings,
    }
    return deal(folder, make_body(code, **named), data=data)


def grid_of(app: ClientApp, folder: Path, n: int, tamper: Any = None, **owner: Any) -> InProcessGrid:
    """A grid whose nodes have their folders in their node configs, beside further settings of their owners."""

    def node_config(worker: int) -> dict[str, Any]:
        return {"partition-id": worker, "num-partitions": n, "secagg-dir": str(folder / f"node-{worker}"), **owner}

    return InProcessGrid(app, n, node_config=node_config, tamper=tamper)


def start(
    code: GradientCode,
    folder: Path,
    app: ClientApp | None = None,
    *,
    rounds: int = 1,
    latency: Latency | None = None,
    tamper: Any = None,
    owner: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[GradientCoding, dict[int, ArrayRecord], Any]:
    """Run rounds; returns the strategy, the model after each round, and Flower's result."""
    models = {0: initial_arrays()}
    kill = options.pop("kill", lambda server_round: None)

    def keep(server_round: int, arrays: ArrayRecord, row: Any) -> None:
        models[server_round] = arrays
        kill(server_round)

    secure = SecureAggregation(read_manifest(folder / "node-0"))
    options = {"run": "run-1", "give_up_rounds": None, "send": secure.send, **options}
    strategy = GradientCoding(FedAvg(), code, secure=secure, on_round_end=keep, **options)
    with grid_of(app or known_app(), folder, code.n, tamper, **(owner or {})) as inner:
        result = strategy.start(
            inner if latency is None else VirtualGrid(inner, latency, seed=3), initial_arrays(), num_rounds=rounds
        )
    return strategy, models, result


def mean_of_integers(
    folder: Path, code: GradientCode, model: ArrayRecord, server_round: int, request: str
) -> NDArray[np.float32]:
    """The model after a round, from the integers of all classes without masks, in plain arithmetic."""
    weight, body = 0.0, read_manifest(folder / "node-0").body
    total = [0] * SIZE
    for worker in range(code.n):
        seeds = seeds_of(read_keys(folder / f"node-{worker}"), body.classes)
        for c, seed in seeds.items():
            if worker != body.classes.holders[c][0]:
                continue
            ours = ClassIntegers(body, c, seed, bytes.fromhex(request))
            for shard in body.classes.members[c]:
                before = flat(model).astype(np.float32)
                moved = (before + update_for(server_round, shard)) - before
                ours.add(shard, ShardResult(moved, shard + 1.0, np.zeros(3)))
                weight += shard + 1.0
            words = body.classes.ring.to_signed(ours.parts()["update"])[:SIZE].tolist()
            total = [one + more for one, more in zip(total, words, strict=True)]
    unit = 2.0**-body.quantiser.fraction_bits * body.quantiser.largest_weight
    mean = np.array([one * unit / weight for one in total])
    after: NDArray[np.float32] = (flat(model) + mean).astype(np.float32)
    return after


def ask(
    app: ClientApp,
    folder: Path,
    worker: int,
    content: RecordDict | None,
    *,
    message_type: str = "train",
    run_config: dict[str, Any] | None = None,
    node_config: dict[str, Any] | None = None,
) -> Message:
    """The answer of a deployed node to one message: nothing around it is a module of a simulation."""
    config: dict[str, Any] = {"partition-id": worker, "num-partitions": 8, "secagg-dir": str(folder / f"node-{worker}")}
    context = Context(1, 7, {**config, **(node_config or {})}, RecordDict(), dict(run_config or {}))
    with inside_a_run():
        message = Message(content or RecordDict(), dst_node_id=7, message_type=message_type)
        return app(message, context)


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to
