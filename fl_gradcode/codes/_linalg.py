"""Matrix decompositions over the reals that retry with a slower algorithm when NumPy's does not converge.

NumPy uses LAPACK's divide-and-conquer routines (gesdd, gelsd). They are fast, but occasionally do not converge, even
for well-conditioned matrices. In that case the slower QR iteration (gesvd, gelss) is used, which does converge.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["condition", "lstsq", "pinv", "svd"]


def svd(matrix: NDArray[Any], *, full_matrices: bool) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[Any]]:
    """Returns the singular value decomposition: U, the singular values in descending order, and V^H."""
    try:
        U, sigma, Vh = np.linalg.svd(matrix, full_matrices=full_matrices)
    except np.linalg.LinAlgError:
        from scipy import linalg

        U, sigma, Vh = linalg.svd(matrix, full_matrices=full_matrices, lapack_driver="gesvd")
    return U, sigma, Vh


def lstsq(matrix: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """Returns the least-squares solution of `matrix @ x = right` of minimum norm, shape (columns, right's columns)."""
    try:
        return np.asarray(np.linalg.lstsq(matrix, right, rcond=None)[0])
    except np.linalg.LinAlgError:
        from scipy import linalg

        cutoff = np.finfo(matrix.dtype).eps * max(matrix.shape)
        return np.asarray(linalg.lstsq(matrix, right, cond=cutoff, lapack_driver="gelss")[0])


def pinv(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the Moore-Penrose inverse, shape (columns, rows)."""
    try:
        return np.asarray(np.linalg.pinv(matrix))
    except np.linalg.LinAlgError:
        U, sigma, Vh = svd(matrix, full_matrices=False)
        kept = sigma > 1e-15 * sigma.max(initial=0.0)
        return np.asarray((Vh[kept].T / sigma[kept]) @ U[:, kept].T)


def condition(matrices: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the condition number of each matrix in the 2-norm.

    Args:
        matrices: The matrices, shape (..., rows, columns).

    Returns:
        The condition numbers, shape (...,); infinite for a singular matrix.
    """
    try:
        return np.asarray(np.linalg.cond(matrices))
    except np.linalg.LinAlgError:
        flat = matrices.reshape(-1, *matrices.shape[-2:])
        numbers = np.empty(len(flat))
        for place, matrix in enumerate(flat):
            sigma = svd(matrix, full_matrices=False)[1]
            numbers[place] = sigma[0] / sigma[-1] if sigma[-1] > 0 else np.inf
        return numbers.reshape(matrices.shape[:-2])
