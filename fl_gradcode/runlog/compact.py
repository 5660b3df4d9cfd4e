"""The short form in which rows of many workers stand in a ledger file: schema 2.

A row of 1,000 workers would take 170 kB as plain lists, at every round. Whole numbers become text such as "0-9,12",
and jobs become columns. What is lost: numbers of seconds keep three digits, and those of computing two if there are
more than 1,500 jobs; jobs and the workers that were asked are in ascending order, those that come again after all
others; of long lists of rejected and late replies, the first are kept and the others counted.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .._text import printable

__all__ = ["MANY", "SHORT_SCHEMA", "expanded", "shortened"]

#: Workers or shards from which on a row is written in the short form.
MANY = 200
#: Version of the short form.
SHORT_SCHEMA = 2

_PHASES = ("train", "evaluate")
_KEPT = 10  # rejected or late replies
_LONGEST_REASON = 200
_DIGITS = {"seconds": 3, "computing": 3}
_MANY_JOBS = 1500  # of more, the seconds of computing keep a digit less
_JOBS = ("timings", "owing")
_WORKERS = (
    *("asked", "held-back", "never-sent", "answered", "unread", "used", "stragglers", "lapsed", "joined", "restarted"),
    *("shards", "compared"),
)
_SORTED = ("asked", "held-back", "never-sent", "unread", "joined", "lapsed", "restarted")
_AS, _UNKNOWN = "as ", "?"


def shortened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row's JSON values in the short form.

    Args:
        values: The row as JSON values, schema 1.
    """
    short = {**values, "schema": SHORT_SCHEMA}
    if values.get("holders") is not None:
        texts = [_text(holders) for holders in values["holders"]]
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        short["holders"] = {"sets": [*places], "of": _text([places[text] for text in texts])}
    train = values.get("train")
    for name in _PHASES:
        if values.get(name) is not None:
            before = train if name == "evaluate" and train is not None else {}
            short[name] = _short_phase(values[name], before)
    return short


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON values, schema 1, of a row in the short form.

    Raises:
        ValueError: The values are no such row. The message says what is wrong.
    """
    row = {**values, "schema": 1}
    holders = row.get("holders")
    if isinstance(holders, Mapping):  # the sets that shards have, and which one each shard has
        sets = [_numbers(text) for text in holders["sets"]]
        row["holders"] = [sets[place or 0] for place in _numbers(holders["of"])]
    elif holders is not None:
        row["holders"] = [_numbers(text) for text in holders]
    for name in _PHASES:
        if isinstance(row.get(name), Mapping):
            train = row.get("train")
            row[name] = _whole_phase(row[name], train if name == "evaluate" and isinstance(train, Mapping) else {})
    return row


def _short_phase(phase: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    short = dict(phase)
    for name in _JOBS:
        if phase.get(name):
            short[name] = _columns(phase[name])
    answered = sorted(phase.get("answered", ()))
    for name in _WORKERS:
        if name in phase:
            numbers = phase[name]
            if name in _SORTED:
                numbers = _in_layers(numbers)
            same = name == "used" and numbers and numbers == answered
            again = numbers and numbers == before.get(name)
            short[name] = f"{_AS}answered" if same else f"{_AS}train" if again else _text(numbers)
    coverage = phase.get("coverage", [])
    if coverage and all(value == coverage[0] for value in coverage):
        short["coverage"] = {"all": coverage[0], "of": len(coverage)}
    for name in ("rejected", "late"):
        if len(phase.get(name, ())) > _KEPT:
            short[name] = phase[name][:_KEPT]
            short[f"{name}-left-out"] = len(phase[name]) - _KEPT
        if name in short:
            short[name] = [
                {**one, "reason": printable(one["reason"], _LONGEST_REASON)} if one.get("reason") else one
                for one in short[name]
            ]
    return short


def _whole_phase(phase: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    whole = dict(phase)
    for name in _JOBS:
        if isinstance(phase.get(name), Mapping):
            whole[name] = _jobs(phase[name])
    for name in _WORKERS:
        text = phase.get(name)
        if text == f"{_AS}answered":
            whole[name] = sorted(_numbers(phase["answered"]), key=lambda number: (number is None, number))
        elif text == f"{_AS}train":
            whole[name] = before.get(name)
        elif isinstance(text, str):
            whole[name] = _numbers(text)
    coverage = phase.get("coverage")
    if isinstance(coverage, Mapping):
        whole["coverage"] = [coverage["all"]] * _count(coverage["of"])
    return whole


def _columns(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns jobs as columns; one value stands for a column in which all are equal."""
    columns: dict[str, Any] = {"jobs": len(jobs)}
    seen: Counter[tuple[Any, ...]] = Counter()
    keyed = []
    for job in jobs:
        about = (job["kind"], job["round"] or 0, job["worker"])
        keyed.append(((*about[:2], seen[about], job["worker"] is None, job["worker"] or 0), job))
        seen[about] += 1
    in_order = [job for _, job in sorted(keyed, key=lambda one: one[0])]
    for key in jobs[0]:
        digits = _DIGITS.get(key)
        if digits and key == "computing" and len(jobs) > _MANY_JOBS:
            digits -= 1
        values = [job[key] for job in in_order]
        if digits:
            texts = [_short_number(value, digits) for value in values]
            same = texts.count(texts[0]) == len(texts)
            columns[key] = _rounded(values[0], digits) if same else ",".join(texts)
        elif values.count(values[0]) == len(values):
            columns[key] = values[0]
        elif key == "worker":
            columns[key] = _text(values)
        else:
            columns[key] = [[value, len([*equal])] for value, equal in itertools.groupby(values)]
    return columns


