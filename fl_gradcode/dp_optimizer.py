"""Opacus' optimizers with the noise of a stream instead of a generator's, and what could void the claim refused.

A torch generator keeps 32 bits of its seed: whoever knows the rest tries them all in hours. Everything else, clipping
and ghost clipping included, is Opacus'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import PrivacyRefused
from .ghost_clipping import per_record_loss, watched_ghost
from .keyed import KeyedStream
from .opacus_import import opacus
from .stepping import Batch, Weights

__all__ = ["Wrapped", "wrap"]

_DTYPES = (torch.float32, torch.float64)


class Wrapped:
    """A model with clipped gradients, and the optimizer and loss that go with it.

    Attributes:
        model: To be called in training; unwrap() gives the plain model back.
    """

    def __init__(
        self, model: Any, *, ghost: bool, max_grad_norm: float, noise: _Noise, batch: Batch, weights: Weights
    ) -> None:
        self.model, self._ghost, self._max_grad_norm, self._noise = model, ghost, max_grad_norm, noise
        self._batch, self._weights = batch, weights
        self._optimizer: Any = None

    @property
    def steps(self) -> int:
        """How many batches had their noisy step."""
        return self._batch.steps

    def check_weights(self) -> None:
        """Refuse weights that something other than noisy steps has changed."""
        self._weights.check()

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
        self._optimizer.fl_gradcode = (self._noise, self._batch, self._weights)
        return self._optimizer

    def criterion(self, inner: Any) -> Any:
        """The loss as a mean over records of what each has alone, such that ghost clipping sees it."""
        if getattr(inner, "reduction", "mean") == "sum":
            raise PrivacyRefused("The loss is a sum over records: give criterion() one with reduction='mean'.")
        if not self._ghost:
            return _mean_over_records(inner) if getattr(inner, "reduction", None) == "mean" else inner
        if self._optimizer is None:
            raise PrivacyRefused("Ghost clipping needs the optimizer before the loss: call optimizer() first.")
        return per_record_loss(self._batch)(self.model, self._optimizer, inner)

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


def _mean_over_records(loss: Any) -> Callable[..., Tensor]:
    """The same as ghost clipping has. PyTorch divides by the sum of class weights, and leaves out ignored labels: how
    long one record's gradient is would depend on the others, before it is clipped.
    """

    def mean(*args: Any, **kwargs: Any) -> Tensor:
        loss.reduction = "none"
        try:
            values: Tensor = loss(*args, **kwargs)
        finally:
            loss.reduction = "mean"
        return values.mean()

    return mean


class _Noise:
    """Where noise comes from: standard normals times `multiplier * max_grad_norm`."""

    def __init__(self, stream: KeyedStream, multiplier: float) -> None:
        self.stream, self.multiplier = stream, multiplier

    def of_a_step(self, parameters: Sequence[Tensor], scale: float) -> Iterator[Tensor]:
        """For each parameter in their order, which holders have to share: float64, of its shape, on its device. One
        draw for all: many small ones cost more than their numbers.
        """
        drawn = torch.from_numpy(self.stream.normal(sum(p.numel() for p in parameters))).mul_(self.multiplier * scale)
        pieces = torch.split(drawn, [p.numel() for p in parameters])
        return (piece.view(p.shape).to(p.device) for piece, p in zip(pieces, parameters, strict=True))


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
        PrivacyRefused: The model mixes records (BatchNorm), has parts whose gradients Opacus cannot tell apart, or is
            trained at less than single precision.
    """
    if any(p.requires_grad and p.dtype not in _DTYPES for p in model.parameters()):
        raise PrivacyRefused(
            "Parameters that are trained must be float32 or float64: coarser numbers round clipped gradients above the "
            "clipping norm. Call model.float() first."
        )
    validators, grad_sample = opacus().validators, opacus().grad_sample
    model.train()
    errors = validators.ModuleValidator.validate(model, strict=False)
    if errors:
        raise PrivacyRefused(
            f"This model cannot be trained with differential privacy: {str(errors[0]).rstrip('.')}. "
            "opacus.validators.ModuleValidator.fix(model) makes one that can, such as GroupNorm for BatchNorm; use it "
            "on the server too."
        )
    batch, weights = Batch(), Weights(model)
    if mode == "ghost":
        wrapped = watched_ghost(grad_sample.GradSampleModuleFastGradientClipping)(model, max_grad_norm=max_grad_norm)
        wrapped.fl_gradcode_batch = batch
    else:
        wrapped = grad_sample.GradSampleModule(model)
    wrapped.forbid_grad_accumulation()

    def drawn(records: int) -> None:
        batch.drawn = records

    noise = _Noise(stream, noise_multiplier)
    ghost = mode == "ghost"
    return (
        Wrapped(wrapped, ghost=ghost, max_grad_norm=max_grad_norm, noise=noise, batch=batch, weights=weights),
        drawn,
    )


