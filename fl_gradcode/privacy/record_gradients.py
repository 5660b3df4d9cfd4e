"""Gradients of single records: Opacus' modules for both modes, and the sum of what is clipped.

Each record's gradient is scaled down to the clipping norm at most. Norms are taken in double precision. A record whose
gradient is not finite, or has a norm that overflows, counts as zero in both modes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import PrivacyRefused
from ._opacus import (
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
    create_or_accumulate_grad_sample,
    ft_compute_per_sample_gradient,
    promote_current_grad_sample,
)
from .record_losses import keep_apart, mark, refuse_mixed, unheard
from .step_guards import Misuse, StepGuard

__all__ = ["GhostLoss", "GhostModule", "HooksModule", "clipped_sums", "forget_pass", "padding_rows"]

#: A clipped gradient stays below the clipping norm by this much, so that rounding does not lift it above.
_BELOW = 1 - 2**-17
#: Norm above which a factor times a gradient is no longer exact in single precision.
_LARGE = 1e18
_PIECE = 4096  # numbers that are added up in single precision
_PASSING = ("grad_sample", "summed_grad", "_current_grad_sample", "_norm_sample")


# ---- Samplers ----


def _without_padding(sampler: Callable[..., Any]) -> Callable[..., Any]:
    """Returns Opacus' sampler for embeddings, without the row of `padding_idx`, which has no gradient."""

    def sampled(layer: nn.Embedding, activations: Any, backprops: Tensor) -> Any:
        if layer.padding_idx is not None:
            backprops = backprops * (activations[0] != layer.padding_idx).unsqueeze(-1)
        return sampler(layer, activations, backprops)

    return sampled


def _linear_norms(layer: Any, activations: Any, backprops: Tensor) -> dict[Any, Tensor]:
    """Returns the norms of each record's gradients of a linear layer, without making those.

    Sums over positions cancel, so they are taken in double precision.
    """
    inputs = activations[0].to(backprops.dtype)
    records = backprops.shape[0]
    b = backprops.reshape(records, -1, backprops.shape[-1]).double()
    found: dict[Any, Tensor] = {}
    if layer.weight.requires_grad:
        a = inputs.reshape(records, -1, inputs.shape[-1]).double()
        if b.shape[1] == 1:
            squares = b.square().sum((1, 2)) * a.square().sum((1, 2))
        elif b.shape[1] ** 2 <= b.shape[2] * a.shape[2]:
            squares = ((b @ b.mT) * (a @ a.mT)).sum((1, 2)).clamp(min=0)
        else:
            squares = (b.mT @ a).square().sum((1, 2))
        found[layer.weight] = squares.sqrt().to(backprops.dtype)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = b.sum(1).norm(dim=1).to(backprops.dtype)
    return found


def _grad_samplers(base: dict[Any, Any]) -> dict[Any, Any]:
    return {**base, nn.Embedding: _without_padding(base[nn.Embedding])}


# ---- Modules ----


