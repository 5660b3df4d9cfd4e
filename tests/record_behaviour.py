"""What the library does, written down: to show that a change of its structure changed nothing else.

    python -m tests.record_behaviour before.json                      # in the tree before the change
    python -m tests.record_behaviour after.json                       # in the tree after it
    python -m tests.record_behaviour --against before.json after.json # prints what differs; exit status 1 if anything

It runs codes, rounds on both grids, coded products, the reference app and the command line, and keeps digests of the
models, the metrics, the ledger rows and what was logged. It uses only names that are public, and reads no private
attribute, so that the same file runs before and after.

What would differ from run to run is taken away at its source. Real clocks (`time.monotonic`, `time.perf_counter`)
stand still unless an app advances them: `seconds.decoding`, `seconds.aggregating` and, without virtual time, all
waiting times are 0, and the bytes of replies, which tell seconds in decimal digits, stay the same. Keys and noise
(`secrets.token_bytes`, `os.urandom`) come from a counter. Replies have one order in both grids: `InProcessGrid` answers
in the order of the messages, and draws its node ids from a seed. Left out are only `ended-at` of a ledger row, the
made-up name of a run of the reference app and, in what `status` prints, how long ago a run ended. Names of temporary
folders are replaced.

Between machines, or versions of NumPy and torch, digests may differ by rounding: record both trees on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from numpy.typing import NDArray

import fl_gradcode
from clients.app import app as reference_client
from fl_gradcode import (
    Approximation,
    Discovered,
    EarlyStopGrid,
    GradientCode,
    GradientCoding,
    Ledger,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    gradient_coding_mod,
    uncoded,
)
from fl_gradcode.codes import bernoulli, cyclic_mds, for_assignment, reed_solomon, stochastic, vandermonde
from fl_gradcode.errors import FlGradcodeError, NotDecodable
from fl_gradcode.latency import Latency, Law, bursty, exponential, lognormal, scaled
from fl_gradcode.matmul import (
    CodedMatrix,
    ConditionWarning,
    ProductCode,
    coded_matmul,
    coded_matmul_worker,
    entangled,
    matdot,
    mds_product,
    polynomial,
    uncoded_product,
)
from fl_gradcode.privacy import DPSGD, CentralNoise, asks_for_privacy, private_training, write_keys
from fl_gradcode.testing import InProcessGrid, ManualClock
from server.app import main as reference_server
from tests.conftest import initial_arrays, toy_app

ROOT = Path(__file__).resolve().parents[1]
GRIDS = ("in process", "virtual")
#: Names of the results that Flower returns of a run.
METRICS = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")

Kwargs = dict[str, Any]


def sending(send: str = "coded", **settings: Any) -> Kwargs:
    """Arguments of `GradientCoding` that say how replies are sent: values where there are any, else single ones."""
    value = getattr(fl_gradcode, send.capitalize(), None)
    return {"send": send, **settings} if value is None else {"send": value(**settings)}


# Making a run repeatable


@contextmanager
def repeatable(clock: ManualClock) -> Iterator[None]:
    """Clocks stand still, and whatever comes from the operating system's generator is the same each time."""
    calls = itertools.count()

    def draw(n: int = 32) -> bytes:
        return hashlib.shake_256(str(next(calls)).encode()).digest(n)

    with ExitStack() as stack:
        for name in ("time.monotonic", "time.perf_counter"):
            stack.enter_context(mock.patch(name, clock))
        for name in ("os.urandom", "secrets.token_bytes"):
            stack.enter_context(mock.patch(name, draw))
        random.seed(0)  # Flower samples nodes with it
        torch.manual_seed(0)
        yield


