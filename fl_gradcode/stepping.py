"""Holds training to what is accounted: one noisy step for each drawn batch, on all of it, and nothing else.

The texts of refusals travel to the server: they hold nothing that depends on the records.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import PrivacyRefused

__all__ = ["Batch", "Weights", "same_bits"]


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
