"""Gradient codes as values: who computes which shards, and how replies decode to the exact sum."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from ._linalg import condition, lstsq
    from ._validation import as_float, as_pattern, check_count, check_tolerance, check_workers
    from .approximate import bernoulli, stochastic
    from .covering import may_cover
    from .cyclic import cyclic_mds, cyclic_repetition, vandermonde
    from .decoder import IncrementalDecoder
    from .encoding_matrix import EXACT, whole_groups
    from .error_location import locate_wrong_replies, locates_wrong_replies
    from .field_codes import reed_solomon
    from .fractional import fractional_repetition, uncoded
    from .gradient_code import GradientCode
    from .prime_field import P, PrimeField, combine_mod, lift_mod, matmul_mod, rank_mod, solve_mod
    from .reals import REALS, Reals, combine
    from .rounding import rounding_bound
    from .universal import for_assignment

__all__ = [
    "EXACT",
    "REALS",
    "GradientCode",
    "IncrementalDecoder",
    "P",
    "PrimeField",
    "Reals",
    "as_float",
    "as_pattern",
    "bernoulli",
    "check_count",
    "check_tolerance",
    "check_workers",
    "combine",
    "combine_mod",
    "condition",
    "cyclic_mds",
    "cyclic_repetition",
    "for_assignment",
    "fractional_repetition",
    "lift_mod",
    "locate_wrong_replies",
    "locates_wrong_replies",
    "lstsq",
    "matmul_mod",
    "may_cover",
    "rank_mod",
    "reed_solomon",
    "rounding_bound",
    "solve_mod",
    "stochastic",
    "uncoded",
    "vandermonde",
    "whole_groups",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "error_location": [
            "locate_wrong_replies",
            "locates_wrong_replies",
        ],
        "_linalg": [
            "condition",
            "lstsq",
        ],
        "_validation": [
            "as_float",
            "as_pattern",
            "check_count",
            "check_tolerance",
            "check_workers",
        ],
        "approximate": [
            "bernoulli",
            "stochastic",
        ],
        "covering": [
            "may_cover",
        ],
        "cyclic": [
            "cyclic_mds",
            "cyclic_repetition",
            "vandermonde",
        ],
        "decoder": [
            "IncrementalDecoder",
        ],
        "encoding_matrix": [
            "EXACT",
            "whole_groups",
        ],
        "field_codes": [
            "reed_solomon",
        ],
        "fractional": [
            "fractional_repetition",
            "uncoded",
        ],
        "gradient_code": [
            "GradientCode",
        ],
        "prime_field": [
            "P",
            "PrimeField",
            "combine_mod",
            "lift_mod",
            "matmul_mod",
            "rank_mod",
            "solve_mod",
        ],
        "reals": [
            "REALS",
            "Reals",
            "combine",
        ],
        "rounding": [
            "rounding_bound",
        ],
        "universal": [
            "for_assignment",
        ],
    },
)
