"""The optimizer of private training: clipped gradients, keyed noise, one noisy step for each batch that was drawn.

Importing this module imports Opacus; `training` does so when a shard is trained.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PrivacyRefused
from ._opacus import DPOptimizer
from .key_derivation import PRFStream
from .model_checks import refuse_unfit, trainable_layers_in_training, try_out
from .record_gradients import (
    GhostLoss,
    GhostModule,
    HooksModule,
    clipped_sums,
    forget_pass,
    full_precision,
    padding_rows,
)
from .record_losses import RecordLoss, StandardLosses, mean_of, tensors_in, unheard
from .step_guards import Misuse, StepGuard, WeightGuard

__all__ = ["KeyedDPOptimizer", "KeyedNoise", "PrivateModel", "wrap"]

_log = logging.getLogger(__name__)

#: Largest learning rate: beyond, an update says nothing but that it overflows.
_MOST_RATE = 1e6
#: Numbers from which on the next step's noise is drawn by a thread while the step computes.
_BESIDE = 50_000


class KeyedNoise:
    """Gaussian noise from a keyed stream, for the sum of a batch's clipped gradients.

    Args:
        stream: Of standard normal numbers, used for nothing else.
        multiplier: Standard deviation of the noise over the clipping norm.
        steps: Number of steps, if known; the noise of the next one is then drawn while a step computes.
    """

    def __init__(self, stream: PRFStream, multiplier: float, *, steps: int = 0) -> None:
        self.stream, self.multiplier = stream, multiplier
        self._left = steps
        self._next: Future[Tensor] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, numbers: int, max_grad_norm: float) -> None:
        """Draw the next step's noise beside, if there is a next step and it takes a while."""
        if self._left > 0 and self._next is None and numbers >= _BESIDE:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="fl-gradcode-noise")
            self._next = self._thread.submit(self._draw, numbers, max_grad_norm)

    def _draw(self, numbers: int, max_grad_norm: float) -> Tensor:
        return torch.from_numpy(self.stream.normal(numbers)).mul_(self.multiplier * max_grad_norm)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()  # what it has drawn is the next step's
            self._thread = None

    def of_a_step(self, parameters: Sequence[Tensor], max_grad_norm: float) -> Iterator[Tensor]:
        """Returns one tensor for each parameter: float64, of its shape and on its device.

        Numbers are drawn in the order of the parameters, which all holders of a shard have to share.
        """
        # One draw for all: many small ones cost more than their numbers.
        numbers = sum(p.numel() for p in parameters)
        scaled = self._draw(numbers, max_grad_norm) if self._next is None else self._next.result()
        self._next = None
        self._left -= 1
        self.begin(numbers, max_grad_norm)
        pieces = torch.split(scaled, [p.numel() for p in parameters])
        return (piece.view(p.shape).to(p.device) for piece, p in zip(pieces, parameters, strict=True))


