"""Text files of tables as people export them, as rows of cells: separators, decimal commas, comments, compression."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from .._files import MEGABYTE, read_file
from .._text import printable
from ..errors import InvalidSetting

__all__ = ["LARGEST", "Sheet", "is_number", "is_table", "number_of", "read_sheet"]

LARGEST = 256 * MEGABYTE  # of a file, and of what it holds; a million rounds of 30 workers
_ENDINGS = (".csv", ".tsv")
_SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}
_SAMPLE = 50  # lines that tell which separator is used
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?\s*")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(\.\d{3})+,\d+\s*|[+-]?\d{1,3}(,\d{3})+\.\d+\s*")
_FLOWER = re.compile(r"\[ROUND \d+(/\d+)?\]|(aggregate|configure)_(fit|train)|Starting Flower|Run finished \d+ round")
_EITHER = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}\s*")  # 1,234: a decimal comma, or a thousands separator
_GROUPS = re.compile(r"[+-]?\d{1,3}(,\d{3}){2,}\s*")  # 1,234,567
_FRAME = re.compile(
    r"(?=.*[|+])[|+\-=:\s]*-{3,}[|+\-=:\s]*|\(\d+ rows?\)|\d+ rows? in set.*"
)  # as SQL and Markdown draw
_FINISHED = re.compile(r"Run finished (\d+) round\S* in ([\d.]+)\s*s")


@dataclass(frozen=True)
class Sheet:
    """The cells of a text file.

    Attributes:
        name: Name of the file.
        header: Names of the columns; empty if the first line has numbers.
        rows: The other lines, each with as many cells as the first.
        lines: Number of each row's line in the file, from 1.
        decimal_comma: Whether numbers are written with a decimal comma.
        separated_by_commas: Whether commas separate the cells.
        notes: How the file was read, where that is not plain.
    """

    name: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    decimal_comma: bool
    separated_by_commas: bool
    notes: tuple[str, ...]


def is_table(path: str | Path) -> bool:
    """Returns whether the name of a file is that of a table of text, compressed or not."""
    return Path(path).name.lower().removesuffix(".gz").endswith(_ENDINGS)


def number_of(text: str, *, decimal_comma: bool = False) -> float:
    """Returns the number that a cell holds.

    Raises:
        ValueError: It is not a number; "1_000" is none either.
    """
    if "_" in text:
        raise ValueError(text)
    return float(text.replace(",", ".") if decimal_comma else text)


def is_number(text: str, *, decimal_comma: bool = False) -> bool:
    """Returns whether a cell holds a number."""
    try:
        number_of(text, decimal_comma=decimal_comma)
    except ValueError:
        return False
    return True


def read_sheet(path: str | Path) -> Sheet:
    """Returns the cells of a .csv or .tsv file, which may be compressed by gzip.

    Cells are separated by commas, semicolons, tabs, bars, or spaces. Lines that start with # are comments, except that
    the last one before the data may be the header, as NumPy writes it.

    Raises:
        InvalidSetting: The file does not exist, is of another kind, has no rows, or rows of several lengths.
    """
    file = Path(path)
    if not file.is_file():
        raise InvalidSetting(f"There is no trace file {str(path)!r}.")
    if not is_table(file):
        raise InvalidSetting(f"A trace is a .csv, .tsv or .npz file, not {file.name!r}.")
    text = _text_of(file)
    lines: list[str] = []
    numbers: list[int] = []
    comment = ""
    stated = None
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if not bare or not bare.strip(",;|\t"):
            continue
        if bare.startswith("#"):
            comment = bare.lstrip("#").strip() if not lines else comment
        elif not lines and re.fullmatch(r"sep=.", bare, re.IGNORECASE):
            stated = bare[-1]
        elif bare[-1] in "-+|):" and _FRAME.fullmatch(bare):
            continue
        else:
            lines.append(line)
            numbers.append(number)
    if not lines:
        raise InvalidSetting(f"The trace {file.name} has no rows of times; each row is one round.")
    _refuse_a_log(file.name, text)
    if all(line.strip().startswith("|") and line.strip().endswith("|") for line in lines):
        lines = [line.strip().strip("|") for line in lines]
    separator = stated or _separator(lines[:_SAMPLE])
    rows = _cells(file.name, lines, separator)
    head = _cells(file.name, [comment], separator)[0] if comment else []
    # Most files have no comma inside a cell, and need no look at each of them.
    inside = '"' in text if separator == "," else "," in text
    comma = inside and _decimal_comma(file.name, rows, numbers, separator)
    notes = [f"cells are separated by {_SEPARATORS.get(separator, 'spaces')}"] if separator != "," else []
    notes += ["numbers have decimal commas"] if comma else []
    header: list[str] = []
    if _is_header(rows, comma):
        header, rows, numbers = rows[0], rows[1:], numbers[1:]
    elif len(head) == len(rows[0]) > 1 and not all(is_number(cell, decimal_comma=comma) for cell in head):
        header = head
        notes.append("the header stands in a comment")
    if not rows:
        raise InvalidSetting(f"The trace {file.name} has no rows of times; each row is one round.")
    # R writes names of rows, and none above them.
    named = separator == " " or all(line.lstrip().startswith('"') for line in lines)
    longer = len(header) > 1 and all(len(row) == len(header) + 1 for row in rows)
    if named and longer and any(row[-1].strip() for row in rows):
        header = ["", *header]
    rows = _even(file.name, header, rows, numbers)
    _refuse_second_header(file.name, header, rows, numbers, comma)
    return Sheet(file.name, [cell.strip() for cell in header], rows, numbers, comma, separator == ",", tuple(notes))


def _text_of(file: Path) -> str:
    try:
        content = read_file(file, LARGEST)
        if content.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
                content = packed.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise InvalidSetting(f"The trace {file.name} holds more than {LARGEST} bytes.")
        _refuse_other_kinds(file.name, content)
        encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        text = content.decode(encoding)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidSetting(f"The trace {file.name} is not a complete gzip file: {printable(str(error))}.") from error
    except OSError as error:
        raise InvalidSetting(f"The trace {file.name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidSetting(
            f"The trace {file.name} cannot be read as text: {str(error)[:200]}. Save it as UTF-8."
        ) from error
    if "\0" in text:
        raise InvalidSetting(f"The trace {file.name} cannot be read as text: it has null bytes. Save it as UTF-8.")
    return text


def _refuse_other_kinds(name: str, content: bytes) -> None:
    """Refuses files whose first signs show that they are of another kind, whatever their name says."""
    begin = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    for signs, what in (
        ((b"PK\x03\x04", b"\xd0\xcf\x11\xe0"), "an Excel sheet or a zip file: save the sheet as CSV"),
        ((b"PAR1", b"\x93NUMPY", b"SQLite format"), "a binary file: write it as CSV"),
        ((b"{", b"["), "JSON: write it as CSV, with a header and one row for each job or round"),
        ((b"<",), "a web page or XML: save the table as CSV"),
    ):
        # Names of columns may be in brackets or braces, as Prometheus writes series.
        if begin.startswith(signs) and not re.match(rb"[{\[](?!\s*[\"{\[\d])", begin):
            raise InvalidSetting(f"The trace {name} is not a table of text, but looks like {what}.")


def _refuse_a_log(name: str, text: str) -> None:
    beginning = text[:20_000]
    if len(_FLOWER.findall(beginning)) < 1 or beginning.count("INFO") < 1:
        return
    found = _FINISHED.search(text)
    mean = f" It says {float(found[2]) / int(found[1]):.3g} s a round." if found and int(found[1]) else ""
    raise InvalidSetting(
        f"The trace {name} is a log of Flower, which does not say how long each client took.{mean} Run with "
        "GradientCoding(strategy, uncoded(n), ledger=path), which trains as before, and give that ledger."
    )


def _separator(lines: list[str]) -> str:
    """Returns the separator by which the lines have the same number of cells, more than one; a comma if none does."""
    for separator in _SEPARATORS:
        try:
            counts = {len(row) for row in csv.reader(lines, delimiter=separator)}
        except csv.Error:  # a quote that is not closed, or a cell of more than 128 KiB: said when all lines are read
            continue
        if len(counts) == 1 and counts.pop() > 1:
            return separator
    for separator in ("\t", ";"):
        if all(separator in line for line in lines):
            return separator
    if len(lines) > 1 and not any("," in line for line in lines):
        rows = [_of_spaces(line) for line in lines]
        width = len(rows[1])
        # The names of rows, which R and pandas write, have no name themselves.
        even = len(rows[0]) in (width, width - 1) and len(rows[0]) > 1 and all(len(row) == width for row in rows[1:])
        if even and all(any(map(is_number, row)) for row in rows[1:]):
            return " "
    return _separator(lines[1:]) if len(lines) > 2 and "," not in lines[0] else ","  # below a title


def _of_spaces(line: str) -> list[str]:
    """Returns the cells of a line that are separated by one or several spaces, some of them in quotes."""
    try:
        return next(csv.reader([line.strip()], delimiter=" ", skipinitialspace=True), [])
    except csv.Error:
        return line.split()


def _cells(name: str, lines: list[str], separator: str) -> list[list[str]]:
    if separator == " ":
        return [_of_spaces(line) for line in lines]
    try:
        rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=False))
    except csv.Error as error:
        raise InvalidSetting(f"The trace {name} cannot be read as text: {str(error)[:200]}.") from error
    if len(rows) != len(lines):
        raise InvalidSetting(f"The trace {name} has a quoted cell that continues in the next line; a row is one line.")
    return rows


def _decimal_comma(name: str, rows: list[list[str]], numbers: list[int], separator: str) -> bool:
    """Returns whether numbers have decimal commas; both signs in one file are refused, and so is 1,234 alone.

    Between semicolons, 1,234 is a decimal: programs separate cells by them because commas are in numbers already.
    """
    comma = point = either = None
    for row, line in zip(rows, numbers, strict=True):
        for column, cell in enumerate(row, 1):
            if "," in cell:
                bare = cell.strip()
                if _THOUSANDS.fullmatch(bare) or _GROUPS.fullmatch(bare):
                    raise InvalidSetting(
                        f"The trace {name} has {printable(cell)!r} in line {line}, column {column}: write numbers "
                        "without thousands separators."
                    )
                if _EITHER.fullmatch(bare):
                    either = either or (line, column, cell)
                elif comma is None and _DECIMAL_COMMA.fullmatch(bare):
                    comma = line, column, cell
            elif point is None and "." in cell and is_number(cell):
                point = line, column, cell
    found = comma or either
    if found and point:
        line, column, cell = found
        raise InvalidSetting(
            f"The trace {name} has {printable(cell)!r} in line {line}, column {column}, and "
            f"{printable(point[2])!r} in line {point[0]}, column {point[1]}: decimals have commas or points, not both."
        )
    if either and not comma and separator != ";":
        line, column, cell = either
        whole, _, rest = cell.strip().partition(",")
        raise InvalidSetting(
            f"The trace {name} has {printable(cell)!r} in line {line}, column {column}, which may be {whole}{rest} or "
            f"{whole}.{rest}: write numbers without thousands separators, and decimals with points."
        )
    return found is not None


def _is_header(rows: list[list[str]], comma: bool) -> bool:
    """Returns whether the first row names the columns, be it with numbers."""
    first, rest = [cell.strip() for cell in rows[0]], rows[1:]
    if not all(is_number(cell, decimal_comma=comma) for cell in first if cell):
        return not all(is_number(cell, decimal_comma=comma) or cell.lower() in MISSING for cell in first)
    named = [cell for cell in first if cell]
    if not rest or not all(cell.isdigit() for cell in named) or len({*named}) < len(named) or len(named) < 2:
        return False
    values = [int(cell) for cell in named]
    counted = values in ([*range(len(values))], [*range(1, len(values) + 1)])
    if not first[0] and len(named) == len(first) - 1 and counted:
        return True  # as pandas writes an index
    if counted and (len(values) > 2 or values[0] == 0) and not all(row[: len(first)] == first for row in rest[:1]):
        below = [cell for row in rest[:_SAMPLE] for cell in row]
        # Rows may count on as well, in a file of whole numbers: 1, 2, 3 and 4, 5, 6.
        return values[0] == 0 or any(not cell.strip().isdigit() for cell in below)
    if min(values) > 10**12:  # ids of nodes
        return True
    cells = [cell.strip() for row in rest[:_SAMPLE] for cell in row if cell.strip()]
    whole = sum(cell.isdigit() for cell in cells)
    return len(values) > 2 and values == sorted(values) and whole <= 0.1 * len(cells)


#: Words that stand for a job without a time, in lower case.
MISSING = frozenset(
    {"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none", "-", "--", "?", "inf", "+inf", "infinity", "timeout",
     "failed", "failure", "error", "dropped", "timed out", "n.a.", "\u2013", "\u2014"}
)  # fmt: skip


def _even(name: str, header: list[str], rows: list[list[str]], numbers: list[int]) -> list[list[str]]:
    """Returns the rows with one length, less a last column that is empty everywhere."""
    width = len(header) or len(rows[0])
    lengths = {len(row) for row in rows}
    if len(lengths) == 1 and header and lengths == {width + 1} and all(not row[-1].strip() for row in rows):
        return [row[:-1] for row in rows]  # a separator at the end of each line
    if lengths == {width}:
        return rows
    at, row = next((at, row) for at, row in enumerate(rows) if len(row) != width)
    if len(header) == 1 and len(lengths) == 1:
        raise InvalidSetting(
            f"The trace {name} has one cell in its first line, {printable(repr(header[0]), 60)}, and {len(row)} in "
            f"line {numbers[at]}: leave a title out, and name each column."
        )
    what = f"the header has {width}" if header else f"line {numbers[0]} has {width}"
    comma = " If its commas are decimal, separate the columns by semicolons." if any("," in x for x in row) else ""
    two = all(re.fullmatch(r"\d+", cell.strip()) for cell in row)
    comma = " If its commas are decimal, separate the columns by semicolons." if two or comma else ""
    raise InvalidSetting(
        f"The trace {name} has a row of {len(row)} cells in line {numbers[at]}, and {what}; each worker or quantity is "
        f"a column.{comma}"
    )


def _refuse_second_header(
    name: str, header: list[str], rows: list[list[str]], numbers: list[int], comma: bool
) -> None:  # fmt: skip
    """Refuses names of columns that stand in two lines, and a header that comes again."""
    if not header:
        return
    again = next((at for at, row in enumerate(rows) if row == header), None)
    if again is not None:
        raise InvalidSetting(
            f"The trace {name} has its header again in line {numbers[again]}: give each run in a file of its own, or "
            "leave that line out and number the rounds on."
        )

    def is_text(cell: str) -> bool:
        return bool(cell.strip()) and cell.strip().lower() not in MISSING and not is_number(cell, decimal_comma=comma)

    sample = rows[1:_SAMPLE]
    names = [
        at
        for at, cell in enumerate(rows[0])
        if is_text(cell) and sample and sum(is_text(row[at]) for row in sample) <= 0.1 * len(sample)
        and any(is_number(row[at], decimal_comma=comma) for row in sample)
    ]  # fmt: skip
    if len(names) > 1:
        raise InvalidSetting(
            f"The trace {name} has {printable(repr(rows[0][names[0]].strip()), 40)} in line {numbers[0]}, above "
            "numbers, as in the line before: the names of the columns must stand in one line."
        )
