"""The rounds of a ledger file while a run is writing it: read tolerantly, and on from where the last look ended.

A last line that is still being written is left out; a file that has become shorter, since a resumed run has cut off
its last rows, is read anew. Of old rounds only what a line of a table needs is kept.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InvalidSetting

__all__ = ["PARTS", "LedgerReader", "RoundLine", "RunRows", "number"]

#: Parts of a round's time that its row has.
PARTS = ("waiting", "decoding", "aggregating")
_PHASES = ("train", "evaluate")
# What makes a row long, and a line of a table does not need: left out before parsing. Inside a JSON string each quote
# has a backslash before it, so that a reason never looks like a field.
_LONG = re.compile(rb'(?<!\{)"(timings|owing|coverage|asked|answered|unread|shards)": \[[^\]]*\]')


@dataclass(frozen=True)
class RoundLine:
    """What one row says in a line.

    Attributes:
        round: Server round.
        outcome: Of training, or of evaluation where nobody was asked to train; "ended" if neither left an entry.
        ended: Why waiting ended.
        seconds: Waiting, decoding, aggregating, of both phases together.
        waiting: Of the phase that `outcome` is of; None if it is not known.
        replies, after: How many replies sufficed, and after how many seconds; None if they never did.
        used, workers: How many workers are in the sum, and how many hold a sampled shard.
        stragglers: Workers that were not in time.
        kappa: Noise amplification.
        error: Decoding error.
        evaluation: Outcome of evaluation beside training.
        events: What else happened, in words.
        bytes: Down and up.
        privacy: What the row says of it.
        code, way: As in the row.
        ended_at: Seconds since the epoch.
        resumed: Whether it is the first round after a resume.
        raised: The exception with which the run ended.
        holders: Of each shard, where the code is new.
    """

    round: int
    outcome: str
    ended: str
    seconds: tuple[float, float, float]
    waiting: float | None
    replies: int | None
    after: float | None
    used: int
    workers: int | None
    stragglers: tuple[int, ...]
    kappa: float | None
    error: float | None
    evaluation: str | None
    events: tuple[str, ...]
    bytes: tuple[int, int]
    privacy: Mapping[str, Any] | None
    code: Mapping[str, Any]
    way: Mapping[str, Any]
    ended_at: float | None
    resumed: bool
    raised: str | None
    holders: tuple[tuple[int, ...], ...]


class _Raw:
    """A line of the file, parsed whole when it is asked for."""

    def __init__(self, line: bytes) -> None:
        self._line = line

    @cached_property
    def row(self) -> dict[str, Any]:
        """The whole row; the line itself is let go."""
        line, self._line = self._line, b""
        return dict(json.loads(line))


class RunRows:
    """The rounds of one run, in order; a round that was run again after a resume counts once.

    Args:
        name: Of the run.
        window: How many of the last rows are kept whole.
    """

    def __init__(self, name: str, window: int) -> None:
        self.name = name
        self.rounds: list[RoundLine] = []
        self._recent: deque[_Raw] = deque(maxlen=window)

    @property
    def recent(self) -> list[dict[str, Any]]:
        """The last rows, whole, oldest first."""
        return [one.row for one in self._recent]

    def add(self, line: RoundLine, raw: bytes) -> None:
        """One more round; those that it goes back behind are run again."""
        while self.rounds and self.rounds[-1].round >= line.round:
            self.rounds.pop()
            if self._recent:
                self._recent.pop()
        self.rounds.append(line)
        self._recent.append(_Raw(raw))


class LedgerReader:
    """Reads a ledger file again and again, each time only what is new.

    Args:
        path: The file; it need not be there yet.
        window: How many of a run's last rows are kept whole.
    """

    def __init__(self, path: str | os.PathLike[str], window: int = 200) -> None:
        self.path, self.window = Path(path), window
        #: Name of a run -> its rounds, in the order in which they began.
        self.runs: dict[str, RunRows] = {}
        #: Name of the run whose row is the file's last.
        self.last: str | None = None
        #: When the file was last written; None: it is not there.
        self.written: float | None = None
        self._forget()

    def read(self) -> bool:
        """Read on; whether anything is new.

        Raises:
            InvalidSetting: The file cannot be read, or a line other than an unfinished last one is no ledger row.
        """
        try:
            with self.path.open("rb") as file:
                self.written = os.fstat(file.fileno()).st_mtime
                file.seek(self._offset - len(self._before))
                anew = file.read(len(self._before)) != self._before
                if anew:
                    self._forget()
                file.seek(self._offset)
                new = self._read_lines(file)
        except FileNotFoundError:
            self.written = None
            return False
        except OSError as error:
            raise InvalidSetting(f"The ledger {str(self.path)!r} cannot be read: {error.strerror}.") from error
        return new or anew

    def _forget(self) -> None:
        self.runs, self.last = {}, None
        self._offset, self._line = 0, 0
        self._before = b""  # the last line read, by which the file is known again

    def _read_lines(self, file: BinaryIO) -> bool:
        new = False
        for raw in file:
            whole = raw.endswith(b"\n")
            if raw.strip():
                try:
                    light = json.loads(_LONG.sub(rb'"\1": []', raw))
                except ValueError as error:
                    if not whole:
                        break  # it is being written
                    raise InvalidSetting(
                        f"Line {self._line + 1} of the ledger {str(self.path)!r} is not JSON: {error}."
                    ) from None
                self._add(light, raw)
                new = True
            self._offset += len(raw)
            self._line += whole
            self._before = raw
        return new

    def _add(self, light: Any, raw: bytes) -> None:
        try:
            if not (_PHASES[0] in light or _PHASES[1] in light):
                raise KeyError("train")
            line = _line_of(light)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidSetting(
                f"Line {self._line + 1} of {str(self.path)!r} is no row of a ledger ({type(error).__name__}: {error}); "
                "name the file given as GradientCoding(ledger=...)."
            ) from None
        name = str(light.get("run") or "without a name")
        self.runs.setdefault(name, RunRows(name, self.window)).add(line, raw)
        self.last = name


def number(value: Any) -> float | None:
    """A finite number, or None: of what an older version did not write, or what was not finite."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < float("inf")
    return float(value) if ok else None


