"""Which scheme pays for given latencies, simulated without Flower; and the rule that hands out shards."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .clairvoyant import clairvoyant_rounds
    from .closed_forms import best_fraction, coded_matvec_seconds, exponential_seconds, harmonic, idle_mean
    from .job_times import LEARNED, JobTimes
    from .planner import GAIN, Line, RoundPlan, candidates, make_plan
    from .product_planner import ProductLine, ProductPlan, plan_products
    from .schemes import Scheme, any_code, partial_work, repetition, wait_for_all
    from .simulation import idle_rounds, steady_rounds
    from .work_queue import ShardQueue, turns_of

__all__ = [
    "GAIN",
    "LEARNED",
    "JobTimes",
    "Line",
    "ProductLine",
    "ProductPlan",
    "RoundPlan",
    "Scheme",
    "ShardQueue",
    "any_code",
    "best_fraction",
    "candidates",
    "clairvoyant_rounds",
    "coded_matvec_seconds",
    "exponential_seconds",
    "harmonic",
    "idle_mean",
    "idle_rounds",
    "make_plan",
    "partial_work",
    "plan_products",
    "repetition",
    "steady_rounds",
    "turns_of",
    "wait_for_all",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "clairvoyant": [
            "clairvoyant_rounds",
        ],
        "closed_forms": [
            "best_fraction",
            "coded_matvec_seconds",
            "exponential_seconds",
            "harmonic",
            "idle_mean",
        ],
        "job_times": [
            "JobTimes",
            "LEARNED",
        ],
        "planner": [
            "GAIN",
            "Line",
            "RoundPlan",
            "candidates",
            "make_plan",
        ],
        "product_planner": [
            "ProductLine",
            "ProductPlan",
            "plan_products",
        ],
        "schemes": [
            "Scheme",
            "any_code",
            "partial_work",
            "repetition",
            "wait_for_all",
        ],
        "simulation": [
            "idle_rounds",
            "steady_rounds",
        ],
        "work_queue": [
            "ShardQueue",
            "turns_of",
        ],
    },
)
