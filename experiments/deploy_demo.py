"""A deployment to watch: six SuperNodes with TLS and keys, one of them very slow, one killed and restarted.

Each node holds three of six shards of the digits data, so that any two nodes may be missing. Nothing is simulated:
SuperLink and SuperNodes are processes on this machine, started as on six machines, and time is real.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from flwr.serverapp.strategy import FedAvg
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from experiments.digits_app.digits_app import client
from experiments.digits_app.digits_app.server import CODE
from experiments.engine import Engine, EngineError
from fl_gradcode.testing import InProcessGrid

ROOT = Path(__file__).resolve().parents[1]
APP = Path(__file__).resolve().parent / "digits_app"
SLOW, KILLED = 1, 4
SLOW_SECONDS = 30.0
LOAD = len(CODE.shards_of(0))
#: The node is killed after this round.
KILLED_AFTER = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WIDTHS = (8, 7, 9, 11, 19, 10)
_HEADINGS = ("time", "round", "seconds", "used nodes", "busy or gone", "accuracy")


class Watch:
    """Prints what happens, with the time since the start: rows as the ledger gets them, and events between them."""

    def __init__(self, console: Console, folder: Path) -> None:
        self._console, self._folder = console, folder
        self._start = time.monotonic()
        self.rows: list[dict[str, Any]] = []

    def say(self, text: str, style: str = "") -> None:
        self._console.print(f"{self._now():>{_WIDTHS[0]}}  {text}", style=style, highlight=False)

    def headings(self) -> None:
        self._line(_HEADINGS, "bold")

    def look(self) -> None:
        """Print the rounds that have ended since the last look."""
        for row in _lines(self._folder / "ledger.jsonl")[len(self.rows) :]:
            accuracies = {one["round"]: one["accuracy"] for one in _lines(self._folder / "accuracy.jsonl")}
            if row["round"] not in accuracies:
                return  # it follows the ledger's line at once
            self.rows.append(row)
            phase = row["train"]
            seconds = sum(phase["seconds"].values())
            used = " ".join(map(str, phase["used"])) if phase["outcome"] == "exact" else phase["outcome"]
            known = sorted(worker for worker in phase["held-back"] if worker is not None)
            away = " ".join([*map(str, known), *"?" * phase["held-back"].count(None)])
            accuracy = f"{accuracies[row['round']]:.1%}"
            self._line((self._now(), row["round"], f"{seconds:.1f}", used, away or "-", accuracy))

    def _now(self) -> str:
        minutes, seconds = divmod(round(time.monotonic() - self._start), 60)
        return f"{minutes}:{seconds:02}"

    def _line(self, cells: tuple[object, ...], style: str = "") -> None:
        text = "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
        self._console.print(text, style=style, highlight=False)


class Trouble:
    """One node is killed, and a supervisor starts it again until the SuperLink takes it."""

    def __init__(self, engine: Engine, watch: Watch) -> None:
        self._engine, self._watch = engine, watch
        self._supervisor = threading.Thread(target=self._restart, daemon=True)
        self._killed = 0.0
        self.seconds = float("nan")

    def look(self) -> None:
        """Kill it when its time has come."""
        if not self._killed and len(self._watch.rows) >= KILLED_AFTER:
            self._engine.kill_node(KILLED)
            self._killed = time.monotonic()
            self._watch.say(f"node {KILLED} is killed, as when its machine loses power", "red")
            self._supervisor.start()

    def _restart(self) -> None:
        self._watch.say(f"node {KILLED} starts anew; refused while its old self counts as online", "red")
        try:
            self._engine.restart_node(KILLED)
        except (EngineError, RuntimeError):
            return  # the demonstration has ended before
        self.seconds = time.monotonic() - self._killed
        self._watch.say(f"node {KILLED} is back, with the same key and id", "green")


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; the exit code is 0 if the run completed."""
    options = _options(arguments)
    console = Console()
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    console.print(
        f"Six nodes with TLS and a key of their own, as processes on this machine. Each holds {LOAD} of {CODE.k} "
        f"shards of the digits data; any {CODE.s} may be missing.\n"
        f"Node {SLOW} needs {SLOW_SECONDS:g} s for a message. Node {KILLED} is killed after round {KILLED_AFTER}. "
        "Ctrl-C stops everything.\n"
        "Busy or gone: still owed an earlier reply when the round began; ?: has not yet said who it is.\n"
    )
    with tempfile.TemporaryDirectory(prefix="fl-gradcode-deploy-") as name:
        folder = Path(name)
        _write_data(folder)
        engine = Engine(
            CODE.n,
            deployed=True,
            secure=True,
            database=True,
            folder=folder / "engine",
            node_config=lambda number: _node_config(folder, number),
        )
        engine.environment["PYTHONPATH"] = str(ROOT)
        watch = Watch(console, folder)
        try:
            with engine:
                try:
                    return _show(engine, watch, folder, options.rounds, console)
                finally:
                    _ignore_signals()
                    console.print("\nStopping the SuperLink and all nodes.")
        except KeyboardInterrupt:
            console.print("Stopped before the end.")
            return 130
        except EngineError as error:
            console.print(f"[bold red]{error}")
            return 1


