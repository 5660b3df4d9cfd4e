"""Names of columns in exported tables: what they mean, in which unit, and which of them is no worker's."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

__all__ = [
    "Heading",
    "have_one_form",
    "heading_of",
    "is_time_of_day",
    "names_a_round",
    "not_a_time",
    "not_a_worker",
    "numbers_rows",
    "odd_one_out",
    "unit_of",
]

#: Meaning -> its names in order of preference: lower case, letters and digits only, without accents.
_WORDS: dict[str, tuple[str, ...]] = {
    "worker": (
        "worker", "workerid", "client", "clientid", "cid", "node", "nodeid", "device", "deviceid", "partitionid",
        "partition", "machine", "host", "hostname", "participant", "rank", "clientname", "nodename", "workername",
        "workernumber", "clientnumber", "nodenumber", "workerindex", "clientindex", "instance", "agent", "peer", "silo",
        "site", "knoten", "arbeiter", "rechner", "gerat", "teilnehmer", "noeud", "travailleur", "appareil",
        "trabajador", "nodo", "dispositivo", "cliente", "trabalhador", "lavoratore", "knooppunt", "werker", "wezel",
        "klient", "pracownik", "узел", "клиент", "работник", "устройство", "节点", "客户端", "设备", "工作节点",
        "ノード", "クライアント", "端末", "클라이언트", "노드",
    ),
    "seconds": (
        "seconds", "duration", "latency", "elapsed", "runtime", "secs", "sec", "took", "totaltime", "totalseconds",
        "totalduration", "durationtime", "elapsedtime", "jobtime", "trainingtime", "traintime", "fittime",
        "responsetime", "wallclock", "walltime", "time", "roundtime",
        "sekunden", "dauer", "zeit", "laufzeit", "dauert", "secondes", "duree", "temps", "segundos", "duracion",
        "tiempo", "duracao", "tempo", "secondi", "durata", "seconden", "duur", "tijd", "sekundy", "czas", "секунды",
        "время", "длительность", "耗时", "时间", "秒", "用时", "時間", "所要時間", "초", "시간",
    ),
    "round": (
        "round", "serverround", "currentround", "roundnumber", "rnd", "roundid", "iteration", "iter", "epoch", "step",
        "runde", "durchgang", "tour", "ronde", "ronda", "rodada", "giro", "runda", "раунд", "轮次", "轮", "回合",
        "ラウンド", "라운드",
    ),
    "shards": ("shards", "numshards", "nshards", "load", "shardcount", "scherben", "teile"),
    "computing": ("computing", "compute", "computetime", "computation", "computationtime", "computetimes"),
}  # fmt: skip
_UNITS = {
    "s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "sek": 1.0, "sekunden": 1.0, "secondes": 1.0,
    "segundos": 1.0, "secondi": 1.0,
    "ms": 1e-3, "msec": 1e-3, "msecs": 1e-3, "millis": 1e-3, "millisecond": 1e-3, "milliseconds": 1e-3,
    "millisekunden": 1e-3, "millisecondes": 1e-3, "milisegundos": 1e-3, "毫秒": 1e-3,
    "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "usec": 1e-6, "micros": 1e-6, "microseconds": 1e-6,
    "ns": 1e-9, "nsec": 1e-9, "nanos": 1e-9, "nanoseconds": 1e-9,
    "min": 60.0, "mins": 60.0, "minutes": 60.0,
    "h": 3600.0, "hr": 3600.0, "hrs": 3600.0, "hours": 3600.0,
}  # fmt: skip
#: Names of columns that number the rows of a table.
_COUNTERS = frozenset(
    {*_WORDS["round"], "", "index", "idx", "id", "row", "rowid", "no", "nr", "number", "tick", "t"}
)  # fmt: skip
#: Names of columns in a table of rounds that are no worker's.
_NO_WORKERS = frozenset(
    {*_COUNTERS, "timestamp", "ts", "date", "datetime", "day", "hour", "start", "starttime", "end", "endtime", "begin",
     "created", "createdat", "when", "unixtime", "epochtime", "loss", "accuracy", "acc", "auc", "f1", "mean", "avg",
     "average", "median", "max", "maximum", "min", "minimum", "sum", "total", "std", "stddev", "count", "roundtime",
     "run", "runid", "seed", "meantime", "maxtime", "mintime", "totaltime", "averagetime", "avgtime", "slowest",
     "fastest", "longest", "shortest", "makespan", "p50", "p90", "p95", "p99", "lr", "learningrate", "batchsize",
     "epochs", "localepochs", "numclients", "trainloss", "testloss", "valloss", "trainacc", "testacc", "valacc",
     "trainaccuracy", "testaccuracy", "valaccuracy", "experiment", "trial"}
)  # fmt: skip
#: Parts of names of columns that hold something else than times.
_NO_TIMES = frozenset(
    {"rate", "speed", "throughput", "hz", "fps", "qps", "percent", "pct", "bytes", "kb", "mb", "gb", "mib", "gib",
     "memory", "watt", "watts", "joule", "joules", "energy", "power", "temperature", "examples", "samples", "batches",
     "loss", "accuracy", "acc", "log"}
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
    """Returns what the name of a column means: "Duration (ms)" and "durationMs" are seconds, in units of 0.001."""
    parts = _parts(name)
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
        if not base and parts[-1] not in ("min", "s", "h"):
            return Heading(whole, "seconds", _UNITS[parts[-1]], 1)
        bracketed = bool(re.search(r"[(\[][^()\[\]]*[)\]]\s*$", name))
        of_a_worker = len(parts) == 2 and re.search(r"\d$", base) and parts[-1] != "h"
        if base and base not in _NO_WORKERS and (bracketed or of_a_worker):
            return Heading(base, "", _UNITS[parts[-1]], 0)  # a worker's column with a unit: w3_ms, alice [ms]
    return Heading(whole, "", None, 0)


def _parts(name: str) -> list[str]:
    """Returns the words of a name, in lower case and without accents: "durée (ms)" and "dureeMs" are duree and ms."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", " ", name.strip())
    decomposed = unicodedata.normalize("NFKD", text.lower())
    plain = re.sub(r"(?<=[a-z])[\u0300-\u036f]+", "", decomposed)  # not of letters of other scripts
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", plain))


