"""States of the process's random generators: seeded for a shard, and restored afterwards.

Importing torch takes a second, which a deployed node would pay for each message. So torch is seeded if the app has
imported it, or at the moment when the app imports it.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ._flower_internals import WhenImported, isolate_flower_random

__all__ = [
    "check_global_states",
    "generators_restored",
    "global_states",
    "seed_generators",
    "seed_with",
    "set_global_states",
]


class _Torch:
    """torch's generators, whether or not torch has been imported.

    Attributes:
        number: What they are seeded with as soon as torch is imported; None: nothing.
        before: Their states when torch had just been imported, before they were seeded; None: it was not.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.before: tuple[Any, dict[str, Any]] | None = None
        self._watch = WhenImported("torch", self._imported)

    @staticmethod
    def module() -> Any:
        """Returns torch if it has been imported completely, else None."""
        torch: Any = sys.modules.get("torch")
        return torch if hasattr(torch, "default_generator") else None

    def expect(self) -> bool:
        """Wait for torch to be imported; returns False if that is needless, or if it is waited for already."""
        return self.module() is None and self._watch.watch()

    def forget(self) -> None:
        """Wait no more."""
        self._watch.stop()

    def seed(self) -> None:
        """Seed all of torch's generators with `number`, if there are both."""
        torch = self.module()
        if torch is None or self.number is None:
            return
        # Not torch.manual_seed: without a GPU it formats a stack trace for each device kind, 1 ms a call.
        torch.default_generator.manual_seed(self.number)
        for device in self._devices():
            _seed_all(device, self.number)

    def states(self) -> tuple[Any, dict[str, Any]] | None:
        """Returns the CPU's state, and those of each kind of accelerator that is in use; None without torch."""
        torch = self.module()
        if torch is None:
            return None
        used = (device for device in self._devices() if getattr(device, "is_initialized", lambda: True)())
        return torch.get_rng_state(), {device.__name__: _all_or_one(device, "get_rng_state")() for device in used}

    def restore(self, states: tuple[Any, dict[str, Any]]) -> None:
        """Restore what `states` returned."""
        torch, (state, kept) = self.module(), states
        torch.set_rng_state(state)
        for device in self._devices():
            if device.__name__ in kept:
                _all_or_one(device, "set_rng_state")(kept[device.__name__])
            else:  # it was not in use and had no states: as torch.manual_seed, or nobody, had seeded it
                _seed_all(device, torch.initial_seed())

    def _devices(self) -> list[Any]:
        """Returns torch's modules for the kinds of accelerator that are there."""
        torch = self.module()
        found = [getattr(torch, name, None) for name in _DEVICES]
        return [device for device in found if device is not None and device.is_available()]

    def _imported(self) -> None:
        self.before = self.states()
        self.seed()


def _seed_all(device: Any, number: int) -> None:
    _all_or_one(device, "manual_seed")(number)


def _all_or_one(device: Any, name: str) -> Any:
    """Returns PyTorch's function for all devices of a kind, or the one for the only device of a kind that has one."""
    return getattr(device, f"{name}_all", None) or getattr(device, name)


_torch = _Torch()
#: Kinds of accelerator with generators of their own.
_DEVICES = ("cuda", "xpu", "mps")


def seed_generators(seed: int, server_round: int, shard: int) -> None:
    """Seed `random`, NumPy and torch so that all holders of a shard draw the same."""
    digest = hashlib.sha256(f"{seed}|{server_round}|{shard}".encode()).digest()
    seed_with(int.from_bytes(digest[:8], "little"))


def seed_with(number: int) -> None:
    """Seed `random`, NumPy and torch, imported or not, with a number of 64 bits."""
    random.seed(number)
    np.random.seed(number % 2**32)
    _torch.number = number
    _torch.seed()


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the states of all generators at the end, also of torch's if it is imported meanwhile."""
    isolate_flower_random()
    python_state, numpy_state, torch_states = random.getstate(), np.random.get_state(), _torch.states()
    number, before = _torch.number, _torch.before
    _torch.before = None
    watching = _torch.expect()
    try:
        yield
    finally:
        if watching:
            _torch.forget()
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        new: Any = _torch.before  # set meanwhile
        if torch_states or new:
            _torch.restore(torch_states or new)
        _torch.number, _torch.before = number, before or new
        if new and number is not None:  # for an outer use of this function it is as if torch had been imported there
            _torch.seed()


def global_states() -> dict[str, Any]:
    """Returns the states of `random`, from which Flower samples clients, and of NumPy, as plain values."""
    return {"random": random.getstate(), "numpy": np.random.get_state()}


def set_global_states(states: dict[str, Any]) -> None:
    """Restore what `global_states` returned."""
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])


def check_global_states(states: dict[str, Any]) -> None:
    """Check that `set_global_states` could restore the states, without changing any generator.

    Raises:
        KeyError, TypeError, ValueError: It could not.
    """
    random.Random().setstate(states["random"])
    np.random.RandomState(0).set_state(states["numpy"])
