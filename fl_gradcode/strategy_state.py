"""What a strategy keeps between rounds (momentum, moments), as plain values that a file can hold.

Only what has changed since the strategy was made is kept: for the rest, what its constructor is given when the run goes
on holds. A strategy that knows better has `state_dict()` and `load_state_dict()`.
"""

from __future__ import annotations

import json
import logging
import random
from collections import deque
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

__all__ = ["StrategyState", "Unstorable", "decode", "encode"]

_log = logging.getLogger(__name__)
_TYPE, _VALUE = "type", "value"
_RECORDS = {"ConfigRecord": ConfigRecord, "MetricRecord": MetricRecord}
_LISTS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Unstorable(ValueError):
    """A value is of a kind that a checkpoint cannot hold; its text names the kind."""


def encode(value: Any, blobs: list[bytes]) -> Any:
    """A tree that JSON can hold; bytes and arrays are appended to `blobs`.

    Raises:
        Unstorable: It is, or contains, an object of another kind.
    """
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    kind = type(value).__name__
    if type(value) in (list, tuple, set, frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return {_TYPE: kind, _VALUE: [encode(one, blobs) for one in items]}
    if isinstance(value, deque):
        return {_TYPE: "deque", _VALUE: [encode(one, blobs) for one in value], "length": value.maxlen}
    if isinstance(value, bytes):
        return {_TYPE: "bytes", _VALUE: _blob(value, blobs)}
    if isinstance(value, np.generic):
        return {_TYPE: "scalar", _VALUE: encode(np.asarray(value), blobs)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU":
        plain = np.ascontiguousarray(value)
        return {
            _TYPE: "array",
            _VALUE: _blob(plain.tobytes(), blobs),
            "dtype": plain.dtype.str,
            "shape": [*value.shape],
        }
    if isinstance(value, Array):
        parts = {"dtype": value.dtype, "shape": [*value.shape], "stype": value.stype}
        return {_TYPE: "Array", _VALUE: _blob(value.data, blobs), **parts}
    if isinstance(value, ArrayRecord):
        return {_TYPE: "ArrayRecord", _VALUE: [[name, encode(array, blobs)] for name, array in value.items()]}
    if isinstance(value, ConfigRecord | MetricRecord):
        return {_TYPE: kind, _VALUE: encode(dict(value.items()), blobs)}
    if isinstance(value, dict):
        pairs = [[encode(key, blobs), encode(one, blobs)] for key, one in value.items()]
        return {_TYPE: "dict", _VALUE: pairs}
    if isinstance(value, np.random.Generator):
        return {
            _TYPE: "Generator",
            _VALUE: encode(value.bit_generator.state, blobs),
            "kind": type(value.bit_generator).__name__,
        }
    if type(value) is random.Random:
        return {_TYPE: "Random", _VALUE: encode(value.getstate(), blobs)}
    raise Unstorable(kind)


def decode(tree: Any, blobs: list[bytes]) -> Any:
    """The value again."""
    if not isinstance(tree, dict):
        return tree
    kind, value = tree[_TYPE], tree[_VALUE]
    if kind in _LISTS:
        return _LISTS[kind](decode(one, blobs) for one in value)
    if kind == "deque":
        return deque((decode(one, blobs) for one in value), tree["length"])
    if kind == "bytes":
        return blobs[value]
    if kind == "scalar":
        return decode(value, blobs)[()]
    if kind == "array":
        return np.frombuffer(blobs[value], np.dtype(tree["dtype"])).reshape(tree["shape"]).copy()
    if kind == "Array":
        return Array(dtype=tree["dtype"], shape=tuple(tree["shape"]), stype=tree["stype"], data=blobs[value])
    if kind == "ArrayRecord":
        return ArrayRecord({name: decode(one, blobs) for name, one in value})
    if kind in _RECORDS:
        return _RECORDS[kind](decode(value, blobs))
    if kind == "dict":
        return {decode(key, blobs): decode(one, blobs) for key, one in value}
    if kind == "Generator":
        bits = getattr(np.random, tree["kind"])()
        bits.state = decode(value, blobs)
        return np.random.Generator(bits)
    generator = random.Random()
    generator.setstate(decode(value, blobs))
    return generator


class StrategyState:
    """What a strategy has changed since now.

    Args:
        strategy: As it was made; strategies inside it are kept in the same way.
        warn: Say what cannot be kept.
    """

    def __init__(self, strategy: Strategy, *, warn: bool = True) -> None:
        self.strategy, self._warn = strategy, warn
        self._own = hasattr(strategy, "state_dict") and hasattr(strategy, "load_state_dict")
        self._inside: dict[str, StrategyState] = {}
        self._first: dict[str, tuple[str, list[bytes]] | None] = {}
        if self._own:
            return
        for name, value in vars(strategy).items():
            if isinstance(value, Strategy):
                self._inside[name] = StrategyState(value, warn=warn)
            else:
                self._first[name] = self._plain(name, value)

    def changed(self) -> dict[str, Any]:
        """Attribute -> value, of those that are other than at first; what `restore` takes."""
        if self._own:
            return {"state_dict": self.strategy.state_dict()}  # type: ignore[attr-defined]
        found: dict[str, Any] = {}
        for name, value in vars(self.strategy).items():
            if name in self._inside:
                inner = self._inside[name].changed()
                if inner:
                    found[name] = {"strategy": inner}
            elif (now := self._plain(name, value)) is not None and now != self._first.get(name):
                found[name] = {"value": value}
        return found

    def restore(self, state: dict[str, Any]) -> None:
        """Set what had changed."""
        if self._own:
            self.strategy.load_state_dict(state["state_dict"])  # type: ignore[attr-defined]
            return
        for name, one in state.items():
            if "strategy" in one and name in self._inside:
                self._inside[name].restore(one["strategy"])
            elif "value" in one:
                setattr(self.strategy, name, one["value"])

    def _plain(self, name: str, value: Any) -> tuple[str, list[bytes]] | None:
        if callable(value):
            return None  # the constructor brings it again
        blobs: list[bytes] = []
        try:
            return json.dumps(encode(value, blobs)), blobs
        except Unstorable as error:
            if self._warn and name not in self._first:
                _log.warning(
                    "%s.%s is a %s, which a checkpoint cannot hold: after a restart it is as the constructor makes it. "
                    "If it changes over the rounds, give the strategy state_dict() and load_state_dict().",
                    type(self.strategy).__name__,
                    name,
                    error,
                )
            self._first.setdefault(name, None)
            return None


def _blob(data: bytes, blobs: list[bytes]) -> int:
    blobs.append(data)
    return len(blobs) - 1