class KeyedDPOptimizer(DPOptimizer):  # type: ignore[misc] # Opacus has no types
    """Opacus' optimizer with keyed noise and with every step checked.

    The settings of the inner optimizer stay what they were when this was made, but for the learning rate's schedule:
    a loop that changes them may do so by what it sees of the data.

    Args:
        inner: The optimizer that takes the steps.
        noise: Noise of each step.
        module: The model, whose backward passes left the gradients.
        max_grad_norm: Clipping norm.
        expected_batch_size: Mean number of records of a batch.
        step_guard: Checks that each batch has one step.
        weight_guard: Checks that nothing but a step changes the weights.
        schedule: Factor of the learning rates in each step of the round, by its number from 0; None for 1.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        noise: KeyedNoise,
        module: HooksModule | GhostModule,
        max_grad_norm: float,
        expected_batch_size: float,
        step_guard: StepGuard,
        weight_guard: WeightGuard,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__(
            inner,
            noise_multiplier=noise.multiplier,  # says what the noise is; a step below draws it
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self.noise, self.module, self.step_guard, self.weight_guard = noise, module, step_guard, weight_guard
        self.penalties: list[Callable[[], Tensor]] = []
        #: The sums of one batch's records so far, if it is handed out record by record; else None.
        self.parts: list[Tensor] | None = None
        self._norm = max_grad_norm
        self._padding = padding_rows(module)
        self._schedule = schedule
        self._settings = [{key: copy.copy(v) for key, v in group.items() if key != "params"} for group in self._groups]
        for group in self._groups:
            _check_rate(group.get("lr", 0.0))
        self._told = False
        noise.begin(sum(p.numel() for p in self.params), max_grad_norm)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.original_optimizer.param_groups
        return groups

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one noisy step, as `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._step_skip_queue:
            raise Misuse("A step was skipped: each batch of batches() has one step, not parts of one.")
        with unheard():
            sums = self._sums()
            if self.parts is None:
                self.take(sums)
            else:
                self.parts = [one + other for one, other in zip(self.parts, sums, strict=True)]
        return loss

    def take(self, sums: Sequence[Tensor] | None) -> None:
        """Take the step of a batch.

        Args:
            sums: The sum of its clipped gradients, for each parameter; None: it has no records.
        """
        self.weight_guard.check()
        if self.max_grad_norm != self._norm:  # the next noise is drawn for it already
            raise Misuse("The optimizer's max_grad_norm was changed: it is the run's, and one for all steps.")
        sums = self.nothing() if sums is None else sums
        noise = self.noise.of_a_step(self.params, self._norm)
        with full_precision():
            for p, total, drawn in zip(self.params, sums, noise, strict=True):
                noisy = drawn.add_(total)  # in float64
                p.grad = noisy.to(p.dtype).div_(self.expected_batch_size)  # one rounding
                if p in self._padding:
                    p.grad[self._padding[p]] = 0.0
            self._add_penalties()
            self._keep_settings()
            self.original_optimizer.step()
        forget_pass(self.module)
        self.weight_guard.keep()
        self.step_guard.steps += 1

    def nothing(self) -> list[Tensor]:
        """Returns the sum over no records."""
        return [torch.zeros_like(p) for p in self.params]

    def _sums(self) -> list[Tensor]:
        sums = clipped_sums(self.params, self.max_grad_norm, self.step_guard)
        self.step_guard.use(self.step_guard.drawn)
        return sums

    def _add_penalties(self) -> None:
        """Add the gradients of terms that are of the weights alone, which need no noise."""
        if not self.penalties:
            return
        self.module.disable_hooks()
        try:
            with torch.enable_grad():
                value = sum(penalty() for penalty in self.penalties)
                if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
                    raise Misuse("A penalty has to be one number that is computed of the model's parameters.")
                grads = torch.autograd.grad(value, self.params, allow_unused=True)
        finally:
            self.module.enable_hooks()
        for p, grad in zip(self.params, grads, strict=True):
            if grad is not None:
                p.grad.add_(grad)

    def _keep_settings(self) -> None:
        factor = 1.0 if self._schedule is None else float(self._schedule(self.step_guard.steps))
        if not 0 <= factor < math.inf:
            raise Misuse("A factor of the learning rate's schedule has to be a finite number of at least 0.")
        for group, settings in zip(self._groups, self._settings, strict=True):
            now = {key: value for key, value in group.items() if key != "params"}
            if not self._told and self._schedule is None and not _same(now, settings):
                self._told = True
                _log.warning(
                    "The loop changed a setting of the optimizer in private training, which was undone: a change could "
                    "tell of the data. Use dp.optimizer(..., schedule=) for the learning rate."
                )
            group.update(settings)
            if "lr" in settings:
                group["lr"] = settings["lr"] * factor

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients, and whatever passes left."""
        with unheard():
            for p in self.params:
                p.grad_sample = p.summed_grad = None
            self.original_optimizer.zero_grad(set_to_none)


class KeyedGhostOptimizer(KeyedDPOptimizer):
    """The same for ghost clipping, where the second backward pass has clipped and summed already."""

    def _sums(self) -> list[Tensor]:
        if any(getattr(p, "grad_sample", None) is not None for p in self.params):
            return super()._sums()
        self.step_guard.use(self.step_guard.clipped)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]


def _check_rate(rate: Any) -> None:
    value = float(rate)
    if not 0 <= value <= _MOST_RATE:
        raise Misuse(f"The learning rate has to be a number from 0 to {_MOST_RATE:g}.")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(repr(one[key]) == repr(other[key]) for key in one)


