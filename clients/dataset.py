"""A data set in memory."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Dataset"]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: what depends on it can be cached
class Dataset:
    """A data set in memory, its training part and its test part; all arrays are read-only.

    Attributes:
        train_x: Images in [0, 1], shape (N, 1, H, W), or standardised rows, shape (N, F); float32.
        train_y: Labels 0..classes-1, shape (N,), int64.
        test_x: As `train_x`, for the test part.
        test_y: As `train_y`, for the test part.
        classes: Number of labels.
        groups: Natural owner of each training example, 0..G-1, shape (N,), int64; None if there is none.
    """

    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]
    classes: int
    groups: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        for array in (self.train_x, self.train_y, self.test_x, self.test_y, self.groups):
            if array is not None:
                array.setflags(write=False)
