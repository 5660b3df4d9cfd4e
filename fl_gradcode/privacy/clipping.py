"""Clips a shard's update on its client, and refuses Flower's own clipping mods, which do not work around coding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._flower_internals import CLIPPING_MODS, clipping_mods_around_or_inside
from ..errors import UnsuitableApp

__all__ = ["clip", "clipping_mod_named_in", "is_statistic", "refuse_clipping_mods", "refuse_statistics"]

_INSTEAD = (
    "does not combine with gradient_coding_mod: a coded reply is a sum over shards, and holders of a shard would add "
    "different noise. Leave it out, and say GradientCoding(..., privacy=DPSGD(...)) for noise that holders share, or "
    "privacy=CentralNoise(...) for clipping with noise on the server."
)
_NOISES = "LocalDpMod"
#: How names of running statistics end in PyTorch, and in Keras and Haiku. Flax keeps them in a collection of their own.
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance", "moving_var")
_COLLECTION = "batch_stats"
# Just below the bound: rounding while the factor is applied must not exceed it.
_BELOW = 1 - 2**-20


def clip(update: NDArray[np.floating], norm: float) -> None:
    """Scales an update down to Euclidean length `norm` at most, in place.

    Raises:
        ValueError: It is not finite, so that no factor would help.
    """
    length = math.sqrt(float(np.square(update, dtype=np.float64).sum()))
    if not math.isfinite(length):
        raise ValueError("its update is not finite (NaN or infinity), and cannot be clipped")
    if length > norm:
        update *= update.dtype.type(norm / length * _BELOW)


def is_statistic(name: str) -> bool:
    """Returns whether an array of this name holds running statistics, which noise would spoil."""
    return name.endswith(_STATISTICS) or _COLLECTION in name


def refuse_statistics(names: Iterable[str]) -> None:
    """Refuse running statistics under noise on the server, which would be clipped and noised like weights.

    Raises:
        UnsuitableApp: Naming the array, and what to use instead.
    """
    name = next(filter(is_statistic, names), None)
    if name is not None:
        raise UnsuitableApp(
            f"The reply holds the running statistics {name!r}, which noise would spoil: a variance may become "
            "negative. Use GroupNorm or LayerNorm instead of BatchNorm, on the server too, or return the parameters "
            "alone and keep the statistics on each node."
        )


def refuse_clipping_mods(call_next: Callable[..., Any], *, as_returned: bool = False) -> None:
    """Refuse Flower's mods that clip or noise replies where the app lists them.

    Listed before our mod they would clip a coded reply, which has no model arrays. Listed after it, each holder of a
    shard would add noise of its own, and the server would take a clipped sum for an unclipped one. A reply that holds
    the function's own records may be clipped: all holders of a shard clip it alike, as in plain Flower.

    Args:
        call_next: What our mod was given to call.
        as_returned: Whether the reply holds the function's records as returned.

    Raises:
        UnsuitableApp: Naming the mod, and what to do instead.
    """
    for name in clipping_mods_around_or_inside(call_next):
        if name == _NOISES or not as_returned:
            raise UnsuitableApp(f"{name} {_INSTEAD}")


def clipping_mod_named_in(reason: str) -> str | None:
    """Returns what to tell of an error reply by one of these mods; None for any other reply.

    A mod before ours finds a plan beside the config and gives up before it calls ours.
    """
    name = next((name for name in CLIPPING_MODS if f"{name} expects" in reason), None)
    return None if name is None else f"{name} {_INSTEAD}"
