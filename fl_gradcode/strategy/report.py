"""What a phase leaves behind: its entry in the ledger row, and the figures among Flower's result metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.serverapp import Grid

from ..codes import EXACT, GradientCode, PrimeField
from ..grid import JobTime
from ..privacy import RunAccount
from ..protocol import report_key, wire_dtype
from .phase import Phase
from .replies import Decoded, Rejection

__all__ = ["figures", "new_row", "phase_entry", "why_undecodable"]


def new_row(run: str, grid: Grid, server_round: int, code: GradientCode, *, is_new: bool) -> dict[str, Any]:
    """A ledger row at the beginning of a round; with each shard's holders if the code is new."""
    holders = {"holders": [[*code.holders_of(j)] for j in range(code.k)]} if is_new else {}
    promise: dict[str, Any] = {} if code.exact else {"exact": False}
    return {
        "run": run,
        "flower-run-id": str(getattr(getattr(grid, "run", None), "run_id", "")),
        "round": server_round,
        "ended-at": None,
        "code": {"name": code.name, "n": code.n, "k": code.k, "s": code.s, "m": code.m, **promise},
        **holders,
        "train": None,
        "evaluate": None,
    }


def phase_entry(
    phase: Phase, decoded: Decoded | None, privacy: RunAccount | None, *, decoding: float
) -> dict[str, Any]:
    """What happened in one phase; `docs/ledger.md` explains every field."""
    wait = phase.wait

    def workers(nodes: list[int]) -> list[int | None]:
        return [phase.registry.worker_of(node) for node in nodes]

    inbox = phase.inbox
    rejections = inbox.rejections + inbox.outvoted()
    used = list(decoded.used) if decoded else []
    unread = workers(wait.unread)
    in_time = {*phase.survivors, *unread}
    error = 1.0 if decoded is None else phase.code.error_of(decoded.vector)
    exact = decoded is not None and error <= EXACT
    coverage = [0.0] * phase.code.k if decoded is None else phase.code.coverage_of(decoded.vector).tolist()
    kappa = None if decoded is None else phase.code.kappa_of(decoded.vector)
    after = phase.decodable_after

    return {
        "outcome": "exact" if exact else "skipped" if decoded is None else "approximate",
        "ended": wait.ended,
        "workers": len(phase.participants),
        "shards": phase.shards,
        "asked": workers(wait.asked),
        "held-back": workers(wait.held_back),
        "never-sent": workers(wait.never_sent),
        "answered": inbox.answered,
        "unread": unread,
        "used": used,
        "stragglers": [i for i in phase.participants if i not in in_time],
        "rejected": [_rejected(one) for one in rejections],
        "late": [_late(phase, *one) for one in wait.late],
        "lapsed": workers(wait.lapsed),
        "joined": workers(wait.joined),
        "restarted": workers(wait.restarted),
        "decodable-after-replies": after[0] if after else None,
        "decodable-after-seconds": after[1] if after else None,
        "decoding-error": error,
        "kappa": kappa,
        "rounding-error": None if decoded is None or kappa is None else _unit_roundoff(decoded) * kappa,
        "coverage": [round(float(c), 6) for c in coverage],
        "quantisation-error": _quantisation(phase, decoded),
        "filled-in": [{"shards": [*one.shards], "round": one.round} for one in (decoded.stale if decoded else ())],
        "replica-disagreement": inbox.disagreement,
        "privacy": privacy.entry(inbox.spent, inbox.other_requests) if privacy and phase.plan.privacy else None,
        "timings": [_timed(phase, one) for one in wait.times],
        "owing": [_timed(phase, one) for one in wait.owing],
        "bytes-down": wait.bytes_down,
        "bytes-up": wait.bytes_up,
        "seconds": {"waiting": wait.seconds, "decoding": decoding, "aggregating": 0.0},
    }


def why_undecodable(phase: Phase, entry: dict[str, Any]) -> str:
    """One sentence without its full stop: which round, why, and what was wrong with the replies."""
    what = phase.failure or f"undecodable ({entry['ended']})"
    reasons = "".join(f"; worker {one['worker']}: {one['reason']}" for one in entry["rejected"][:5])
    return (
        f"Round {phase.plan.round}, {phase.plan.kind}: {what}, from "
        f"{len(entry['answered'])} of {len(phase.participants)} workers{reasons}"
    )


def figures(entry: dict[str, Any]) -> dict[str, Any]:
    """The numbers that go among Flower's result metrics, under `fl-gradcode.`."""
    spent = {report_key("epsilon"): float(entry["privacy"]["epsilon"])} if entry["privacy"] else {}
    return {
        **spent,
        report_key("decoded"): int(entry["outcome"] != "skipped"),
        report_key("decoding-error"): float(entry["decoding-error"]),
        report_key("replies-used"): len(entry["used"]),
        report_key("stragglers"): len(entry["stragglers"]),
        report_key("wait-seconds"): float(entry["seconds"]["waiting"]),
    }


def _late(phase: Phase, node: int, label: str, wrong: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"worker": phase.registry.worker_of(node), "node": str(node), "from": label}
    return {**entry, "reason": wrong} if wrong else entry


def _timed(phase: Phase, one: JobTime) -> dict[str, Any]:
    worker = phase.registry.worker_of(one.node)
    kind, _, asked = one.label.partition(" ")
    return {
        "worker": worker,
        "kind": kind,
        "round": int(asked) if asked.isdigit() else None,
        "shards": one.loads.get(worker, 0) if worker is not None else 0,
        "seconds": one.seconds,
        "computing": one.computing,
    }


def _rejected(one: Rejection) -> dict[str, Any]:
    return {"worker": one.worker, "node": str(one.node), "reason": one.reason}


def _quantisation(phase: Phase, decoded: Decoded | None) -> float | None:
    """Largest error that fixed point leaves in an entry of the mean; None where replies are floats."""
    numbers = phase.code.numbers
    if decoded is None or not isinstance(numbers, PrimeField):
        return None
    return numbers.rounding(phase.code.k) / float(decoded.metrics[phase.plan.weight_key])  # type: ignore[arg-type]


def _unit_roundoff(decoded: Decoded) -> float:
    """Relative rounding of one number on the wire."""
    dtype = np.float64 if decoded.arrays is None else wire_dtype(decoded.layout)
    return float(np.finfo(dtype).eps) / 2
