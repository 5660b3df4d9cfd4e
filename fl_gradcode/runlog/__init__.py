"""The ledger of a run: typed rows, the writer and the readers, job times, and the status that they tell."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .advice import Advice, advise
    from .ledger import Ledger
    from .notices import Notice
    from .reader import LedgerReader, RoundLine, RunRows, number
    from .rows import (
        PHASES,
        SCHEMA,
        CodeLine,
        FilledIn,
        JobLine,
        Late,
        ModeLine,
        PhaseKind,
        PhaseRow,
        PhaseSeconds,
        PrivacyLine,
        Rejected,
        RoundRow,
    )
    from .status import RunStatus, as_json, status_of
    from .workers import MARKS, WorkerLine, gone_of

__all__ = [
    "MARKS",
    "PHASES",
    "SCHEMA",
    "Advice",
    "CodeLine",
    "FilledIn",
    "JobLine",
    "Late",
    "Ledger",
    "LedgerReader",
    "ModeLine",
    "Notice",
    "PhaseKind",
    "PhaseRow",
    "PhaseSeconds",
    "PrivacyLine",
    "Rejected",
    "RoundLine",
    "RoundRow",
    "RunRows",
    "RunStatus",
    "WorkerLine",
    "advise",
    "as_json",
    "gone_of",
    "number",
    "status_of",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "advice": [
            "Advice",
            "advise",
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
            "number",
        ],
        "rows": [
            "PHASES",
            "SCHEMA",
            "CodeLine",
            "FilledIn",
            "JobLine",
            "Late",
            "ModeLine",
            "PhaseKind",
            "PhaseRow",
            "PhaseSeconds",
            "PrivacyLine",
            "Rejected",
            "RoundRow",
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
