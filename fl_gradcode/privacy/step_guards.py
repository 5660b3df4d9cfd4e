"""Guards of private training: each batch has one step on its own records, and nothing else changes the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PrivacyRefused

__all__ = ["OTHER_RECORDS", "Misuse", "StepGuard", "Unfit", "WeightGuard", "same_bits"]


#: Mean size of parameters from which on they are compared one by one.
_WIDE = 20_000

OTHER_RECORDS = (
    "A step on another number of records than was drawn: train on the batches of batches(), whole, with records along "
    "the first axis of inputs and outputs. Others have not the privacy that is accounted."
)


class Misuse(PrivacyRefused):
    """Private training is used in a way that needs another loop, model or loss, whatever the data are.

    Its sentences are fixed. Whether it comes may depend on records, if a loop does something else for some of them.
    """

    kind = "unsuitable-app"


class Unfit(Misuse):
    """A model or a loss cannot be trained privately, as a trial on synthetic records has found."""


class StepGuard:
    """Checks that each step is on the records that were drawn for it.

    Attributes:
        drawn: Number of records that were handed out last; None once they had their step.
        clipped: Number of records whose gradients the last backward pass clipped; only ghost clipping sets it.
        backward: Whether a loss that takes each record by itself has had its backward pass.
        steps: Number of batches that had their step.
        begun: Whether records were handed out.
    """

    def __init__(self) -> None:
        self.drawn: int | None = None
        self.clipped: int | None = None
        self.backward = False
        self.steps = 0
        self.begun = False

    def draw(self, records: int) -> None:
        """Note that so many records were handed out; the next step has to be on them."""
        self.drawn, self.clipped, self.backward, self.begun = records, None, False, True

    def check(self, records: int | None) -> None:
        """Check that gradients belong to the records that were handed out.

        Args:
            records: Number of records that they were computed from; None: they were not clipped.

        Raises:
            PrivacyRefused: They do not, or there is no batch.
        """
        if self.drawn is None:
            raise PrivacyRefused("A step without a batch of its own: take one step for each batch of batches().")
        if records is None:
            raise Misuse(
                "A step whose gradients were not clipped: with grad_sample_mode='ghost' wrap the loss by criterion()."
            )
        if records != self.drawn:
            raise PrivacyRefused(OTHER_RECORDS)

    def use(self, records: int | None) -> None:
        """Check gradients as `check` does, and let no second step use these records."""
        self.check(records)
        if not self.backward:
            raise Misuse(
                "A step after a backward pass of something else than its loss: call backward() of a loss of "
                "criterion(), or of one of PyTorch's loss functions, once for each step."
            )
        self.drawn, self.clipped, self.backward = None, None, False


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
        kinds, self._shapes = self._now()
        self._kept = [torch.cat(values) for values in kinds]

    def check(self) -> None:
        """Check that the parameters have the bits that `keep` remembered, on whatever device.

        Raises:
            Misuse: One has changed.
        """
        kinds, shapes = self._now()
        if shapes != self._shapes or not all(map(_same_values, kinds, self._kept)):
            raise Misuse(
                "Something other than a step of the optimizer that optimizer() returned has changed the model, without "
                "noise: change weights by its step() alone, and set them or their dtype before private_training."
            )

    def check_buffers(self) -> None:
        """Check that the buffers are those that training started with.

        Raises:
            Misuse: One has changed or is new.
        """
        before = self._buffers
        for name, buffer in self._model.named_buffers():
            if name not in before or not same_bits(buffer, before[name]):
                raise Misuse(
                    f"Training changed {name!r}, which is no parameter and gets no noise: it would tell of the data. "
                    "Use layers without running statistics."
                )

    def _now(self) -> tuple[list[list[Tensor]], list[tuple[str, torch.Size, torch.dtype]]]:
        """Returns flat values, a list for each dtype and device, and name, shape and dtype of each parameter."""
        parameters = _parameters_of(self._model)
        shapes = [(name, p.shape, p.dtype) for name, p in parameters.items()]
        kinds: dict[Any, list[Tensor]] = {}
        for p in parameters.values():
            kinds.setdefault((p.dtype, p.device), []).append(p.detach().reshape(-1))
        return list(kinds.values()), shapes


def _parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters by name; `named_parameters` takes several times as long, and is called twice a step."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    ways = [("", model)]
    while ways:
        way, module = ways.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.update({f"{way}{name}": p for name, p in module._parameters.items() if p is not None})
        ways += [(f"{way}{name}.", part) for name, part in module._modules.items() if part is not None]
    return found


def _same_values(values: list[Tensor], kept: Tensor) -> bool:
    """Returns whether flat tensors have, one after the other, the bits of one flat copy."""
    if sum(len(value) for value in values) < _WIDE * len(values):  # many small comparisons cost more than a copy
        return same_bits(torch.cat(values), kept)
    return all(map(same_bits, values, torch.split(kept, [len(value) for value in values])))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether both tensors have equal dtype, shape and bits (NaN included), on whatever devices."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = one.detach(), other.detach().to(one.device)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.element_size())
    return torch.equal(one, other) if whole is None else torch.equal(one.view(whole), other.view(whole))
