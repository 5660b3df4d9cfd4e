"""Names of columns in exported tables: what they mean, in which unit, and which of them is no worker's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

__all__ = ["Heading", "heading_of", "is_time_of_day", "not_a_worker", "odd_one_out"]

#: Meaning -> its names in order of preference: lower case, letters and digits only.
_WORDS: dict[str, tuple[str, ...]] = {
    "worker": (
        "worker", "workerid", "client", "clientid", "cid", "node", "nodeid", "device", "deviceid", "partitionid",
        "partition", "machine", "host", "hostname", "participant", "rank", "clientname", "nodename", "workername",
    ),
    "seconds": (
        "seconds", "duration", "latency", "elapsed", "runtime", "secs", "sec", "took", "durationtime", "elapsedtime",
        "roundtime", "trainingtime", "traintime", "fittime", "responsetime", "wallclock", "walltime", "time",
    ),
    "round": (
        "round", "serverround", "currentround", "roundnumber", "rnd", "roundid", "iteration", "iter", "epoch", "step",
    ),
    "shards": ("shards", "numshards", "nshards", "load", "shardcount"),
    "computing": ("computing", "compute", "computetime", "computation", "computationtime", "computetimes"),
}  # fmt: skip
_UNITS = {
    "s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0,
    "ms": 1e-3, "msec": 1e-3, "millis": 1e-3, "millisecond": 1e-3, "milliseconds": 1e-3,
    "us": 1e-6, "µs": 1e-6, "usec": 1e-6, "microseconds": 1e-6,
    "min": 60.0, "mins": 60.0, "minutes": 60.0,
}  # fmt: skip
#: Names of columns in a table of rounds that are no worker's.
_NO_WORKERS = frozenset(
    {*_WORDS["round"], "", "index", "idx", "id", "row", "rowid", "no", "nr", "number", "tick", "t", "timestamp", "ts",
     "date", "datetime", "day", "hour", "start", "starttime", "end", "endtime", "begin", "created", "createdat", "when",
     "unixtime", "epochtime", "loss", "accuracy", "acc", "auc", "f1", "mean", "avg", "average", "median", "max",
     "maximum", "min", "minimum", "sum", "total", "std", "stddev", "count", "roundtime", "run", "runid", "seed"}
)  # fmt: skip
_UNNAMED = re.compile(r"unnamed\d*(level\d*)?")


@dataclass(frozen=True)
class Heading:
    """The name of a column.

    Attributes:
        plain: Letters and digits of the name without its unit, in lower case.
        meaning: "worker", "seconds", "round", "shards" or "computing"; empty for none of them.
        unit: Seconds of the unit that the name says; None if it says none.
        rank: Place among the names of the same meaning; a smaller one takes precedence.
    """

    plain: str
    meaning: str
    unit: float | None
    rank: int


@cache
def heading_of(name: str) -> Heading:
    """Returns what the name of a column means: "Duration (ms)" is seconds, in units of 0.001."""
    text = name.strip().lower()
    parts = [part for part in re.split(r"[^0-9a-zµ]+", text) if part]
    whole = "".join(parts)
    for word, names in _WORDS.items():
        if whole in names:
            own = _UNITS.get(whole) if word in ("seconds", "computing") else None
            return Heading(whole, word, own if whole != "min" else None, names.index(whole))
    if parts and parts[-1] in _UNITS:
        base = "".join(parts[:-1])
        for word in ("seconds", "computing"):
            if base in _WORDS[word]:
                return Heading(base, word, _UNITS[parts[-1]], _WORDS[word].index(base))
        if not base and parts[-1] not in ("min", "s"):
            return Heading(whole, "seconds", _UNITS[parts[-1]], 1)
        if base and base not in _NO_WORKERS and len(parts) == 2 and re.search(r"\d$", base):
            return Heading(base, "", _UNITS[parts[-1]], 0)  # a worker's column with a unit: w3_ms
    return Heading(whole, "", None, 0)


def not_a_worker(plain: str) -> bool:
    """Returns whether a column of that plain name, in a table of rounds, is no worker's."""
    return plain in _NO_WORKERS or bool(_UNNAMED.fullmatch(plain))


def is_time_of_day(value: float) -> bool:
    """Returns whether a number is a date of 2001 to 2096 in seconds, milli-, micro- or nanoseconds since 1970."""
    return any(1e9 <= value / scale < 4e9 for scale in (1.0, 1e3, 1e6, 1e9))


def odd_one_out(names: Sequence[str]) -> str | None:
    """Returns a name that lacks the form of the others, such as "loss" beside w0, w1 and w2; None if none does.

    Up to a fifth of the names may be odd; the first of them is returned.
    """
    forms = [re.sub(r"\d+", "0", name.strip().lower()) for name in names]
    usual = max(set(forms), key=lambda form: (forms.count(form), form))
    if "0" not in usual or forms.count(usual) < max(2, 0.8 * len(forms) - 1e-9 if len(forms) > 5 else len(forms) - 1):
        return None
    return next((name for name, form in zip(names, forms, strict=True) if form != usual), None)
