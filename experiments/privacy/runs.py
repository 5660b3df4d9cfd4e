"""One task, run: a trajectory of models on real data in virtual time, and what it has spent."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from clients.app import app as client_app
from clients.data import load_dataset
from experiments.compare.runs import FOREVER, Curve, work_of
from experiments.compare.store import Task
from experiments.compare.synchronous import quiet
from experiments.privacy.tasks import DELTA, PROBLEMS, SCHEMES, Private, Scheme, latency
from fl_gradcode import EarlyStopGrid, GradientCode, GradientCoding, VirtualGrid
from fl_gradcode.privacy import DPSGD, amplification, in_config, write_keys
from fl_gradcode.testing import InProcessGrid

__all__ = ["privacy_of", "run"]

_NEXT_TO_NONE = 1e-6  # of the clipping norm


def run(task: Task, data_dir: str, keys: Path) -> dict[str, Any]:
    """The row of a task, without its provenance.

    Args:
        task: Which.
        data_dir: Folder with the data sets' folders.
        keys: Folder for shards' secrets and ledgers, by task. They are new with each run, as a run's keys have to be.
    """
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started = time.perf_counter()
    private, scheme, options = PROBLEMS[task.problem], SCHEMES[task.scheme], dict(task.options)
    problem = private.problem
    code = scheme.code(problem.n, problem.s) if scheme.code else None
    privacy = privacy_of(scheme, private, code, task.rounds, options) if scheme.noise else None
    config = {**problem.run_config(data_dir, task.seed), "learning-rate": options["learning-rate"]}
    if privacy and privacy.noise == "shared":
        assert code is not None
        folder = keys / task.hash
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
        write_keys(folder, [code.shards_of(worker) for worker in range(code.n)])
        config["privacy-dir"] = str(folder.resolve())
    dataset = load_dataset(problem.dataset, data_dir, problem.train_examples, seed=task.seed)
    with InProcessGrid(client_app, problem.n, run_config=config) as inner:
        grid = VirtualGrid(inner, latency(), seed=task.seed)  # a message is charged as a shard, whatever its work share
        curve = Curve(problem, dataset, task.seed, grid.now)

        def evaluate(server_round: int, arrays: ArrayRecord) -> None:
            if server_round % problem.every == 0 or server_round == task.rounds:
                curve.measure(server_round, arrays)

        waiting: Grid = EarlyStopGrid(grid, stop_after=problem.n - scheme.drop) if scheme.drop else grid
        strategy: Any = FedAvg(**quiet)
        train_config: dict[str, Any] = {}
        if code is not None:
            strategy = GradientCoding(strategy, code, privacy=privacy, run=task.hash)
        elif privacy is not None:
            train_config.update(in_config(privacy))
        else:
            # As many records a round as private training draws on average.
            train_config["work-share"] = private.steps * private.sample_rate
        strategy.start(
            waiting,
            curve.initial,
            task.rounds,
            timeout=FOREVER,
            train_config=ConfigRecord(train_config),
            evaluate_fn=evaluate,
        )
    result: dict[str, Any] = {"points": curve.points, "work": work_of(grid)}
    if privacy is not None and scheme.noise != "none":
        result |= _promised(privacy, code, task.rounds)
    if code is not None:
        entries = [row["train"] for row in strategy.ledger.rows]
        assert len(entries) == task.rounds and all(entry["outcome"] == "exact" for entry in entries)
        result["epsilon-of-ledger"] = round(entries[-1]["privacy"]["epsilon"], 4)
        result["kappa"] = round(max(entry["kappa"] for entry in entries), 4)
    return {**result, "real-seconds": round(time.perf_counter() - started, 2)}


def privacy_of(
    scheme: Scheme, private: Private, code: GradientCode | None, rounds: int, options: dict[str, float]
) -> DPSGD:
    """The least noise with which all rounds together keep the wished epsilon, by the accountant PRV."""
    if scheme.noise == "none":
        return DPSGD(
            noise_multiplier=_NEXT_TO_NONE,
            max_grad_norm=options["clip"],
            sample_rate=private.sample_rate,
            steps=private.steps,
            noise="independent",
            delta=DELTA,
        )
    assert scheme.noise is not None
    return DPSGD.for_epsilon(
        options["epsilon"],
        rounds=rounds,
        holders=_holders(code),
        delta=DELTA,
        max_grad_norm=options["clip"],
        sample_rate=private.sample_rate,
        steps=private.steps,
        noise=scheme.noise,
    )


def _promised(privacy: DPSGD, code: GradientCode | None, rounds: int) -> dict[str, Any]:
    holders = _holders(code)
    least, most = (1.0, 1.0) if code is None or privacy.noise == "shared" else amplification(code)
    return {
        "noise-multiplier": privacy.noise_multiplier,
        "epsilon": round(privacy.epsilon(rounds, holders=holders), 4),
        "releases": privacy.releases(holders),
        "amplification": [round(least, 3), round(most, 3)],
    }


def _holders(code: GradientCode | None) -> int:
    return 1 if code is None else max(len(code.holders_of(shard)) for shard in range(code.k))
