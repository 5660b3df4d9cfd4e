"""Tables of measured times as people export them: which column is what, and which job has no time.

A table is one of *jobs*, with a column of workers and one of seconds, or of *rounds*, with a column for each worker.
Whatever else is in it is named and left out, or refused in one sentence: a column that counts up or tells the time is
no worker.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._text import listed, printable
from ..errors import InvalidSetting
from .column_names import (
    Heading,
    have_one_form,
    heading_of,
    is_time_of_day,
    not_a_worker,
    numbers_rows,
    odd_one_out,
    unit_of,
)
from .doubts import (
    column_of,
    refuse_clocks,
    refuse_durations,
    refuse_grouped,
    refuse_jobs_without_names,
    refuse_labels,
    refuse_no_times,
    refuse_parts,
    refuse_round_times,
    refuse_rounds_as_columns,
    refuse_shards,
    refuse_split_decimals,
    refuse_texts,
    refuse_totals_of_workers,
)
from .jobs import Jobs
from .repeats import by_clock, failed, rounds_of_runs, same_jobs, training, varying_examples
from .sheets import MISSING, Sheet, is_number, number_of, read_sheet

__all__ = ["Measured", "measured_rounds", "read_measured"]

_MOST = 1e15  # of seconds, rounds and shards: more is no measured number, and overflows in sums of squares
_FEW = 10  # rows from which on a column that only grows is no coincidence
_UNIT_COLUMNS = frozenset({"unit", "units", "timeunit", "einheit", "unite", "unidad"})

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """The times in a file.

    Attributes:
        name: Name of the file.
        jobs: The jobs that have a time; those without are left out.
        workers: Name of each worker, as the file has it; empty if it has none.
        sample: Whether the file is one column of times, a sample for all workers.
        unit: Seconds of the unit that a column's name says; None if none says one.
        notes: What was read in a way that a user may want to know, in words.
    """

    name: str
    jobs: Jobs
    workers: tuple[str, ...]
    sample: bool
    unit: float | None
    notes: tuple[str, ...]

    def rounds_table(self) -> Array:
        """Returns the seconds of one shard as a table, shape (rounds, workers).

        Raises:
            InvalidSetting: A worker has no time in a round, or several.
        """
        jobs = self.jobs
        rounds, place = np.unique(jobs.round, return_inverse=True)
        full = len(rounds) * jobs.n == len(jobs.seconds)
        at = place * jobs.n + jobs.worker
        if not full or len(np.unique(at)) < len(at):
            at = np.setdiff1d(np.arange(len(rounds) * jobs.n), at)
            where = f": round {rounds[at[0] // jobs.n]}, worker {at[0] % jobs.n} has none" if len(at) else ""
            raise InvalidSetting(f"The trace {self.name} lacks times{where}; each worker needs one in each round.")
        table = np.empty(len(at))
        table[at] = jobs.seconds * (self.unit or 1.0)
        return table.reshape(len(rounds), jobs.n)


def read_measured(path: str | Path) -> Measured:
    """Returns the times in a .csv or .tsv file, in the unit of the file.

    Raises:
        InvalidSetting: The file cannot be read, or not be understood. The sentence names the file, and the line, column
            and value where one is to blame.
    """
    with _no_garbage_collected():
        sheet = read_sheet(path)
        headings = [heading_of(name) for name in sheet.header]
        words = {heading.meaning for heading in headings}
        if headings and (
            "worker" in words or ("seconds" in words and len(headings) > 1 and not _wide(sheet, headings))
        ):
            return _of_jobs(sheet, headings)
        return _of_rounds(sheet, headings)


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Pauses the collection of garbage: with a million rows in memory, to look for it takes as long as to read them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measured_rounds(name: str, table: Array, workers: Sequence[str] = (), notes: Sequence[str] = ()) -> Measured:
    """Returns the times of a table of rounds, shape (rounds, workers), in which NaN and 0 stand for no time.

    Raises:
        InvalidSetting: A time is negative or absurdly large, or there is none.
    """
    n = table.shape[1]
    bad = np.argwhere((table < 0) | (table > _MOST) & (table < math.inf))
    if len(bad):
        row, column = (int(x) for x in bad[0])
        bound = "at least 0, or NaN if the job never came back" if table[row, column] < 0 else f"at most {_MOST:g}"
        raise InvalidSetting(
            f"The trace {name} has {table[row, column]} at row {row}, column {column}; it must be {bound}."
        )
    there = np.isfinite(table) & (table > 0)
    _refuse_growing(name, table)
    if not there.any():
        raise InvalidSetting(f"The trace {name} has no time above 0, and no job is that short.")
    rounds, worker = np.nonzero(there)
    seconds = table[there]
    jobs = Jobs(n, rounds + 1, worker, np.ones(len(seconds)), seconds, np.full(len(seconds), np.nan))
    zeros = table == 0
    told = [*notes, *_said_of_zeros(zeros.sum(axis=0), workers)]
    silent = np.flatnonzero(~there.any(axis=0))
    if len(silent):
        who = listed([_called(int(i), workers) for i in silent], 4)
        raise InvalidSetting(f"The trace {name} has no time above 0 of worker {who}: leave the column out.")
    return Measured(name, jobs, tuple(workers), n == 1, None, tuple(told))


def _refuse_growing(name: str, table: Array) -> None:
    """Refuses columns of an array that count rounds, add up, or tell when."""
    if len(table) < _FEW:
        return
    for column, values in enumerate(table.T):
        if (np.diff(values) > 0).all() or is_time_of_day(float(values[0])):
            raise InvalidSetting(
                f"The trace {name} has column {column}, which only grows or tells when ({values[0]:.10g}, "
                f"{values[1]:.10g}, ...): give how long each job took, and leave a column of rounds out."
            )


def _said_of_zeros(zeros: NDArray[np.int64], workers: Sequence[str]) -> list[str]:
    if not zeros.any():
        return []
    who = listed([_called(int(i), workers) for i in np.flatnonzero(zeros)], 4)
    number = int(zeros.sum())
    what = "1 time of 0 s is" if number == 1 else f"{number} times of 0 s are"
    return [f"{what} taken as failed (worker {who})"]


def _called(worker: int, names: Sequence[str]) -> str:
    return printable(names[worker], 40) if names else str(worker)


# Tables of jobs


def _of_jobs(sheet: Sheet, headings: list[Heading]) -> Measured:
    place, unused = _columns_of_jobs(sheet, headings)
    notes = list(sheet.notes)
    renamed = [f"{printable(sheet.header[at], 40)} is {word}" for word, at in place.items() if sheet.header[at] != word]
    if renamed:
        notes.append("columns: " + ", ".join(renamed))
    sheet, unused = training(sheet, headings, unused, notes)
    rows = list(zip(*sheet.rows, strict=True))
    lost = failed(sheet, headings, rows, unused, notes)
    unit = _unit_of_jobs(sheet, headings, rows, place["seconds"], unused)
    refuse_parts(sheet, headings, place["seconds"], unused)
    refuse_totals_of_workers(sheet, place["worker"], rows[place["worker"]])
    values = {}
    for word, at in place.items():
        if word != "worker":
            values[word] = _numbers(sheet, rows[at], at, missing=word in ("seconds", "computing"))
    refuse_grouped(sheet, rows[place["seconds"]], place["seconds"], unit)
    seconds = np.where(lost, np.nan, values["seconds"])
    lines = np.array(sheet.lines)
    refuse_clocks(sheet, place["seconds"], seconds, values.get("round"), unit)
    names, worker = _workers(sheet, rows[place["worker"]], place["worker"])
    again = np.zeros(len(worker), dtype=bool)
    if "round" in values:
        whole = values["round"] % 1 == 0
        if not whole.all():
            at = int(np.flatnonzero(~whole)[0])
            raise InvalidSetting(
                f"The trace {sheet.name} has round {values['round'][at]:g} in line {lines[at]}; rounds are whole."
            )
        rounds = rounds_of_runs(sheet, headings, rows, unused, worker, values["round"].astype(np.int64), names, notes)
        again = same_jobs(sheet, rows, unused, worker, rounds, names, notes)
    else:
        # The first job of each worker is of the first round, and so on; a job without a time counts as well.
        order = by_clock(sheet, rows, unused, notes)
        order = np.argsort(worker, kind="stable") if order is None else order[np.argsort(worker[order], kind="stable")]
        start = np.searchsorted(worker[order], worker[order])
        rounds = np.empty(len(worker), dtype=np.int64)
        rounds[order] = np.arange(len(worker)) - start + 1
        if np.bincount(worker).max() > 1:
            notes.append("no column of rounds: the k-th job of a worker is taken as that of round k")
    if unused:
        notes.append(
            f"not used: {printable(listed([sheet.header[at] or 'a column without a name' for at in unused], 5))}"
        )
    shards = values.get("shards", np.ones(len(seconds)))
    if "shards" in values:
        refuse_shards(sheet, place["shards"], shards, len(names))
    refuse_round_times(
        sheet, place["seconds"], worker, rounds, np.where(seconds > 0, seconds, np.nan), loads=bool(np.ptp(shards) > 0)
    )
    notes += varying_examples(sheet, headings, rows, unused, worker)
    computing = np.full(len(seconds), np.nan)
    if "computing" in values:
        own = headings[place["computing"]].unit
        computing = values["computing"] * ((own or 1.0) / (unit or 1.0) if own != unit and own and unit else 1.0)
    there = np.isfinite(seconds) & (seconds > 0) & ~again
    empty = int(np.isnan(seconds).sum())
    if empty:
        notes.append(f"{empty} of {len(seconds)} jobs have no time: they never came back")
    zeros = np.bincount(worker[seconds == 0], minlength=len(names))
    notes += _said_of_zeros(zeros, names)
    without = there & ~(shards > 0)
    if without.any():
        notes.append(f"{int(without.sum())} jobs of no shards are left out")
        there &= shards > 0
    above = there & (computing > seconds)
    if above.any():
        at = int(np.flatnonzero(above)[0])
        raise InvalidSetting(
            f"The trace {sheet.name} has computing {computing[at]:g} in line {lines[at]}, above its seconds "
            f"{seconds[at]:g}; computing is a part of the seconds."
        )
    if not there.any():
        raise InvalidSetting(f"The trace {sheet.name} has no job with a time above 0, and no job is that short.")
    jobs = Jobs(len(names), rounds[there], worker[there], shards[there], seconds[there], computing[there])
    silent = sorted({*range(len(names))} - {*np.unique(worker[there]).tolist()})
    if silent:
        gone = listed([printable(names[i], 40) for i in silent], 4)
        notes.append(f"no job of worker {gone} has a time: left out")
        new = np.full(len(names), -1)
        new[[i for i in range(len(names)) if i not in set(silent)]] = np.arange(len(names) - len(silent))
        names = [name for i, name in enumerate(names) if i not in set(silent)]
        jobs = replace(jobs, n=len(names), worker=new[jobs.worker])
    return Measured(sheet.name, jobs, tuple(names), False, unit, tuple(notes))


def _unit_of_jobs(
    sheet: Sheet, headings: list[Heading], rows: Sequence[Sequence[str]], at: int, unused: list[int]
) -> float | None:
    """Returns the seconds of the unit that the column's name says, or a column of units."""
    unit = headings[at].unit
    for other in list(unused):
        if headings[other].plain not in _UNIT_COLUMNS:
            continue
        stated = {cell.strip().lower() for cell in rows[other]}
        known = {unit_of(text) for text in stated}
        if known == {None}:
            continue
        unused.remove(other)
        if len(known) > 1 or (unit is not None and known != {unit}):
            raise InvalidSetting(
                f"The trace {sheet.name} has units {printable(listed(sorted(stated), 4), 60)} in "
                f"{column_of(sheet, other)}: give all times in one unit."
            )
        unit = known.pop()
    return unit