class Lines(logging.Handler):
    """Keeps what the library logs; not the names of its loggers, which are those of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


@contextmanager
def logged() -> Iterator[list[str]]:
    """What the library logs meanwhile; Flower is quiet, and nothing goes to the terminal."""
    ours, flower, handler = logging.getLogger("fl_gradcode"), logging.getLogger("flwr"), Lines()
    before = ours.level, ours.propagate, flower.level
    ours.addHandler(handler)
    try:
        ours.setLevel(logging.INFO)
        ours.propagate = False
        flower.setLevel(logging.CRITICAL)
        yield handler.lines
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]
        flower.setLevel(before[2])


def digest(values: ArrayRecord | NDArray[Any]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    arrays = {key: array.numpy() for key, array in values.items()} if isinstance(values, ArrayRecord) else {"": values}
    sha = hashlib.sha256()
    for key, array in arrays.items():
        sha.update(f"{key} {array.dtype} {array.shape};".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def storable(value: Any, folder: Path | None = None) -> Any:
    """What JSON can hold, and compare: numbers that are not finite as text, the folder without its name."""
    if isinstance(value, Mapping):
        return {str(key): storable(one, folder) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [storable(one, folder) for one in value]
    if isinstance(value, np.generic):
        return storable(value.item(), folder)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.replace(str(folder), "FOLDER") if isinstance(value, str) and folder is not None else value


def metrics_of(result: Any) -> Kwargs:
    return {kind: {number: dict(one) for number, one in getattr(result, kind).items()} for kind in METRICS}


def jobs_of(grid: Grid) -> Kwargs:
    """What a virtual clock tells after a run."""
    if not isinstance(grid, VirtualGrid):
        return {}
    jobs = json.dumps([storable(asdict(job)) for job in grid.jobs])
    return {"now": grid.now(), "jobs": len(grid.jobs), "jobs digest": hashlib.sha256(jobs.encode()).hexdigest()}


# Codes

HELD = [[0, 1, 2, 5], [1, 2, 3], [2, 3, 4], [3, 4, 5, 0], [4, 5, 0], [5, 0, 1, 3]]
CAPACITIES = np.array(
    [[1] * 6, [1] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1]]
)

CODES: dict[str, Callable[[], GradientCode]] = {
    "uncoded": lambda: uncoded(6),
    "fractional": lambda: fractional_repetition(6, 2),
    "fractional, uneven": lambda: fractional_repetition(7, 3, order=[3, 1, 6, 0, 2, 5, 4]),
    "fractional, k=5": lambda: fractional_repetition(6, 1, k=5),
    "fractional, m=2": lambda: fractional_repetition(8, 2, m=2),
    "cyclic": lambda: cyclic_repetition(6, 2, rng=np.random.default_rng(1)),
    "cyclic, larger": lambda: cyclic_repetition(12, 4, rng=np.random.default_rng(2)),
    "cyclic MDS": lambda: cyclic_mds(8, 3),
    "Vandermonde": lambda: vandermonde(6, 2),
    "universal": lambda: for_assignment(HELD, s=1),
    "universal, m=2": lambda: for_assignment(HELD, s=1, m=2),
    "universal, capacities": lambda: for_assignment(CAPACITIES, s=1, holders=3, rng=np.random.default_rng(4)),
    "field": lambda: reed_solomon(6, 2),
    "field, m=2": lambda: reed_solomon(6, 2, m=2, fraction_bits=12),
    "field, assignment": lambda: reed_solomon(6, 1, assignment=HELD),
    "Bernoulli": lambda: bernoulli(6, 2, rng=np.random.default_rng(5)),
    "stochastic": lambda: stochastic(6, 2, p=0.1, rng=np.random.default_rng(6)),
}


def survivors_of(code: GradientCode) -> list[list[int]]:
    """Everybody, without the first or last s, two draws of n - s, and two sets that are too small or nearly so."""
    rng = np.random.default_rng(7)
    n, s = code.n, code.s
    drawn = [rng.permutation(n)[: n - s].tolist() for _ in range(2)]
    return [[*range(n)], [*range(s, n)], [*range(n - s)], *drawn, [*range(0, n, 2)], [n - 1]]


def record_code(code: GradientCode) -> Kwargs:
    updates = np.random.default_rng(8).standard_normal((code.k, 7)).astype(np.float32)
    replies = code.encode(updates)
    told: Kwargs = {
        "repr": repr(code),
        "B": digest(code.B),
        "groups": code.groups,
        "exact": code.exact,
        "holders": [code.holders_of(shard) for shard in range(code.k)],
        "encoded": digest(replies),
        "restricted": digest(code.restrict([*range(0, code.k, 2)]).B),
    }
    for survivors in survivors_of(code):
        entry: Kwargs = {
            "decodable": code.decodable(survivors),
            "decoding error": code.decoding_error(survivors),
            "kappa": code.kappa(survivors),
            "coverage": code.coverage(survivors).tolist(),
            "least squares": digest(code.least_squares_vector(survivors, ridge=0.1)),
        }
        try:
            entry["vector"] = digest(code.decoding_vector(survivors))
            entry["decoded"] = digest(code.decode(replies[survivors], survivors, length=7))
        except NotDecodable as error:
            entry["refused"] = str(error)
        told[" ".join(map(str, survivors))] = entry
    return told


# Rounds


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of `GradientCoding`.

    Attributes:
        code: The code, or the wish for one.
        options: Further arguments of `GradientCoding`.
        inner: Makes the wrapped strategy.
        rounds: How many.
        pause: Rounds after which a new strategy goes on from the checkpoint; 0: none.
        latency: Of the virtual grid.
        troubles: (round, worker) -> what goes wrong in training: "error", "not a number", "other" (numbers than the
            other holders') or "slow" (each shard takes 100 seconds of the app's clock).
        shards: What nodes say that they hold, one entry a node; empty: nothing.
        private: Whether the clients can train privately, with keys.
    """

    code: GradientCode | Discovered
    options: Kwargs = field(default_factory=sending)
    inner: Callable[[], Strategy] = FedAvg
    rounds: int = 4
    pause: int = 0
    latency: Latency
    troubles: Mapping[tuple[int, int], str] = field(default_factory=dict)
    shards: Sequence[str] = ()
    private: bool = False

    @property
    def nodes(self) -> int:
        return len(self.shards) if isinstance(self.code, Discovered) else self.code.n


