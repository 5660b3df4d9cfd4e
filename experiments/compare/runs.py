"""One task, run: a trajectory of models on real data, or the times of a scheme's rounds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg, Strategy

from clients.app import app as client_app
from clients.data import Dataset, load_dataset
from clients.models import build_model
from clients.training import evaluate_by_class
from experiments.compare.asynchronous import fedbuff, semi_asynchronous
from experiments.compare.problems import OWNERS, PROBLEMS, Problem, latency_of
from experiments.compare.store import Task
from experiments.compare.synchronous import WORK_SHARE, PartialProx, WorkShareGrid, quiet, server_strategy
from experiments.rounds import app as idle_app
from fl_gradcode import EarlyStopGrid, GradientCode, GradientCoding, Shards, VirtualGrid
from fl_gradcode.averaging import ModelAverage
from fl_gradcode.codes import cyclic_repetition, for_assignment, fractional_repetition
from fl_gradcode.planning import candidates, make_plan, partial_work, steady_rounds, wait_for_all
from fl_gradcode.testing import InProcessGrid

__all__ = ["ASYNCHRONOUS", "EXACT", "FOREVER", "INEXACT", "Curve", "run", "scheme_titles", "work_of"]

FOREVER = 1e9
#: name -> (title, code of (n, s), how it sends, patience). None: plain FedAvg.
Send = Literal["coded", "shards", "adaptive"]
EXACT: dict[str, tuple[str, Callable[[int, int], GradientCode] | None, Send, float]] = {
    "wait": ("FedAvg, wait for all", None, "coded", 0.0),
    "repetition": ("repetition", fractional_repetition, "coded", 0.0),
    "cyclic": ("cyclic", lambda n, s: cyclic_repetition(n, s, rng=np.random.default_rng(0)), "coded", 0.0),
    "general": ("general", lambda n, s: _general(n, s), "coded", 0.0),
    "repetition-m2": ("repetition, m = 2", lambda n, s: fractional_repetition(n, s, m=2), "coded", 0.0),
    "replication": ("uncoded replication", fractional_repetition, "shards", 0.0),
    "partial": ("partial work", fractional_repetition, "shards", 2.0),
    "adaptive": ("adaptive", fractional_repetition, "adaptive", 0.0),
}
INEXACT = {
    "drop-s": "drop the slowest s",
    "drop-owners": f"drop the slowest {OWNERS}",
    "deadline": "deadline",
    "over-selection": "over-select 130 %",
    "fedprox": "FedProx, partial epochs",
    "semi": "semi-asynchronous",
    "fedbuff": "FedBuff",
}
#: What only the suite "sooner" runs: all data at full weight, some of them some rounds late.
STALE = {"stale": "bounded staleness"}
ASYNCHRONOUS = ("semi", "fedbuff")
_LONGER = 2  # a faster baseline may go on for so many times the rounds, up to the time that partial work takes
_EVER = 20  # the same where it may go on for as long as waiting for all takes
_TIMELINE = 6  # rounds of which every job is kept


def scheme_titles() -> dict[str, str]:
    """Name -> what people read."""
    return {**{name: title for name, (title, *_) in EXACT.items()}, **INEXACT, **STALE}


def run(task: Task, data_dir: str) -> dict[str, Any]:
    """The row of a task, without its provenance."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    problem = PROBLEMS[task.problem]
    started = time.perf_counter()
    if task.scheme == "hindsight":
        result = _hindsight(task, problem, data_dir)
    elif task.scheme in EXACT and task.law:
        result = _times(task, problem, data_dir)
    else:
        result = _trajectory(task, problem, data_dir)
    return {**result, "real-seconds": round(time.perf_counter() - started, 2)}


class _Enough(Exception):
    """The run has gone on for long enough."""


class Curve:
    """Points of one run: called by Flower, or by a baseline, after each server round."""

    def __init__(self, problem: Problem, dataset: Dataset, seed: int, now: Callable[[], float]) -> None:
        self.problem, self.dataset, self.now = problem, dataset, now
        self.model = build_model(problem.model, dataset, seed=seed)
        self.initial = ArrayRecord(self.model.state_dict())
        self.points: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.average: ModelAverage | None = None

    def measure(self, server_round: int, arrays: ArrayRecord) -> None:
        """Add a point; with an average, it has the average's accuracies besides."""
        point = self._point(server_round, arrays)
        if self.average is not None and (mean := self.average.arrays) is not None:
            averaged = self._point(server_round, mean)
            point |= {f"{name}-averaged": averaged[name] for name in ("accuracy", "worst", "owned") if name in averaged}
        self.points.append(point)

    def _point(self, server_round: int, arrays: ArrayRecord) -> dict[str, Any]:
        self.model.load_state_dict(arrays.to_torch_state_dict())
        x, y = torch.tensor(self.dataset.test_x), torch.tensor(self.dataset.test_y)
        loss, accuracy, by_class = evaluate_by_class(self.model, x, y, self.dataset.classes, torch.device("cpu"))
        point = {
            "round": server_round,
            "seconds": round(self.now(), 4),
            "loss": loss if math.isfinite(loss) else None,
            "accuracy": accuracy,
            "worst": float(np.nanmin(by_class)),
        }
        if self.problem.owners:
            point["owned"] = float(np.mean(by_class[-2:]))
        return point


