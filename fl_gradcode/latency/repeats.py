"""Rows of a table of jobs that are no job of their own: failed, written twice, of another run, or a part of a job."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .._text import listed, printable
from ..errors import InvalidSetting
from .column_names import Heading, is_time_of_day
from .doubts import column_of
from .sheets import MISSING, Sheet, is_number

__all__ = ["by_clock", "failed", "rounds_of_runs", "same_jobs", "training", "varying_examples"]

_STATES = frozenset({"status", "state", "outcome", "result"})  # whose numbers are codes, and not understood
_SUCCESS = frozenset({"success", "successful", "succeeded", "ok", "answered", "completed", "finished", "returned"})
_FAILURE = frozenset({"failed", "failure", "fail", "error", "timeout", "timedout", "dropped", "cancelled", "crashed"})
_BAD = frozenset(
    {"failed", "fail", "failure", "error", "timeout", "timedout", "timed out", "dropped", "cancelled", "canceled",
     "aborted", "killed", "lost", "crashed", "disconnected", "unavailable", "no answer", "no reply", "missing"}
)  # fmt: skip
_RUNS = frozenset(
    {"run", "runid", "runname", "runnumber", "experiment", "experimentid", "exp", "trial", "seed", "repetition", "rep",
     "repeat", "replicate", "session", "fold"}
)  # fmt: skip
_EXAMPLES = frozenset(
    {"numexamples", "nexamples", "examples", "samples", "numsamples", "nsamples", "batches", "numbatches", "datasize",
     "datapoints", "records"}
)  # fmt: skip
_PHASES = frozenset({"kind", "phase", "type", "task", "stage", "event", "messagetype", "method", "operation", "op"})
_PARTS_OF_JOBS = frozenset({"upload", "download", "communication", "comm", "transfer", "send", "receive"})
_TRAINING = frozenset({"train", "fit", "training", "trained", "fitres", "fitins"})
_VARY = 1.5  # times as many examples in one job of a worker as in another that are worth a word

Integers = NDArray[np.int64]


def training(sheet: Sheet, headings: list[Heading], unused: list[int], notes: list[str]) -> tuple[Sheet, list[int]]:
    """Returns the rows of training, and the columns that are still not used."""
    for at in [at for at in unused if headings[at].plain in _PHASES]:
        kinds = [row[at].strip().lower() for row in sheet.rows]
        trained = [kind in _TRAINING for kind in kinds]
        if any(trained) and not all(trained):
            if parts := {*kinds} & _PARTS_OF_JOBS:
                raise InvalidSetting(
                    f"The trace {sheet.name} has {printable(listed(sorted(parts), 4))} in {column_of(sheet, at)}, "
                    "beside training: add up what passes from the message to the reply, so that each job is one row."
                )
            notes.append(f"{trained.count(False)} jobs that are no training are left out")
            sheet = replace(
                sheet,
                rows=[row for row, use in zip(sheet.rows, trained, strict=True) if use],
                lines=[line for line, use in zip(sheet.lines, trained, strict=True) if use],
            )
            unused = [other for other in unused if other != at]
    return sheet, unused


def failed(
    sheet: Sheet, headings: Sequence[Heading], rows: Sequence[Sequence[str]], unused: list[int], notes: list[str]
) -> NDArray[np.bool_]:
    """Returns which jobs failed by a column of states, shape (jobs,); it is then no longer unused, and noted."""
    lost = np.zeros(len(sheet.rows), dtype=bool)
    for at in list(unused):
        plain = headings[at].plain
        if plain not in _STATES | _SUCCESS | _FAILURE:
            continue
        cells = [cell.strip().lower() for cell in rows[at]]
        if plain in _STATES:
            cells = [cell.rpartition(".")[2] for cell in cells]  # Code.OK
            bad = [cell in _BAD for cell in cells]
        elif plain in _SUCCESS:
            bad = [cell in _BAD or cell in ("false", "no", "0", "n") for cell in cells]
        else:
            if any(is_number(cell) and cell not in ("0", "1", "nan") for cell in cells):
                continue  # a limit of time, or a measure
            good = ("false", "no", "0", "n", "ok") if plain != "error" else ("false", "no", "0", "n", "ok", "none")
            bad = [cell not in good and cell not in MISSING - _BAD for cell in cells]
        if any(bad):
            lost |= np.array(bad)
            unused.remove(at)
            number = sum(bad)
            notes.append(
                f"{number} job{'s' if number > 1 else ''} failed by {column_of(sheet, at)}, and count as without a time"
            )
    return lost


def rounds_of_runs(
    sheet: Sheet,
    headings: Sequence[Heading],
    rows: Sequence[Sequence[str]],
    unused: list[int],
    worker: Integers,
    rounds: Integers,
    names: Sequence[str],
    notes: list[str],
) -> Integers:
    """Returns each job's round, numbered on where the table has several runs, shape (jobs,).

    Raises:
        InvalidSetting: Each run has workers of its own.
    """
    columns = [at for at in unused if headings[at].plain in _RUNS and len({*rows[at]}) > 1]
    if not columns:
        return rounds
    keys = [tuple(cells) for cells in zip(*(rows[at] for at in columns), strict=True)]
    order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    run = np.array([order[key] for key in keys], dtype=np.int64)
    at = columns[0]
    if (
        len(np.unique(_key(worker, run))) == len(names)
        and len(order) > 1
        and _repeat(run, rounds)
        and len(names) > len(order)
    ):
        runs = listed([repr(rows[at][int(np.flatnonzero(run == place)[0])]) for place in range(len(order))], 3)
        raise InvalidSetting(
            f"The trace {sheet.name} has runs {printable(runs, 60)} in {column_of(sheet, at)}, and each worker is in "
            "one of them only: give the rows of one run, or call each machine by one name."
        )
    if not _repeated(worker, rounds).any() or _repeated(worker, rounds, run).all():
        return rounds
    unused[:] = [other for other in unused if other not in columns]
    notes.append(f"{len(order)} runs by {column_of(sheet, at)}: their rounds follow one another")
    return _key(run, rounds) + 1


def _repeat(run: Integers, rounds: Integers) -> bool:
    """Returns whether several runs have rounds of the same numbers."""
    pairs = np.unique(_key(run, rounds))
    return len(pairs) > len(np.unique(rounds))


def _key(*columns: Integers) -> Integers:
    """Returns a number for each row that is the same for rows with the same numbers only, shape (rows,)."""
    key = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, place = np.unique(column, return_inverse=True)
        key = np.unique(key * len(values) + place.reshape(-1), return_inverse=True)[1].reshape(-1)
    return key


def _repeated(*columns: Integers) -> NDArray[np.bool_]:
    """Returns which rows have the same numbers as another one, shape (rows,)."""
    key = _key(*columns)
    return np.asarray(np.bincount(key)[key] > 1)


def same_jobs(
    sheet: Sheet, rows: Sequence[Sequence[str]], unused: Sequence[int], worker: Integers, rounds: Integers,
    names: Sequence[str], notes: list[str],
) -> NDArray[np.bool_]:  # fmt: skip
    """Returns which rows are the same as an earlier one in each cell, shape (jobs,).

    It notes them, and workers with several other jobs in a round, which count with their mean.

    Raises:
        InvalidSetting: A column has the same values for the jobs of each worker and round, as a column of epochs has:
            then a row is a part of a job, or of another kind.
    """
    again = np.zeros(len(sheet.rows), dtype=bool)
    repeated = np.flatnonzero(_repeated(worker, rounds))
    seen: set[tuple[str, ...]] = set()
    groups: dict[tuple[int, int], list[int]] = {}
    for row in map(int, repeated):
        cells = tuple(sheet.rows[row])
        again[row] = cells in seen
        if not again[row]:
            seen.add(cells)
            groups.setdefault((int(worker[row]), int(rounds[row])), []).append(row)
    if again.any():
        notes.append(
            f"{again.sum()} row{'s are' if again.sum() > 1 else ' is'} the same as an earlier one, and left out"
        )
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    for at in unused:
        values = {tuple(sorted(rows[at][row] for row in group)) for group in groups.values()}
        if len(groups) > 1 and len(values) == 1 and len({*next(iter(values))}) > 1:
            (who, _), (first, second, *_) = next(iter(groups.items()))
            raise InvalidSetting(
                f"The trace {sheet.name} has lines {sheet.lines[first]} and {sheet.lines[second]} of worker "
                f"{printable(names[who], 40)} in one round, which differ in {column_of(sheet, at)}: keep the rows of "
                "one kind, or add up the seconds of the parts of a job, so that each job is one row."
            )
    if groups:
        times = f"{len(groups)} times" if len(groups) > 1 else "once"
        notes.append(f"{times} a worker has several jobs in a round, which count with their mean")
    return again


def by_clock(sheet: Sheet, rows: Sequence[Sequence[str]], unused: list[int], notes: list[str]) -> Integers | None:
    """Returns the order of the rows by a column that tells the time, shape (jobs,); None if it is that of the file."""
    for at in unused:
        cells = rows[at]
        if all(re.match(r"\d{4}-\d\d-\d\d.\d\d:\d\d", cell) for cell in cells) and len({*map(len, cells)}) == 1:
            order = np.argsort(np.array(cells), kind="stable")
        elif is_number(cells[0]) and is_time_of_day(float(cells[0])) and all(map(is_number, cells)):
            order = np.argsort(np.array(cells, dtype=np.float64), kind="stable")
        else:
            continue
        if (np.diff(order) > 0).all():
            return None
        unused.remove(at)
        notes.append(f"rows are in the order of {column_of(sheet, at)}")
        return order
    return None


def varying_examples(
    sheet: Sheet, headings: Sequence[Heading], rows: Sequence[Sequence[str]], unused: Sequence[int], worker: Integers
) -> list[str]:
    """Returns a note of a column of examples that differ among the jobs of a worker: their times differ as well."""
    for at in unused:
        if headings[at].plain not in _EXAMPLES or not all(map(is_number, rows[at])):
            continue
        values = np.array(rows[at], dtype=np.float64)
        order = np.lexsort((values, worker))
        start = np.flatnonzero(np.diff(worker[order], prepend=-1))
        low, high = values[order][start], values[order][[*(start[1:] - 1), -1]]
        if ((low > 0) & (high >= _VARY * low)).any():
            return [
                f"{column_of(sheet, at)} differs among the jobs of a worker, and its times are taken as of one shard "
                "each: if it is their load, give a column shards"
            ]
    return []
