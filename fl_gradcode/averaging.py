"""An exponential average of a run's models, which is evaluated in their place; training does not see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from .errors import InvalidSetting
from .protocol import as_array, restore_types, view

__all__ = ["ModelAverage"]


class ModelAverage:
    """An exponential average of models: `average += weight * (model - average)`, from the first model on.

        average = ModelAverage(0.25)
        average.add(arrays)  # after each round
        average.arrays  # names, dtypes and shapes of the models

    Federated averaging with a constant rate moves around its optimum, and the average is nearer to it than the models
    are. `GradientCoding(average=0.25)` keeps one by itself.

    Args:
        weight: Share of the newest model, above 0 and at most 1.

    Raises:
        InvalidSetting: The weight is no such number.

    References:
        Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30, 1992.
    """

    def __init__(self, weight: float) -> None:
        given: Any = weight
        if type(given) not in (int, float) or not 0 < given <= 1:
            raise InvalidSetting(
                f"average={weight!r} must be the newest model's share, above 0 and at most 1, such as 0.25."
            )
        self.weight = float(weight)
        self._newest: ArrayRecord | None = None
        self._means: dict[str, NDArray[Any]] = {}

    def add(self, arrays: ArrayRecord) -> None:
        """Add a model. Entries that are not floats, such as counters, are taken from the newest model.

        Args:
            arrays: The model, with the names and shapes of the models before.
        """
        means = {}
        for name, array in arrays.items():
            values = view(array)
            if values.dtype.kind != "f":
                continue
            before = self._means.get(name)
            new = values.astype(np.result_type(values.dtype, np.float32))
            if before is not None and before.shape == new.shape:
                new -= before
                new *= new.dtype.type(self.weight)
                new += before
            means[name] = new
        self._newest, self._means = arrays, means

    @property
    def arrays(self) -> ArrayRecord | None:
        """The average as a model; None before the first model."""
        if self._newest is None:
            return None
        layout = tuple((name, array.dtype, tuple(array.shape)) for name, array in self._newest.items())
        record = ArrayRecord()
        for name, array in self._newest.items():
            mean = self._means.get(name)
            record[name] = array if mean is None else as_array(mean.astype(view(array).dtype).reshape(array.shape))
        return restore_types(layout, record)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold besides the newest model, as plain values and arrays."""
        return {"means": dict(self._means)}

    def restore(self, state: Mapping[str, Any], newest: ArrayRecord) -> None:
        """Take over what `state` returned.

        Args:
            state: See above.
            newest: The newest model.

        Raises:
            ValueError: It does not fit the model.
        """
        means = dict(state["means"])
        for name, mean in means.items():
            fits = isinstance(mean, np.ndarray) and mean.dtype.kind == "f" and name in newest
            if not fits or mean.shape != tuple(newest[name].shape):
                raise ValueError(f"an average of {name!r} that does not fit the model")
        self._newest, self._means = (newest if means else None), means
