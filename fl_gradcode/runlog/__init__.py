"""The ledger of a run: typed rows, the writer and the readers, job times, status, data frames and dashboards."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .advice import Advice, advise
    from .figures import figures_of
    from .frames import jobs_frame, rounds_frame
    from .history import History, Timing
    from .ledger import Ledger
    from .notices import Notice
    from .reader import LedgerReader, RoundLine, RunRows
    from .recorders import to_mlflow, to_tensorboard
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
    "figures_of",
    "gone_of",
    "jobs_frame",
    "rounds_frame",
    "status_of",
    "to_mlflow",
    "to_tensorboard",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "advice": [
            "Advice",
            "advise",
        ],
        "figures": [
            "figures_of",
        ],
        "frames": [
            "jobs_frame",
            "rounds_frame",
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
        "recorders": [
            "to_mlflow",
            "to_tensorboard",
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
