"""The lines of a ledger file, which another program may have written: an error names the line and what is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .._files import MEGABYTE, open_file, parse_json
from ..errors import InvalidSetting
from .rows import RoundRow

__all__ = ["LONGEST", "every_line", "object_of", "row_of", "where_in"]

#: Longest line that is read, in bytes; a row of 10,000 workers has a tenth.
LONGEST = 16 * MEGABYTE


def where_in(path: str | os.PathLike[str], number: int) -> str:
    """Returns the name of a line, for an error."""
    return f"Line {number} of the ledger {str(path)!r}"


def every_line(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the text of each line of a file.

    Raises:
        InvalidSetting: The file cannot be read, or a line is too long.
    """
    try:
        with os.fdopen(open_file(Path(path)), "rb") as file:
            yield from _lines(file, path)
    except OSError as error:
        raise InvalidSetting(f"The ledger {str(path)!r} cannot be read: {error.strerror}.") from error


def _lines(file: IO[bytes], path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes]]:
    number = 0
    while text := file.readline(LONGEST + 1):
        number += 1
        where = where_in(path, number)
        if len(text) > LONGEST:
            raise InvalidSetting(f"{where} has more than {LONGEST} bytes; no row is as long.")
        yield where, text


def values_of(text: bytes, where: str) -> Any:
    """Returns the JSON value in a line.

    Raises:
        InvalidSetting: The line is blank, not in UTF-8, or no JSON.
    """
    if not text.strip():
        raise InvalidSetting(f"{where} is blank, but each line must be a row: delete it.")
    try:
        return parse_json(text)
    except ValueError as error:
        raise InvalidSetting(f"{where} is not JSON: {error}.") from None


def object_of(text: bytes, where: str) -> dict[str, Any]:
    """Returns the JSON object in a line.

    Raises:
        InvalidSetting: The line holds something else.
    """
    values = values_of(text, where)
    if not isinstance(values, dict):
        raise InvalidSetting(f"{where} is not a ledger row: each line is one JSON object.")
    return values


def row_of(text: bytes, where: str) -> RoundRow:
    """Returns the row in a line.

    Raises:
        InvalidSetting: The line is not a ledger row.
    """
    values = values_of(text, where)
    try:
        return RoundRow.from_json(values)
    except InvalidSetting as error:
        raise InvalidSetting(f"{where}: {error} Name the file given as GradientCoding(ledger=...).") from None
