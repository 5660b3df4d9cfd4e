"""Refuses tables of times that would be misread: each check looks for one way in which exports mislead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .._text import listed, printable
from ..errors import InvalidSetting
from .column_names import Heading, have_one_form, is_time_of_day, names_a_round, not_a_time
from .sheets import MISSING, Sheet, is_number

__all__ = [
    "SUMMARIES",
    "refuse_clocks",
    "refuse_durations",
    "refuse_grouped",
    "refuse_jobs_without_names",
    "refuse_labels",
    "refuse_no_times",
    "refuse_parts",
    "refuse_round_times",
    "refuse_rounds_as_columns",
    "refuse_shards",
    "refuse_split_decimals",
    "refuse_texts",
    "refuse_totals_of_workers",
]

_FEW = 10  # rows from which on what holds for all of them is no coincidence
#: Ends of names of columns by which a worker has several of them.
_OF_A_WORKER = frozenset(
    {"", "x", "y", "left", "right", "std", "sd", "sem", "err", "error", "min", "max", "mean", "avg", "median", "low",
     "high", "lower", "upper", "train", "fit", "eval", "evaluate", "test", "compute", "comm", "upload", "download",
     "send", "receive", "wait", "idle", "total", "start", "end"}
)  # fmt: skip
_LOOK = 1000  # cells of a column by which it is judged
_ENOUGH = 5  # rows of a table from which on there is a verdict
#: Names of rows and workers that sum up others, in lower case.
SUMMARIES = frozenset(
    {"total", "totals", "sum", "mean", "average", "avg", "median", "max", "maximum", "min", "minimum", "std", "count",
     "overall", "all", "summe", "gesamt", "mittelwert", "durchschnitt", "moyenne", "somme", "promedio", "media"}
)  # fmt: skip
_TRAINING_TIMES = frozenset({"trainingtime", "traintime", "fittime", "train", "fit"})
_PARTS = frozenset(
    {"upload", "uploadtime", "download", "downloadtime", "comm", "commtime", "communication", "communicationtime",
     "transfer", "transfertime", "send", "sendtime", "receive", "receivetime", "network", "networktime"}
)  # fmt: skip

Array = NDArray[np.float64]


def column_of(sheet: Sheet, at: int) -> str:
    """Returns what an error calls a column: its name in quotes, or its number from 1."""
    name = sheet.header[at] if sheet.header else ""
    return f"column {printable(repr(name), 40)}" if name else f"column {at + 1}"


# Tables of rounds


def refuse_rounds_as_columns(sheet: Sheet, *, numbers: bool = False) -> None:
    """Refuses a table whose columns are rounds, by name or also by bare numbers, and whose rows are workers."""
    rounds = [name for name in sheet.header if names_a_round(name) or (numbers and name.isdigit())]
    if len(rounds) > 2 and 2 * len(rounds) > len(sheet.header):
        raise InvalidSetting(
            f"The trace {sheet.name} has columns {printable(listed([repr(name) for name in rounds], 4), 100)}: swap "
            "rows and columns, so that each worker is a column and each round a row."
        )


def refuse_labels(sheet: Sheet, at: int, cells: Sequence[str]) -> None:
    """Refuses rows that are no rounds: one has a text, such as "Mean" or a worker's name."""
    try:
        np.array(cells, dtype=np.float64)
    except ValueError:
        pass
    else:
        return
    for row, cell in enumerate(cells):
        text = cell.strip()
        numbered = re.match(r"[\d#]", text) is not None and not text.endswith("%")
        if not (numbered or text.lower() in MISSING or is_number(text) or names_a_round(text, short=True)):
            raise InvalidSetting(
                f"The trace {sheet.name} has {printable(repr(text), 40)} in line {sheet.lines[row]}, "
                f"{column_of(sheet, at)}: each row is a round with its number. If rows are workers, swap rows and "
                "columns; leave out rows that sum up others, and a column that has no numbers of rounds."
            )


