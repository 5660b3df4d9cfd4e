"""Opacus' optimizers with keyed noise, held to what is accounted: one noisy step for each batch that was drawn.

Importing this module imports Opacus; `training` does so when a shard is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PrivacyRefused
from ._opacus import (
    DPLossFastGradientClipping,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPTensorFastGradientClipping,
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
    ModuleValidator,
    check_processed_flag,
    mark_as_processed,
)
from .key_derivation import PRFStream

__all__ = [
    "KeyedDPOptimizer",
    "KeyedGhostOptimizer",
    "KeyedNoise",
    "PrivateModel",
    "StepGuard",
    "WeightGuard",
    "same_bits",
    "wrap",
]

_DTYPES = (torch.float32, torch.float64)


class StepGuard:
    """Checks that each batch has exactly one step, on its own records.

    Attributes:
        drawn: Number of records of the batch that was drawn last; None once it had its step.
        clipped: Number of records whose gradients the last backward pass clipped; only ghost clipping sets it.
        steps: Number of batches that had their step.
    """

    def __init__(self) -> None:
        self.drawn: int | None = None
        self.clipped: int | None = None
        self.steps = 0

    def check(self, records: int | None) -> None:
        """Check that gradients belong to the batch that was drawn.

        Args:
            records: Number of records that they were computed from; None: they were not clipped.

        Raises:
            PrivacyRefused: They do not, or there is no batch.
        """
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
        """Check gradients as `check` does, and let no second step use this batch.

        Returns:
            The number of records.
        """
        self.check(records)
        assert self.drawn is not None
        drawn, self.drawn, self.clipped = self.drawn, None, None
        return drawn


class WeightGuard:
    """Checks that nothing but noisy steps changes a model's parameters, and nothing at all its buffers.

    Args:
        model: The plain model, as training starts from it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.keep()

    def keep(self) -> None:
        """Remember the parameters as they are now."""
        # A copy: version counters of tensors miss what is written through `.data`.
        self._kept, self._shapes = self._now()

    def check(self) -> None:
        """Check that the parameters have the bits that `keep` remembered, on whatever device.

        Raises:
            PrivacyRefused: One has changed.
        """
        now, shapes = self._now()
        if shapes != self._shapes or not all(map(same_bits, now, self._kept)):
            raise PrivacyRefused(
                "Something other than a step of the optimizer that optimizer() returned has changed the model, without "
                "noise: change weights by its step() alone, and set them or their dtype before private_training."
            )

    def check_buffers(self) -> None:
        """Check that the buffers are those that training started with.

        Raises:
            PrivacyRefused: One has changed or is new.
        """
        before = self._buffers
        for name, buffer in self._model.named_buffers():
            if name not in before or not same_bits(buffer, before[name]):
                raise PrivacyRefused(
                    f"Training changed {name!r}, which is no parameter and gets no noise: it would tell of the data. "
                    "Use layers without running statistics."
                )

    def _now(self) -> tuple[list[Tensor], list[tuple[str, torch.Size, torch.dtype]]]:
        """Returns all values, one flat copy for each dtype and device, and name, shape and dtype of each parameter."""
        # One copy for each kind: many small copies cost more than what is in them.
        parameters = list(self._model.named_parameters())
        shapes = [(name, p.shape, p.dtype) for name, p in parameters]
        kinds = dict.fromkeys((p.dtype, p.device) for _, p in parameters)
        flat = [
            torch.cat([p.detach().reshape(-1) for _, p in parameters if (p.dtype, p.device) == kind]) for kind in kinds
        ]
        return flat, shapes


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether both tensors have equal dtype, shape and bits (NaN included), on whatever devices."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = one.detach(), other.detach().to(one.device)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.element_size())
    return torch.equal(one, other) if whole is None else torch.equal(one.view(whole), other.view(whole))


class KeyedNoise:
    """Gaussian noise from a keyed stream, for the sum of a batch's clipped gradients.

    Attributes:
        stream: Of standard normal numbers, used for nothing else.
        multiplier: Standard deviation of the noise over the clipping norm.
    """

    def __init__(self, stream: PRFStream, multiplier: float) -> None:
        self.stream, self.multiplier = stream, multiplier

    def of_a_step(self, parameters: Sequence[Tensor], max_grad_norm: float) -> Iterator[Tensor]:
        """Returns one tensor for each parameter: float64, of its shape and on its device.

        Numbers are drawn in the order of the parameters, which all holders of a shard have to share.
        """
        # One draw for all: many small ones cost more than their numbers.
        scale = self.multiplier * max_grad_norm
        drawn = torch.from_numpy(self.stream.normal(sum(p.numel() for p in parameters))).mul_(scale)
        pieces = torch.split(drawn, [p.numel() for p in parameters])
        return (piece.view(p.shape).to(p.device) for piece, p in zip(pieces, parameters, strict=True))


