"""Builds the ledger row of a round, the entries of its phases, and the figures in Flower's result metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from .._text import numbered
from ..codes import EXACT, GradientCode, PrimeField, rounding_bound
from ..grid import JobTime, Wait
from ..grid import Late as LateReply
from ..privacy import RunAccount
from ..protocol import report_key, wire_dtype
from ..runlog import CodeLine, FilledIn, JobLine, Late, Outcome, PhaseRow, PhaseSeconds, Rejected, RoundRow, SecureLine
from .phase import Phase
from .reply_groups import Decoded, Returned

__all__ = ["figures", "new_row", "phase_row", "why_undecodable"]


def new_row(
    run: str, grid: Grid, server_round: int, code: GradientCode, *, is_new: bool, resumed: bool = False
) -> RoundRow:
    """Returns the ledger row of a round that begins; it lists each shard's holders if the code is new."""
    return RoundRow(
        run=run,
        flower_run_id=str(getattr(getattr(grid, "run", None), "run_id", "")),
        round=server_round,
        resumed=resumed,
        code=CodeLine(code.name, code.n, code.k, code.s, code.m, exact=code.exact),
        holders=tuple(tuple(code.holders_of(j)) for j in range(code.k)) if is_new else None,
    )


def phase_row(
    phase: Phase, decoded: Decoded | Returned | None, account: RunAccount | None, *, decoding: float
) -> PhaseRow:
    """Returns the ledger entry of one phase; `docs/ledger.md` explains every field."""
    wait, replies, code = phase.wait, phase.replies, phase.code

    def named(nodes: Iterable[int]) -> tuple[int | None, ...]:
        return tuple(phase.registry.named(node) for node in nodes)

    unread = named(wait.unread)
    in_time = {*phase.survivors, *unread}
    error = 1.0 if decoded is None else code.error_of(decoded.vector)
    coverage = [0.0] * code.k if decoded is None else code.coverage_of(decoded.vector).tolist()
    kappa = None if decoded is None else code.kappa_of(decoded.vector)
    estimated: Outcome = "stale" if phase.ages else "approximate"
    outcome: Outcome = "skipped" if decoded is None else "exact" if error <= EXACT else estimated
    after = phase.decodable_after
    stale = decoded.stale if isinstance(decoded, Decoded) else ()
    first = phase.compared or Wait()  # nodes compute before they compare, and only send what they have kept after it
    computing = phase.compared or wait

    return PhaseRow(
        outcome=outcome,
        ended=wait.ended,
        workers=len(phase.participants),
        shards=tuple(phase.shards),
        # The worker as known when the message was sent, or else as the node has reported since.
        asked=tuple(phase.registry.named(node) if worker is None else worker for node, worker in phase.asked),
        held_back=named(wait.held_back),
        never_sent=named(wait.never_sent),
        answered=tuple(replies.answered),
        unread=unread,
        used=decoded.used if decoded else (),
        stragglers=tuple(i for i in phase.participants if i not in in_time),
        rejected=tuple(
            Rejected(rejected.worker, str(rejected.node), rejected.rejection.kind, rejected.rejection.reason)
            for rejected in [*replies.rejected, *replies.outvoted()]
        ),
        late=tuple(_late(phase, late) for late in wait.late),
        lapsed=named(wait.lapsed),
        joined=named(wait.joined),
        restarted=named(wait.restarted),
        decodable_after_replies=after[0] if after else None,
        decodable_after_seconds=after[1] if after else None,
        decoding_error=error,
        kappa=kappa,
        rounding_error=None if decoded is None or phase.plan.secure else _rounding(code, decoded),
        coverage=tuple(round(float(c), 6) for c in coverage),
        quantisation_error=_quantisation(phase, decoded),
        filled_in=tuple(FilledIn(old.shards, old.round) for old in stale),
        ages=phase.ages,
        replica_disagreement=phase.copies.apart,
        compared=tuple(sorted(phase.copies.compared)),
        privacy=account.line(replies.spent, replies.other_requests) if account and phase.plan.privacy else None,
        secure=_masked(phase, decoded) if phase.plan.secure else None,
        timings=tuple(_timed(phase, job) for job in computing.times),
        owing=tuple(_timed(phase, job) for job in computing.owing),
        bytes_down=first.bytes_down + wait.bytes_down,
        bytes_up=first.bytes_up + wait.bytes_up,
        seconds=PhaseSeconds(waiting=first.seconds + wait.seconds, decoding=decoding, verifying=phase.verifying),
    )


