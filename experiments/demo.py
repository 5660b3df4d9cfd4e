"""The main job: three ways to live with slow clients, on real data, in Flower's own simulation engine.

Twelve clients share the digits data; three of them are ten times slower and alone own two of the ten labels.
The same app runs under FedAvg waiting for all, FedAvg dropping the slowest three, and GradientCoding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.engine import Engine, EngineError
from experiments.figures import accuracy_over_time
from fl_gradcode import Ledger

ROOT = Path(__file__).resolve().parents[1]
SLOW = 3


@dataclass(frozen=True)
class Scheme:
    """One way to run the app: what differs in its run-config. The legend of the figure may say more than the title."""

    key: str
    title: str
    run_config: dict[str, Any]
    legend: str = ""


@dataclass(frozen=True)
class Run:
    """What a scheme did: one row a round, from the app's own results file."""

    scheme: Scheme
    rows: list[dict[str, Any]]
    decoded: str


def schemes(ledger: Path) -> list[Scheme]:
    """The three, in the order of the table."""
    return [
        Scheme("wait", "FedAvg, wait for all", {}),
        Scheme("drop", f"FedAvg, drop {SLOW} slowest", {"drop-slowest": SLOW}),
        Scheme(
            "coded",
            "GradientCoding, s = 2",
            {"code": "fractional", "stragglers": 2, "ledger": str(ledger)},
            legend="GradientCoding: any 2 clients may be missing (s = 2)",
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the exit code is 0 if every run completed."""
    options = _options(arguments)
    console = Console()
    out = Path(options.out).expanduser().resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shared = {
        "num-server-rounds": options.rounds,
        "dataset": options.dataset,
        "data-dir": options.data_dir,
        "partitioner": "owned-labels",
        "owners": SLOW,
        # Convex on purpose: the trajectory does not amplify rounding, so equal models show as equal numbers.
        "model": "logistic",
        "local-epochs": 5,
        "learning-rate": 1.0,
        "latency": "lognormal",
        "slow-clients": SLOW,
        "slow-factor": 10.0,
    }
    console.print(
        f"{options.clients} clients train on {options.dataset} for {options.rounds} rounds, in Flower's simulation "
        f"engine.\n"
        f"Clients 0 to {SLOW - 1} are 10 times slower and alone own two labels. Time is virtual: nobody sleeps."
    )
    runs = []
    try:
        with Engine(options.clients, folder=out / "engine") as engine, _progress(console) as progress:
            every = schemes(out / "ledger.jsonl")
            for number, scheme in enumerate(every, 1):
                told = f"[{number} of {len(every)}] {scheme.title}: {options.rounds} rounds"
                started = _tell(console, f"{told} ...")
                runs.append(_run(engine, scheme, shared, out, progress))
                _tell(console, f"{told} in {time.perf_counter() - started:.0f} s")
    except (EngineError, RunFailed) as error:
        console.print(f"[bold red]{error}")
        return 1
    console.print(_table(runs, options.rounds))
    figure = out / "demo.png"
    lines = [(run.scheme.legend or run.scheme.title, run.rows) for run in runs]
    accuracy_over_time(lines, figure, title=f"{_found(runs)}\n{_title(options)}")
    _say(console, runs, out, figure)
    return 0


class RunFailed(RuntimeError):
    """A run did not complete; the last lines of its log say why."""


def _run(engine: Engine, scheme: Scheme, shared: dict[str, Any], out: Path, progress: Progress) -> Run:
    results = out / f"{scheme.key}.jsonl"
    total = shared["num-server-rounds"]
    task = progress.add_task(scheme.title, total=total)

    def look() -> None:
        _advance(progress, task, results)

    run_config = {**shared, **scheme.run_config, "results": str(results)}
    outcome = engine.run(ROOT, run_config, timeout=1800, while_waiting=look)
    (out / f"{scheme.key}.log").write_text(outcome.log)
    if not outcome.completed:
        sentence = _reason(outcome.log)
        raise RunFailed(f"{scheme.title}: {outcome.status}. {sentence} The whole log is in {out / scheme.key}.log.")
    progress.update(task, completed=total)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    if "ledger" in scheme.run_config:
        complete = sum(row["train"]["outcome"] == "exact" for row in Ledger.read(scheme.run_config["ledger"]))
    else:  # Flower's own line for each round of training
        complete = outcome.log.count(f"aggregate_train: Received {engine.nodes} results and 0 failures")
    return Run(scheme, rows, f"{complete} of {total}")


def _advance(progress: Progress, task: TaskID, results: Path) -> None:
    if results.exists():
        progress.update(task, completed=max(0, results.read_bytes().count(b"\n") - 1))


def _reason(log: str) -> str:
    errors = [line.split("ERROR", 1)[1].strip(" :\x1b[0m") for line in log.splitlines() if "ERROR" in line]
    return errors[0] if errors else ""


def _table(runs: list[Run], rounds: int) -> Table:
    table = Table(
        title=f"After {rounds} rounds", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("scheme", no_wrap=True)
    for column in ("accuracy", "worst class", "virtual s", "real s", "complete"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        last = run.rows[-1]
        table.add_row(
            run.scheme.title,
            f"{last['accuracy']:.1%}",
            f"{min(last['class-accuracies']):.1%}",
            f"{last['seconds']:.0f}",
            f"{last['real-seconds']:.0f}",
            run.decoded,
        )
    return table


def _say(console: Console, runs: list[Run], out: Path, figure: Path) -> None:
    wait, drop, coded = (run.rows for run in runs)
    apart = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(wait, coded, strict=True))
    console.print(
        f"GradientCoding took {coded[-1]['seconds'] / wait[-1]['seconds']:.2f} of the time of waiting for all; its "
        f"test loss differs by at most {apart:.0e} (relative) in any round. Dropping took "
        f"{drop[-1]['seconds'] / wait[-1]['seconds']:.2f} and ended with {min(drop[-1]['class-accuracies']):.0%} on "
        "its worst class."
    )
    console.print(f"Figure: {figure}\nLedger: {out / 'ledger.jsonl'}\nRows:   {out}/{{wait,drop,coded}}.jsonl")


def _tell(console: Console, line: str) -> float:
    """Prints a line where there are no bars to watch, as in a pipe or a log; returns the time in seconds."""
    if not console.is_terminal:
        print(line, flush=True)
    return time.perf_counter()


def _title(options: argparse.Namespace) -> str:
    return f"{options.dataset}, {options.clients} clients, {SLOW} of them 10 times slower and sole owners of two labels"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rounds"),
        TimeElapsedColumn(),
        console=console,
    )


def _found(runs: list[Run]) -> str:
    """What the figure shows, in a sentence."""
    wait, drop, coded = (run.rows for run in runs)
    same = abs(wait[-1]["accuracy"] - coded[-1]["accuracy"]) < 0.0005
    faster = wait[-1]["seconds"] / coded[-1]["seconds"]
    found = f"Coding is {faster:.1f} times as fast as waiting for all" + (", with the same accuracy" if same else "")
    return found + ("; dropping never learns some labels" if min(drop[-1]["class-accuracies"]) == 0.0 else "")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--rounds", type=_positive, default=30)
    parser.add_argument("--clients", type=_positive, default=12)
    parser.add_argument("--dataset", default="digits", choices=("digits", "mnist", "fashion-mnist"))
    parser.add_argument("--data-dir", default="", help="folder of the data set's files (not needed for digits)")
    parser.add_argument("--out", default=str(ROOT / "out" / "demo"))
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


if __name__ == "__main__":
    started = time.perf_counter()
    code = main()
    Console().print(f"{time.perf_counter() - started:.0f} s in all.")
    sys.exit(code)
