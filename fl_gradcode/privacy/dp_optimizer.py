"""Opacus' optimizer with our noise, held to what is accounted: one noisy step for each batch that was drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PrivacyRefused
from ._opacus import opacus
from .key_derivation import KeyedStream

__all__ = ["Batch", "Weights", "Wrapped", "per_record_loss", "same_bits", "watched_ghost", "wrap"]


class Batch:
    """The batch that was drawn last.

    Attributes:
        drawn: Number of its records; None once it had its step.
        clipped: Records of the last backward pass that was clipped; ghost clipping alone.
        steps: How many batches had their step.
    """

    def __init__(self) -> None:
        self.drawn: int | None = None
        self.clipped: int | None = None
        self.steps = 0

    def check(self, records: int | None) -> None:
        """Gradients of so many records are those of the batch."""
        if self.drawn is None:
            raise PrivacyRefused("A step without a batch of its own: take one step for each batch of batches().")
        if records is None:
            raise PrivacyRefused(
                "A step whose gradients were not clipped: with grad_sample_mode='ghost' wrap the loss by criterion()."
            )
        if records != self.drawn:
            raise PrivacyRefused(
                "A step on another number of records than was drawn: train on the batches of batches(), whole, with "
                "records along the first axis of inputs and outputs. Others have not the privacy that is accounted."
            )

    def use(self, records: int | None) -> int:
        """Check them, and let no second step have this batch; the number of records."""
        self.check(records)
        assert self.drawn is not None
        drawn, self.drawn, self.clipped = self.drawn, None, None
        return drawn


class Weights:
    """A model's parameters as the last noisy step left them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.keep()

    def keep(self) -> None:
        """As they are now. A copy: versions of tensors miss what is written through `.data`."""
        self._kept, self._shapes = self._now()

    def check(self) -> None:
        """Nothing but a noisy step has changed them; on another device they are the same."""
        now, shapes = self._now()
        if shapes != self._shapes or not all(map(same_bits, now, self._kept)):
            raise PrivacyRefused(
                "Something other than a step of the optimizer that optimizer() returned has changed the model, without "
                "noise: change weights by its step() alone, and set them or their dtype before private_training."
            )

    def _now(self) -> tuple[list[Tensor], list[tuple[str, torch.Size, torch.dtype]]]:
        """The numbers, one copy for each dtype: many small ones cost more than what is in them."""
        parameters = list(self._model.named_parameters())
        shapes = [(name, p.shape, p.dtype) for name, p in parameters]
        kinds = dict.fromkeys((p.dtype, p.device) for _, p in parameters)
        flat = [
            torch.cat([p.detach().reshape(-1) for _, p in parameters if (p.dtype, p.device) == kind]) for kind in kinds
        ]
        return flat, shapes


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether both have equal dtype, shape and bits (NaN included), on whatever devices."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = one.detach(), other.detach().to(one.device)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.element_size())
    return torch.equal(one, other) if whole is None else torch.equal(one.view(whole), other.view(whole))


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
