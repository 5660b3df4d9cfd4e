"""What `fl-gradcode plan` reads: a named law, a table of measured times, or the ledger of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._text import listed, printable
from ..errors import InvalidSetting
from ..latency import POPULATIONS, Fit, Latency, checked_times, fit, named, read_table, read_trace, replay, trace
from ..runlog import History, Ledger, Timing

__all__ = ["UNITS", "Source", "read_source"]

#: Name of a unit of time -> its seconds.
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_LONGEST, _SHORTEST = 86_400.0, 1e-6  # bounds of the median job's seconds: outside, the unit is wrong
_DEFAULT_SHARE = 0.8
_MOST = 1e15  # of a number in a table: of seconds, workers, rounds or shards
_COLUMNS = ("worker", "seconds", "round", "shards", "computing")


@dataclass(frozen=True)
class Source:
    """A latency, and the number of workers that it is for.

    Attributes:
        latency: How long a job takes.
        n: Number of workers; None if the source does not say.
        told: What was read, in one line.
        fits: Laws fitted to measured times, best first; empty for a named law.
    """

    latency: Latency
    n: int | None
    told: str
    fits: tuple[Fit, ...] = ()


def read_source(
    source: str,
    *,
    n: int | None = None,
    compute_share: float | None = None,
    model_megabytes: float = 0.0,
    link: float | None = None,
    unit: str = "s",
    key: str | None = None,
    transfer_included: bool = True,
) -> Source:
    """Returns the latency that a name or a file stands for.

    A .csv file holds one of two tables:

    * *Jobs*: one row for each job. The header has `worker` and `seconds` and may have `round`, `shards` (1 if missing)
      and `computing`, the part of the seconds that grows with the shards.
    * *Rounds*: one row for each round and one column for each worker, with or without a header. Each number is the time
      for one shard. A single column is a sample for all workers.

    An .npz file holds a table of rounds under `key`. A .jsonl file is a ledger.

    Args:
        source: A name in `POPULATIONS`, or a path.
        n: Number of workers. Tables with one column need it.
        compute_share: Share of a time that grows with the shards; 0.8 if None. What jobs and ledgers say themselves
            takes precedence.
        model_megabytes: Size of the model, in MB.
        link: Network bandwidth in Mbit/s each way.
        transfer_included: Whether measured times contain the transfer. If so, it is taken out of the part that does
            not grow with the shards. Otherwise it is added, as for a named law.
        unit: Unit of a table's times: s, ms or us.
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
    if unit not in UNITS:
        raise InvalidSetting(f"The unit {unit!r} is not known; choose one of {', '.join(UNITS)}.")
    a_megabyte = 0.0 if link is None else 8.0 / link
    moved = 2 * a_megabyte * model_megabytes if transfer_included else 0.0  # seconds of transfer in a measured time
    share = _DEFAULT_SHARE if compute_share is None else compute_share
    path = Path(source)
    if path.suffix == ".jsonl":
        history = History.of_ledger(Ledger.read_rounds(path))
        told = f"{path.name}: {history.rounds} rounds of {history.n} workers"
        return _of_history(history, told, a_megabyte, moved)
    if path.suffix in (".csv", ".npz"):
        if path.suffix == ".csv":
            header, rows = read_table(path)
            if "worker" in header or ("seconds" in header and len(header) > 1) or "round" in header:
                history, told = _jobs(path.name, header, rows, UNITS[unit], compute_share)
                return _of_history(history, told, a_megabyte, moved)
        table = checked_times(read_trace(path, key=key)) * UNITS[unit]
        return _of_table(path.name, table, n, share, a_megabyte, moved)
    if source not in POPULATIONS:
        known = ", ".join(POPULATIONS)
        raise InvalidSetting(
            f"{source!r} is neither a law ({known}) nor a .csv, .npz or .jsonl file; choose a law or name a file."
        )
    latency = named(source, share)
    if link is not None:
        latency = Latency(latency.fixed, latency.compute, a_megabyte, latency.evaluation, latency.slowdown)
    return Source(latency, None, f"law {source}")


