"""Reading a ledger file while a run writes it: each look continues where the last one ended.

A last line that is still being written is left for the next look. If the file has changed before that place, since a
resumed run has cut off its last rows, the whole file is read again. Of older rounds only a summary is kept.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from .._files import open_file, parse_json
from ..errors import InvalidSetting
from .lines import LONGEST, row_of, where_in
from .rows import CodeLine, ModeLine, PhaseRow, PrivacyLine, RoundRow

__all__ = ["HARMLESS", "PARTS", "LedgerReader", "RoundLine", "RunRows"]

#: The parts of a round's time that its row holds.
PARTS = ("waiting", "decoding", "aggregating")
#: Kinds of rejections that are no failure of the worker.
HARMLESS = ("duplicate", "duplicate-worker")

# Long lists that the summary of a round does not need. They are cut out of the text of a line before it is parsed. With
# 200 workers that makes reading ten times as fast: a ledger of 10,000 rounds takes 4 seconds instead of 50. A quote
# inside a JSON string has a backslash before it, so that a reason never looks like a field. `filled-in`, whose entries
# begin with "shards", is kept. A list in a list is not cut, so that the search takes no longer than the line is.
_LONG = re.compile(rb'(?<!\{)"(timings|owing|coverage|asked|answered|unread|shards)": \[[^][]*\]')


@dataclass(frozen=True)
class RoundLine:
    """The summary of one ledger row.

    Attributes:
        round: Server round.
        outcome: Outcome of training, or of evaluation if no node was asked to train; "ended" if there was neither.
        ended: Why waiting ended, in the phase that `outcome` is from.
        seconds: Seconds of waiting, decoding and aggregating, of both phases together.
        waiting: Seconds of waiting in the phase that `outcome` is from; None if not known.
        replies, after: How many replies sufficed, and after how many seconds; None if they never did.
        used, workers: How many workers are in the sum, and how many hold a sampled shard.
        stragglers: Workers that were not in time.
        kappa: Noise amplification.
        error: Decoding error.
        ages: Number of shards whose update is of each age in rounds, from 0; empty without bounded staleness.
        evaluation: Outcome of evaluation, if there was training too.
        events: What else happened, in words.
        bytes: Bytes sent, and bytes of the replies read.
        privacy: Privacy promised and spent.
        code, way: As in the row.
        ended_at: When the round ended, in seconds since the epoch.
        resumed: Whether it is the first round after a resume.
        raised: The exception that ended the run.
        holders: Workers that hold each shard, if the code is new; else empty.
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
    ages: tuple[int, ...]
    evaluation: str | None
    events: tuple[str, ...]
    bytes: tuple[int, int]
    privacy: PrivacyLine | None
    code: CodeLine
    way: ModeLine | None
    ended_at: float | None
    resumed: bool
    raised: str | None
    holders: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, row: RoundRow) -> RoundLine:
        """Returns the summary of a row."""
        main = row.phases[0] if row.phases else None
        evaluation = row.evaluate.outcome if row.train is not None and row.evaluate is not None else None
        spent = [one.seconds for one in row.phases]
        return cls(
            round=row.round,
            outcome="ended" if main is None else main.outcome,
            ended="" if main is None else main.ended,
            seconds=(
                sum(one.waiting or 0.0 for one in spent),
                sum(one.decoding or 0.0 for one in spent),
                sum(one.aggregating or 0.0 for one in spent),
            ),
            waiting=None if main is None else main.seconds.waiting,
            replies=None if main is None else main.decodable_after_replies,
            after=None if main is None else main.decodable_after_seconds,
            used=0 if main is None else len(main.used),
            workers=None if main is None else main.workers,
            stragglers=() if main is None else main.stragglers,
            kappa=None if main is None else main.kappa,
            error=None if main is None else main.decoding_error,
            ages=() if main is None else main.ages,
            evaluation=evaluation,
            events=tuple(_events(row)),
            bytes=(sum(one.bytes_down for one in row.phases), sum(one.bytes_up for one in row.phases)),
            privacy=None if main is None else main.privacy,
            code=row.code,
            way=row.way,
            ended_at=row.ended_at,
            resumed=row.resumed,
            raised=row.ended_by,
            holders=row.holders or (),
        )


