"""`python -m experiments.compare`: run what is missing of a comparison, then say where the rows are.

A run that was killed goes on where it was: each task is a row of its own. `make report` turns the rows into a page.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from clients.data import load_dataset
from clients.errors import AppConfigError
from experiments.compare.pool import run_all
from experiments.compare.problems import PROBLEMS
from experiments.compare.runs import run
from experiments.compare.store import ROOT, Store
from experiments.compare.suites import SUITES, cost_of, order_of

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the missing tasks of a suite; the exit code is 0 if all have rows."""
    options = _options(arguments)
    console = Console()
    data_dir = str(Path(options.data_dir).expanduser().resolve()) if options.data_dir else ""
    tasks = SUITES[options.suite]()
    if options.problem:
        tasks = [task for task in tasks if task.problem == options.problem]
    if options.seeds:
        tasks = [task for task in tasks if task.seed in options.seeds]
    store = Store(Path(options.rows).expanduser())
    missing = store.missing(tasks)
    console.print(f"{options.suite}: {len(tasks)} tasks, {len(tasks) - len(missing)} have rows in {store.path}.")
    try:
        for name in dict.fromkeys(task.problem for task in missing):
            problem = PROBLEMS[name]
            load_dataset(problem.dataset, data_dir, problem.train_examples)
    except AppConfigError as error:
        console.print(f"[bold red]{error}")
        return 2
    started = time.perf_counter()
    queue = sorted(missing, key=order_of)
    work = partial(run, data_dir=data_dir)
    failed = run_all(queue, store, work, cost_of, processes=options.processes, console=console)
    console.print(f"{len(missing) - failed} tasks in {time.perf_counter() - started:.0f} s; rows: {store.path}")
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__)
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick")
    parser.add_argument("--problem", choices=tuple(PROBLEMS), help="only this data set and split")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--data-dir", default="", help="folder with the data sets' folders; digits needs none")
    parser.add_argument("--rows", default=str(ROOT / "out" / "compare" / "rows.jsonl"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes {options.processes} must be at least 1")
    if options.rows.endswith(".gz"):
        parser.error(f"--rows {options.rows} is packed: unpack it first, rows are appended")
    return options


if __name__ == "__main__":
    sys.exit(main())
