"""`python -m experiments.privacy`: run what is missing of accuracy against epsilon, then write the page from the rows.

A run that was killed goes on where it was: each task is a row of its own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from clients.data import load_dataset
from clients.errors import AppConfigError
from experiments.compare.pool import run_all
from experiments.compare.store import ROOT, Store, Task
from experiments.privacy.figure import draw
from experiments.privacy.measures import Results
from experiments.privacy.page import page
from experiments.privacy.runs import run
from experiments.privacy.tasks import PROBLEMS, SUITES, cost_of

__all__ = ["PAGE", "ROWS", "main"]

PAGE, ROWS = "privacy-measured.md", "docs/results/privacy.jsonl.gz"


def main(arguments: list[str] | None = None) -> int:
    """Run the missing tasks; the exit code is 0 if all have rows."""
    options = _options(arguments)
    console = Console(soft_wrap=True)
    data_dir = str(Path(options.data_dir).expanduser().resolve()) if options.data_dir else ""
    out = Path(options.out).expanduser()
    tasks = SUITES[options.suite]()
    store = Store(out / "rows.jsonl")
    missing = store.missing(tasks)
    console.print(f"{options.suite}: {len(tasks)} tasks, {len(tasks) - len(missing)} have rows in {store.path}.")
    try:
        for name in dict.fromkeys(task.problem for task in missing):
            load_dataset(PROBLEMS[name].problem.dataset, data_dir)
    except AppConfigError as error:
        console.print(f"[bold red]{error}")
        return 2
    started = time.perf_counter()
    # Seed by seed: a run that is stopped early has all schemes of the first seeds.
    work = partial(run, data_dir=data_dir, keys=out / "keys")
    failed = run_all(missing, store, work, cost_of, processes=options.processes, console=console)
    console.print(f"{len(missing) - failed} tasks in {time.perf_counter() - started:.0f} s; rows: {store.path}")
    if not failed:
        _write(store, tasks, out, console, docs=options.docs)
    return 1 if failed else 0


def _write(store: Store, tasks: list[Task], out: Path, console: Console, *, docs: bool) -> None:
    """The page, from the rows of these tasks and those that tuned."""
    wanted = {task.hash for task in (*tasks, *SUITES["tuning"]())}
    rows = [row for key, row in sorted(store.rows().items()) if key in wanted]
    results = Results(rows)
    if not results.rows:
        return
    for folder in [out, ROOT / "docs"] if docs else [out]:
        draw(results, folder / "images" / "privacy-accuracy.png")
        (folder / PAGE).write_text(page(results))
        console.print(f"{folder / PAGE}")
    if docs:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (ROOT / ROWS).write_bytes(gzip.compress(lines.encode(), mtime=0))  # the same bytes for the same rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.privacy", description=__doc__)
    parser.add_argument("--suite", choices=tuple(SUITES), default="main")
    parser.add_argument("--quick", dest="suite", action="store_const", const="quick", help="digits: no files, a minute")
    parser.add_argument("--data-dir", default="", help="folder with the data sets' folders; digits needs none")
    parser.add_argument("--out", default=str(ROOT / "out" / "privacy"))
    parser.add_argument("--docs", action="store_true", help="write docs/privacy-measured.md, its figure and rows too")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.docs and options.suite != "main":
        parser.error("--docs shows the suite main")
    if options.processes < 1:
        parser.error(f"--processes {options.processes} must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