def _events(row: RoundRow) -> Iterator[str]:
    """Yields what happened in a round beside its outcome."""
    trained, evaluated = _failures(row.train), _failures(row.evaluate)
    if trained or evaluated:
        yield f"{trained} failed" if trained else f"{evaluated} failed to evaluate"
    joined = sum(len(one.joined) for one in row.phases)
    if joined:
        yield f"{joined} joined"
    restarted = sum(len(one.restarted) for one in row.phases)
    if restarted:
        yield f"{restarted} restarted"
    filled = 0 if row.train is None else sum(len(one.shards) for one in row.train.filled_in)
    if filled and row.train is not None and not row.train.ages:  # else the ages say it
        yield f"{filled} shards filled in"


def _failures(phase: PhaseRow | None) -> int:
    return 0 if phase is None else sum(one.kind not in HARMLESS for one in phase.rejected)


class _Line:
    """A line of the file, which is parsed whole when its row is asked for.

    Args:
        text: The line.
        where: The line's number and file, for errors.
    """

    def __init__(self, text: bytes, where: str) -> None:
        self._text, self._where = text, where

    @cached_property
    def row(self) -> RoundRow:
        """The whole row. The text is dropped."""
        row = row_of(self._text, self._where)
        self._text = b""
        return row


class RunRows:
    """The rounds of one run, in order. A round that was run again after a resume counts once.

    Args:
        name: Name of the run.
        window: How many of the last rows are kept whole.
    """

    def __init__(self, name: str, window: int) -> None:
        self.name = name
        self.rounds: list[RoundLine] = []
        self._recent: deque[_Line] = deque(maxlen=window)

    @property
    def recent(self) -> list[RoundRow]:
        """The last rows, whole, oldest first.

        Raises:
            InvalidSetting: One of them is not a ledger row.
        """
        return [one.row for one in self._recent]

    @property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """The workers that hold each shard under the present code; empty if no row says so."""
        return next((one.holders for one in reversed(self.rounds) if one.holders), ())

    def _add(self, summary: RoundLine, line: _Line) -> None:
        """Adds one more round. Rounds with the same or a later number are being run again."""
        while self.rounds and self.rounds[-1].round >= summary.round:
            self.rounds.pop()
            if self._recent:
                self._recent.pop()
        self.rounds.append(summary)
        self._recent.append(line)


class LedgerReader:
    """Reads a ledger file again and again, each time only the new lines.

    Args:
        path: The file, which need not exist yet.
        window: How many of a run's last rows are kept whole.
    """

    def __init__(self, path: str | os.PathLike[str], window: int = 200) -> None:
        self.path, self.window = Path(path), window
        #: Whether the file was there at the last look.
        self.exists = False
        self._forget()

    def read(self) -> bool:
        """Reads the new lines of the file. Returns whether anything has changed.

        Raises:
            InvalidSetting: The file cannot be read, or a line other than an unfinished last one is not a ledger row.
        """
        try:
            with os.fdopen(open_file(self.path), "rb") as file:
                self.exists = True
                file.seek(self._offset - len(self._before))
                replaced = file.read(len(self._before)) != self._before
                if replaced:
                    self._forget()
                file.seek(self._offset)
                new = self._read_lines(file)
        except FileNotFoundError:
            self.exists = False
            return False
        except OSError as error:
            raise InvalidSetting(f"The ledger {str(self.path)!r} cannot be read: {error.strerror}.") from error
        return new or replaced

    def _forget(self) -> None:
        #: Name of a run -> its rounds, in the order in which the runs began.
        self.runs: dict[str, RunRows] = {}
        #: Name of the run that the file's last row is of.
        self.last: str | None = None
        self._offset, self._line = 0, 0
        self._before = b""  # the last line read, by which the file is recognised

    def _read_lines(self, file: BinaryIO) -> bool:
        new = False
        while text := file.readline(LONGEST + 1):
            whole = text.endswith(b"\n")
            where = where_in(self.path, self._line + 1)
            if len(text) > LONGEST:
                raise InvalidSetting(f"{where} has more than {LONGEST} bytes; no row is as long.")
            if not whole and not _is_json(text):
                break  # it is being written
            if text == b"\n" and self._before and not self._before.endswith(b"\n"):
                self._offset, self._line, self._before = self._offset + 1, self._line + 1, text
                continue  # the end of a line that was read before it had one
            row = row_of(_LONG.sub(rb'"\1": []', text), where)
            self.runs.setdefault(row.run, RunRows(row.run, self.window))._add(RoundLine.of(row), _Line(text, where))
            self.last = row.run
            new = True
            self._offset += len(text)
            self._line += whole
            self._before = text
        return new


def _is_json(text: bytes) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True