def _columns_of_jobs(sheet: Sheet, headings: list[Heading]) -> tuple[dict[str, int], list[int]]:
    """Returns the place of each quantity's column, and the places of columns that mean none."""
    place: dict[str, int] = {}
    for word in ("worker", "seconds", "round", "shards", "computing"):
        found = [(heading.rank, at) for at, heading in enumerate(headings) if heading.meaning == word]
        first = [at for rank, at in found if rank == min(found)[0]]
        if len(first) > 1:
            names = listed([printable(repr(sheet.header[at]), 40) for at in first], 4)
            raise InvalidSetting(
                f"The trace {sheet.name} has columns {names}, each of which may be the {word}: call one of them {word} "
                "and rename the others."
            )
        if first:
            place[word] = first[0]
    missing = [word for word in ("worker", "seconds") if word not in place]
    if "worker" in place and "seconds" in missing:
        refuse_rounds_as_columns(sheet, numbers=True)
    if missing:
        raise InvalidSetting(
            f"The trace {sheet.name} has columns {printable(', '.join(sheet.header), 200)} and lacks "
            f"{' and '.join(missing)}: a table of jobs needs worker and seconds, and may have round, shards and "
            f"computing.{_less(headings)}"
        )
    return place, [at for at in range(len(headings)) if at not in place.values()]


