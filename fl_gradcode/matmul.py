"""Coded matrix multiplication: a product A @ B from any k of n answers. Everything public of it."""

from __future__ import annotations

from .bases import ConditionWarning
from .coded_matmul import CodedMatrix, ProductReport, coded_matmul
from .product_code import ProductCode
from .product_codes import entangled, matdot, mds_product, polynomial, uncoded_product
from .product_worker import coded_matmul_worker

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
