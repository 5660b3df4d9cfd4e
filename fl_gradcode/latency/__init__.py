"""How long a job takes: random laws, measured traces, and the job times recorded in a ledger."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .history import History, Timing
    from .latency import Latency, Parts
    from .laws import (
        Law,
        Marginal,
        bimodal,
        bursty,
        constant,
        device_classes,
        exponential,
        from_quantiles,
        lognormal,
        pareto,
        poisson_stragglers,
        scaled,
        shifted_exponential,
    )
    from .populations import POPULATIONS, named
    from .traces import Fit, checked_times, fit, read_table, read_trace, replay, trace

__all__ = [
    "POPULATIONS",
    "Fit",
    "History",
    "Latency",
    "Law",
    "Marginal",
    "Parts",
    "Timing",
    "bimodal",
    "bursty",
    "checked_times",
    "constant",
    "device_classes",
    "exponential",
    "fit",
    "from_quantiles",
    "lognormal",
    "named",
    "pareto",
    "poisson_stragglers",
    "read_table",
    "read_trace",
    "replay",
    "scaled",
    "shifted_exponential",
    "trace",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "history": [
            "History",
            "Timing",
        ],
        "latency": [
            "Latency",
            "Parts",
        ],
        "laws": [
            "Law",
            "Marginal",
            "bimodal",
            "bursty",
            "constant",
            "device_classes",
            "exponential",
            "from_quantiles",
            "lognormal",
            "pareto",
            "poisson_stragglers",
            "scaled",
            "shifted_exponential",
        ],
        "populations": [
            "POPULATIONS",
            "named",
        ],
        "traces": [
            "Fit",
            "checked_times",
            "fit",
            "read_table",
            "read_trace",
            "replay",
            "trace",
        ],
    },
)
