"""The process's random generators: seeded for a shard, and given back as they were.

torch takes a second to import, which a deployed node would pay for each message: it is seeded if the app has imported
it, or at the moment when it does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

__all__ = [
    "generators_restored",
    "global_states",
    "keep_flower_apart",
    "seed_generators",
    "seed_with",
    "set_global_states",
]


class _Torch(MetaPathFinder):
    """torch's generators, of which nothing is known before somebody imports it."""

    def __init__(self) -> None:
        #: What it is seeded with when it is imported.
        self.number: int | None = None
        #: Its states when it had just been imported, before that.
        self.before: tuple[Any, dict[str, Any]] | None = None
        self._searching = False

    @staticmethod
    def module() -> Any:
        """Imported by somebody, and not just now."""
        torch: Any = sys.modules.get("torch")
        return torch if hasattr(torch, "default_generator") else None

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Called for each first import: it takes note of torch's, and finds nothing itself."""
        if fullname != "torch" or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            self._seed_behind(spec)
        return spec

    def expect(self) -> bool:
        """Look at imports from now on, unless that is done or needless; whether it was not."""
        begins = self.module() is None and self not in sys.meta_path
        if begins:
            sys.meta_path.insert(0, self)
        return begins

    def forget(self) -> None:
        """Look at them no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def seed(self) -> None:
        """Seed it with our number."""
        torch = self.module()
        if torch is None or self.number is None:
            return
        # Not torch.manual_seed: without a GPU it formats a stack trace for each device kind, 1 ms a call.
        torch.default_generator.manual_seed(self.number)
        for device in self._devices():
            _seed_all(device, self.number)

    def states(self) -> tuple[Any, dict[str, Any]] | None:
        """Of its generators; none of devices that nobody has used so far; None: it is not imported."""
        torch = self.module()
        if torch is None:
            return None
        used = (device for device in self._devices() if getattr(device, "is_initialized", lambda: True)())
        return torch.get_rng_state(), {device.__name__: _all_or_one(device, "get_rng_state")() for device in used}

    def restore(self, states: tuple[Any, dict[str, Any]]) -> None:
        """Give them back."""
        torch, (state, kept) = self.module(), states
        torch.set_rng_state(state)
        for device in self._devices():
            if device.__name__ in kept:
                _all_or_one(device, "set_rng_state")(kept[device.__name__])
            else:  # it was not in use and had no states: as torch.manual_seed, or nobody, had seeded it
                _seed_all(device, torch.initial_seed())

    def _devices(self) -> list[Any]:
        """Kinds of accelerator that are there."""
        torch = self.module()
        found = [getattr(torch, name, None) for name in _DEVICES]
        return [device for device in found if device is not None and device.is_available()]

    def _seed_behind(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_seed(module: ModuleType) -> None:
            execute(module)
            self.forget()
            self.before = self.states()
            self.seed()

        loader.exec_module = execute_and_seed  # of this one spec


def _seed_all(device: Any, number: int) -> None:
    _all_or_one(device, "manual_seed")(number)


def _all_or_one(device: Any, name: str) -> Any:
    """PyTorch's function for all devices of a kind, or, where there is only one, for that."""
    return getattr(device, f"{name}_all", None) or getattr(device, name)


_torch = _Torch()
#: Kinds of accelerator with generators of their own.
_DEVICES = ("cuda", "xpu", "mps")

#: Parts of Flower that draw their jitter from `random`, in threads that run beside the user's training.
_JITTERY = ("heartbeat", "retry.retry_invoker", "inflatable.inflatable_utils")


def keep_flower_apart() -> None:
    """Give Flower's threads a generator of their own.

    Else a slow holder of a shard would draw other numbers than a fast one, and a server other clients each time.
    """
    for name in _JITTERY:
        module: Any = sys.modules.get(f"flwr.supercore.{name}")
        if getattr(module, "random", None) is random:
            module.random = random.Random()


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
    """Give the process its random states back at the end."""
    keep_flower_apart()
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
        if new and number is not None:  # to whoever is around us it is as if it had been imported there
            _torch.seed()


def global_states() -> dict[str, Any]:
    """What `random` and NumPy draw from next, in plain values: Flower samples clients from the former."""
    return {"random": random.getstate(), "numpy": np.random.get_state()}


def set_global_states(states: dict[str, Any]) -> None:
    """Go on from what `global_states` gave."""
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])
