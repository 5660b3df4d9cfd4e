"""How long a job takes: random laws, and measured traces."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .exports import Measured, measured_rounds, read_measured
    from .jobs import DEFAULT_SHARE, Jobs, Split, job_tables, split_of
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
    from .sheets import is_table
    from .traces import Fit, checked_times, fit, read_table, read_trace, replay, trace

__all__ = [
    "DEFAULT_SHARE",
    "POPULATIONS",
    "Fit",
    "Jobs",
    "Latency",
    "Law",
    "Marginal",
    "Measured",
    "Parts",
    "Split",
    "bimodal",
    "bursty",
    "checked_times",
    "constant",
    "device_classes",
    "exponential",
    "fit",
    "from_quantiles",
    "is_table",
    "job_tables",
    "lognormal",
    "measured_rounds",
    "named",
    "pareto",
    "poisson_stragglers",
    "read_measured",
    "read_table",
    "read_trace",
    "replay",
    "scaled",
    "shifted_exponential",
    "split_of",
    "trace",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "exports": [
            "Measured",
            "measured_rounds",
            "read_measured",
        ],
        "jobs": [
            "DEFAULT_SHARE",
            "Jobs",
            "Split",
            "job_tables",
            "split_of",
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
        "sheets": [
            "is_table",
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