def silent(*lost: tuple[int, int]) -> Latency:
    """About a second a shard; `lost`: (round, worker) of what never comes."""
    usual = lognormal(1.0, 0.3)

    def draw(seed: int, worker: int, tick: int) -> float:
        return math.inf if (tick // 2, worker) in lost else usual.draw(seed, worker, tick)

    return Latency(fixed=0.1, compute=Law("silent at times", draw))


STRAGGLERS = Latency(fixed=exponential(0.2), compute=scaled(lognormal(1.0, 0.3), {1: 20.0, 4: 6.0}), transfer=100.0)
SPELLS = Latency(fixed=0.2, compute=0.8, slowdown=bursty(0.2, 0.4, 10.0, jitter=0.2))
SLOW_FOR_GOOD = Latency(fixed=0.2, compute=0.8, slowdown=scaled(lognormal(1.0, 0.3), {0: 10.0, 1: 10.0}))
# All three holders of shard 2 of a cyclic code; with a fourth worker no estimate is of use.
LOST = {(2, worker): "error" for worker in (0, 1, 2)}
MORE_LOST = {(2, worker): "error" for worker in (0, 1, 3, 4)}
DISCOVERED = ("0,1,2", "2,3", "0,3,1", "1,2,3,0")


def sampled(make: Callable[..., Strategy]) -> Strategy:
    return make(fraction_train=0.5, min_train_nodes=1, fraction_evaluate=0.5, min_evaluate_nodes=1)


def no_evaluation() -> Strategy:
    return FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0)


def dp_sgd(**changes: Any) -> DPSGD:
    values: Kwargs = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.2, "steps": 2, **changes}
    return DPSGD(accountant="rdp", **values)