def _length(parameters: Any) -> float:
    """Norm of the summed gradients."""
    return float(torch.nn.utils.get_total_norm([p.summed_grad for p in parameters]))


def _with_stream(kind: type[Any]) -> type[Any]:
    """An optimizer of Opacus' whose noise is the stream's."""
    check_unused = opacus().optimizers.optimizer._check_processed_flag
    mark_used = opacus().optimizers.optimizer._mark_as_processed

    class KeyedOptimizer(kind):  # type: ignore[misc] # a class that is known at run time only
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            loss: float | None = super().step(closure)
            _, batch, weights = self.fl_gradcode
            weights.keep()
            batch.steps += 1
            return loss

        def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
            self.fl_gradcode[2].check()
            for p in self.params:
                p.summed_grad = None  # this batch's records, once
            if not super().pre_step(closure):
                raise PrivacyRefused("A step was skipped: each batch of batches() has one step, not parts of one.")
            return True

        def clip_and_accumulate(self) -> None:
            """Clip; under hooks, once more without the records that have no finite gradient, if there are any.

            Such a record makes the sum NaN or infinite, which one pass over the sum shows. To look at all records'
            gradients before would cost half a step.
            """
            hooks = all(getattr(p, "grad_sample", None) is not None for p in self.params)
            if hooks:  # else super() says so, or ghost
                for p in self.params:
                    check_unused(p.grad_sample)
                    sample = self._get_flat_grad_sample(p)
                    self.fl_gradcode[1].check(len(sample))
                    if sample.dtype != p.dtype:  # autocast: norms of coarser numbers are too coarse to clip by
                        p.grad_sample = sample.to(p.dtype)
            super().clip_and_accumulate()
            self.fl_gradcode_length = _length(self.params) if hooks else None
            if self.fl_gradcode_length is not None and not math.isfinite(self.fl_gradcode_length):
                samples = [self._get_flat_grad_sample(p).to(p.dtype) for p in self.params]
                lengths = [s.reshape(len(s), p.numel()).norm(dim=1) for p, s in zip(self.params, samples, strict=True)]
                finite = torch.stack([length.to(lengths[0].device) for length in lengths]).norm(dim=0).isfinite()
                del samples
                for p in self.params:
                    sample = self._get_flat_grad_sample(p).to(p.dtype)
                    kept = finite.to(sample.device).view(-1, *[1] * (sample.dim() - 1))
                    p.grad_sample = torch.where(kept, sample, 0.0)  # not by a product: 0 times NaN is NaN
                    p.summed_grad = None
                super().clip_and_accumulate()
                self.fl_gradcode_length = _length(self.params)

        def add_noise(self) -> None:
            noise, batch, _ = self.fl_gradcode
            samples = getattr(self.params[0], "grad_sample", None)
            records = batch.use(batch.clipped if samples is None else len(samples))
            length = getattr(self, "fl_gradcode_length", None)
            length = _length(self.params) if length is None else length
            if not length <= records * self.max_grad_norm * (1 + 1e-3) + 1e-30:  # NaN is refused too
                raise PrivacyRefused(
                    "Gradients were not clipped: a weight is used past its layer, as by F.linear(x, layer.weight), "
                    "or a loss mixes records. Use grad_sample_mode='hooks', layers alone, and a loss for each record."
                )
            for p, drawn in zip(self.params, noise.of_a_step(self.params, self.max_grad_norm), strict=True):
                check_unused(p.summed_grad)
                noisy = drawn.add_(p.summed_grad.view(p.shape))  # in float64
                p.grad = noisy.to(p.dtype)  # one rounding
                mark_used(p.summed_grad)

    return KeyedOptimizer
