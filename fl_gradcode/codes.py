"""The code families: functions that make a `GradientCode`. `docs/choosing-a-code.md` says which one when."""

from __future__ import annotations

from .approximate import bernoulli, stochastic
from .classical import cyclic_mds, cyclic_repetition, vandermonde
from .field_codes import reed_solomon
from .gradient_code import GradientCode
from .repetition import fractional_repetition, uncoded
from .universal import for_assignment

__all__ = [
    "GradientCode",
    "bernoulli",
    "cyclic_mds",
    "cyclic_repetition",
    "for_assignment",
    "fractional_repetition",
    "reed_solomon",
    "stochastic",
    "uncoded",
    "vandermonde",
]