def cases() -> dict[str, Case]:
    """Every run, by name."""
    made = {name: make() for name, make in CODES.items()}
    usual = partial(Case, latency=STRAGGLERS)
    fractional, cyclic, universal, over_field = (made[one] for one in ("fractional", "cyclic", "universal", "field"))
    exact = [name for name, code in made.items() if code.exact]
    found = {f"coded, {name}": usual(code=made[name]) for name in exact}
    approximate = {"on_undecodable": "approximate"}
    central = CentralNoise(noise_multiplier=1.0, clipping_norm=0.5)
    return {
        **found,
        # Ways to send
        "coded, Bernoulli": usual(code=made["Bernoulli"], options=sending() | approximate),
        "coded, stochastic, ridge": usual(
            code=made["stochastic"], options={**sending(), "on_undecodable": Approximation(ridge=0.1)}
        ),
        "coded, spells": usual(code=fractional, latency=SPELLS, rounds=8),
        "coded, another seed": usual(code=cyclic, options={**sending(), "seed": 5}),
        "shards, fractional": usual(code=fractional, options=sending("shards")),
        "shards, cyclic": usual(code=cyclic, options=sending("shards", patience=0.0), latency=SPELLS),
        "shards, universal": usual(code=universal, options=sending("shards", patience=1.0)),
        "shards, Bernoulli": usual(code=made["Bernoulli"], options=sending("shards")),
        "adaptive, fractional": Case(
            code=fractional_repetition(9, 2), options=sending("adaptive"), inner=no_evaluation, rounds=14,
            latency=SLOW_FOR_GOOD,
        ),
        "adaptive, network": Case(
            code=fractional_repetition(9, 2), options=sending("adaptive"), rounds=14,
            latency=Latency(fixed=exponential(1.0)),
        ),
        "adaptive, cyclic": usual(code=cyclic, options=sending("adaptive"), rounds=8),
        "kappa_max": usual(code=cyclic, options=sending(kappa_max=1.5)),
        "give_up_after": usual(
            code=cyclic, options=sending(give_up_after=150.0), troubles={(1, 0): "slow", (2, 3): "slow"}
        ),
        # Wrapped strategies
        **{
            f"inner, {make.__name__}": usual(code=fractional, inner=make)
            for make in (FedAdam, FedYogi, FedAdagrad, partial_named(FedAvgM, server_momentum=0.9),
                         partial_named(FedProx, proximal_mu=0.1))
        },
        "sampled, fractional": usual(code=fractional, inner=partial(sampled, FedAvg), rounds=6),
        "sampled, cyclic": usual(code=cyclic, inner=partial(sampled, FedAvg), rounds=6),
        "sampled, shards": usual(
            code=universal, inner=partial(sampled, FedAdam), options=sending("shards"), rounds=6
        ),
        # Nodes that fail, and rounds that cannot be decoded
        "errors": usual(
            code=cyclic, rounds=6,
            troubles={(1, 2): "error", (2, 2): "error", (2, 5): "not a number", (3, 0): "not a number"},
        ),
        "errors, shards": usual(
            code=fractional, options=sending("shards"), troubles={(1, 2): "error", (2, 5): "not a number"}
        ),
        "holders disagree": usual(
            code=cyclic, troubles={(2, 0): "other", (3, 3): "other", (3, 4): "other"}, latency=silent()
        ),
        "skip": usual(code=uncoded(6), latency=silent((2, 1), (3, 1)), troubles={(2, 1): "error"}),
        "skip, groups": usual(code=fractional, latency=silent((2, 0), (2, 2), (2, 4)), troubles={
            (2, worker): "error" for worker in (0, 2, 4)
        }),
        "raise": usual(
            code=cyclic, options={**sending(), "on_undecodable": "raise"}, troubles=LOST,
            latency=silent(*LOST),
        ),
        "approximate": usual(
            code=cyclic, options=sending() | approximate, troubles=LOST, latency=silent(*LOST)
        ),
        "approximate, in vain": usual(
            code=cyclic, options=sending() | approximate, troubles=MORE_LOST, latency=silent(*MORE_LOST)
        ),
        "fill in, groups": usual(
            code=fractional, options={**sending(), "on_undecodable": Approximation(fill_in=True)},
            latency=silent((2, 0), (2, 2), (2, 4), (3, 0)),
            troubles={(2, worker): "error" for worker in (0, 2, 4)},
        ),
        "fill in, shards": usual(
            code=cyclic, options={**sending("shards"), "on_undecodable": Approximation(fill_in=True)},
            latency=silent(*LOST), troubles=LOST,
        ),
        # Going on, and codes for what is there
        "resumed, FedAdam": usual(code=fractional, inner=partial(sampled, FedAdam), rounds=6, pause=3),
        "resumed, FedAvgM": usual(code=over_field, inner=partial(FedAvgM, server_momentum=0.9), rounds=6, pause=3),
        "resumed, adaptive": usual(code=cyclic, options=sending("adaptive"), rounds=8, pause=4),
        "discovered": usual(code=Discovered(k=4, s=1), shards=DISCOVERED),
        "discovered, shards": usual(code=Discovered(k=4, s=1), options=sending("shards"), shards=DISCOVERED),
        # Privacy
        "shared noise": usual(code=fractional, options={**sending(), "privacy": dp_sgd()}, private=True, rounds=6),
        "shared noise, universal": usual(code=universal, options={**sending(), "privacy": dp_sgd()}, private=True),
        "shared noise, field": usual(code=over_field, options={**sending(), "privacy": dp_sgd()}, private=True),
        "shared noise, shards, ghost": usual(
            code=cyclic, options={**sending("shards"), "privacy": dp_sgd(grad_sample_mode="ghost")}, private=True
        ),
        "shared noise, resumed": usual(
            code=fractional, options={**sending(), "privacy": dp_sgd()}, private=True, pause=2
        ),
        "independent noise": usual(
            code=fractional, options={**sending(), "privacy": dp_sgd(noise="independent")}, private=True, rounds=2
        ),
        "central noise": usual(code=cyclic, options={**sending(), "privacy": central}),
        "central noise, field": usual(code=over_field, options={**sending(), "privacy": central}),
    }  # fmt: skip


