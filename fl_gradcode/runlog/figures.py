"""The numbers of a round by name, flat, as dashboards and tables take them."""

from __future__ import annotations

from collections.abc import Iterator

from .rows import PhaseKind, PhaseRow, RoundRow

__all__ = ["figures_of"]


def figures_of(row: RoundRow) -> dict[str, float]:
    """Returns name -> number for all that a row says in single numbers. What is not known is left out.

    Names are those of the phase and the figure, `train/waiting-seconds`. `train/exact` is 1 if the sum holds each
    sampled shard exactly, else 0. `used`, `stragglers`, `rejected` and `late` are counts.
    """
    return {
        f"{kind}/{name}": float(value)
        for kind, phase in _phases(row)
        for name, value in _figures(phase)
        if value is not None
    }


def _phases(row: RoundRow) -> Iterator[tuple[PhaseKind, PhaseRow]]:
    if row.train is not None:
        yield "train", row.train
    if row.evaluate is not None:
        yield "evaluate", row.evaluate


def _figures(phase: PhaseRow) -> Iterator[tuple[str, float | None]]:
    yield "exact", phase.outcome == "exact"
    yield "waiting-seconds", phase.seconds.waiting
    yield "decoding-seconds", phase.seconds.decoding
    yield "aggregating-seconds", phase.seconds.aggregating
    yield "decodable-after-replies", phase.decodable_after_replies
    yield "decodable-after-seconds", phase.decodable_after_seconds
    yield "used", len(phase.used)
    yield "stragglers", len(phase.stragglers)
    yield "rejected", len(phase.rejected) + phase.rejected_left_out
    yield "late", len(phase.late) + phase.late_left_out
    yield "decoding-error", phase.decoding_error
    yield "kappa", phase.kappa
    yield "replica-disagreement", phase.replica_disagreement
    yield "megabytes-down", phase.bytes_down / 1e6
    yield "megabytes-up", phase.bytes_up / 1e6
    if phase.privacy is not None:
        yield "epsilon", phase.privacy.epsilon
