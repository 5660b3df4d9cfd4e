"""Tasks run in processes of their own, each row written as soon as it is there."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.compare.store import Store, Task

__all__ = ["run_all"]

_TELL = 30.0  # seconds between lines of progress in a log


def run_all(
    tasks: Sequence[Task],
    store: Store,
    work: Callable[[Task], dict[str, Any]],
    cost_of: Callable[[Task], float],
    *,
    processes: int,
    console: Console,
) -> int:
    """Run tasks in their order; the number of those that failed.

    Args:
        tasks: Those without a row.
        store: Where rows go.
        work: Task -> row; it has to be found by name in another process.
        cost_of: About how many seconds a task takes, for the progress bar.
        processes: How many tasks run at a time.
        console: For progress and errors.
    """
    if not tasks:
        return 0
    failed, told = 0, time.monotonic()
    progress = Progress(
        TextColumn("{task.description:44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    queue = list(tasks)
    with progress, ProcessPoolExecutor(processes, mp_context=context) as pool:
        bar = progress.add_task("", total=sum(map(cost_of, tasks)))
        running: dict[Future[dict[str, Any]], Task] = {}
        try:
            while queue or running:
                while queue and len(running) < processes:
                    task = queue.pop(0)
                    running[pool.submit(work, task)] = task
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    error = future.exception()
                    name = f"{task.problem} {task.law or 'no clock'} {task.scheme} seed {task.seed}"
                    if error is None:
                        store.add(task, future.result())
                    else:
                        failed += 1
                        console.print(f"[red]{name}: {type(error).__name__}: {error}")
                    progress.update(bar, advance=cost_of(task), description=name)
                    if not console.is_terminal and time.monotonic() >= told + _TELL:  # a log shows no bar
                        told = time.monotonic()
                        share, left = progress.tasks[bar].percentage, len(queue) + len(running)
                        console.print(f"{share:.0f} % of the work, {left} tasks left")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            console.print("Interrupted; what has a row is kept.")
            raise SystemExit(130) from None
    return failed