class KeyedDPOptimizer(DPOptimizer):  # type: ignore[misc] # Opacus has no types
    """Opacus' optimizer for per-record gradients, with keyed noise and with every step checked.

    Attributes:
        noise: Replaces Opacus' noise.
        step_guard: Checks that each batch has one step.
        weight_guard: Checks that nothing but a step changes the weights.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        noise: KeyedNoise,
        step_guard: StepGuard,
        weight_guard: WeightGuard,
        max_grad_norm: float,
        expected_batch_size: float,
    ) -> None:
        super().__init__(
            inner,
            noise_multiplier=noise.multiplier,  # says what the noise is; `add_noise` below draws it
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self.noise, self.step_guard, self.weight_guard = noise, step_guard, weight_guard
        self._summed_norm = math.nan

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one noisy step, as `torch.optim.Optimizer.step`."""
        loss: float | None = super().step(closure)
        self.weight_guard.keep()
        self.step_guard.steps += 1
        return loss

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip, sum and add noise, without anything that an earlier step left."""
        self.weight_guard.check()
        for p in self.params:
            p.summed_grad = None  # this batch's records, once
        if not super().pre_step(closure):
            raise PrivacyRefused("A step was skipped: each batch of batches() has one step, not parts of one.")
        return True

    def clip_and_accumulate(self) -> None:
        """Clip and sum the records' gradients, without those records whose gradient is not finite."""
        self._summed_norm = math.nan
        if not all(getattr(p, "grad_sample", None) is not None for p in self.params):
            super().clip_and_accumulate()  # raises, and says what is missing
            return
        for p in self.params:
            check_processed_flag(p.grad_sample)
            sample = self._get_flat_grad_sample(p)
            self.step_guard.check(len(sample))
            if sample.dtype != p.dtype:  # autocast: norms of coarser numbers are too coarse to clip by
                p.grad_sample = sample.to(p.dtype)
        super().clip_and_accumulate()
        self._summed_norm = _norm_of_sum(self.params)
        # One record that is not finite makes the whole sum so. Looking at the sum costs little, looking at all records'
        # gradients before each step would cost half a step.
        if not math.isfinite(self._summed_norm):
            self._leave_out_records_that_are_not_finite()
            super().clip_and_accumulate()
            self._summed_norm = _norm_of_sum(self.params)

    def _leave_out_records_that_are_not_finite(self) -> None:
        """Set their gradients to zero, and undo the sum."""
        samples = [self._get_flat_grad_sample(p).to(p.dtype) for p in self.params]
        lengths = [s.reshape(len(s), p.numel()).norm(dim=1) for p, s in zip(self.params, samples, strict=True)]
        finite = torch.stack([length.to(lengths[0].device) for length in lengths]).norm(dim=0).isfinite()
        del samples
        for p in self.params:
            sample = self._get_flat_grad_sample(p).to(p.dtype)
            kept = finite.to(sample.device).view(-1, *[1] * (sample.dim() - 1))
            p.grad_sample = torch.where(kept, sample, 0.0)  # not by a product: 0 times NaN is NaN
            p.summed_grad = None

    def add_noise(self) -> None:
        """Add this step's noise to the summed gradients, and check that their sum was clipped."""
        records = self.step_guard.use(self._records())
        if not self._norm() <= records * self.max_grad_norm * (1 + 1e-3) + 1e-30:  # NaN is refused too
            raise PrivacyRefused(
                "Gradients were not clipped: a weight is used past its layer, as by F.linear(x, layer.weight), "
                "or a loss mixes records. Use grad_sample_mode='hooks', layers alone, and a loss for each record."
            )
        for p, drawn in zip(self.params, self.noise.of_a_step(self.params, self.max_grad_norm), strict=True):
            check_processed_flag(p.summed_grad)
            noisy = drawn.add_(p.summed_grad.view(p.shape))  # in float64
            p.grad = noisy.to(p.dtype)  # one rounding
            mark_as_processed(p.summed_grad)

    def _records(self) -> int | None:
        """Returns the number of records that the sum is of; None: they were not clipped."""
        samples = getattr(self.params[0], "grad_sample", None)
        return None if samples is None else len(samples)

    def _norm(self) -> float:
        """Returns the Euclidean norm of the summed gradients, before noise."""
        return self._summed_norm


class KeyedGhostOptimizer(KeyedDPOptimizer, DPOptimizerFastGradientClipping):  # type: ignore[misc] # no types
    """The same for ghost clipping, where the second backward pass has clipped and summed already.

    `super().pre_step` of `KeyedDPOptimizer` is here that of `DPOptimizerFastGradientClipping`, which calls `accumulate`
    in place of `clip_and_accumulate`.
    """

    def _records(self) -> int | None:
        return self.step_guard.clipped

    def _norm(self) -> float:
        return _norm_of_sum(self.params)


