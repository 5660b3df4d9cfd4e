"""Clipping of a shard's update on its client, and Flower's own privacy mods, which do not fit around coding."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from numpy.typing import NDArray

from ..errors import UnsuitableApp

__all__ = ["clip", "clipping_mod_named_in", "refuse_clipping_mods"]

_CODES = {
    LocalDpMod.__call__.__code__: "LocalDpMod",
    fixedclipping_mod.__code__: "fixedclipping_mod",
    adaptiveclipping_mod.__code__: "adaptiveclipping_mod",
}
_INSTEAD = (
    "does not combine with gradient_coding_mod: a coded reply is a sum over shards, and holders of a shard would add "
    "different noise. Leave it out, and say GradientCoding(..., privacy=DPSGD(...)) for noise that holders share, or "
    "privacy=CentralNoise(...) for clipping with noise on the server."
)
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


def refuse_clipping_mods(call_next: Callable[..., Any]) -> None:
    """Refuse Flower's mods that clip or noise replies, wherever they are listed.

    Before ours they wait in the calls around us, and a coded reply has no model arrays for them; after ours they are in
    what we call, where each holder of a shard would clip and add noise of its own.

    Raises:
        UnsuitableApp: Naming the mod, and what to do instead.
    """
    for name in (*_around(), *_inside(call_next)):
        raise UnsuitableApp(f"{name} {_INSTEAD}")


def clipping_mod_named_in(reason: str) -> str | None:
    """What to tell of an error reply by one of these mods, which finds a plan beside the config and gives up before it
    calls ours; None for any other."""
    name = next((name for name in _CODES.values() if f"{name} expects" in reason), None)
    return None if name is None else f"{name} {_INSTEAD}"


def _around() -> list[str]:
    found, frame = [], sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code in _CODES:
            found.append(_CODES[frame.f_code])
        elif frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), LocalDpMod):
            found.append("LocalDpMod")  # one that is derived from it
    return found


def _inside(call: Any) -> list[str]:
    """Flower chains mods by closures: each holds its mod and the next one."""
    found: list[str] = []
    seen: set[int] = set()
    left = [call]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        code = getattr(one, "__code__", None)
        if isinstance(one, LocalDpMod):
            found.append("LocalDpMod")
        elif code in _CODES:
            found.append(_CODES[code])
        elif isinstance(one, partial):
            left.append(one.func)
        elif getattr(one, "__closure__", None) and getattr(one, "__module__", "").startswith("flwr."):
            left.extend(cell.cell_contents for cell in one.__closure__ if callable(cell.cell_contents))
    return found
