"""Gradient coding for Flower: a round that does not wait for its slowest clients and loses none of their data.

strategy = GradientCoding(FedAvg(), fractional_repetition(n=12, s=2))   # server: wrap the strategy you have
app = ClientApp(mods=[gradient_coding_mod])                             # client: add one mod
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported when first used (PEP 562): a deployed node starts a process for each message, and needs the mod alone.
_WHERE = {
    "Approximation": "options",
    "Discovered": "discovered",
    "EarlyStopGrid": "grid",
    "FlGradcodeError": "errors",
    "GradientCode": "gradient_code",
    "GradientCoding": "strategy",
    "Ledger": "ledger",
    "NotDecodable": "errors",
    "VirtualGrid": "virtual",
    "cyclic_repetition": "codes",
    "fractional_repetition": "codes",
    "gradient_coding_mod": "mods",
    "uncoded": "codes",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that has it."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    """All that may be imported from here."""
    return sorted({*globals(), *__all__})