def refuse_jobs_without_names(
    sheet: Sheet, columns: Sequence[Sequence[str]], left: Sequence[int], values: Mapping[int, Array]
) -> None:  # fmt: skip
    """Refuses a table of jobs whose columns are not called so: whole numbers that repeat beside one column of times."""
    others = [at for at in range(len(columns)) if at not in values]
    times = [at for at in values if _share_of_decimals(columns[at][:_LOOK]) > 0.5]
    if len(times) != 1 or len(columns[0]) < _FEW:
        return
    for at in (*values, *(at for at in others if not sheet.header)):
        if at in times or not all(cell.strip().isdecimal() for cell in columns[at]):
            continue
        numbers, counts = np.unique(np.array(columns[at], dtype=np.float64), return_counts=True)
        if numbers[0] <= 1 and len(numbers) > 1 and (np.diff(numbers) == 1).all() and counts.min() > 1:
            raise InvalidSetting(
                f"The trace {sheet.name} has {column_of(sheet, at)} with the numbers {numbers[0]:g} to {numbers[-1]:g} "
                f"in several rows each, beside the times of {column_of(sheet, times[0])}: if each row is a job, call "
                "the columns worker, seconds and round."
            )


def _refuse_parts_of_workers(sheet: Sheet, places: Sequence[int]) -> None:
    """Refuses a table with several columns for each worker, such as w0_train, w0_upload, w1_train and w1_upload."""
    kinds: dict[str, set[str]] = {}
    for at in places:
        found = re.fullmatch(r"(.*?\d+)(?:[_ .(/-]+(\D*?)\)?)?", sheet.header[at].strip())
        kind = (found[2] or "").lower() if found else "-"
        if found is None or kind not in _OF_A_WORKER:
            return
        kinds.setdefault(found[1], set()).add(kind)
    first = next(iter(kinds.values()))
    if len(first) > 1 and len(kinds) > 1 and all(kind == first for kind in kinds.values()):
        names = [sheet.header[at] for at in places if sheet.header[at].startswith(next(iter(kinds)))]
        raise InvalidSetting(
            f"The trace {sheet.name} has columns {printable(listed(map(repr, names[:2])), 80)} of one worker: give "
            "each worker one column, with the seconds of its job."
        )


def refuse_no_times(sheet: Sheet, columns: Sequence[Sequence[str]], values: Mapping[int, Array]) -> None:
    """Refuses columns of a table of rounds that hold something else than a worker's times.

    That is a name such as "rate", whole numbers or one constant beside measured decimals, and a column that is equal
    to another.
    """
    if len(values) < 2:
        return
    for at in values:
        word = not_a_time(sheet.header[at]) if sheet.header else None
        if word is not None:
            raise InvalidSetting(
                f"The trace {sheet.name} has {column_of(sheet, at)}, which is named after no time ({word}): give the "
                "seconds that a job took, and leave other columns out."
            )
    if sheet.header:
        _refuse_parts_of_workers(sheet, [*values])
    decimals = {at: _share_of_decimals(columns[at][:_LOOK]) for at in values}
    usual = [at for at, share in decimals.items() if share > 0.5 and np.ptp(_finite(values[at])) > 0]
    form = bool(sheet.header) and have_one_form([sheet.header[at] for at in values])
    rows = len(columns[0])
    if rows < _ENOUGH or 2 * len(usual) < len(values) or len(usual) < 2:
        return
    for at in values:
        known = _finite(values[at])
        if decimals[at] == 0 and len(known) > 1 and (known > 0).any() and not (known % 1).any():
            raise InvalidSetting(
                f"The trace {sheet.name} has {column_of(sheet, at)} with whole numbers ({columns[at][0].strip()}, "
                f"{columns[at][1].strip()}, ...) beside decimals, so it may be no worker: leave it out, or write "
                "decimals (2.0). If each row is a job, call the columns worker, seconds and round."
            )
        if len(known) == rows and np.ptp(known) == 0 and not form:
            raise InvalidSetting(
                f"The trace {sheet.name} has {column_of(sheet, at)}, which is {known[0]:g} in each row: leave it out "
                "if it is no worker; otherwise give a table of jobs with worker, round and seconds."
            )
    sums: dict[float, int] = {}
    for at in usual:
        first = sums.setdefault(float(np.nansum(values[at])), at)
        if first != at and np.array_equal(values[first], values[at], equal_nan=True) and len(np.unique(values[at])) > 2:
            raise InvalidSetting(
                f"The trace {sheet.name} has {column_of(sheet, first)} and {column_of(sheet, at)}, which are equal in "
                "each row: give each worker one column."
            )