def _less(headings: list[Heading]) -> str:
    """Returns what to do with columns that tell when jobs began and ended."""
    plain = {heading.plain.removesuffix("ms").removesuffix("time") for heading in headings}
    return " Give the end less the start as seconds." if {"start", "end"} <= plain else ""


def _workers(sheet: Sheet, cells: Sequence[str], at: int) -> tuple[list[str], NDArray[np.int64]]:
    """Returns the names of the workers in ascending order, and each job's place among them."""
    unique = sorted({*cells})
    clean = {}
    numeric = all(is_number(cell.strip()) for cell in unique)
    for cell in unique:
        name = cell.strip()
        if name.lower() in MISSING or not name:
            line = sheet.lines[cells.index(cell)]
            raise InvalidSetting(
                f"The trace {sheet.name} has {printable(repr(cell))} as worker in line {line}; name it."
            )
        if numeric and not name.lstrip("+-").isdigit():
            line = sheet.lines[cells.index(cell)]
            if not re.fullmatch(r"\d+\.0*", name):
                why = " Numbers with exponents have lost digits." if "e" in name.lower() else ""
                raise InvalidSetting(
                    f"The trace {sheet.name} has worker {printable(name)} in line {line}; workers are names or whole "
                    f"numbers.{why}"
                )
            name = name.split(".")[0]
            if int(name) > 2**53:
                raise InvalidSetting(
                    f"The trace {sheet.name} has worker {printable(cell.strip())} in line "
                    f"{sheet.lines[cells.index(cell)]}: a number so large has lost digits where it was stored with "
                    "decimals. Export the ids as text."
                )
        clean[cell] = name
    alike: dict[str | int, str] = {}
    for name in sorted({*clean.values()}):
        other = alike.setdefault(int(name) if numeric else name.casefold(), name)
        if other != name:
            first, second = sorted((other, name))
            raise InvalidSetting(
                f"The trace {sheet.name} has workers {printable(repr(first), 40)} and {printable(repr(second), 40)} in "
                f"{column_of(sheet, at)}: write each worker's name in one way."
            )
    names = sorted({*clean.values()}, key=int if numeric else _natural)
    if len(names) > 100_000:
        raise InvalidSetting(
            f"The trace {sheet.name} has {len(names)} workers in column {at + 1}; is it a count of jobs?"
        )
    number = {name: i for i, name in enumerate(names)}
    lookup = {cell: number[name] for cell, name in clean.items()}
    return names, np.fromiter((lookup[cell] for cell in cells), dtype=np.int64, count=len(cells))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Returns a key that sorts w9 before w10."""
    return [
        (0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in re.findall(r"[0-9]+|[^0-9]+", name)
    ]


def _numbers(sheet: Sheet, cells: Sequence[str], at: int, *, missing: bool) -> Array:
    """Returns a column's numbers; NaN where a cell has none and `missing` allows it."""
    try:
        if sheet.decimal_comma:
            raise ValueError
        values = np.array(cells, dtype=np.float64)
    except ValueError:
        values = np.array([_number(sheet, row, cell, at, missing) for row, cell in enumerate(cells)])
    values = np.where(np.isposinf(values), np.nan, values) if missing else values
    wrong = ~((values >= 0) & (values <= _MOST)) & ~(np.isnan(values) if missing else np.zeros(len(values), dtype=bool))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        bounds = f"at most {_MOST:g}" if values[row] > _MOST else "at least 0"
        bounds += ", or empty if the job never came back" if missing and values[row] < 0 else ""
        raise InvalidSetting(
            f"The trace {sheet.name} has {_column(sheet, at)} {values[row]:g} in line {sheet.lines[row]}; it must be "
            f"{bounds}."
        )
    return values


