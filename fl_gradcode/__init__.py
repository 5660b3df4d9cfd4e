"""Gradient coding for Flower: a round that does not wait for its slowest clients and loses none of their data.

Two lines of an app change:

    strategy = GradientCoding(FedAvg(), fractional_repetition(n=12, s=2))   # server: wrap the strategy you have
    app = ClientApp(mods=[gradient_coding_mod])                             # client: add one mod
"""

from typing import TYPE_CHECKING

from ._lazy import lazy_names

if TYPE_CHECKING:
    from .client import gradient_coding_mod
    from .codes import GradientCode, cyclic_repetition, fractional_repetition, uncoded
    from .errors import FlGradcodeError, NotDecodable
    from .grid import EarlyStopGrid, VirtualGrid
    from .roster import Discovered
    from .runlog import Ledger
    from .strategy import Adaptive, Approximation, Coded, GradientCoding, Shards

__all__ = [
    "Adaptive",
    "Approximation",
    "Coded",
    "Discovered",
    "EarlyStopGrid",
    "FlGradcodeError",
    "GradientCode",
    "GradientCoding",
    "Ledger",
    "NotDecodable",
    "Shards",
    "VirtualGrid",
    "cyclic_repetition",
    "fractional_repetition",
    "gradient_coding_mod",
    "uncoded",
]

# A deployed node starts a process for each message, and needs the mod alone.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "client": ["gradient_coding_mod"],
        "codes": ["GradientCode", "cyclic_repetition", "fractional_repetition", "uncoded"],
        "errors": ["FlGradcodeError", "NotDecodable"],
        "grid": ["EarlyStopGrid", "VirtualGrid"],
        "runlog": ["Ledger"],
        "roster": ["Discovered"],
        "strategy": ["Adaptive", "Approximation", "Coded", "GradientCoding", "Shards"],
    },
)