def _trajectory(task: Task, problem: Problem, data_dir: str) -> dict[str, Any]:
    dataset = load_dataset(problem.dataset, data_dir, problem.train_examples, seed=task.seed)
    with InProcessGrid(client_app, problem.n, run_config=problem.run_config(data_dir, task.seed)) as inner:
        latency = latency_of(task.law or "none")
        grid = WorkShareGrid(inner, latency, seed=task.seed)
        curve = Curve(problem, dataset, task.seed, grid.now)
        horizon = 0.0
        if task.law:
            parts = latency.parts(seed=task.seed, n=problem.n, rounds=task.rounds)
            patient = "as-long-as-waiting" in dict(task.options)
            longest = wait_for_all(problem.n) if patient else partial_work(problem.n, problem.s)
            horizon = float(steady_rounds(longest, parts).seconds.sum())

        weight = dict(task.options).get("average")
        curve.average = None if weight is None else ModelAverage(weight)

        def after(server_round: int, arrays: ArrayRecord) -> None:
            if curve.average is not None and server_round:
                curve.average.add(arrays)
            over = server_round >= task.rounds and grid.now() >= horizon
            if server_round % problem.every == 0 or over or server_round == task.rounds:
                curve.measure(server_round, arrays)
            if over:
                raise _Enough

        after(0, curve.initial)
        with _until_enough():
            _baseline(task, problem, grid, curve, after, horizon)
    return {"points": curve.points, "work": work_of(grid)}


@contextmanager
def _until_enough() -> Iterator[None]:
    try:
        yield
    except _Enough:
        return


def _baseline(
    task: Task,
    problem: Problem,
    grid: VirtualGrid,
    curve: Curve,
    after: Callable[[int, ArrayRecord], None],
    horizon: float,
) -> None:
    options = dict(task.options)
    n, most = problem.n, task.rounds * (_EVER if "as-long-as-waiting" in options else _LONGER)
    deadline = 1.5 * _typical_seconds(task, n)

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> None:
        if server_round:
            after(server_round, arrays)

    share = options.get("steps", 1.0)
    asked = ConfigRecord({WORK_SHARE: share} if share < 1 else {})

    def fedavg(waiting: Any, timeout: float = FOREVER, strategy: Strategy | None = None) -> None:
        strategy = strategy or server_strategy(options)
        strategy.start(waiting, curve.initial, most, timeout=timeout, train_config=asked, evaluate_fn=evaluate_fn)

    match task.scheme:
        case "exact":
            fedavg(grid)
        case "drop-s":
            fedavg(EarlyStopGrid(grid, stop_after=n - problem.s))
        case "drop-owners":
            fedavg(EarlyStopGrid(grid, stop_after=max(1, n - OWNERS)))
        case "over-selection":
            fedavg(EarlyStopGrid(grid, stop_after=math.ceil(n / 1.3)))
        case "deadline":
            fedavg(EarlyStopGrid(grid), timeout=deadline)
        case "fedprox":
            least = min(1.0, n * problem.batch_size / len(curve.dataset.train_y))  # one batch of a client of mean size
            server = server_strategy(options) if "adam" in options else None
            mu = options.get("mu", 0.01)
            fedavg(grid, strategy=PartialProx(deadline=deadline, least=least, mu=mu, most=share, server=server))
        case "stale":
            send = Shards(staleness=round(options.get("bound", 3)), fresh=options.get("fresh", 0.6))
            code = fractional_repetition(n, problem.s)
            fedavg(grid, strategy=GradientCoding(server_strategy(options), code, send=send, verify=0))
        case "semi":
            wanted = max(1, round(0.8 * n))
            semi_asynchronous(
                grid,
                curve.initial,
                wanted=wanted,
                rounds=most,
                on_update=after,
                share=share,
                optimiser=server_strategy(options) if "adam" in options else None,
            )
        case "fedbuff":
            buffer = max(1, round(n / 3))
            steps = n / buffer  # server updates for as many trainings as a round has

            def scaled(update: int, arrays: ArrayRecord) -> None:
                if update % max(1, round(steps)) == 0:
                    after(round(update / steps), arrays)

            fedbuff(
                grid,
                curve.initial,
                buffer=buffer,
                server_rate=options.get("server-rate", 1.0),
                staleness=options.get("staleness", 0.5),
                updates=round(most * steps),
                until=FOREVER,
                on_update=scaled,
            )
        case _:
            raise ValueError(f"There is no scheme {task.scheme!r}.")


