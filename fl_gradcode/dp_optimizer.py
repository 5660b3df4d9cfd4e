"""Opacus' optimizers with the noise of a stream instead of a generator's, and what could void the claim refused.

A torch generator keeps 32 bits of its seed: whoever knows the rest tries them all in hours. Everything else, clipping
and ghost clipping included, is Opacus'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import PrivacyRefused
from .keyed import KeyedStream
from .opacus_import import opacus

__all__ = ["Wrapped", "wrap"]


class Wrapped:
    """A model with clipped gradients, and the optimizer and loss that go with it.

    Attributes:
        model: To be called in training; unwrap() gives the plain model back.
    """

    def __init__(self, model: Any, *, ghost: bool, max_grad_norm: float, noise: _Noise, batch: _Batch) -> None:
        self.model, self._ghost, self._max_grad_norm, self._noise, self._batch = (
            model,
            ghost,
            max_grad_norm,
            noise,
            batch,
        )
        self._optimizer: Any = None

    def optimizer(self, inner: torch.optim.Optimizer, *, expected_batch_size: float) -> Any:
        """The inner optimizer, given clipped and noisy gradients."""
        mine = {id(p) for p in self.model.parameters() if p.requires_grad}
        if {id(p) for group in inner.param_groups for p in group["params"] if p.requires_grad} != mine:
            raise PrivacyRefused(
                "The optimizer has other parameters than those of the model that are trained: all of them get noise. "
                "Make it from model.parameters() alone, and freeze what is not trained."
            )
        kind = opacus().optimizers.DPOptimizerFastGradientClipping if self._ghost else opacus().optimizers.DPOptimizer
        keyed = _with_stream(kind)
        self._optimizer = keyed(
            inner,
            # For accounting alone: the noise comes from the stream.
            noise_multiplier=self._noise.multiplier,
            max_grad_norm=self._max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._optimizer.fl_gradcode = (self._noise, self._batch)
        return self._optimizer

    def criterion(self, inner: Any) -> Any:
        """The loss, such that ghost clipping sees it."""
        if not self._ghost:
            return inner
        if self._optimizer is None:
            raise PrivacyRefused("Ghost clipping needs the optimizer before the loss: call optimizer() first.")
        losses = opacus().utils.fast_gradient_clipping_utils
        return losses.DPLossFastGradientClipping(self.model, self._optimizer, inner)

    def unwrap(self) -> nn.Module:
        """The plain model, without hooks."""
        plain: nn.Module = self.model.to_standard_module()
        for module in plain.modules():  # what a pass that was broken off left would be taken for the next batch's
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):
                    delattr(module, name)
        for parameter in plain.parameters():
            if hasattr(parameter, "summed_grad"):  # has no noise yet
                del parameter.summed_grad
        return plain


class _Noise:
    """Where noise comes from: standard normals times `multiplier * max_grad_norm`."""

    def __init__(self, stream: KeyedStream, multiplier: float) -> None:
        self.stream, self.multiplier = stream, multiplier

    def for_(self, parameter: Tensor, scale: float) -> Tensor:
        """float64, shaped as the parameter, on its device."""
        values = torch.from_numpy(self.stream.normal(parameter.numel()))
        return values.mul_(self.multiplier * scale).view(parameter.shape).to(parameter.device)


class _Batch:
    """Holds what is stepped on to what was drawn."""

    def __init__(self) -> None:
        self.drawn: int | None = None
        self.clipped: int | None = None  # records in the last backward pass that was clipped; ghost only

    def check(self, records: int | None) -> None:
        """One optimizer step for each drawn batch, on that batch."""
        drawn, self.drawn, self.clipped = self.drawn, None, None
        if drawn is None:
            raise PrivacyRefused("A step without a batch of its own: take one step for each batch of batches().")
        if records is None:
            raise PrivacyRefused(
                "A step whose gradients were not clipped: with grad_sample_mode='ghost' wrap the loss by criterion()."
            )
        if records != drawn:
            raise PrivacyRefused(
                f"A step on {records} records, where {drawn} were drawn: train on the batches of batches(), whole. "
                "Other batches would not have the privacy that is accounted."
            )


def wrap(
    model: nn.Module,
    stream: KeyedStream,
    *,
    mode: Literal["hooks", "ghost"],
    noise_multiplier: float,
    max_grad_norm: float,
) -> tuple[Wrapped, Callable[[int], None]]:
    """The wrapped model, and what to call with the number of records of each batch that is drawn.

    Raises:
        PrivacyRefused: The model mixes records (BatchNorm), or has parts whose gradients Opacus cannot tell apart.
    """
    validators, grad_sample = opacus().validators, opacus().grad_sample
    model.train()
    errors = validators.ModuleValidator.validate(model, strict=False)
    if errors:
        raise PrivacyRefused(
            f"This model cannot be trained with differential privacy: {str(errors[0]).rstrip('.')}. "
            "opacus.validators.ModuleValidator.fix(model) makes one that can, such as GroupNorm for BatchNorm; use it "
            "on the server too."
        )
    batch = _Batch()
    if mode == "ghost":
        wrapped = _watched_ghost(grad_sample.GradSampleModuleFastGradientClipping)(model, max_grad_norm=max_grad_norm)
        wrapped.fl_gradcode_batch = batch
    else:
        wrapped = grad_sample.GradSampleModule(model)
    wrapped.forbid_grad_accumulation()

    def drawn(records: int) -> None:
        batch.drawn = records

    noise = _Noise(stream, noise_multiplier)
    return Wrapped(wrapped, ghost=mode == "ghost", max_grad_norm=max_grad_norm, noise=noise, batch=batch), drawn


def _with_stream(kind: type[Any]) -> type[Any]:
    """An optimizer of Opacus' whose noise is the stream's."""
    check_unused = opacus().optimizers.optimizer._check_processed_flag
    mark_used = opacus().optimizers.optimizer._mark_as_processed

    class KeyedOptimizer(kind):  # type: ignore[misc] # a class that is known at run time only
        def add_noise(self) -> None:
            noise, batch = self.fl_gradcode
            samples = getattr(self.params[0], "grad_sample", None)
            batch.check(batch.clipped if samples is None else len(samples))
            for p in self.params:  # their order is part of what holders have to share
                check_unused(p.summed_grad)
                noisy = p.summed_grad.double().view(p.shape) + noise.for_(p, self.max_grad_norm)
                p.grad = noisy.to(p.dtype)  # one rounding
                mark_used(p.summed_grad)

    return KeyedOptimizer


def _watched_ghost(kind: type[Any]) -> type[Any]:
    """Ghost clipping that remembers that it clipped, and how many records."""

    class WatchedGhost(kind):  # type: ignore[misc]
        def get_clipping_coef(self) -> Tensor:
            coefficients: Tensor = super().get_clipping_coef()
            self.fl_gradcode_batch.clipped = len(coefficients)
            return coefficients

        def capture_backprops_hook(self, *args: Any, **kwargs: Any) -> None:
            # Runs in the first pass of each loss, which measures norms, and not in the second, which clips. After
            # a loss that is not wrapped, or a second one, no clipping follows or what was clipped is not all.
            if self.hooks_enabled:
                self.fl_gradcode_batch.clipped = None
            super().capture_backprops_hook(*args, **kwargs)

    return WatchedGhost