class PrivateModel:
    """A model with clipped gradients, and the optimizer and loss that go with it; made by `wrap`.

    Attributes:
        model: To be called in training; `unwrap` gives the plain model back.
        losses: To be entered while the loop runs.
        inner: The optimizer; None before `optimizer`.
        penalties: Terms of the loss that are of the weights alone.
    """

    def __init__(
        self, model: nn.Module, *, mode: Literal["hooks", "ghost"], max_grad_norm: float, noise: KeyedNoise
    ) -> None:
        self._guard, self._weights = StepGuard(), WeightGuard(model)
        self._max_grad_norm, self._noise = max_grad_norm, noise
        self._ghost = mode == "ghost"
        self._flags = trainable_layers_in_training(model)
        self._flags.__enter__()
        self.model: Any
        if self._ghost:
            self.model = GhostModule(model, max_grad_norm=max_grad_norm, guard=self._guard, before=self._try)
        else:
            self.model = HooksModule(model, guard=self._guard, before=self._try)
        self.model.forbid_grad_accumulation()
        self.losses = StandardLosses(self._guard)
        self.inner: KeyedDPOptimizer | None = None
        self.penalties: list[Callable[[], Tensor]] = []

    def _try(self, wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Try the model out on the form of a batch; returns False if this is none."""
        drawn = self._guard.drawn
        given = [one for one in tensors_in((args, kwargs)) if one.dim()]
        if not drawn or not given or given[0].shape[0] != drawn:
            return False
        self.model.before = None  # the trial calls the model
        try_out(wrapped, args, kwargs, drawn)
        return True

    @property
    def steps(self) -> int:
        """Number of batches that had their noisy step."""
        return self._guard.steps

    @property
    def stepped(self) -> bool:
        """Whether the records that were handed out last had their step."""
        return self._guard.drawn is None

    @property
    def begun(self) -> bool:
        """Whether records were handed out."""
        return self._guard.begun

    def batch_drawn(self, records: int) -> None:
        """Note that so many records were handed out; the next step has to be on them."""
        self._guard.draw(records)

    def check_unchanged(self) -> None:
        """Check that nothing but noisy steps has changed the model.

        Raises:
            Misuse: A buffer changed, or a parameter by something else.
        """
        self._weights.check_buffers()
        self._weights.check()

    def restore(self, values: Sequence[Tensor]) -> None:
        """Set the parameters to values that they had after an earlier step."""
        with torch.no_grad():
            for p, value in zip(self.model.parameters(), values, strict=True):
                p.copy_(value)
        self._weights.keep()

    def resume_at(self, steps: int) -> None:
        """Count so many batches as done."""
        self._guard.steps = steps

    def optimizer(
        self,
        inner: torch.optim.Optimizer,
        *,
        expected_batch_size: float,
        schedule: Callable[[int], float] | None = None,
    ) -> KeyedDPOptimizer:
        """Returns an optimizer that gives `inner` clipped and noisy gradients.

        Args:
            inner: With the parameters of the model that are trained, and no others.
            expected_batch_size: Mean number of records of a batch: summed gradients are divided by it.
            schedule: Factor of the learning rates in each step, by its number from 0.

        Raises:
            Misuse: It has other parameters, or a learning rate that makes no sense.
        """
        mine = {id(p) for p in self.model.parameters() if p.requires_grad}
        if {id(p) for group in inner.param_groups for p in group["params"] if p.requires_grad} != mine:
            raise Misuse(
                "The optimizer has other parameters than those of the model that are trained: all of them get noise. "
                "Make it from model.parameters() alone, and freeze what is not trained."
            )
        kind = KeyedGhostOptimizer if self._ghost else KeyedDPOptimizer
        self.inner = kind(
            inner,
            noise=self._noise,
            module=self.model,
            max_grad_norm=self._max_grad_norm,
            expected_batch_size=expected_batch_size,
            step_guard=self._guard,
            weight_guard=self._weights,
            schedule=schedule,
        )
        self.inner.penalties = self.penalties
        return self.inner

    def criterion(self, inner: Any) -> Any:
        """Returns the loss as a mean over records of what each has alone."""
        loss = RecordLoss(inner, early=not self._guard.begun)

        def mean(*args: Any, **kwargs: Any) -> Any:
            drawn = self._guard.drawn
            if not drawn:
                raise PrivacyRefused(
                    "A loss without a batch of its own: call it for the batches of batches(), once for each step."
                )
            with unheard() if loss.of_torch else nullcontext():
                values = loss(drawn, *args, **kwargs)
                return GhostLoss(self.model, values) if self._ghost else mean_of(values, self._guard)

        return mean

    def unwrap(self) -> nn.Module:
        """Returns the plain model, without hooks and without anything that an interrupted pass left."""
        self._noise.close()
        self._flags.__exit__(None, None, None)
        plain: nn.Module = self.model.to_standard_module()
        forget_pass(plain)
        for parameter in plain.parameters():
            for name in [name for name in vars(parameter) if name in _LEFT]:
                delattr(parameter, name)
        return plain


_LEFT = ("summed_grad", "grad_sample", "_norm_sample", "_forward_counter")  # has no noise yet, or is Opacus' own


def wrap(
    model: nn.Module,
    stream: PRFStream,
    *,
    mode: Literal["hooks", "ghost"],
    noise_multiplier: float,
    max_grad_norm: float,
    steps: int = 0,
) -> PrivateModel:
    """Returns the model wrapped for private training.

    Args:
        model: With the weights that training starts from.
        stream: For the noise alone.
        mode: Opacus' way to get single records' gradients.
        noise_multiplier: Standard deviation of the noise over `max_grad_norm`.
        max_grad_norm: Bound of the Euclidean norm of one record's gradient.
        steps: Number of steps, if known.

    Raises:
        Misuse: The model cannot be trained privately; see `model_checks`.
    """
    refuse_unfit(model)
    noise = KeyedNoise(stream, noise_multiplier, steps=steps)
    return PrivateModel(model, mode=mode, max_grad_norm=max_grad_norm, noise=noise)
