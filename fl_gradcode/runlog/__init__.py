"""The ledger of a run: typed rows, the writer and the readers, job times, and the status that they tell."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .advice import Advice, advise
    from .history import History, Timing
    from .ledger import Ledger
    from .notices import Notice
    from .reader import LedgerReader, RoundLine, RunRows
    from .rows import (
        CodeLine,
        FilledIn,
        JobLine,
        Late,
        ModeLine,
        Outcome,
        PhaseRow,
        PhaseSeconds,
        PrivacyLine,
        Rejected,
        RoundRow,
        SecureLine,
    )
    from .status import RunStatus, as_json, status_of
    from .workers import MARKS, WorkerLine, gone_of

__all__ = [
    "MARKS",
    "Advice",
    "CodeLine",
    "FilledIn",
    "History",
    "JobLine",
    "Late",
    "Ledger",
    "LedgerReader",
    "ModeLine",
    "Notice",
    "Outcome",
    "PhaseRow",
    "PhaseSeconds",
    "PrivacyLine",
    "Rejected",
    "RoundLine",
    "RoundRow",
    "RunRows",
    "RunStatus",
    "SecureLine",
    "Timing",
    "WorkerLine",
    "advise",
    "as_json",
    "gone_of",
    "status_of",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "advice": [
            "Advice",
            "advise",
        ],
        "history": [
            "History",
            "Timing",
        ],
        "ledger": [
            "Ledger",
        ],
        "notices": [
            "Notice",
        ],
        "reader": [
            "LedgerReader",
            "RoundLine",
            "RunRows",
        ],
        "rows": [
            "CodeLine",
            "FilledIn",
            "JobLine",
            "Late",
            "ModeLine",
            "Outcome",
            "PhaseRow",
            "PhaseSeconds",
            "PrivacyLine",
            "Rejected",
            "RoundRow",
            "SecureLine",
        ],
        "status": [
            "RunStatus",
            "as_json",
            "status_of",
        ],
        "workers": [
            "MARKS",
            "WorkerLine",
            "gone_of",
        ],
    },
)