def why_undecodable(phase: Phase, entry: PhaseRow) -> str:
    """Returns a sentence without its full stop that names the round, the reason, and what was wrong with replies."""
    what = phase.failure or f"undecodable ({entry.ended})"
    reasons = "".join(
        f"; {f'node {one.node}' if one.worker is None else f'worker {one.worker}'}: {one.reason}"
        for one in entry.rejected[:5]
    )
    return (
        f"Round {phase.plan.round}, {phase.plan.kind}: {what}, from "
        f"{len({*entry.answered})} of {len(phase.participants)} workers{_failed_everywhere(phase, entry)}{reasons}"
    )


def _failed_everywhere(phase: Phase, entry: PhaseRow) -> str:
    """Returns a clause about the shards whose holders have all failed, which no code can make up for."""
    failed = {rejected.worker for rejected in entry.rejected}
    holders: dict[int, list[int]] = {}
    for worker, row in phase.plan.rows.items():
        for shard in row.shards:
            holders.setdefault(shard, []).append(worker)
    lost = {shard: who for shard, who in sorted(holders.items()) if failed.issuperset(who)}
    if not lost:
        return ""
    shard, who = next(iter(lost.items()))
    return (
        f"; all holders of {numbered('shard', [*lost], 11)} failed, which are {numbered('worker', who, 11)} for shard "
        f"{shard}, and plain Flower would have gone on without that data"
    )


def figures(entry: PhaseRow) -> dict[str, Any]:
    """Returns the figures for Flower's result metrics, whose names start with `fl-gradcode.`."""
    spent = {report_key("epsilon"): _number(entry.privacy.epsilon)} if entry.privacy else {}
    return {
        **spent,
        report_key("decoded"): int(entry.outcome != "skipped"),
        report_key("decoding-error"): _number(entry.decoding_error),
        report_key("replies-used"): len(entry.used),
        report_key("stragglers"): len(entry.stragglers),
        report_key("wait-seconds"): _number(entry.seconds.waiting),
    }


def _number(value: float | None) -> float:
    """Returns the number, or NaN for None, which stands for a number that was not finite in a row read from a file."""
    return float("nan") if value is None else float(value)


def _late(phase: Phase, late: LateReply) -> Late:
    worker, why = phase.registry.named(late.node), late.rejection
    apart = phase.late.get(late.node)
    return Late(worker, str(late.node), late.label, why.kind if why else None, why.reason if why else None, apart)


def _timed(phase: Phase, job: JobTime) -> JobLine:
    worker = phase.registry.named(job.node)
    kind, _, asked = job.label.partition(" ")
    return JobLine(
        worker=worker,
        kind=kind,
        round=int(asked) if asked.isdigit() else None,
        shards=job.loads.get(worker, 0) if worker is not None else 0,
        seconds=job.seconds,
        computing=job.computing,
    )


def _masked(phase: Phase, decoded: Decoded | Returned | None) -> SecureLine:
    used = decoded.masks if isinstance(decoded, Decoded) else None
    return SecureLine(
        manifest=phase.plan.secure,
        request=None if used is None else used.request,
        clipped=None if used is None else used.clipped,
        simulated=phase.replies.simulated,
    )


def _quantisation(phase: Phase, decoded: Decoded | Returned | None) -> float | None:
    """Returns the largest error that fixed point causes in an entry of the mean, or None if replies are floats.

    Under secure aggregation it is the error against the mean of the clipped updates.
    """
    numbers = phase.code.numbers
    if isinstance(decoded, Decoded) and decoded.masks is not None:
        return decoded.masks.error
    if not isinstance(decoded, Decoded) or not isinstance(numbers, PrimeField):
        return None
    return numbers.rounding(phase.code.k) / float(decoded.metrics[phase.plan.weight_key])  # type: ignore[arg-type]


def _rounding(code: GradientCode, decoded: Decoded | Returned) -> float | None:
    """Returns the relative rounding error of the update at most; records that come as returned are not rounded."""
    if isinstance(decoded, Returned):
        return 0.0
    if isinstance(code.numbers, PrimeField):
        return None
    dtype = np.float64 if decoded.arrays is None else wire_dtype(decoded.layout)
    return rounding_bound(code, decoded.vector, np.dtype(dtype), further=len(decoded.stale))
