"""What the planner would now recommend for a run, from the job times of its last rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import FlGradcodeError
from ..latency import History, Law, scaled
from ..planning import Scheme, make_plan
from .workers import told_workers

__all__ = ["LEAST", "Advice", "advise"]

#: Rounds with job times that a recommendation takes.
LEAST = 5
_ROUNDS, _RUNS = 48, 32  # what the planner simulates of measured times if there is time
_MOST = 15_000  # rounds times workers that are simulated of each scheme: some seconds
_MANY = 200  # workers from which on only a few tolerances are compared


@dataclass(frozen=True)
class Advice:
    """A recommendation, or why there is none.

    Attributes:
        verdict: One sentence.
        python: The line to paste; empty without a recommendation.
        own: Whether the run does already what is recommended; None: the planner does not know its code.
        own_seconds: What its own scheme is expected to take, by the same times, in seconds a round.
        rounds: From how many rounds' times.
    """

    verdict: str
    python: str = ""
    own: bool | None = None
    own_seconds: float | None = None
    rounds: int = 0


def advise(
    rows: Sequence[Mapping[str, Any]], *, gone: Sequence[int] = (), holders: Sequence[Sequence[int]] = ()
) -> Advice:
    """A recommendation from a run's last rows, oldest first, since the number of workers last changed.

    Args:
        rows: The rows.
        gone: Workers that do not answer any more: they are planned for as if they never would.
        holders: Of each shard, as far as the ledger says.
    """
    last = rows[-1]
    n = (last.get("code") or {}).get("n")
    if not isinstance(n, int) or n < 2:
        return Advice("no recommendation: planning needs at least 2 workers.")
    absent = sorted({*range(n)}.difference(*holders)) if holders else []
    if absent:
        who = told_workers(absent)
        return Advice(
            f"no recommendation: {who} hold{'s' * (len(absent) == 1)} nothing now; plans are for n={n} that do."
        )
    first = len(rows)
    while first and (rows[first - 1].get("code") or {}).get("n") == n:
        first -= 1
    simulated = max(20, min(_ROUNDS * _RUNS, _MOST // n))
    rows = rows[first:][-simulated:]  # a replay begins with the first
    try:
        history = History.of_ledger(rows) if any(_timed(row) for row in rows) else History(n)
        if history.rounds < LEAST:
            left = f"{history.rounds} of the last rounds left job times"
            return Advice(f"no recommendation yet: {left}, {LEAST} are needed.", rounds=history.rounds)
        s = last["code"].get("s")
        few = None if n <= _MANY else sorted({1, 3, s} if isinstance(s, int) and 0 < s < n else {1, 3})
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
        )
    except FlGradcodeError as error:
        return Advice(f"no recommendation: {error}")
    own = _own(last, n)
    line = next((line for line in plan.lines if line.scheme.exact and _kind(line.scheme) == own), None)
    verdict = plan.verdict
    if gone:
        verdict = f"as if {told_workers(gone)} never answered again: {verdict[0].lower()}{verdict[1:]}"
    return Advice(
        verdict,
        plan.recommended.scheme.python,
        None if own is None else _kind(plan.recommended.scheme) == own,
        None if line is None or not line.steady < float("inf") else line.steady,
        history.rounds,
    )


def _timed(row: Mapping[str, Any]) -> bool:
    return any((row.get(kind) or {}).get("timings") for kind in ("train", "evaluate"))


def _kind(scheme: Scheme) -> tuple[Any, ...]:
    return scheme.shardwise, scheme.patience, scheme.m, scheme.s, scheme.enough


def _own(row: Mapping[str, Any], n: int) -> tuple[Any, ...] | None:
    """What the run does, as `_kind` says it; None if it is nothing that the planner compares."""
    code, way = row.get("code") or {}, row.get("way") or {}
    name, s, m = code.get("name"), code.get("s"), code.get("m") or 1
    if name == "uncoded":
        return False, 0.0, 1, 0, n
    if name == "cyclic repetition" and way.get("send") == "coded" and isinstance(s, int):
        return False, 0.0, 1, s, n - s
    if name != "fractional repetition":
        return None
    return (True, way.get("patience"), 1, s, None) if way.get("send") == "shards" else (False, 0.0, m, s, None)
