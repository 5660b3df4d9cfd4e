"""Opacus' ghost clipping, with what would escape it refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .errors import PrivacyRefused
from .opacus_import import opacus
from .stepping import Batch

__all__ = ["per_record_loss", "watched_ghost"]


def watched_ghost(kind: type[Any]) -> type[Any]:
    """Ghost clipping that remembers that it clipped, and how many records."""

    class WatchedGhost(kind):  # type: ignore[misc]
        def get_clipping_coef(self) -> Tensor:
            for p in self.trainable_parameters:
                self.fl_gradcode_batch.check(len(p._norm_sample))
                if p._norm_sample.dtype != p.dtype:
                    raise PrivacyRefused(
                        "Ghost clipping got gradients of another precision than the parameters': train without "
                        "autocast, or with grad_sample_mode='hooks'."
                    )
            coefficients: Tensor = super().get_clipping_coef()
            if not self.per_sample_gradient_norms.isfinite().all():
                raise PrivacyRefused(
                    "A gradient is not finite, and ghost clipping cannot leave one record out: use "
                    "grad_sample_mode='hooks', which does."
                )
            self.fl_gradcode_batch.clipped = len(coefficients)
            return coefficients

        def capture_backprops_hook(self, *args: Any, **kwargs: Any) -> None:
            # Runs in the first pass of each loss, which measures norms, and not in the second, which clips. After
            # a loss that is not wrapped, or a second one, no clipping follows or what was clipped is not all.
            if self.hooks_enabled:
                self.fl_gradcode_batch.clipped = None
            super().capture_backprops_hook(*args, **kwargs)

    return WatchedGhost


def per_record_loss(batch: Batch) -> type[Any]:
    """Opacus' loss for ghost clipping, held to one number for each record.

    Opacus multiplies coefficients of shape (records,) by the loss: one of shape (records, 1) would become a square.
    """
    losses = opacus().utils.fast_gradient_clipping_utils
    opacus_loss: type[Any] = losses.DPTensorFastGradientClipping
    opacus_criterion: type[Any] = losses.DPLossFastGradientClipping

    class Loss(opacus_loss):  # type: ignore[misc]
        def __init__(self, module: Any, optimizer: Any, loss_per_sample: Tensor, loss_reduction: str = "mean") -> None:
            values = loss_per_sample
            super().__init__(
                module, optimizer, values.flatten(1).mean(1) if values.dim() > 1 else values, loss_reduction
            )

        def backward(self) -> None:
            batch.check(len(self.loss_per_sample) if self.loss_per_sample.dim() else -1)
            super().backward()

        def _with(self, operation: str, other: Any) -> Loss:
            if isinstance(other, Tensor):
                raise PrivacyRefused(
                    "Ghost clipping sees no gradients of what is added to a loss or multiplied by it: add losses of "
                    "criterion() and scale them by numbers alone, or use grad_sample_mode='hooks'."
                )
            found = getattr(opacus_loss, operation)(self, other)
            return Loss(found.module, found.optimizer, found.loss_per_sample, found.loss_reduction)

        def __mul__(self, other: Any) -> Loss:
            return self._with("__mul__", other)

        def __truediv__(self, other: Any) -> Loss:
            return self._with("__truediv__", other)

        def __add__(self, other: Any) -> Loss:
            return self._with("__add__", other)

        def __sub__(self, other: Any) -> Loss:
            return self._with("__sub__", other)

        def __rsub__(self, other: Any) -> Loss:
            return self._with("__rsub__", other)

        def __neg__(self) -> Loss:
            return self * -1

    class PerRecordLoss(opacus_criterion):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Loss:
            found = super().__call__(*args, **kwargs)
            return Loss(found.module, found.optimizer, found.loss_per_sample, found.loss_reduction)

    return PerRecordLoss