def unit_of(text: str) -> float | None:
    """Returns the seconds of a unit's name, such as 0.001 for "ms"; None if it is not known."""
    return _UNITS.get(text.strip().lower())


def not_a_time(name: str) -> str | None:
    """Returns the word of a column's name that says that it holds no times, such as "rate"; None if none does."""
    return next((part for part in _parts(name) if part in _NO_TIMES), None)


def numbers_rows(plain: str) -> bool:
    """Returns whether a column of that plain name numbers the rows, as an index and a column of rounds do."""
    return plain in _COUNTERS or bool(_UNNAMED.fullmatch(plain))


def names_a_round(name: str, *, short: bool = False) -> bool:
    """Returns whether a text is a round with its number: "Round 3" or "epoch-3", and if short, also "r3"."""
    found = re.fullmatch(r"([^\W\d_]+)[\W_]*\d+", name.strip())
    return found is not None and (found[1].lower() in _WORDS["round"] or (short and found[1].lower() in ("r", "t")))


def not_a_worker(plain: str) -> bool:
    """Returns whether a column of that plain name, in a table of rounds, is no worker's."""
    return plain in _NO_WORKERS or bool(_UNNAMED.fullmatch(plain))


def is_time_of_day(value: float) -> bool:
    """Returns whether a number is a date of 2001 to 2096 in seconds, milli-, micro- or nanoseconds since 1970."""
    return any(1e9 <= value / scale < 4e9 for scale in (1.0, 1e3, 1e6, 1e9))


def odd_one_out(names: Sequence[str]) -> tuple[str, str] | None:
    """Returns a name that lacks the form of the others, and one of those: "loss" and w0 of w0, w1, w2 and loss.

    Up to a fifth of the names may be odd, or up to a half if they have no digits; the first of them is returned.
    """
    forms = [re.sub(r"\d+", "0", name.strip().lower()) for name in names]
    usual = max(set(forms), key=lambda form: (forms.count(form), form))
    if "0" not in usual or forms.count(usual) < 2:
        return None
    odd = [(name, form) for name, form in zip(names, forms, strict=True) if form != usual]
    enough = 0.8 * len(forms) - 1e-9 if len(forms) > 5 else len(forms) - 1
    if forms.count(usual) < enough:
        odd = [] if forms.count(usual) < 0.5 * len(forms) else [(name, form) for name, form in odd if "0" not in form]
    return (odd[0][0], names[forms.index(usual)]) if odd else None


def have_one_form(names: Sequence[str]) -> bool:
    """Returns whether most of several names differ in their numbers only, as w0, w1 and w2 do."""
    forms = [re.sub(r"\d+", "0", name.strip().lower()) for name in names]
    return any("0" in form and forms.count(form) >= max(2, 0.5 * len(forms)) for form in {*forms})
