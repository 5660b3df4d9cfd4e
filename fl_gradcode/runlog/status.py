"""The status of a run so far, as one value: totals, rounds, workers, and notices for a person.

reader = LedgerReader("ledger.jsonl")
reader.read()
status = status_of(reader.runs[reader.last])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from .notices import Notice, notices_of
from .reader import PARTS, RoundLine, RunRows
from .rows import CodeLine, PrivacyLine
from .workers import WorkerLine, workers_of

__all__ = ["RunStatus", "as_json", "status_of"]


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        run: Name of the run.
        code: The code of its last round.
        sending: How it sends, in words.
        outcomes: Number of rounds by outcome.
        rounds: All of its rounds.
        seconds: Seconds spent waiting, decoding, aggregating and between rounds. None for the last one if it is not
            known.
        virtual: Whether waiting was on a virtual clock, which it was if it took longer than the time that passed.
        ages: Number of updates of each age in rounds that were used, from 0; empty without bounded staleness.
        bytes_down, bytes_up: Bytes sent, and bytes of the replies read.
        privacy: Privacy promised and spent, from the last row that says so; None without privacy.
        workers: The workers, those with a mark first.
        looked_at: Number of latest rounds that `workers` is based on.
        notices: What needs a person's attention, the most serious first.
    """

    run: str
    code: CodeLine
    sending: str
    outcomes: Mapping[str, int]
    rounds: Sequence[RoundLine]
    seconds: Mapping[str, float | None]
    virtual: bool
    ages: Sequence[int]
    bytes_down: int
    bytes_up: int
    privacy: PrivacyLine | None
    workers: Sequence[WorkerLine]
    looked_at: int
    notices: Sequence[Notice]

    @property
    def last(self) -> RoundLine:
        """The last round."""
        return self.rounds[-1]


def status_of(run: RunRows) -> RunStatus:
    """Returns the status of a run: totals over all of its rounds, workers and notices from its last ones.

    Raises:
        InvalidSetting: One of its last rows is not a ledger row.
    """
    recent = run.recent
    workers = workers_of(recent, run.holders)
    seconds, virtual = _seconds(run.rounds)
    return RunStatus(
        run=run.name,
        code=run.rounds[-1].code,
        sending=_sending(run.rounds),
        outcomes=dict(Counter(one.outcome for one in run.rounds)),
        rounds=tuple(run.rounds),
        seconds=seconds,
        virtual=virtual,
        ages=_ages(run.rounds),
        bytes_down=sum(one.bytes[0] for one in run.rounds),
        bytes_up=sum(one.bytes[1] for one in run.rounds),
        privacy=next((one.privacy for one in reversed(run.rounds) if one.privacy), None),
        workers=workers,
        looked_at=len(recent),
        notices=tuple(notices_of(run.rounds, recent, workers, run.holders)),
    )


def _seconds(rounds: Sequence[RoundLine]) -> tuple[dict[str, float | None], bool]:
    """Returns the seconds of a run by what they were spent on, and whether waiting was on a virtual clock.

    A pause before a resume does not count as time between rounds, nor does a step back of the clock.
    """
    sums: dict[str, float | None] = {part: sum(one.seconds[i] for one in rounds) for i, part in enumerate(PARTS)}
    passed = worked = 0.0
    known = False
    for before, one in pairwise(rounds):
        if before.ended_at is None or one.ended_at is None or one.resumed or one.ended_at < before.ended_at:
            continue
        passed, worked, known = passed + one.ended_at - before.ended_at, worked + sum(one.seconds), True
    virtual = known and worked > 1.1 * passed + 1.0
    sums["between rounds"] = max(0.0, passed - worked) if known and not virtual else None
    return sums, virtual


def _sending(rounds: Sequence[RoundLine]) -> str:
    """Returns in words how a run sends."""
    ways = [one.way for one in rounds if one.way is not None]
    if not ways:
        return "nothing yet"
    last = ways[-1]
    if last.send == "shards":
        patience = "" if last.patience is None else f", patience {last.patience:g}"
        told = "one shard a message" + (", patience learned" if last.learned else patience)
    else:
        told = f"coded vectors of {last.load} shard{'s' * (last.load != 1)}"
    return told if len({*ways}) == 1 else f"chosen from round to round, now {told}"


def _ages(rounds: Sequence[RoundLine]) -> tuple[int, ...]:
    """Returns the number of updates of each age that all rounds used."""
    oldest = max((len(one.ages) for one in rounds), default=0)
    return tuple(sum(one.ages[age] for one in rounds if age < len(one.ages)) for age in range(oldest))


def as_json(status: RunStatus, rounds: int) -> dict[str, Any]:
    """Returns the status as JSON values with kebab-case keys, with its last `rounds` rounds only."""
    shown = replace(status, rounds=status.rounds[-rounds:])
    return {**_kebab(asdict(shown)), "rounds-done": len(status.rounds)}


def _kebab(value: Any) -> Any:
    """Returns a value whose keys are spelled as in the ledger."""
    if isinstance(value, dict):
        return {str(key).replace("_", "-").replace(" ", "-"): _kebab(one) for key, one in value.items()}
    return [_kebab(one) for one in value] if isinstance(value, list | tuple) else value
