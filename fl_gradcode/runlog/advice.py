"""What the planner recommends for a run, from the job times of its last rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._text import numbered
from ..errors import FlGradcodeError
from ..latency import Law, scaled
from ..planning import LEARNED, Scheme, make_plan, partial_work
from .history import History
from .rows import RoundRow

__all__ = ["LEAST", "Advice", "advise"]

#: Number of rounds with job times that a recommendation needs.
LEAST = 5
_ROUNDS, _RUNS = 48, 32  # rounds of a simulated run, and simulated runs, for few workers
_MOST = 15_000  # rounds times workers that are simulated for each scheme, which takes some seconds
_MANY = 200  # above so many workers only a few tolerances are compared


@dataclass(frozen=True)
class Advice:
    """A recommendation, or why there is none.

    Attributes:
        verdict: The recommendation, or the reason why there is none, in one sentence.
        python: The line of Python to paste; empty without a recommendation.
        own: Whether the run already does what is recommended; None if the planner does not know its code.
        own_seconds: Expected seconds a round of the run's own scheme, by the same times; None if not known.
        rounds: Number of rounds whose times were used.
        notes: What the recommended scheme does, and what to know of these times, in sentences.
    """

    verdict: str
    python: str = ""
    own: bool | None = None
    own_seconds: float | None = None
    rounds: int = 0
    notes: tuple[str, ...] = ()


def advise(rows: Sequence[RoundRow], *, gone: Sequence[int] = (), holders: Sequence[Sequence[int]] = ()) -> Advice:
    """Returns a recommendation from a run's last rows since its number of workers last changed.

    Args:
        rows: The last rows, oldest first; at least one.
        gone: Workers that no longer answer. The plan assumes that they never will.
        holders: Workers that hold each shard, as far as known.
    """
    last = rows[-1]
    n = last.code.n
    if n < 2:
        return Advice("no recommendation: planning needs at least 2 workers.")
    absent = sorted({*range(n)}.difference(*holders)) if holders else []
    if absent:
        who = numbered("worker", absent)
        return Advice(
            f"no recommendation: {who} hold{'s' * (len(absent) == 1)} no shards now, and a plan is for n={n} that do."
        )
    first = len(rows)
    while first and rows[first - 1].code.n == n:
        first -= 1
    simulated = max(20, min(_ROUNDS * _RUNS, _MOST // n))
    rows = rows[first:][-simulated:]  # a replay begins with the first
    try:
        history = History.of_ledger(rows) if any(phase.timings for row in rows for phase in row.phases) else History(n)
        if history.rounds < LEAST:
            left = f"{history.rounds} of the last rounds left job times"
            return Advice(f"no recommendation yet: {left}, {LEAST} are needed.", rounds=history.rounds)
        s = last.code.s
        few = None if n <= _MANY else sorted({1, 3, s} if 0 < s < n else {1, 3})
        latency = history.latency()
        if gone:
            assert isinstance(latency.compute, Law)
            latency = replace(latency, compute=scaled(latency.compute, dict.fromkeys(gone, float("inf"))))
        plan = make_plan(
            latency,
            n,
            tolerances=few,
            rounds=min(_ROUNDS, simulated),
            populations=max(1, simulated // _ROUNDS),
            besides=_patient(last, n),
        )
    except FlGradcodeError as error:
        return Advice(f"no recommendation: {error}")
    own = _own(last, n)
    line = next((line for line in plan.lines if line.scheme.exact and _kind(line.scheme) == own), None)
    verdict = plan.verdict
    if gone:
        answer = "answers" if len(gone) == 1 else "answer"
        verdict = f"if {numbered('worker', gone)} never {answer} again: {verdict[0].lower()}{verdict[1:]}"
    return Advice(
        verdict,
        plan.recommended.scheme.python,
        None if own is None else _kind(plan.recommended.scheme) == own,
        None if line is None or not line.steady < float("inf") else line.steady,
        history.rounds,
        _notes(plan.recommended.scheme.meaning, history),
    )


def _notes(meaning: str, history: History) -> tuple[str, ...]:
    """Returns what to know of a recommendation, in sentences."""
    return (*([meaning] if meaning else []), *(f"Note: {note}." for note in history.notes))


def _patient(row: RoundRow, n: int) -> list[Scheme]:
    """Returns what the run does, if that is a patience which the planner does not compare by itself."""
    own, s = _own(row, n), row.code.s
    known = own is None or not own[0] or own[1] in (0.0, LEARNED) or not 1 <= s < n
    return [] if known or row.way is None else [partial_work(n, s, patience=row.way.patience or 0.0)]


def _kind(scheme: Scheme) -> tuple[Any, ...]:
    """Returns what makes two schemes the same to the planner."""
    return scheme.shardwise, scheme.patience, scheme.m, scheme.s, scheme.enough


def _own(row: RoundRow, n: int) -> tuple[Any, ...] | None:
    """Returns what the run does, as `_kind` describes it; None if the planner does not compare it."""
    code, way = row.code, row.way
    if code.name == "uncoded":
        return False, 0.0, 1, 0, n
    if way is None:
        return None
    if code.name == "cyclic repetition" and way.send == "coded":
        return False, 0.0, 1, code.s, n - code.s
    if code.name != "fractional repetition":
        return None
    return (
        (True, LEARNED if way.learned else way.patience, 1, code.s, None)
        if way.send == "shards"
        else (False, 0.0, code.m, code.s, None)
    )