def _number(sheet: Sheet, row: int, cell: str, at: int, missing: bool) -> float:
    text = cell.strip()
    if missing and text.lower() in MISSING:
        return math.nan
    try:
        return number_of(text, decimal_comma=sheet.decimal_comma)
    except ValueError:
        empty = ", or empty if the job never came back" if missing else ""
        raise InvalidSetting(
            f"The trace {sheet.name} has {printable(repr(text))} as {_column(sheet, at)} in line {sheet.lines[row]}; "
            f"it must be a number{empty}."
        ) from None


def _column(sheet: Sheet, at: int) -> str:
    if not sheet.header:
        return f"column {at + 1}"
    name = sheet.header[at]
    return printable(heading_of(name).meaning or (name if name else f"column {at + 1}"), 40)


# Tables of rounds


def _wide(sheet: Sheet, headings: list[Heading]) -> bool:
    """Returns whether a column called time stands beside columns of workers, and is a clock."""
    seconds = [heading for heading in headings if heading.meaning == "seconds"]
    others = [at for at, heading in enumerate(headings) if not heading.meaning and not not_a_worker(heading.plain)]
    clocks = all(heading.plain in ("time", "elapsed") for heading in seconds)
    return len(others) > 1 and (clocks or have_one_form([sheet.header[at] for at in others]))