def _typical_seconds(task: Task, n: int) -> float:
    parts = latency_of(task.law or "none").parts(seed=task.seed, n=n, rounds=20)
    return float(np.median(parts.seconds(1.0, 0.0)))


def _times(task: Task, problem: Problem, data_dir: str) -> dict[str, Any]:
    """Rounds of an exact scheme: the models are those of waiting for all, so the app here does nothing."""
    _, make, send, patience = EXACT[task.scheme]
    dataset = load_dataset(problem.dataset, data_dir, problem.train_examples, seed=task.seed)
    initial = ArrayRecord(build_model(problem.model, dataset, seed=task.seed).state_dict())
    with InProcessGrid(idle_app, problem.n) as inner:
        grid = WorkShareGrid(inner, latency_of(task.law), seed=task.seed)
        options = dict(task.options)
        share = options.get("steps", 1.0)
        asked = ConfigRecord({WORK_SHARE: share} if share < 1 else {})
        s = round(options.get("holders", problem.s + 1)) - 1
        ends: list[float] = []

        def clock(server_round: int, arrays: ArrayRecord) -> None:
            ends.append(grid.now())

        result: dict[str, Any] = {}
        if make is None:
            FedAvg(**quiet).start(grid, initial, task.rounds, timeout=FOREVER, train_config=asked, evaluate_fn=clock)
        else:
            coding = GradientCoding(
                FedAvg(**quiet),
                make(problem.n, s),
                send=Shards(patience) if send == "shards" else send,
                verify=0,  # what is compared is how long rounds take; `make bench` shows what verification adds
            )
            coding.start(grid, initial, task.rounds, timeout=FOREVER, train_config=asked, evaluate_fn=clock)
            rows = coding.ledger.rows
            assert all(row["train"]["outcome"] == "exact" for row in rows)
            result["used"] = [row["train"]["used"] for row in rows[:_TIMELINE]]
            result["ways"] = [row["way"] for row in rows] if send == "adaptive" else []
    seconds = np.diff(ends)
    jobs = [
        [job.worker, job.round, *(round(t, 3) for t in (job.began, job.finished))]
        for job in grid.jobs
        if job.round <= _TIMELINE and task.seed == 0
    ]
    return {**result, "seconds": [round(float(t), 5) for t in seconds], "work": work_of(grid), "jobs": jobs}


def work_of(grid: VirtualGrid) -> dict[str, float]:
    """What all clients did, needed or not."""
    return {
        "messages": len(grid.jobs),
        "shards": round(float(sum(job.shards for job in grid.jobs)), 3),
        "megabytes-up": round(sum(job.megabytes_up for job in grid.jobs), 4),
        "megabytes-down": round(sum(job.megabytes_down for job in grid.jobs), 4),
    }


def _hindsight(task: Task, problem: Problem, data_dir: str) -> dict[str, Any]:
    """Mean round seconds of every exact scheme over runs that the planner has not seen, and what it chose before."""
    dataset = load_dataset(problem.dataset, data_dir, problem.train_examples, seed=task.seed)
    model = build_model(problem.model, dataset, seed=task.seed)
    megabytes = sum(4 * value.numel() for value in model.state_dict().values()) / 1e6
    latency, n = latency_of(task.law), problem.n
    plan = make_plan(latency, n, model_megabytes=megabytes, seed=10_000)
    schemes = [wait_for_all(n), *(one for one in candidates(n, slow=plan.slow, m=True) if one.exact)]
    runs = 200  # of a fresh population each; the first fifth of a run, in which it settles, does not count
    draws = [latency.parts(seed=number, n=n, rounds=30) for number in range(runs)]
    means = {
        one.name: float(np.mean([steady_rounds(one, parts, model_megabytes=megabytes).seconds[6:] for parts in draws]))
        for one in schemes
    }
    return {"means": means, "planned": plan.recommended.scheme.name, "codes": plan.codes, "verdict": plan.verdict}


def _general(n: int, s: int) -> GradientCode:
    """Holders chosen among all, s + 1 of them a shard; the coefficients are the universal construction's."""
    return for_assignment(np.ones((n, n), bool), s=s, holders=s + 1, rng=np.random.default_rng(0))
