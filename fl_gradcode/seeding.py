"""The process's random generators: seeded for a shard, and given back as they were."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["generators_restored", "global_states", "seed_generators", "seed_with", "set_global_states"]


def seed_generators(seed: int, server_round: int, shard: int) -> None:
    """Seed `random`, NumPy and torch so that all holders of a shard draw the same."""
    digest = hashlib.sha256(f"{seed}|{server_round}|{shard}".encode()).digest()
    seed_with(int.from_bytes(digest[:8], "little"))


def seed_with(number: int) -> None:
    """Seed `random`, NumPy and torch with a number of 64 bits."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch = _torch()
    if torch is not None:
        # Not torch.manual_seed: without a GPU it formats a stack trace for each device kind, 1 ms a call.
        torch.default_generator.manual_seed(number)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(number)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Give the process its random states back at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch = _torch()
    torch_state = torch.get_rng_state() if torch is not None else None
    devices = torch.cuda.get_rng_state_all() if torch is not None and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if torch is not None:
            torch.set_rng_state(torch_state)
            if devices:
                torch.cuda.set_rng_state_all(devices)


def global_states() -> dict[str, Any]:
    """What `random` and NumPy draw from next, in plain values: Flower samples clients from the former."""
    return {"random": random.getstate(), "numpy": np.random.get_state()}


def set_global_states(states: dict[str, Any]) -> None:
    """Go on from what `global_states` gave."""
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])


@lru_cache(maxsize=1)
def _torch() -> Any:
    """torch, where it is installed, even if the app has not imported it: it might, inside train()."""
    return importlib.import_module("torch") if importlib.util.find_spec("torch") else None