def _of_rounds(sheet: Sheet, headings: list[Heading]) -> Measured:
    notes = list(sheet.notes)
    columns = list(zip(*sheet.rows, strict=True))
    width = len(columns)
    if not headings and width > 1:
        refuse_split_decimals(sheet)
    refuse_rounds_as_columns(sheet)
    words = headings or [heading_of("")] * width
    left: list[int] = []
    single = width == 1
    for at, heading in enumerate(words):
        named = bool(headings) and not single and not_a_worker(heading.plain)
        clock = bool(headings) and not single and heading.meaning == "seconds"
        dates = not single and _is_dates(columns[at])
        extreme = bool(headings) and re.sub("__(MIN|MAX)$", "", sheet.header[at]) in {*sheet.header} - {
            sheet.header[at]
        }
        if dates and not (named or clock) and (at > 0 or have_one_form(sheet.header[:2])):
            refuse_durations(sheet, at, columns[at])
        if named and not dates and numbers_rows(heading.plain):
            refuse_labels(sheet, at, columns[at])
        if named or clock or dates or extreme:
            left.append(at)
        elif headings:
            refuse_texts(sheet, at, columns[at])
    values: dict[int, Array] = {
        at: _numbers(sheet, columns[at], at, missing=True) for at in range(width) if at not in left
    }
    for at, column in list(values.items()):
        if len(values) > 1 and _counts_up(column, other=[values[i] for i in values if i != at], sheet=sheet, at=at):
            left.append(at)
            del values[at]
    if not values:
        raise InvalidSetting(
            f"The trace {sheet.name} has columns {printable(', '.join(sheet.header), 200)}, and none of them is a "
            "worker's: give one column for each worker, or a table of jobs with worker and seconds."
        )
    refuse_jobs_without_names(sheet, columns, left, values)
    for at in _summaries(sheet, values):
        left.append(at)
        del values[at]
    names = [sheet.header[at] for at in values] if sheet.header else []
    odd = odd_one_out(names) if len(names) > 1 else None
    if odd is not None:
        raise InvalidSetting(
            f"The trace {sheet.name} has a column {printable(repr(odd[0]), 40)} beside {printable(odd[1], 40)} and "
            "others of that form: if it is a worker, name it likewise; otherwise leave it out."
        )
    refuse_no_times(sheet, columns, values)
    if left:
        others = listed([column_of(sheet, at) for at in sorted(left)], 5)
        notes.append(f"no worker: {others} (counts rounds, tells the time or sums up)")
    unit = None
    if len(values) > 1 and len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidSetting(f"The trace {sheet.name} has two columns called {printable(repr(twice), 40)}.")
    if len(values) == 1:
        at = next(iter(values))
        unit = words[at].unit
        times = values[at]
        refuse_clocks(sheet, at, times, None, unit)
        missing = int(np.isnan(times).sum())
        if missing:
            notes.append(f"{missing} of {len(times)} cells are empty and left out")
        one = measured_rounds(sheet.name, times[~np.isnan(times)][:, None], (), notes)
        return replace(one, unit=unit)
    table = np.stack(list(values.values()), axis=1)
    empty = int(np.isnan(table).sum())
    if empty:
        notes.append(f"{empty} of {table.size} cells have no time: those jobs never came back")
    units = {words[at].unit: at for at in values} if headings else {None: 0}
    if len(units) > 1:
        first, second, *_ = units.values()
        raise InvalidSetting(
            f"The trace {sheet.name} has {column_of(sheet, first)} and {column_of(sheet, second)}, which are of "
            "different units: give all times in one unit."
        )
    found = measured_rounds(sheet.name, table, names, notes)
    found = replace(found, unit=units.popitem()[0])
    for at in left:
        if headings and words[at].meaning == "round" and all(cell.strip().isdigit() for cell in columns[at]):
            number = np.array(columns[at], dtype=np.float64)
            if number.max() <= _MOST and (np.diff(number) > 0).all():  # rounds are called as the file calls them
                rounds = number.astype(np.int64)[found.jobs.round - 1]
                return replace(found, jobs=replace(found.jobs, round=rounds))
    return found


