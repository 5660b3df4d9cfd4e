"""Ledger rows for tests that need no more of them than who wrote them, and how a round ended."""

from __future__ import annotations

from fl_gradcode.runlog.rows import CodeLine, Outcome, PhaseRow, PhaseSeconds, RoundRow

__all__ = ["round_row"]


def round_row(run: str, number: int, *, outcome: Outcome | None = None) -> RoundRow:
    """A row without training, or with training of one worker that ended like this."""
    train = None
    if outcome is not None:
        train = PhaseRow(
            outcome=outcome,
            ended="answered",
            workers=1,
            shards=(0,),
            asked=(0,),
            answered=(),
            used=(),
            stragglers=(0,),
            decoding_error=1.0,
            coverage=(0.0,),
            bytes_down=0,
            bytes_up=0,
            seconds=PhaseSeconds(1.0, 0.0),
        )
    return RoundRow(run=run, flower_run_id="", round=number, code=CodeLine("uncoded", 1, 1, 0, 1), train=train)
