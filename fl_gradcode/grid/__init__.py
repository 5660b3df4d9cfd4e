"""Sending messages and waiting for replies: grids that stop early, in real or virtual time."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .arrivals import Arrival, ArrivalSource, ForwardingGrid
    from .early_stop import EarlyStopGrid
    from .nodes import SETTLED, nodes_of_a_phase, poll_nodes, wait_for_nodes
    from .stop_rule import CountRule, JobTime, Late, StopRule, Wait
    from .virtual import VirtualGrid

__all__ = [
    "SETTLED",
    "Arrival",
    "ArrivalSource",
    "CountRule",
    "EarlyStopGrid",
    "ForwardingGrid",
    "JobTime",
    "Late",
    "StopRule",
    "VirtualGrid",
    "Wait",
    "nodes_of_a_phase",
    "poll_nodes",
    "wait_for_nodes",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "arrivals": [
            "Arrival",
            "ArrivalSource",
            "ForwardingGrid",
        ],
        "early_stop": [
            "EarlyStopGrid",
        ],
        "nodes": [
            "SETTLED",
            "nodes_of_a_phase",
            "poll_nodes",
            "wait_for_nodes",
        ],
        "stop_rule": [
            "CountRule",
            "JobTime",
            "Late",
            "StopRule",
            "Wait",
        ],
        "virtual": [
            "VirtualGrid",
        ],
    },
)