def _jobs(
    name: str, header: list[str], rows: list[list[str]], unit: float, compute_share: float | None
) -> tuple[History, str]:
    """Returns the times in a table of jobs, and one line that describes them."""
    missing = [column for column in ("worker", "seconds") if column not in header]
    if missing:
        raise InvalidSetting(
            f"The trace {name} has columns {printable(', '.join(header), 200)} and lacks {' and '.join(missing)}: a "
            "table of jobs needs worker and seconds, and may have round, shards and computing."
        )
    place = {column: header.index(column) for column in _COLUMNS if column in header}
    jobs: list[Timing] = []
    seen: dict[int, int] = {}
    for number, row in enumerate(rows, 2):
        values = {column: _number(name, number, column, row, at) for column, at in place.items()}
        worker = int(values["worker"])
        if worker != values["worker"]:
            raise InvalidSetting(
                f"The trace {name} has worker {values['worker']:g} in line {number}; workers are whole."
            )
        seen[worker] = seen.get(worker, 0) + 1
        seconds = values["seconds"] * unit
        computing = values["computing"] * unit if "computing" in values else None
        if computing is None and compute_share is not None:
            shards = values.get("shards", 1.0)
            computing = seconds * compute_share * shards / (1 - compute_share + compute_share * shards)
        round_number = int(values.get("round", seen[worker]))
        jobs.append(Timing(round_number, worker, values.get("shards", 1.0), seconds, computing))
    _check_scale(name, np.array([one.seconds for one in jobs]))
    # Workers may be named by ids, or from 1. A number that is not in the file gets no worker.
    numbers = {worker: i for i, worker in enumerate(sorted(seen))}
    history = History(len(numbers))
    history.add(replace(one, worker=numbers[one.worker]) for one in jobs)
    told = f"{name}: {len(rows)} jobs of {history.n} workers"
    return history, told if max(seen) < len(seen) else f"{told} ({listed(numbers, 4)} are 0, 1, ... here)"


def _number(name: str, number: int, column: str, row: list[str], at: int) -> float:
    text = row[at] if at < len(row) else ""
    try:
        value = float(text)
    except ValueError:
        raise InvalidSetting(
            f"The trace {name} has {printable(text)!r} as {column} in line {number}; it must be a number."
        ) from None
    if not 0 <= value <= _MOST:
        bounds = "at least 0" if not value > 0 else f"at most {_MOST:g}"
        raise InvalidSetting(f"The trace {name} has {column} {value:g} in line {number}; it must be {bounds}.")
    return value


def _of_history(history: History, told: str, a_megabyte: float, moved: float) -> Source:
    fixed, compute = history.tables()
    _check_transfer(told, moved, float(np.median(fixed)))
    latency = Latency(
        fixed=replay(np.maximum(0.0, fixed - moved), name="fixed"),
        compute=replay(compute, name="compute"),
        transfer=a_megabyte,
    )
    return Source(latency, history.n, told, _fits(fixed + compute))


def _of_table(
    name: str, table: NDArray[np.float64], n: int | None, share: float, a_megabyte: float, moved: float
) -> Source:
    _check_scale(name, table)
    rounds, workers = table.shape
    if workers == 1 and n is None:
        raise InvalidSetting(
            f"The trace {name} has one column, a sample for all workers: say how many, with --workers."
        )
    told = f"{name}: {rounds} times" if workers == 1 else f"{name}: {rounds} rounds of {workers} workers"
    middle = float(np.median(table))
    _check_transfer(told, moved, (1 - share) * middle)
    # The parts are shares of the median time, since a slow moment slows the transfer down as well.
    latency = Latency(
        fixed=max(0.0, 1 - share - moved / middle),
        compute=share,
        transfer=a_megabyte / middle,
        slowdown=trace(table, name=name) if workers == 1 else replay(table, name=name),
    )
    return Source(latency, None if workers == 1 else workers, told, _fits(table))


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
    try:
        return tuple(fit(table))
    except InvalidSetting:
        return ()  # too few times, or all alike