def _finite(values: Array) -> Array:
    known = values[np.isfinite(values)]
    return known if len(known) else np.zeros(1)


def _share_of_decimals(cells: Sequence[str]) -> float:
    """Returns the share of cells with a decimal point or comma, or an exponent, among those with a number."""
    known = [cell for cell in cells if cell.strip().lower() not in MISSING and cell.strip() != "0"]
    return sum(not cell.strip().isdigit() for cell in known) / len(known) if known else 0.0


def refuse_split_decimals(sheet: Sheet) -> None:
    """Refuses "1,03" where a comma separates cells: the part behind it is no whole number of seconds."""
    for row, line in zip(sheet.rows, sheet.lines, strict=True):
        if all(cell.strip().isdigit() for cell in row) and any(re.fullmatch(r"0\d+", cell.strip()) for cell in row[1:]):
            raise InvalidSetting(
                f"The trace {sheet.name} has {printable(','.join(row), 40)} in line {line}: a number that begins with "
                "0 is the end of a decimal. Separate columns by semicolons, or write decimal points."
            )


def refuse_texts(sheet: Sheet, at: int, cells: Sequence[str]) -> None:
    """Refuses a column of texts in a table that has no column called worker."""
    some = [cell.strip() for cell in cells[:20]]
    texts = [
        cell for cell in some if cell.lower() not in MISSING and not is_number(cell, decimal_comma=sheet.decimal_comma)
    ]
    if 2 * len(texts) > len(some) and not re.match(r"[\d+-]", texts[0]):
        name = (sheet.header[at] if sheet.header else "") or f"column {at + 1}"
        raise InvalidSetting(
            f"The trace {sheet.name} has {printable(repr(texts[0]), 60)} as {printable(name, 40)} in line "
            f"{sheet.lines[some.index(texts[0])]}; it must be a number, or empty if the job never came back. If each "
            "row is a job, call its columns worker, seconds and round."
        )


def refuse_durations(sheet: Sheet, at: int, cells: Sequence[str]) -> None:
    """Refuses times such as 1:02 or 00:01:02.5, which have no date and may be a worker's."""
    some = [cell.strip() for cell in cells if cell.strip()]
    if all(re.fullmatch(r"\d+:\d\d(:\d\d([.,]\d+)?)?", cell) for cell in some[:20]):
        row = next(row for row, cell in enumerate(cells) if cell.strip() == some[0])
        raise InvalidSetting(
            f"The trace {sheet.name} has {some[0]!r} in line {sheet.lines[row]}, {column_of(sheet, at)}; a time "
            "must be a number of seconds, or empty if the job never came back."
        )


# Tables of jobs


def refuse_totals_of_workers(sheet: Sheet, at: int, cells: Sequence[str]) -> None:
    """Refuses a row that sums up others, as spreadsheets add it at the end."""
    for cell in {*cells}:
        if cell.strip().lower() in SUMMARIES:
            row = cells.index(cell)
            raise InvalidSetting(
                f"The trace {sheet.name} has {printable(repr(cell.strip()), 40)} in line {sheet.lines[row]}, "
                f"{column_of(sheet, at)}: each row is one job; leave rows out that sum up others."
            )


def refuse_parts(sheet: Sheet, headings: Sequence[Heading], at: int, unused: Sequence[int]) -> None:
    """Refuses the time of training alone where another column has the time of the transfer."""
    if headings[at].plain not in _TRAINING_TIMES:
        return
    parts = [sheet.header[i] for i in unused if {headings[i].plain, headings[i].plain.removesuffix("s")} & _PARTS]
    if parts:
        raise InvalidSetting(
            f"The trace {sheet.name} has {column_of(sheet, at)} beside {printable(listed(map(repr, parts), 4), 80)}: "
            "add up what passes from the message to the reply in a column called seconds."
        )