def _line_of(row: Mapping[str, Any]) -> RoundLine:
    phases = [row.get(kind) or {} for kind in _PHASES]
    main = phases[0] or phases[1]
    evaluation = phases[1].get("outcome") if phases[0] and phases[1] else None
    replies, code, way = number(main.get("decodable-after-replies")), row.get("code") or {}, row.get("way") or {}
    totals = [[number((one.get("seconds") or {}).get(part)) or 0.0 for part in PARTS] for one in phases]
    loads = [[int(number(one.get(key)) or 0) for key in ("bytes-down", "bytes-up")] for one in phases]
    return RoundLine(
        round=int(row["round"]),
        outcome=str(main.get("outcome", "ended")),
        ended=str(main.get("ended", "")),
        seconds=(totals[0][0] + totals[1][0], totals[0][1] + totals[1][1], totals[0][2] + totals[1][2]),
        waiting=number((main.get("seconds") or {}).get("waiting")),
        replies=None if replies is None else int(replies),
        after=number(main.get("decodable-after-seconds")),
        used=len(main.get("used") or ()),
        workers=main.get("workers"),
        stragglers=tuple(int(i) for i in main.get("stragglers") or () if i is not None),
        kappa=number(main.get("kappa")),
        error=number(main.get("decoding-error")),
        evaluation=None if evaluation is None else str(evaluation),
        events=tuple(_events(phases)),
        bytes=(loads[0][0] + loads[1][0], loads[0][1] + loads[1][1]),
        privacy=main.get("privacy"),
        code={
            **{name: code.get(name) for name in ("name", "n", "k", "s", "m")},
            "exact": code.get("exact") is not False,
        },
        way={name: way.get(name) for name in ("send", "patience", "load")},
        ended_at=number(row.get("ended-at")),
        resumed=bool(row.get("resumed")),
        raised=str(row["ended-by"]) if row.get("ended-by") else None,
        holders=tuple(tuple(int(i) for i in one) for one in row.get("holders") or ()),
    )


def _events(phases: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What happened beside the outcome."""
    failed = [
        sum(not str(one.get("reason")).startswith("duplicate") for one in phase.get("rejected") or ())
        for phase in phases
    ]
    if any(failed):
        yield f"{failed[0]} failed" if failed[0] else f"{failed[1]} failed to evaluate"
    for name in ("joined", "restarted"):
        count = sum(len(phase.get(name) or ()) for phase in phases)
        if count:
            yield f"{count} {name}"
    filled = sum(len(one.get("shards") or ()) for one in phases[0].get("filled-in") or ())
    if filled:
        yield f"{filled} shards filled in"
