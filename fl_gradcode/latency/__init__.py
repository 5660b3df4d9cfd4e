"""How long a job takes: random laws, and measured traces."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
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
    "Latency",
    "Law",
    "Marginal",
    "Parts",
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
