"""Gradient coding for Flower: a round that does not wait for its slowest clients and loses none of their data.

strategy = GradientCoding(FedAvg(), fractional_repetition(n=12, s=2))   # server: wrap the strategy you have
app = ClientApp(mods=[gradient_coding_mod])                             # client: add one mod
"""

from .codes import cyclic_repetition, fractional_repetition, uncoded
from .discovered import Discovered
from .errors import FlGradcodeError, NotDecodable
from .gradient_code import GradientCode
from .grid import EarlyStopGrid
from .ledger import Ledger
from .mods import gradient_coding_mod
from .options import Approximation
from .strategy import GradientCoding
from .virtual import VirtualGrid

__all__ = [
    "Approximation",
    "Discovered",
    "EarlyStopGrid",
    "FlGradcodeError",
    "GradientCode",
    "GradientCoding",
    "Ledger",
    "NotDecodable",
    "VirtualGrid",
    "cyclic_repetition",
    "fractional_repetition",
    "gradient_coding_mod",
    "uncoded",
]