def _in_layers(numbers: Sequence[int | None]) -> list[int | None]:
    """Returns all numbers once in ascending order, then those that come again: their text then has long ranges."""
    seen: Counter[int | None] = Counter()
    keyed = []
    for number in numbers:
        keyed.append((seen[number], number is None, number or 0, number))
        seen[number] += 1
    return [number for *_, number in sorted(keyed, key=lambda one: one[:3])]


def _jobs(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    count = _count(columns["jobs"])
    lists: dict[str, list[Any]] = {}
    for key, values in columns.items():
        if key == "jobs":
            continue
        if isinstance(values, str) and key == "worker":
            lists[key] = [*_numbers(values)]
        elif isinstance(values, str) and key in _DIGITS:
            lists[key] = [None if number == _UNKNOWN else float(number) for number in values.split(",")]
        elif isinstance(values, list):
            lists[key] = [value for value, times in values for _ in range(_count(times))]
        else:
            lists[key] = [values] * count
    if any(len(values) != count for values in lists.values()):
        raise ValueError("columns of jobs of different lengths")
    return [{key: values[at] for key, values in lists.items()} for at in range(count)]


def _rounded(value: Any, digits: int) -> Any:
    if not isinstance(value, float) or value == 0:
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))


def _short_number(value: float | None, digits: int) -> str:
    """Returns a number of seconds in as few letters as keep its digits: ".123" and "12300"."""
    if value is None:
        return _UNKNOWN
    text = f"{value:.{digits}g}"
    if "e+" in text:
        text = f"{float(text):g}"
    return text[1:] if text.startswith("0.") else text


def _text(numbers: Sequence[int | None]) -> str:
    """Returns whole numbers as text: "0-9,12,?" for 0 to 9, 12 and one that is not known."""
    parts: list[str] = []
    at = 0
    while at < len(numbers):
        first = numbers[at]
        end = at + 1
        while first is not None and end < len(numbers) and numbers[end] == first + end - at:
            end += 1
        if first is not None and end - at > 2:
            parts.append(f"{first}-{first + end - at - 1}")
        else:
            parts += [_UNKNOWN if number is None else str(number) for number in numbers[at:end]]
        at = end
    return ",".join(parts)


def _numbers(text: object) -> list[int | None]:
    numbers: list[int | None] = []
    for part in str(text).split(",") if text != "" else []:
        first, _, last = part.partition("-")
        if part == _UNKNOWN:
            numbers.append(None)
        elif last:
            count = _count(int(last) - int(first) + 1)
            numbers += range(int(first), int(first) + count)
        else:
            numbers.append(int(part))
    return numbers


def _count(number: object) -> int:
    if type(number) is not int or not 0 <= number <= 1_000_000:
        raise ValueError(f"a list of {number!r} items")
    return number