def _show(engine: Engine, watch: Watch, folder: Path, rounds: int, console: Console) -> int:
    watch.say(f"SuperLink at https://{engine.address}, {len(engine.node_ids)} keys registered")
    run_id = engine.submit(APP, {"folder": str(folder), "num-server-rounds": rounds})
    watch.say("the run is submitted; each message starts a process on its node\n")
    watch.headings()
    trouble = Trouble(engine, watch)

    def look() -> None:
        watch.look()
        trouble.look()

    outcome = engine.wait(run_id, 900.0, look)
    watch.look()
    if not outcome.completed:
        console.print(f"The run ended as {outcome.status}:\n{outcome.log[-2000:]}")
        return 1
    console.print(_summary(watch.rows, trouble, folder))
    return 0


def _summary(rows: list[dict[str, Any]], trouble: Trouble, folder: Path) -> Table:
    seconds = [sum(row["train"]["seconds"].values()) for row in rows]
    exact = sum(row["train"]["outcome"] == "exact" for row in rows)
    late = [one["worker"] for row in rows for one in row["train"]["late"]]
    back = f"after {trouble.seconds:.0f} s" if trouble.seconds == trouble.seconds else "not before the run ended"
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_row("Rounds with the data of all shards", f"{exact} of {len(rows)}")
    table.add_row("Median round", f"{np.median(seconds):.1f} s; node {SLOW} alone needs {SLOW_SECONDS:g} s and more")
    table.add_row(f"Late replies of node {SLOW}", f"{late.count(SLOW)}, none of them used")
    table.add_row(f"Node {KILLED} was back", back)
    table.add_row("Model against FedAvg without faults", f"{_distance(len(rows), folder):.0e} relative difference")
    return table


def _distance(rounds: int, folder: Path) -> float:
    """Relative distance of the final model to that of Flower's own FedAvg, all six nodes there, in this process."""

    def node_config(number: int) -> dict[str, Any]:
        return {"partition-id": number, "num-partitions": CODE.k, "data": str(folder / "all")}

    logging.getLogger("flwr").setLevel(logging.ERROR)
    with InProcessGrid(client.app, CODE.k, node_config=node_config) as grid:
        result = FedAvg(fraction_evaluate=0.0).start(grid, client.initial_arrays(), num_rounds=rounds)
    expected = np.concatenate([array.ravel() for array in result.arrays.to_numpy_ndarrays()]).astype(np.float64)
    with np.load(folder / "final.npz") as saved:
        actual = np.concatenate([saved[name].ravel() for name in saved.files]).astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _write_data(folder: Path) -> None:
    """Shards sorted by digit, so that none can be done without; each node gets the files of its own shards alone."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    test, rest = np.split(order, [len(y) // 5])
    (folder / "all").mkdir()
    np.savez(folder / "test.npz", x=x[test] / 16, y=y[test])
    for shard, part in enumerate(np.array_split(rest[np.argsort(y[rest], kind="stable")], CODE.k)):
        np.savez(folder / "all" / f"shard-{shard}.npz", x=x[part] / 16, y=y[part])
    for worker in range(CODE.n):
        (folder / f"node-{worker}").mkdir()
        for shard in CODE.shards_of(worker):
            (folder / f"node-{worker}" / f"shard-{shard}.npz").hardlink_to(folder / "all" / f"shard-{shard}.npz")


def _node_config(folder: Path, number: int) -> str:
    slow = f" seconds-per-shard={SLOW_SECONDS / LOAD}" if number == SLOW else ""
    return f'data="{folder / f"node-{number}"}"{slow}'


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _interrupt(number: int, frame: FrameType | None) -> None:
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    """While everything is being stopped: a second Ctrl-C would leave processes behind."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make deploy-demo", description=__doc__)
    # about two minutes: what takes time is starting processes
    rounds = 8 if (os.cpu_count() or 1) <= 2 else 18
    parser.add_argument("--rounds", type=int, default=rounds, help=f"how many rounds ({rounds})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