def refuse_round_times(
    sheet: Sheet, at: int, worker: NDArray[np.int64], rounds: NDArray[np.int64], seconds: Array, *, loads: bool
) -> None:
    """Refuses seconds that are the time of the whole round, or that have passed since the beginning."""
    there = np.isfinite(seconds)
    worker, rounds, seconds = worker[there], rounds[there], seconds[there]
    if not len(seconds):
        return
    order = np.lexsort((worker, rounds))
    same, times = rounds[order][1:] == rounds[order][:-1], seconds[order]
    alike = times[1:][same] == times[:-1][same]
    if len(alike) >= _FEW and alike.all() and len(np.unique(seconds)) > 2 and len(np.unique(rounds)) > 2:
        raise InvalidSetting(
            f"The trace {sheet.name} has {column_of(sheet, at)}, which is the same for all workers in each round "
            f"({times[0]:g}, ...): it is the time of the round. Give how long each job took."
        )
    if loads:
        return
    order = np.lexsort((rounds, worker))
    same, times = worker[order][1:] == worker[order][:-1], seconds[order]
    if len(times) >= _FEW * (int(worker.max()) + 1) and (np.diff(times)[same] > 0).all():
        raise InvalidSetting(
            f"The trace {sheet.name} has {column_of(sheet, at)}, which only grows from round to round of each worker "
            f"({times[0]:g}, {times[1]:g}, ...): it adds up, or tells when. Give how long each job took."
        )


def refuse_shards(sheet: Sheet, at: int, shards: Array, workers: int) -> None:
    """Refuses loads that are not counted in shards, but in examples, fractions or a machine's load."""
    used = shards[shards > 0]
    broken = np.flatnonzero((shards > 0) & (shards % 1 != 0))
    if len(broken) or (len(used) and used.min() > max(workers, 1)):
        row = int(broken[0]) if len(broken) else int(np.flatnonzero(shards > 0)[0])
        why = "shards are whole numbers" if len(broken) else f"no job of {workers} workers has so many shards"
        raise InvalidSetting(
            f"The trace {sheet.name} has {shards[row]:g} in line {sheet.lines[row]}, {column_of(sheet, at)}; {why}. "
            "Give the number of shards of each job, or call the column by another name."
        )


def refuse_clocks(sheet: Sheet, at: int, seconds: Array, rounds: Array | None, unit: float | None) -> None:
    """Refuses a column of seconds that tells when, and not how long."""
    known = seconds[np.isfinite(seconds)]
    name = printable(repr(sheet.header[at]) if sheet.header else str(at + 1), 40)
    middle = float(np.median(known)) if len(known) else 0.0
    # Two thousand seconds in microseconds look like a date in seconds.
    if is_time_of_day(middle * unit if unit is not None and unit < 1e-3 else middle):
        raise InvalidSetting(
            f"The trace {sheet.name} has {known[0]:.10g} in line {sheet.lines[0]}, column {name}, which is a date in "
            "seconds since 1970: give how long each job took, not when."
        )
    if len(known) < _FEW:
        return
    if (np.diff(known) > 0).all() and (rounds is None or (np.diff(rounds) >= 0).all()):
        raise InvalidSetting(
            f"The trace {sheet.name} has column {name}, which only grows ({known[0]:g}, {known[1]:g}, ... "
            f"{known[-1]:g}): it tells when, or the table is sorted by it. Give how long each job took, round by round."
        )


def refuse_grouped(sheet: Sheet, cells: Sequence[str], at: int, unit: float | None) -> None:
    """Refuses 1.234 as a number of milliseconds, where it may be a thousand of them."""
    if unit is None or unit >= 1 or sheet.separated_by_commas:
        return
    known = [cell.strip() for cell in cells if cell.strip().lower() not in MISSING]
    mark = "," if sheet.decimal_comma else "."
    grouped = [cell for cell in known if re.fullmatch(rf"[1-9]\d{{0,2}}[{mark}]\d{{3}}", cell)]
    if grouped and all(cell in grouped or re.fullmatch(r"\d{1,3}", cell) for cell in {*known}):
        row = next(row for row, cell in enumerate(cells) if cell.strip() == grouped[0])
        whole, _, rest = grouped[0].partition(mark)
        raise InvalidSetting(
            f"The trace {sheet.name} has {grouped[0]!r} in line {sheet.lines[row]}, {column_of(sheet, at)}, which may "
            f"be {whole}{rest} or {whole}.{rest}: write numbers without thousands separators, "
            "or give seconds."
        )
