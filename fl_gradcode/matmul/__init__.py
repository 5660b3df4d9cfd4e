"""Coded matrix multiplication: a product A @ B from any k of n answers."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .client import coded_matmul_worker
    from .families import entangled, matdot, mds_product, polynomial, uncoded_product
    from .product_code import ConditionWarning, ProductCode
    from .server import CodedMatrix, ProductReport, coded_matmul

__all__ = [
    "CodedMatrix",
    "ConditionWarning",
    "ProductCode",
    "ProductReport",
    "coded_matmul",
    "coded_matmul_worker",
    "entangled",
    "matdot",
    "mds_product",
    "polynomial",
    "uncoded_product",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "client": [
            "coded_matmul_worker",
        ],
        "families": [
            "entangled",
            "matdot",
            "mds_product",
            "polynomial",
            "uncoded_product",
        ],
        "product_code": [
            "ConditionWarning",
            "ProductCode",
        ],
        "server": [
            "CodedMatrix",
            "ProductReport",
            "coded_matmul",
        ],
    },
)
