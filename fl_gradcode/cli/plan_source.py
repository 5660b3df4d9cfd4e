"""What `fl-gradcode plan` reads: a named law, a table of measured times, or the ledger of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._text import listed, printable
from ..errors import InvalidSetting
from ..latency import (
    DEFAULT_SHARE,
    POPULATIONS,
    Fit,
    Jobs,
    Latency,
    Measured,
    Split,
    fit,
    is_table,
    job_tables,
    measured_rounds,
    named,
    read_measured,
    read_trace,
    replay,
    split_of,
    trace,
)
from ..runlog import History, Ledger

__all__ = ["UNITS", "Source", "read_source"]

#: Name of a unit of time -> its seconds.
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_LONGEST, _SHORTEST = 86_400.0, 1e-6  # bounds of the median job's seconds: outside, the unit is wrong
_MOST_FITTED = 20_000  # times that laws are fitted to, spread over all


@dataclass(frozen=True)
class Source:
    """A latency, and the number of workers that it is for.

    Attributes:
        latency: How long a job takes.
        n: Number of workers; None if the source does not say.
        told: What was read, in one line.
        split: The share of a job's time that grows with its shards, and where it comes from.
        names: Name of each worker in the file; empty if it has none but their numbers from 0.
        rounds: Number of measured rounds; None for a law and for a sample of times.
        notes: What a user may want to know of how the source was read, in words.
        fits: Laws fitted to measured times, best first; empty for a named law.
    """

    latency: Latency
    n: int | None
    told: str
    split: Split
    names: tuple[str, ...] = ()
    rounds: int | None = None
    notes: tuple[str, ...] = ()
    fits: tuple[Fit, ...] = ()

    def worker(self, number: int) -> str:
        """Returns what people call a worker: its number, and its name if it has one."""
        name = printable(self.names[number], 40) if self.names else str(number)
        return name if name == str(number) else f"{number} ({name})"


def read_source(
    source: str,
    *,
    n: int | None = None,
    compute_share: float | None = None,
    model_megabytes: float = 0.0,
    link: float | None = None,
    unit: str | None = None,
    key: str | None = None,
    transfer_included: bool = True,
) -> Source:
    """Returns the latency that a name or a file stands for.

    A .csv or .tsv file, compressed or not, holds one of two tables:

    * *Jobs*: one row for each job. The header has `worker` and `seconds` and may have `round`, `shards` (1 if missing)
      and `computing`, the part of the seconds that grows with the shards.
    * *Rounds*: one row for each round and one column for each worker, with or without a header. Each number is the time
      for one shard. A single column is a sample for all workers.

    `latency.read_measured` knows other words for these columns, and other forms. An .npz file holds a table of rounds
    under `key`. A .jsonl file is a ledger.

    Args:
        source: A name in `POPULATIONS`, or a path.
        n: Number of workers. Tables with one column need it.
        compute_share: Share of a time that grows with the shards. If None, it is fitted to jobs of several loads, or
            assumed to be 0.8. What clients measured themselves takes precedence.
        model_megabytes: Size of the model, in MB.
        link: Network bandwidth in Mbit/s each way.
        transfer_included: Whether measured times contain the transfer. If so, it is taken out of the part that does
            not grow with the shards. Otherwise it is added, as for a named law.
        unit: Unit of a table's times: s, ms or us. None for what the name of the column says, or seconds.
        key: Name of the array in an .npz file.

    Raises:
        InvalidSetting: The source or an option cannot be used.
    """
    if compute_share is not None and not 0 <= compute_share <= 1:
        raise InvalidSetting(f"The compute share {compute_share} must lie in 0..1.")
    if not 0 <= model_megabytes < float("inf"):
        raise InvalidSetting(f"The model size {model_megabytes} MB must be a finite number of at least 0.")
    if link is not None and not 0 < link < float("inf"):
        raise InvalidSetting(f"The network bandwidth {link} Mbit/s must be a finite number above 0.")
    if unit is not None and unit not in UNITS:
        raise InvalidSetting(f"The unit {unit!r} is not known; choose one of {', '.join(UNITS)}.")
    a_megabyte = 0.0 if link is None else 8.0 / link
    moved = 2 * a_megabyte * model_megabytes if transfer_included else 0.0  # seconds of transfer in a measured time
    path = Path(source)
    if path.suffix.lower() == ".jsonl":
        rows = Ledger.read_rounds(path)
        history = History.of_ledger(rows)
        told = f"{path.name}: {history.rounds} rounds of {history.n} workers"
        return _of_jobs(told, history.jobs(), compute_share, a_megabyte, moved, notes=history.notes)
    if path.suffix.lower() == ".npz":
        table = read_trace(path, key=key)
        if table.ndim == 1:
            table = table[:, None]
        if table.ndim != 2 or not table.size:
            raise InvalidSetting(f"The array in {path.name} has shape {table.shape}, and must have (rounds, workers).")
        return _of_measured(measured_rounds(path.name, table), n, compute_share, unit, a_megabyte, moved)
    if is_table(path):
        return _of_measured(read_measured(path), n, compute_share, unit, a_megabyte, moved)
    if source not in POPULATIONS:
        known = ", ".join(POPULATIONS)
        why = " Save the sheet as CSV." if path.suffix.lower() in (".xlsx", ".xls", ".ods") else _of_text(path)
        if meant := get_close_matches(source, POPULATIONS, n=1):
            why = f" Did you mean {meant[0]}?"
        raise InvalidSetting(
            f"{printable(repr(source))} is neither a law ({known}) nor a .csv, .tsv, .npz or .jsonl file; choose a law "
            f"or name a file.{why}"
        )
    split = Split(DEFAULT_SHARE, "assumed") if compute_share is None else Split(compute_share, "given")
    latency = named(source, split.share)
    if link is not None:
        latency = Latency(latency.fixed, latency.compute, a_megabyte, latency.evaluation, latency.slowdown)
    return Source(latency, None, f"law {source}", split)


def _of_text(path: Path) -> str:
    """Returns what to do with a text file of another name, such as a log."""
    if path.suffix.lower() not in (".txt", ".log", ".out") or not path.is_file():
        return ""
    return (
        " Flower's logs do not say how long each client took: run with GradientCoding(strategy, uncoded(n), "
        "ledger=path), which trains as before, and give that ledger. A table in a text file needs the ending .csv."
    )


def _of_measured(
    measured: Measured, n: int | None, share: float | None, unit: str | None, a_megabyte: float, moved: float
) -> Source:
    if unit is not None and measured.unit not in (None, UNITS[unit]):
        raise InvalidSetting(
            f"--unit {unit}, but the column of times in {measured.name} is named after another unit; leave --unit out, "
            "or rename the column."
        )
    scale = UNITS[unit] if unit is not None else measured.unit or 1.0
    jobs, name = measured.jobs, measured.name
    if scale != 1.0:
        jobs = replace(jobs, seconds=jobs.seconds * scale, computing=jobs.computing * scale)
    notes = measured.notes if unit is not None or scale == 1.0 else (*measured.notes, f"unit: {scale:g} s")
    _check_scale(name, jobs.seconds)
    if measured.sample:
        return _of_sample(name, jobs.seconds[:, None], n, share, a_megabyte, moved, notes)
    rounds = len(np.unique(jobs.round))
    by_job = rounds * jobs.n != len(jobs.seconds)
    told = f"{name}: {rounds} round{'s' if rounds > 1 else ''} of {jobs.n} workers"
    told += f", {len(jobs.seconds)} jobs" if by_job else ""
    names = measured.workers
    if names and tuple(names) != tuple(map(str, range(jobs.n))):
        told += f" ({printable(listed(names, 4), 200)} are 0, 1, ... here)"
    else:
        names = ()
    return _of_jobs(told, jobs, share, a_megabyte, moved, names=names, notes=notes)


def _of_jobs(
    told: str, jobs: Jobs, share: float | None, a_megabyte: float, moved: float, *,
    names: tuple[str, ...] = (), notes: tuple[str, ...] = (),
) -> Source:  # fmt: skip
    split = split_of(jobs, given=share)
    tables = job_tables(jobs, split)
    fixed, compute = tables.fixed, tables.compute
    rounds = len(fixed)
    if tables.missing:
        notes = (
            *notes,
            f"{tables.missing} of {fixed.size} times are missing, and the worker's next time is used instead",
        )
    for worker, last in tables.stopped:
        who = printable(names[worker], 40) if names else str(worker)
        notes = (
            *notes,
            f"worker {who} stopped answering after round {last}; it is planned with its last time, but waiting for all "
            "would never end if it is gone",
        )
    for worker, first in tables.late:
        who = printable(names[worker], 40) if names else str(worker)
        notes = (*notes, f"worker {who} answered in round {first} first; before, it is planned with its first time")
    middle, usual = float(np.median(fixed)), float(np.median(fixed + compute))
    _check_transfer(told, moved, middle)
    # The transfer is a share of the part that does not grow with the shards, since a slow moment slows it down as well.
    pace = fixed / middle if middle > 0 else (fixed + compute) / usual if usual > 0 else np.ones_like(fixed)
    latency = Latency(
        fixed=replay(fixed * (1 - moved / middle) if moved else fixed, name="fixed"),
        compute=replay(compute, name="compute"),
        transfer=replay(a_megabyte * pace, name="transfer") if a_megabyte else 0.0,
    )
    return Source(latency, jobs.n, told, split, names, rounds, notes, _fits(fixed + compute))


def _of_sample(
    name: str, table: NDArray[np.float64], n: int | None, given: float | None, a_megabyte: float, moved: float,
    notes: tuple[str, ...],
) -> Source:  # fmt: skip
    if n is None:
        raise InvalidSetting(
            f"The trace {name} has one column, a sample for all workers: say how many, with --workers."
        )
    split = Split(DEFAULT_SHARE, "assumed") if given is None else Split(given, "given")
    told, share, middle = f"{name}: {len(table)} times", split.share, float(np.median(table))
    _check_transfer(told, moved, (1 - share) * middle)
    latency = Latency(
        fixed=max(0.0, 1 - share - moved / middle),
        compute=share,
        transfer=a_megabyte / middle,
        slowdown=trace(table, name=name),
    )
    return Source(latency, None, told, split, notes=notes, fits=_fits(table))


def _check_transfer(told: str, moved: float, room: float) -> None:
    if moved > room * (1 + 1e-9):
        raise InvalidSetting(
            f"{told}: half of the times have at most {room:.3g} s that do not grow with the shards, but transferring "
            f"the model takes {moved:.3g} s at this bandwidth. If the times are without the transfer, say "
            "--add-transfer."
        )


def _check_scale(name: str, times: NDArray[np.float64]) -> None:
    middle = float(np.median(times))
    if middle > _LONGEST:
        raise InvalidSetting(
            f"Half of the times in {name} are above {middle:,.0f} s, more than a day: if they are milliseconds or "
            "microseconds, say --unit ms or --unit us."
        )
    if middle < _SHORTEST:
        raise InvalidSetting(
            f"Half of the times in {name} are below {_SHORTEST:g} s: no job is that short. Check --unit."
        )


def _fits(table: NDArray[np.float64]) -> tuple[Fit, ...]:
    if table.size > _MOST_FITTED and len(table) > 100:
        table = table[np.linspace(0, len(table) - 1, max(100, _MOST_FITTED // table.shape[1])).astype(int)]
    try:
        return tuple(fit(table))
    except InvalidSetting:
        return ()  # too few times, or all alike