class GuardedGhostModule(GradSampleModuleFastGradientClipping):  # type: ignore[misc] # Opacus has no types
    """Opacus' model for ghost clipping, which tells `step_guard` how many records it clipped."""

    def __init__(self, model: nn.Module, *, max_grad_norm: float, step_guard: StepGuard) -> None:
        super().__init__(model, max_grad_norm=max_grad_norm)
        self.step_guard = step_guard

    def get_clipping_coef(self) -> Tensor:
        """Returns each record's factor, shape (records,), after checking that it is of the batch that was drawn."""
        for p in self.trainable_parameters:
            self.step_guard.check(len(p._norm_sample))
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
        self.step_guard.clipped = len(coefficients)
        return coefficients

    def capture_backprops_hook(self, *args: Any, **kwargs: Any) -> None:
        """Measure norms in the first backward pass of a loss."""
        # Hooks are enabled in the pass that measures, and not in the one that clips. After a loss that is not wrapped,
        # or after a second loss, no clipping follows, or not all was clipped.
        if self.hooks_enabled:
            self.step_guard.clipped = None
        super().capture_backprops_hook(*args, **kwargs)


class PerRecordLoss(DPTensorFastGradientClipping):  # type: ignore[misc] # Opacus has no types
    """Opacus' loss for ghost clipping, held to one number for each record: `loss_per_sample` has shape (records,).

    Opacus multiplies factors of shape (records,) by the loss; one of shape (records, 1) would become a square.
    """

    def __init__(self, module: Any, optimizer: Any, loss_per_sample: Tensor, loss_reduction: str = "mean") -> None:
        several = loss_per_sample.dim() > 1
        values = loss_per_sample.flatten(1).mean(1) if several else loss_per_sample
        super().__init__(module, optimizer, values, loss_reduction)

    @classmethod
    def of(cls, loss: Any) -> PerRecordLoss:
        """Returns the same loss in this class: operations of Opacus' class return Opacus' class."""
        return cls(loss.module, loss.optimizer, loss.loss_per_sample, loss.loss_reduction)

    def backward(self) -> None:
        """Check the number of records, and run both backward passes."""
        self.optimizer.step_guard.check(len(self.loss_per_sample) if self.loss_per_sample.dim() else -1)
        super().backward()

    def __mul__(self, other: Any) -> PerRecordLoss:
        return self.of(super().__mul__(_no_tensor(other)))

    def __truediv__(self, other: Any) -> PerRecordLoss:
        return self.of(super().__truediv__(_no_tensor(other)))

    def __add__(self, other: Any) -> PerRecordLoss:
        return self.of(super().__add__(_no_tensor(other)))

    def __sub__(self, other: Any) -> PerRecordLoss:
        return self.of(super().__sub__(_no_tensor(other)))

    def __rsub__(self, other: Any) -> PerRecordLoss:
        return self.of(super().__rsub__(_no_tensor(other)))

    def __neg__(self) -> PerRecordLoss:
        return self * -1


def _no_tensor(other: Any) -> Any:
    if isinstance(other, Tensor):
        raise PrivacyRefused(
            "Ghost clipping sees no gradients of what is added to a loss or multiplied by it: add losses of "
            "criterion() and scale them by numbers alone, or use grad_sample_mode='hooks'."
        )
    return other


class PerRecordCriterion(DPLossFastGradientClipping):  # type: ignore[misc] # Opacus has no types
    """Opacus' loss function for ghost clipping; it returns a `PerRecordLoss`."""

    def __call__(self, *args: Any, **kwargs: Any) -> PerRecordLoss:
        return PerRecordLoss.of(super().__call__(*args, **kwargs))