class _Watched:
    """A model that is tried out before its first batch, and whose outputs are known to keep records apart.

    Attributes:
        guard: Knows how many records were drawn.
        before: Called with the arguments of forward passes until it returns that it is done; None once it has.
    """

    guard: StepGuard
    before: Callable[..., bool] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the model returns.

        Raises:
            Misuse: An input was made of the whole batch.
        """
        refuse_mixed(args, kwargs)
        if self.before is not None and self.before(self, args, kwargs):
            self.before = None
        with unheard():
            outputs = super().forward(*args, **kwargs)  # type: ignore[misc]
        return keep_apart(outputs, self.guard.drawn or 0)


class HooksModule(_Watched, GradSampleModule):  # type: ignore[misc] # Opacus has no types
    """Opacus' model for gradients of single records.

    Args:
        model: The plain model.
        guard: Checks that each step is on the records that were drawn.
        before: Called with the arguments of forward passes until it returns that it is done.
    """

    GRAD_SAMPLERS = _grad_samplers(GradSampleModule.GRAD_SAMPLERS)

    def __init__(self, model: nn.Module, *, guard: StepGuard, before: Callable[..., bool]) -> None:
        super().__init__(model, loss_reduction="sum")
        self.guard, self.before = guard, before


class GhostModule(_Watched, GradSampleModuleFastGradientClipping):  # type: ignore[misc] # Opacus has no types
    """Opacus' model for ghost clipping: one backward pass takes norms, and a second one sums what is clipped.

    Where some record's gradient is not finite or very large, the second pass would spoil the sum. It then makes all
    records' gradients instead, as `HooksModule` does.

    Args:
        model: The plain model.
        max_grad_norm: Bound of the Euclidean norm of one record's gradient.
        guard: Is told how many records were clipped.
        before: Called with the arguments of forward passes until it returns that it is done.
    """

    GRAD_SAMPLERS = _grad_samplers(GradSampleModuleFastGradientClipping.GRAD_SAMPLERS)
    NORM_SAMPLERS: ClassVar[dict[Any, Any]] = {
        **GradSampleModuleFastGradientClipping.NORM_SAMPLERS,
        nn.Linear: _linear_norms,
        nn.Embedding: _without_padding(GradSampleModuleFastGradientClipping.NORM_SAMPLERS[nn.Embedding]),
    }

    def __init__(
        self, model: nn.Module, *, max_grad_norm: float, guard: StepGuard, before: Callable[..., bool]
    ) -> None:
        super().__init__(model, max_grad_norm=max_grad_norm, loss_reduction="sum")
        self.guard, self.before = guard, before
        self._seen: dict[nn.Module, deque[list[Tensor]]] = {}  # activations, in the order of the backward pass
        self._one_by_one = False

    def clip(self, losses: Tensor) -> None:
        """Run both backward passes.

        Args:
            losses: Loss of each record, shape (records,).
        """
        self.guard.check(len(losses) if losses.dim() else -1)
        self._seen.clear()
        for p in self.trainable_parameters:
            p.grad = p.grad_sample = p._norm_sample = None
        _backward(losses.sum(), retain_graph=True)
        for p in self.trainable_parameters:
            p.grad = None
        factors = self._factors()
        if factors is None:
            with self._gradients_one_by_one():
                _backward(losses.sum())
        else:
            self.disable_hooks()
            try:
                _backward((factors.to(losses) * losses).sum())
            finally:
                self.enable_hooks()
            if any(p.grad is not None and p._norm_sample is None for p in self.trainable_parameters):
                raise Misuse(_PAST_A_LAYER)
        self._seen.clear()
        self.guard.clipped, self.guard.backward = len(losses), True

    def _factors(self) -> Tensor | None:
        """Returns each record's factor, shape (records,), float64; None if one is not finite or very large."""
        norms = []
        for p in self.trainable_parameters:
            if p._norm_sample is None:
                continue
            self.guard.check(len(p._norm_sample))
            if p._norm_sample.dtype != p.dtype:
                raise Misuse(
                    "Ghost clipping got gradients of another precision than the parameters': train without "
                    "autocast, or with grad_sample_mode='hooks'."
                )
            norms.append(p._norm_sample.double().square())
        if not norms:
            raise Misuse("The loss of a step does not depend on the model: call the model that private training gives.")
        lengths = torch.stack([norm.to(norms[0].device) for norm in norms]).sum(0).sqrt()
        self.per_sample_gradient_norms = lengths
        if not bool((lengths <= _LARGE).all()):
            return None
        return _factors_of(lengths, self.max_grad_norm)

    @contextmanager
    def _gradients_one_by_one(self) -> Iterator[None]:
        self._one_by_one = True
        try:
            yield
        finally:
            self._one_by_one = False
        for p in self.trainable_parameters:
            p.grad = None
            if hasattr(p, "_current_grad_sample"):
                promote_current_grad_sample(p)

    def capture_backprops_hook(
        self, module: nn.Module, forward_input: Any, forward_output: Any, loss_reduction: str, batch_first: bool
    ) -> None:
        """Take norms in the first backward pass of a loss, or gradients in the second one."""
        if not self.hooks_enabled:
            return
        if not self._one_by_one:
            # After a loss that is not wrapped, or after a second loss, no clipping follows, or not all was clipped.
            self.guard.clipped = None
            kept: Any = module.activations
            self._seen.setdefault(module, deque()).append(kept[-1])
            super().capture_backprops_hook(module, forward_input, forward_output, loss_reduction, batch_first)
            return
        module.activations = [self._seen[module].popleft()]  # type: ignore[assignment]
        activations, backprops = self.rearrange_grad_samples(
            module=module, backprops=forward_output[0].detach(), loss_reduction=loss_reduction, batch_first=batch_first
        )
        sampler = self.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
        for p, sample in sampler(module, activations, backprops).items():
            create_or_accumulate_grad_sample(param=p, grad_sample=sample, max_batch_len=module.max_batch_len)
        del module.max_batch_len


