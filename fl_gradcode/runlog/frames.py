"""A ledger as pandas data frames: one row for each phase of a round, or one for each job."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .figures import figures_of
from .ledger import Ledger
from .rows import PHASES, RoundRow

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["jobs_frame", "rounds_frame"]

_NAMES = (
    "exact", "waiting-seconds", "decoding-seconds", "aggregating-seconds", "decodable-after-replies",
    "decodable-after-seconds", "used", "stragglers", "rejected", "late", "decoding-error", "kappa",
    "replica-disagreement", "megabytes-down", "megabytes-up", "epsilon",
)  # fmt: skip


def rounds_frame(ledger: str | os.PathLike[str] | Ledger | Sequence[RoundRow]) -> pd.DataFrame:
    """Returns a data frame with one row for each phase of a round, in the order of the ledger.

    frame = rounds_frame("ledger.jsonl")
    frame[frame["phase"] == "train"].plot(x="round", y="waiting_seconds")

    Columns are `run`, `round`, `phase`, `ended_at` (UTC), `code`, `n`, `k`, `s`, `send`, `outcome`, `ended`, `workers`,
    and the numbers of `figures_of` with underscores. A number that is not known is NaN.

    Args:
        ledger: Path of a ledger file, a `Ledger`, or rows.

    Raises:
        InvalidSetting: The file is no ledger.
        ImportError: pandas is not installed.
    """
    pandas = _pandas()
    names = [name.replace("-", "_") for name in _NAMES]
    first = ["run", "round", "phase", "ended_at", "code", "n", "k", "s", "send", "outcome", "ended", "workers"]
    lines = []
    for row in _rows(ledger):
        figures = figures_of(row)
        for kind in PHASES:
            if (phase := row.phase(kind)) is not None:
                told = (figures.get(f"{kind}/{name}") for name in _NAMES)
                send = None if row.way is None else row.way.send
                code = row.code
                lines.append((
                    row.run, row.round, kind, row.ended_at, code.name, code.n, code.k, code.s, send, phase.outcome,
                    phase.ended, phase.workers, *told,
                ))  # fmt: skip
    frame = pandas.DataFrame(lines, columns=[*first, *names])
    frame["ended_at"] = pandas.to_datetime(frame["ended_at"].astype("float64"), unit="s", utc=True)
    return frame.astype(dict.fromkeys(names, "float64"))


def jobs_frame(ledger: str | os.PathLike[str] | Ledger | Sequence[RoundRow]) -> pd.DataFrame:
    """Returns a data frame with one row for each job whose reply came in, in the order of the ledger.

    Columns are `run`, `round` and `phase` in which the reply came, `worker`, `asked` and `kind` (round and phase that
    asked), `shards`, `seconds` from send to reply, and `computing`, the seconds that the client spent on the shards.

    Args:
        ledger: Path of a ledger file, a `Ledger`, or rows.

    Raises:
        InvalidSetting: The file is no ledger.
        ImportError: pandas is not installed.
    """
    pandas = _pandas()
    lines = [
        (row.run, row.round, kind, one.worker, one.round, one.kind, one.shards, one.seconds, one.computing)
        for row in _rows(ledger)
        for kind in PHASES
        if (phase := row.phase(kind)) is not None
        for one in phase.timings
    ]
    columns = ["run", "round", "phase", "worker", "asked", "kind", "shards", "seconds", "computing"]
    frame = pandas.DataFrame(lines, columns=columns)
    return frame.astype({"worker": "Int64", "asked": "Int64", "seconds": "float64", "computing": "float64"})


def _rows(ledger: str | os.PathLike[str] | Ledger | Sequence[RoundRow]) -> Iterable[RoundRow]:
    if isinstance(ledger, str | os.PathLike):
        return Ledger.read_rounds(ledger)
    if isinstance(ledger, Ledger):
        return ledger.rounds if ledger.path is None else Ledger.read_rounds(ledger.path)
    return ledger


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("A data frame needs pandas: pip install 'pandas>=2.2'.") from error
    return pandas
