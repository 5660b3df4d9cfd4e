"""The ledger of a run: its rows, their writer and readers, and the status that is told from them."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .advice import Advice, advise
    from .ledger import Ledger
    from .notices import Notice
    from .reader import LedgerReader, RoundLine, RunRows, number
    from .rows import PhaseRow, RoundRow
    from .status import RunStatus, as_json, status_of
    from .workers import MARKS, WorkerLine, gone_of

__all__ = [
    "MARKS",
    "Advice",
    "Ledger",
    "LedgerReader",
    "Notice",
    "PhaseRow",
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
            "PhaseRow",
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