def _backward(loss: Tensor, *, retain_graph: bool = False) -> None:
    mark(loss).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]


_PAST_A_LAYER = (
    "A weight is used past its layer, as by F.linear(x, layer.weight), and ghost clipping sees layers alone: call the "
    "layer itself."
)


class GhostLoss:
    """The loss of a batch under ghost clipping, by record; it can be added to another and scaled by numbers.

    Args:
        module: The model.
        losses: Loss of each record, shape (records,).
    """

    def __init__(self, module: GhostModule, losses: Tensor) -> None:
        self._module, self.losses = module, losses

    def backward(self) -> None:
        """Compute the sum of clipped gradients."""
        self._module.clip(self.losses)

    def item(self) -> float:
        """Returns the mean over records."""
        return float(self.detach())

    def detach(self) -> Tensor:
        """Returns the mean over records, without its graph."""
        return self.losses.detach().mean()

    def __float__(self) -> float:
        return self.item()

    def __mul__(self, other: Any) -> GhostLoss:
        return GhostLoss(self._module, self.losses * _no_tensor(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> GhostLoss:
        return GhostLoss(self._module, self.losses / _no_tensor(other))

    def __add__(self, other: Any) -> GhostLoss:
        return GhostLoss(self._module, self.losses + _no_tensor(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> GhostLoss:
        return GhostLoss(self._module, self.losses - _no_tensor(other))

    def __rsub__(self, other: Any) -> GhostLoss:
        return GhostLoss(self._module, _no_tensor(other) - self.losses)

    def __neg__(self) -> GhostLoss:
        return GhostLoss(self._module, -self.losses)


def _no_tensor(other: Any) -> Any:
    if isinstance(other, GhostLoss):
        return other.losses
    if isinstance(other, Tensor):
        raise Misuse(
            "Ghost clipping sees no gradients of what is added to a loss or multiplied by it: add losses of "
            "criterion() and scale them by numbers alone, and say penalties on weights by penalty()."
        )
    return other


# ---- Sums ----


def _factors_of(lengths: Tensor, bound: float) -> Tensor:
    """Returns the factors that bring gradients of these lengths to the bound, float64; 0 where one is not finite."""
    factors = (bound * _BELOW / lengths.clamp(min=bound * _BELOW)).double()
    return torch.where(lengths.isfinite(), factors, 0.0)


def clipped_sums(parameters: Sequence[Any], bound: float, guard: StepGuard) -> list[Tensor]:
    """Returns the sum over records of clipped gradients, one tensor for each parameter.

    Args:
        parameters: The parameters that are trained, with what backward passes left at them.
        bound: Clipping norm.
        guard: Checks the number of records.
    """
    with full_precision():
        return _clipped_sums(parameters, bound, guard)


def _clipped_sums(parameters: Sequence[Any], bound: float, guard: StepGuard) -> list[Tensor]:
    samples = [_sample_of(p) for p in parameters]
    if all(sample is None for sample in samples):
        raise PrivacyRefused("A step without a backward pass: call backward() of the loss before step().")
    used = [sample for sample in samples if sample is not None]
    for sample in used:
        guard.check(len(sample))
    lengths = _lengths(used, _norms)
    if not bool((lengths <= _LARGE).all()):  # the squares of such numbers may overflow in single precision
        lengths = _lengths(used, lambda rows: torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
    factors = _factors_of(lengths, bound)
    finite = lengths.isfinite()
    all_finite = bool(finite.all())
    exact = bool((lengths[finite] <= _LARGE).all())
    sums = []
    for p, found in zip(parameters, samples, strict=True):
        if found is None:
            sums.append(torch.zeros_like(p))
            continue
        rows = found.reshape(len(found), -1)
        if not all_finite:  # not by a product: 0 times NaN is NaN
            rows = torch.where(finite.to(rows.device)[:, None], rows, 0.0)
        factor = factors.to(rows.device)
        total = factor.to(rows.dtype) @ rows if exact else (factor @ rows.double()).to(rows.dtype)
        sums.append(total.view(p.shape))
    return sums


def _lengths(samples: Sequence[Tensor], norms: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the norm of each record's gradient over all parameters, float64, shape (records,)."""
    parts = [norms(sample.reshape(len(sample), -1)) for sample in samples]
    if any(part.dtype != parts[0].dtype for part in parts):
        parts = [part.double() for part in parts]
    return torch.stack([part.to(parts[0].device) for part in parts]).double().square().sum(0).sqrt()


def _norms(rows: Any) -> Tensor:
    """Returns the norm of each row, shape (rows,), in single precision at least.

    Single precision adds up a few thousand numbers to eight digits, twenty times as fast as double precision; so the
    rows are taken piece by piece, and only the pieces are added up in double precision.
    """
    if rows.dtype == torch.float64 or rows.shape[1] <= _PIECE:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms
    whole = rows.shape[1] // _PIECE * _PIECE
    pieces: Tensor = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, _PIECE)), dim=2)
    rest: Tensor = torch.linalg.vector_norm(rows[:, whole:], dim=1)
    return (pieces.double().square().sum(1) + rest.double().square()).sqrt()


def _sample_of(p: Any) -> Tensor | None:
    """Returns a parameter's gradients of single records, in its own dtype; None if it was not used."""
    sample = getattr(p, "grad_sample", None)
    if sample is None:
        return None
    if isinstance(sample, list):
        sample = torch.cat(sample)
    # Under autocast they are coarser: norms of coarser numbers are too coarse to clip by.
    found: Tensor = sample.to(p.dtype)
    return found


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch autocast off, which would clip by coarser numbers."""
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def padding_rows(model: nn.Module) -> dict[Tensor, int]:
    """Returns the row of `padding_idx` of each embedding whose weight belongs to no other layer.

    No record changes it, so it gets no noise.
    """
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[p] = owners.get(p, 0) + 1
    return {
        module.weight: module.padding_idx
        for module in model.modules()
        if type(module) is nn.Embedding and module.padding_idx is not None and owners[module.weight] == 1
    }


def forget_pass(model: nn.Module) -> None:
    """Remove whatever forward and backward passes left at a model's layers and parameters, but for plain gradients."""
    for module in model.modules():
        kept = vars(module)  # looking for what a module lacks is slow
        kept.pop("activations", None)
        kept.pop("max_batch_len", None)
    for p in model.parameters():
        for name in _PASSING:
            if getattr(p, name, None) is not None:
                setattr(p, name, None)
        if hasattr(p, "_current_grad_sample"):
            delattr(p, "_current_grad_sample")
        if hasattr(p, "_forward_counter"):
            p._forward_counter = 0