def _is_dates(cells: Sequence[str]) -> bool:
    some = [cell.strip() for cell in cells if cell.strip()][:20]
    return bool(some) and all(
        re.search(r"\d", x) and re.search(r"\d[-/:.]\d+[-/:.]\d|\d:\d", x) and not is_number(x) for x in some
    )


def _counts_up(column: Array, *, other: list[Array], sheet: Sheet, at: int) -> bool:
    """Returns whether a column counts or tells the time; refuses one that only grows otherwise."""
    if np.isnan(column).any() or len(column) < 2:
        return False
    steps = np.diff(column)
    whole = not (column % 1).any()
    beside = np.concatenate(other)
    beside = beside[np.isfinite(beside)]
    decimals = len(beside) > 0 and (beside % 1 != 0).mean() > 0.5
    if whole and (steps == steps[0]).all() and steps[0] > 0 and (len(column) > 3 or decimals or column[0] == 0):
        return True
    if is_time_of_day(float(column[0])):
        return True
    if whole and (steps >= 0).all() and steps.any() and decimals and len(column) >= _FEW and at == 0:
        return True  # rounds in blocks: 0, 0, 1, 1 would be jobs, but 1, 2, 4, 5 leaves rounds out
    if len(column) >= _FEW and (steps > 0).all():
        raise InvalidSetting(
            f"The trace {sheet.name} has {column_of(sheet, at)}, which only grows ({column[0]:g}, {column[1]:g}, ... "
            f"{column[-1]:g}): it is no worker's time for a round. Leave it out, or give times instead of totals."
        )
    return False


def _summaries(sheet: Sheet, values: dict[int, Array]) -> list[int]:
    """Returns the columns that are the maximum, mean, minimum or sum of all others in each row."""
    if len(values) < 4 or len(next(iter(values.values()))) < 3:
        return []
    found: list[int] = []
    for at in (*reversed([*values][-3:]), next(iter(values))):
        beside = [i for i in values if i != at and i not in found]
        if sheet.header and have_one_form([sheet.header[at], sheet.header[beside[0]]]):
            continue  # a worker by its name, who is always the first or the last
        others = np.stack([values[i] for i in beside])
        if not np.ptp(values[at]) > 0 or np.isnan(others).any() or not (np.ptp(others, axis=0) > 0).all():
            continue
        rounded = _rounded_by(values[at])
        for summary in (np.max, np.mean, np.sum, np.median, np.min):
            if np.allclose(values[at], summary(others, axis=0), rtol=1e-5, atol=rounded) and at not in found:
                found.append(at)
    return found


def _rounded_by(column: Array) -> float:
    """Returns half of the last decimal place of a column, where that is small beside its spread; otherwise 0."""
    for places in range(7):
        if np.allclose(column, np.round(column, places), rtol=0, atol=1e-9):
            half = 0.501 * 10.0**-places
            return half if half < 0.02 * float(column.std()) else 0.0
    return 0.0
