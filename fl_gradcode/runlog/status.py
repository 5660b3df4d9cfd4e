"""What has happened in a run so far, as one value: totals, its last rounds, its workers, and what a person must see.

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

from ..errors import FlGradcodeError
from .notices import Notice, notices_of
from .reader import PARTS, RoundLine, RunRows
from .workers import WorkerLine, workers_of

__all__ = ["RunStatus", "as_json", "status_of"]


@dataclass(frozen=True)
class RunStatus:
    """A run so far.

    Attributes:
        run: Its name.
        code: As in its last row: name, n, k, s, m.
        sending: How it sends, in words.
        outcomes: How many rounds ended how.
        rounds: All of its rounds.
        seconds: Waiting, decoding, aggregating, and the rest between rounds if rows say when they were written.
        virtual: Whether waiting was on a virtual clock: it was longer than the time that passed.
        bytes_down, bytes_up: Payload sent, and read.
        privacy: What the last row that has it says; None without privacy.
        workers: Those worth a look first.
        looked_at: From how many of the last rounds the lines about workers are.
        notices: What a person must see.
    """

    run: str
    code: Mapping[str, Any]
    sending: str
    outcomes: Mapping[str, int]
    rounds: Sequence[RoundLine]
    seconds: Mapping[str, float | None]
    virtual: bool
    bytes_down: int
    bytes_up: int
    privacy: Mapping[str, Any] | None
    workers: Sequence[WorkerLine]
    looked_at: int
    notices: Sequence[Notice]

    @property
    def last(self) -> RoundLine:
        """The last round."""
        return self.rounds[-1]


def status_of(run: RunRows) -> RunStatus:
    """Totals of all of a run's rounds; workers and warnings by its last ones.

    Raises:
        FlGradcodeError: A row has fields that make no sense.
    """
    try:
        recent = run.recent
        workers = workers_of(recent, next((one.holders for one in reversed(run.rounds) if one.holders), ()))
        seconds, virtual = _seconds(run.rounds)
        return RunStatus(
            run=run.name,
            code=run.rounds[-1].code,
            sending=_sending(run.rounds),
            outcomes=dict(Counter(one.outcome for one in run.rounds)),
            rounds=tuple(run.rounds),
            seconds=seconds,
            virtual=virtual,
            bytes_down=sum(one.bytes[0] for one in run.rounds),
            bytes_up=sum(one.bytes[1] for one in run.rounds),
            privacy=next((one.privacy for one in reversed(run.rounds) if one.privacy), None),
            workers=workers,
            looked_at=len(recent),
            notices=tuple(notices_of(run.rounds, recent, workers)),
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FlGradcodeError):
            raise
        raise FlGradcodeError(
            f"A row of the run {run.name!r} is no ledger row ({type(error).__name__}: {error})."
        ) from error


def _seconds(rounds: Sequence[RoundLine]) -> tuple[dict[str, float | None], bool]:
    """Time by what it went into; and whether waiting was on a virtual clock.

    A pause before a resume, and a clock that was set back, count as no time between rounds.
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
    ways = {tuple(one.way.values()) for one in rounds if one.way.get("send")}
    last = next((one.way for one in reversed(rounds) if one.way.get("send")), None)
    if last is None:
        return "not said"
    load, patience = last.get("load"), last.get("patience")
    if last["send"] == "shards":
        told = "one shard a message" + ("" if patience is None else f", patience {patience:g}")
    else:
        told = "coded vectors" + ("" if load is None else f" of {load} shard{'s' * (load != 1)}")
    return told if len(ways) == 1 else f"chosen from round to round, now {told}"


def as_json(status: RunStatus, rounds: int) -> dict[str, Any]:
    """All of it but the rounds before the last `rounds`."""
    shown = replace(status, rounds=status.rounds[-rounds:])
    return {**_kebab(asdict(shown)), "rounds-done": len(status.rounds)}


def _kebab(value: Any) -> Any:
    """Keys as in the ledger."""
    if isinstance(value, dict):
        return {str(key).replace("_", "-").replace(" ", "-"): _kebab(one) for key, one in value.items()}
    return [_kebab(one) for one in value] if isinstance(value, list | tuple) else value