class PrivateModel:
    """A model with clipped gradients, and the optimizer and loss that go with it; made by `wrap`.

    Attributes:
        model: To be called in training; `unwrap` gives the plain model back.
    """

    def __init__(
        self,
        model: Any,
        *,
        ghost: bool,
        max_grad_norm: float,
        noise: KeyedNoise,
        steps: StepGuard,
        weights: WeightGuard,
    ) -> None:
        self.model, self._ghost, self._max_grad_norm, self._noise = model, ghost, max_grad_norm, noise
        self._step_guard, self._weight_guard = steps, weights
        self._optimizer: KeyedDPOptimizer | None = None

    @property
    def steps(self) -> int:
        """Number of batches that had their noisy step."""
        return self._step_guard.steps

    def batch_drawn(self, records: int) -> None:
        """Note that a batch of so many records was drawn; the next step has to be on it."""
        self._step_guard.drawn = records

    def check_unchanged(self) -> None:
        """Check that nothing but noisy steps has changed the model.

        Raises:
            PrivacyRefused: A buffer changed, or a parameter by something else.
        """
        self._weight_guard.check_buffers()
        self._weight_guard.check()

    def optimizer(self, inner: torch.optim.Optimizer, *, expected_batch_size: float) -> KeyedDPOptimizer:
        """Returns an optimizer that gives `inner` clipped and noisy gradients.

        Args:
            inner: With the parameters of the model that are trained, and no others.
            expected_batch_size: Mean number of records of a batch: summed gradients are divided by it.

        Raises:
            PrivacyRefused: It has other parameters.
        """
        mine = {id(p) for p in self.model.parameters() if p.requires_grad}
        if {id(p) for group in inner.param_groups for p in group["params"] if p.requires_grad} != mine:
            raise PrivacyRefused(
                "The optimizer has other parameters than those of the model that are trained: all of them get noise. "
                "Make it from model.parameters() alone, and freeze what is not trained."
            )
        kind = KeyedGhostOptimizer if self._ghost else KeyedDPOptimizer
        self._optimizer = kind(
            inner,
            noise=self._noise,
            step_guard=self._step_guard,
            weight_guard=self._weight_guard,
            max_grad_norm=self._max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        return self._optimizer

    def criterion(self, inner: Any) -> Any:
        """Returns the loss as a mean over records of what each has alone, in a form that ghost clipping sees."""
        if getattr(inner, "reduction", "mean") == "sum":
            raise PrivacyRefused("The loss is a sum over records: give criterion() one with reduction='mean'.")
        if not self._ghost:
            return _mean_over_records(inner) if getattr(inner, "reduction", None) == "mean" else inner
        if self._optimizer is None:
            raise PrivacyRefused("Ghost clipping needs the optimizer before the loss: call optimizer() first.")
        return PerRecordCriterion(self.model, self._optimizer, inner)

    def unwrap(self) -> nn.Module:
        """Returns the plain model, without hooks and without anything that an interrupted pass left."""
        plain: nn.Module = self.model.to_standard_module()
        for module in plain.modules():  # else it would be taken for the next batch's
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):
                    delattr(module, name)
        for parameter in plain.parameters():
            if hasattr(parameter, "summed_grad"):  # has no noise yet
                del parameter.summed_grad
        return plain


def _mean_over_records(loss: Any) -> Callable[..., Tensor]:
    """Returns the loss as the mean over records of each record's own loss, as ghost clipping has it.

    PyTorch divides by the sum of class weights, and leaves out ignored labels: the length of one record's gradient
    would depend on the other records before it is clipped.
    """

    def mean(*args: Any, **kwargs: Any) -> Tensor:
        loss.reduction = "none"
        try:
            values: Tensor = loss(*args, **kwargs)
        finally:
            loss.reduction = "mean"
        return values.mean()

    return mean


def _norm_of_sum(parameters: Sequence[Any]) -> float:
    """Returns the Euclidean norm of the summed gradients of all parameters together."""
    return float(torch.nn.utils.get_total_norm([p.summed_grad for p in parameters]))


def wrap(
    model: nn.Module,
    stream: PRFStream,
    *,
    mode: Literal["hooks", "ghost"],
    noise_multiplier: float,
    max_grad_norm: float,
) -> PrivateModel:
    """Returns the model wrapped for private training.

    Args:
        model: With the weights that training starts from.
        stream: For the noise alone.
        mode: Opacus' way to get single records' gradients.
        noise_multiplier: Standard deviation of the noise over `max_grad_norm`.
        max_grad_norm: Bound of the Euclidean norm of one record's gradient.

    Raises:
        PrivacyRefused: The model mixes records (BatchNorm), has parts whose gradients Opacus cannot tell apart, or is
            trained at less than single precision.
    """
    if any(p.requires_grad and p.dtype not in _DTYPES for p in model.parameters()):
        raise PrivacyRefused(
            "Parameters that are trained must be float32 or float64: coarser numbers round clipped gradients above the "
            "clipping norm. Call model.float() first."
        )
    model.train()
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise PrivacyRefused(
            f"This model cannot be trained with differential privacy: {str(errors[0]).rstrip('.')}. "
            "opacus.validators.ModuleValidator.fix(model) makes one that can, such as GroupNorm for BatchNorm; use it "
            "on the server too."
        )
    ghost = mode == "ghost"
    steps, weights, noise = StepGuard(), WeightGuard(model), KeyedNoise(stream, noise_multiplier)
    wrapped = (
        GuardedGhostModule(model, max_grad_norm=max_grad_norm, step_guard=steps) if ghost else GradSampleModule(model)
    )
    wrapped.forbid_grad_accumulation()
    return PrivateModel(wrapped, ghost=ghost, max_grad_norm=max_grad_norm, noise=noise, steps=steps, weights=weights)