def partial_named(make: Callable[..., Strategy], **settings: Any) -> Any:
    """A partial that keeps the name of what it makes."""
    made: Any = partial(make, **settings)
    made.__name__ = getattr(make, "__name__", "")
    return made


def troubling(troubles: Mapping[tuple[int, int], str], clock: ManualClock) -> Callable[..., Message]:
    """A mod, inside of the library's, in which training goes wrong for some workers in some rounds."""

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        training = message.metadata.message_type.startswith("train")
        server_round = int(message.content["config"]["server-round"]) if training else 0  # type: ignore[arg-type]
        trouble = troubles.get((server_round, int(context.node_config["worker"])))
        if trouble == "error":
            raise RuntimeError(f"no room left for shard {context.node_config['partition-id']}")
        if trouble == "slow":
            clock.advance(100.0)
        reply = call_next(message, context)
        if trouble in ("not a number", "other"):
            change = math.nan if trouble == "not a number" else 0.5
            arrays: Any = reply.content["arrays"]
            reply.content["arrays"] = ArrayRecord([one + np.float32(change) for one in arrays.to_numpy_ndarrays()])
        return reply

    return mod


def small_model() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def private_app() -> ClientApp:
    """Shard j has 40 + 10 j records; trains privately when it is asked to."""
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        assert asks_for_privacy(message, context)
        model, content = small_model(), message.content
        model.load_state_dict(content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        shard = int(context.node_config["partition-id"])
        generator = torch.Generator().manual_seed(shard)
        x = torch.randn(40 + 10 * shard, 6, generator=generator)
        y = torch.randint(0, 3, (len(x),), generator=generator)
        with private_training(message, context, model, examples=len(x)) as dp:
            optimizer = dp.optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
            criterion = dp.criterion(torch.nn.CrossEntropyLoss())
            for batch in dp.batches():
                optimizer.zero_grad()
                criterion(dp.model(x[batch]), y[batch]).backward()
                optimizer.step()
        records: Kwargs = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(x), "loss": 0.5}),
            "privacy": dp.record,
        }
        return Message(RecordDict(records), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1 + int(context.node_config["partition-id"]), "accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def record_rounds(case: Case, kind: str, folder: Path) -> Kwargs:
    """Models, metrics, ledger rows and log lines of a run, which is begun twice if it pauses."""
    clock = ManualClock()
    ledger, checkpoint = folder / "ledger.jsonl", folder / "run.ckpt" if case.pause else None
    run_config: Kwargs = {"privacy-dir": str(folder / "keys")} if case.private else {}
    app = private_app() if case.private else toy_app((gradient_coding_mod, troubling(case.troubles, clock)))
    models: list[list[Any]] = []

    def node_config(worker: int) -> Kwargs:
        held = {"shards": case.shards[worker]} if case.shards else {}
        return {"partition-id": worker, "num-partitions": case.nodes, "worker": worker, **held}

    told: Kwargs = {"models": models, "starts": []}
    with repeatable(clock), logged() as lines:
        if case.private:
            assert isinstance(case.code, GradientCode)
            write_keys(folder / "keys", [case.code.shards_of(worker) for worker in range(case.code.n)])
        for rounds in filter(None, (case.pause, case.rounds)):
            strategy = GradientCoding(
                case.inner(),
                case.code,
                ledger=ledger,
                checkpoint=checkpoint,
                run="fixed",
                on_round_end=lambda number, arrays, row: models.append([number, digest(arrays)]),
                **case.options,
            )
            with InProcessGrid(app, case.nodes, run_config=run_config, node_config=node_config) as inside:
                grid: Grid = inside if kind == "in process" else VirtualGrid(inside, case.latency, seed=1)
                arrays = ArrayRecord(small_model().state_dict()) if case.private else initial_arrays()
                try:
                    result = strategy.start(grid, arrays, num_rounds=rounds, timeout=300.0)
                except FlGradcodeError as error:
                    entry: Kwargs = {"raised": f"{type(error).__name__}: {error}"}
                else:
                    entry = {"model": digest(result.arrays), **metrics_of(result)}
            told["starts"].append({**entry, "calls": inside.calls, **jobs_of(grid)})
        told["log"] = lines
    rows = Ledger.read(ledger)
    for row in rows:
        del row["ended-at"]  # real time
    return {**told, "rows": rows}


def record_plain(kind: str, stop_after: int | None) -> Kwargs:
    """FedAvg of Flower on a grid that stops early, without a code."""
    models: list[list[Any]] = []

    def keep(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        models.append([server_round, digest(arrays)])
        return MetricRecord({"round": server_round})

    with repeatable(ManualClock()), logged(), InProcessGrid(toy_app(), 6) as inside:
        grid: Grid = inside if kind == "in process" else VirtualGrid(inside, STRAGGLERS, seed=1)
        early = grid if stop_after is None else EarlyStopGrid(grid, stop_after=stop_after)
        result = FedAvg(fraction_evaluate=0.5).start(
            early, initial_arrays(), num_rounds=4, timeout=300.0, evaluate_fn=keep
        )
        return {"models": models, **metrics_of(result), "calls": inside.calls, **jobs_of(grid)}


# Coded products


def products() -> dict[str, ProductCode]:
    whole, fixed = (reed_solomon(3, 1, fraction_bits=bits).numbers for bits in (0, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConditionWarning)  # the last one is a bad choice, and warns
        return {
            "MDS": mds_product(8, 5),
            "MDS, Chebyshev": mds_product(8, 5, basis="chebyshev"),
            "polynomial": polynomial(8, 2, 3),
            "MatDot": matdot(8, 3),
            "MatDot, roots": matdot(8, 3, basis="roots"),
            "entangled": entangled(12, 2, 2, 2),
            "uncoded": uncoded_product(2, 3),
            "MDS, whole numbers": mds_product(8, 5, numbers=whole),
            "polynomial, whole numbers": polynomial(8, 2, 3, numbers=whole),
            "polynomial, fixed point": polynomial(8, 2, 3, numbers=fixed),
            "MatDot, whole numbers": matdot(8, 3, numbers=whole),
            "polynomial, integers": polynomial(10, 3, 3, basis="integers"),
        }


def doubled(worker: int, message: Message, reply: Message) -> Message:
    """Worker 1 answers with twice the numbers."""
    if worker == 1 and reply.has_content():
        for name, record in [*reply.content.items()]:
            if isinstance(record, ArrayRecord):
                twice = {key: one.numpy() * one.numpy().dtype.type(2) for key, one in record.items()}
                reply.content[name] = ArrayRecord({key: Array(one) for key, one in twice.items()})
    return reply


def record_product(code: ProductCode, kind: str, *, integers: bool, wrong: bool = False) -> Kwargs:
    """One product, then three with the same left factor."""
    rng = np.random.default_rng(9)
    draw: Callable[..., Any] = partial(rng.integers, -99, 99) if integers else rng.standard_normal
    A, *right = (draw(shape) for shape in ((9, 7), (7, 5), (7, 4), (7,)))
    app = ClientApp()
    app.query("matmul")(coded_matmul_worker)
    extra = 2 if wrong else 0
    told: Kwargs = {"repr": repr(code)}
    inside = InProcessGrid(app, code.n, tamper=doubled if wrong else None)
    with repeatable(ManualClock()), logged() as lines, inside:
        grid: Grid = inside if kind == "in process" else VirtualGrid(inside, STRAGGLERS, seed=1)
        product = coded_matmul(grid, A, right[0], code, extra=extra, rng=np.random.default_rng(0))
        told["product"] = digest(product)
        matrix = CodedMatrix(grid, A, code, extra=extra, timeout=300.0, rng=np.random.default_rng(0))
        told["products"] = [digest(matrix.multiply(B)) for B in right]
        told["reports"] = [asdict(report) for report in matrix.reports]
        told["calls"] = inside.calls
        told |= jobs_of(grid)
    return {**told, "log": lines}


def record_products(kind: str) -> Kwargs:
    made = products()
    told = {name: record_product(code, kind, integers="whole" in name) for name, code in made.items()}
    told["a wrong answer"] = record_product(made["polynomial"], kind, integers=False, wrong=True)
    return told


# The reference app


REFERENCE: dict[str, Kwargs] = {
    "plain, the slowest dropped": {"drop-slowest": 1, "strategy": "fedprox"},
    "fractional": {"code": "fractional", "stragglers": 2, "strategy": "fedadam"},
    "universal, shards": {"code": "universal", "capacities": "4,4,2,2", "send": "shards", "patience": 0.0},
    "cyclic, kappa": {"code": "cyclic", "stragglers": 2, "kappa-max": 2.0},
    "fractional, adaptive": {"code": "fractional", "send": "adaptive", "num-server-rounds": 5},
}


def record_reference(changes: Kwargs, folder: Path) -> Kwargs:
    """`server/` and `clients/` on digits, four nodes, in virtual time."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files = {"results": folder / "results.jsonl", "ledger": folder / "ledger.jsonl"}
    config: Kwargs = {
        **project["tool"]["flwr"]["app"]["config"],
        "num-server-rounds": 3,
        "latency": "lognormal",
        "slow-clients": 1,
        "results": str(files["results"]),
        "ledger": str(files["ledger"]) if "code" in changes else "",
        **changes,
    }
    library = logging.getLogger("fl_gradcode")
    parent = library.parent
    with repeatable(ManualClock()), logged() as lines:
        with InProcessGrid(reference_client, 4, run_config=config) as grid:
            reference_server(grid, Context(1, 0, {}, RecordDict(), config))
        library.parent = parent
        told: Kwargs = {"calls": grid.calls, "log": lines}
    told["results"] = [json.loads(line) for line in files["results"].read_text().splitlines()]
    for row in (rows := Ledger.read(files["ledger"]) if "code" in changes else []):
        del row["ended-at"], row["run"]  # real time, and a name that is made up
    return {**told, "rows": rows}


# The command line


def run_command(*arguments: str, folder: Path) -> Kwargs:
    """What the command prints; it is found where pyproject.toml says."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["fl-gradcode"].partition(":")
    call = [sys.executable, "-c", f"from {module} import {name}; {name}()", *arguments]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    out = re.sub(r"\d+ d \d+ h ago", "long ago", done.stdout)
    return {"status": done.returncode, "out": out.splitlines(), "err": done.stderr.splitlines()}


def record_commands(rows: Mapping[str, Sequence[Kwargs]], folder: Path) -> Kwargs:
    """Of planning, of the status of some runs, and the help."""
    told = {
        "plan": run_command("plan", "virtual-machines", "--workers", "12", folder=folder),
        "plan, JSON": run_command("plan", "virtual-machines", "--workers", "12", "--json", folder=folder),
        "plan, product": run_command("plan", "lognormal", "--workers", "12", "--matmul", folder=folder),
        **{
            " ".join([*words, "help"]): run_command(*words, "--help", folder=folder)
            for words in ([], ["plan"], ["status"], ["place"], ["privacy"], ["keys"])
        },
    }
    for name, some in rows.items():
        ledger = folder / "ledger.jsonl"
        ledger.write_text("".join(json.dumps({**row, "ended-at": 1.75e9 + row["round"]}) + "\n" for row in some))
        told[f"status, {name}"] = run_command("status", ledger.name, folder=folder)
        told[f"status, JSON, {name}"] = run_command("status", ledger.name, "--json", folder=folder)
        told[f"plan, {name}"] = run_command("plan", ledger.name, folder=folder)
    return told


# All of it


def record() -> Kwargs:
    told: Kwargs = {"codes": {name: record_code(make()) for name, make in CODES.items()}}
    rounds: dict[str, Kwargs] = {}
    for (name, case), kind in itertools.product(cases().items(), GRIDS):
        with tempfile.TemporaryDirectory() as folder:
            rounds.setdefault(name, {})[kind] = storable(record_rounds(case, kind, Path(folder)), Path(folder))
    for stop_after, kind in itertools.product((None, 4), GRIDS):
        rounds.setdefault(f"FedAvg, stop_after={stop_after}", {})[kind] = record_plain(kind, stop_after)
    told["rounds"] = rounds
    told["products"] = {kind: record_products(kind) for kind in GRIDS}
    told["reference app"] = {}
    for name, changes in REFERENCE.items():
        with tempfile.TemporaryDirectory() as folder:
            told["reference app"][name] = storable(record_reference(changes, Path(folder)), Path(folder))
    shown = {name: rounds[name]["virtual"]["rows"] for name in ("errors", "adaptive, network", "shared noise")}
    with tempfile.TemporaryDirectory() as folder:
        told["commands"] = storable(record_commands(shown, Path(folder)), Path(folder))
    return dict(storable(told))


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Each path at which two records differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            here = f"{path} > {key}" if path else key
            if key not in old or key not in new:
                yield f"{here}: only {'before' if key in old else 'after'}"
            else:
                yield from differences(old[key], new[key], here)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{path} > {place}")
    elif type(old) is not type(new) or old != new:
        yield f"{path}: {json.dumps(old)[:300]} -> {json.dumps(new)[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write down what the library does, or compare two records of it.")
    parser.add_argument("record", type=Path, help="file to write, or the newer one to compare")
    parser.add_argument("--against", type=Path, help="the older record: compare, and run nothing")
    given = parser.parse_args()
    if given.against is None:
        print(f"Recording {Path(fl_gradcode.__file__).parent}.")
        began = time.perf_counter()
        given.record.write_text(json.dumps(record(), indent=1) + "\n")
        print(f"Written to {given.record} after {time.perf_counter() - began:.0f} s.")
        return
    old, new = (json.loads(path.read_text()) for path in (given.against, given.record))
    found = [*differences(old, new)]
    print(*found, f"{len(found)} differences.", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
