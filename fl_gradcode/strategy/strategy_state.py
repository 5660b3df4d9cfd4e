"""Converts the state that a strategy keeps between rounds, such as momentum, to plain values that a file can hold.

Only attributes that have changed since the strategy was made are kept. The constructor restores the others when the
run is resumed. A strategy can take over by defining `state_dict()` and `load_state_dict()`.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from ..errors import InvalidSetting

__all__ = ["StrategyState", "Unstorable", "decode", "encode"]

_log = logging.getLogger(__name__)
_TYPE, _VALUE = "type", "value"
_RECORDS = {"ConfigRecord": ConfigRecord, "MetricRecord": MetricRecord}
_LISTS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_DICTS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
#: Default factories that a stored defaultdict may have, by name.
_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (int, float, bool, str, list, tuple, set, dict)}
# Types of attributes that a strategy is given and does not change, so that its constructor restores them.
_GIVEN = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    type,
    functools.partial,
    functools._lru_cache_wrapper,
)


class Unstorable(ValueError):
    """A value has a type that a checkpoint cannot hold; the message is the name of the type."""


def encode(value: Any, blobs: list[bytes]) -> Any:
    """Returns `value` as a tree that JSON can hold; bytes and arrays are appended to `blobs`.

    Raises:
        Unstorable: The value is, or contains, an object of an unsupported type.
    """
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    kind = type(value).__name__
    if type(value) in (list, tuple, set, frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return {_TYPE: kind, _VALUE: [encode(item, blobs) for item in items]}
    if isinstance(value, deque):
        return {_TYPE: "deque", _VALUE: [encode(item, blobs) for item in value], "length": value.maxlen}
    if isinstance(value, bytes):
        return {_TYPE: "bytes", _VALUE: _blob(value, blobs)}
    if isinstance(value, np.generic):
        return {_TYPE: "scalar", _VALUE: encode(np.asarray(value), blobs)}
    if type(value) is np.ndarray and value.dtype.kind in "biufcSU":
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
        pairs = [[encode(key, blobs), encode(item, blobs)] for key, item in value.items()]
        if type(value) is defaultdict and value.default_factory in (None, *_FACTORIES.values()):
            factory = value.default_factory
            return {_TYPE: "defaultdict", _VALUE: pairs, "factory": getattr(factory, "__name__", None)}
        if type(value) is not _DICTS.get(kind):
            raise Unstorable(kind)
        return {_TYPE: kind, _VALUE: pairs}
    torch = sys.modules.get("torch")  # imported already if the value is a tensor
    if torch is not None and type(value) is torch.Tensor and value.layout == torch.strided:
        plain = value.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {
            _TYPE: "tensor",
            _VALUE: _blob(data, blobs),
            "dtype": str(plain.dtype).removeprefix("torch."),
            "shape": [*plain.shape],
        }
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
    """Returns the value that `encode` turned into `tree` and `blobs`."""
    if not isinstance(tree, dict):
        return tree
    kind, value = tree[_TYPE], tree[_VALUE]
    if kind in _LISTS:
        return _LISTS[kind](decode(item, blobs) for item in value)
    if kind == "deque":
        return deque((decode(item, blobs) for item in value), tree["length"])
    if kind == "bytes":
        return blobs[value]
    if kind == "scalar":
        return decode(value, blobs)[()]
    if kind == "array":
        return np.frombuffer(blobs[value], np.dtype(tree["dtype"])).reshape(tree["shape"]).copy()
    if kind == "Array":
        return Array(dtype=tree["dtype"], shape=tuple(tree["shape"]), stype=tree["stype"], data=blobs[value])
    if kind == "ArrayRecord":
        return ArrayRecord({name: decode(item, blobs) for name, item in value})
    if kind in _RECORDS:
        return _RECORDS[kind](decode(value, blobs))
    if kind in _DICTS or kind == "defaultdict":
        pairs = ((decode(key, blobs), decode(item, blobs)) for key, item in value)
        return _DICTS[kind](dict(pairs)) if kind in _DICTS else defaultdict(_FACTORIES.get(tree["factory"]), pairs)
    if kind == "tensor":
        import torch

        numbers = torch.frombuffer(bytearray(blobs[value]), dtype=torch.uint8) if blobs[value] else torch.empty(0)
        dtype = getattr(torch, tree["dtype"])
        return (numbers.view(dtype) if len(numbers) else numbers.to(dtype)).reshape(tree["shape"])
    if kind == "Generator":
        bits = getattr(np.random, tree["kind"])()
        bits.state = decode(value, blobs)
        return np.random.Generator(bits)
    generator = random.Random()
    generator.setstate(decode(value, blobs))
    return generator


class StrategyState:
    """Tracks which attributes of a strategy change from now on.

    Args:
        strategy: The strategy as it was made. Strategies that it wraps are tracked in the same way.
        warn: Whether to warn of attributes that cannot be kept.
    """

    def __init__(self, strategy: Strategy, *, warn: bool = True) -> None:
        self.strategy, self._warn = strategy, warn
        self._own = hasattr(strategy, "state_dict") and hasattr(strategy, "load_state_dict")
        self._inside: dict[str, StrategyState] = {}
        self._first: dict[str, tuple[str, list[bytes]] | None] = {}  # None: a checkpoint cannot hold the value
        self._warned: set[str] = set()
        self._ran = False  # whether the strategy may have changed
        if self._own:
            return
        for name, value in vars(strategy).items():
            if isinstance(value, Strategy):
                self._inside[name] = StrategyState(value, warn=warn)
            else:
                self._first[name] = self._plain(name, value)

    def changed(self) -> dict[str, Any]:
        """Returns attribute -> value for the attributes that have changed, in the form that `restore` takes.

        Raises:
            InvalidSetting: The strategy's `state_dict()` contains a value that a checkpoint cannot hold.
        """
        self._ran = True
        if self._own:
            state = self.strategy.state_dict()  # type: ignore[attr-defined]
            try:
                encode(state, [])
            except (Unstorable, RecursionError) as error:
                what = error if isinstance(error, Unstorable) else "container that holds itself"
                raise InvalidSetting(
                    f"{type(self.strategy).__name__}.state_dict() holds a {what}, which a checkpoint cannot: return "
                    "numbers, texts, arrays and tensors, in lists and dicts."
                ) from None
            return {"state_dict": state}
        changed: dict[str, Any] = {}
        for name, value in vars(self.strategy).items():
            if name in self._inside:
                inner = self._inside[name].changed()
                if inner:
                    changed[name] = {"strategy": inner}
            elif (now := self._plain(name, value)) is not None and now != self._first.get(name):
                changed[name] = {"value": value}
        return changed

    def restore(self, state: dict[str, Any]) -> None:
        """Set the attributes that had changed, as returned by `changed`.

        Raises:
            InvalidSetting: Only one of the strategies that wrote and restore the state has `state_dict()`.
        """
        if self._own != ("state_dict" in state) and (state or self._own):
            raise InvalidSetting(
                f"{type(self.strategy).__name__} has {'a' if self._own else 'no'} state_dict(), and the checkpoint was "
                f"written {'without' if self._own else 'with'} it: go on with the strategy that wrote it."
            )
        if self._own:
            self.strategy.load_state_dict(state["state_dict"])  # type: ignore[attr-defined]
            return
        if self._ran:
            self._take_back(state)
        for name, inside in self._inside.items():
            inside.restore(state.get(name, {}).get("strategy", {}))
        for name, entry in state.items():
            if "value" in entry:
                setattr(self.strategy, name, entry["value"])

    def _take_back(self, state: dict[str, Any]) -> None:
        """Reset the attributes that are not in `state`, because a round that changed this object was lost."""
        for name, value in [*vars(self.strategy).items()]:
            now = None if name in state or name in self._inside else self._plain(name, value)
            if now is None:
                continue
            first = self._first.get(name)
            if name not in self._first:
                delattr(self.strategy, name)
            elif first is not None and now != first:
                setattr(self.strategy, name, decode(json.loads(first[0]), first[1]))

    def _plain(self, name: str, value: Any) -> tuple[str, list[bytes]] | None:
        if isinstance(value, _GIVEN):
            return None
        blobs: list[bytes] = []
        try:
            return json.dumps(encode(value, blobs)), blobs
        except (Unstorable, RecursionError) as error:
            if self._warn and name not in self._warned:
                self._warned.add(name)
                _log.warning(
                    "%s.%s is a %s, which a checkpoint cannot hold: after a restart it is as the constructor makes it. "
                    "If it changes over the rounds, give the strategy state_dict() and load_state_dict().",
                    type(self.strategy).__name__,
                    name,
                    error if isinstance(error, Unstorable) else f"{type(value).__name__} that holds itself",
                )
            return None


def _blob(data: bytes, blobs: list[bytes]) -> int:
    blobs.append(data)
    return len(blobs) - 1
