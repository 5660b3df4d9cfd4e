"""Converts the state that a strategy keeps between rounds, such as momentum, to plain values that a file can hold.

Only attributes that have changed since the strategy was made are kept. The constructor restores the others when the
run is resumed. A strategy can take over by defining `state_dict()` and `load_state_dict()`.
"""

from __future__ import annotations

import functools
import inspect
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
#: Kinds of NumPy's dtypes that an array may have: numbers and texts, no objects, no fields, no dates.
_ARRAYS = "biufcSU"
#: Dtypes of tensors by name.
_TENSORS = frozenset(
    {"bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16"}
    | {"float32", "float64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"}
    | {"float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}
)
#: NumPy's bit generators by name, which no other function of `numpy.random` is.
_BIT_GENERATORS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
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
    if type(value) is np.ndarray and value.dtype.kind in _ARRAYS:
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
    if (
        torch is not None
        and type(value) is torch.Tensor
        and value.layout == torch.strided
        and str(value.dtype).removeprefix("torch.") in _TENSORS
    ):
        plain = value.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {
            _TYPE: "tensor",
            _VALUE: _blob(data, blobs),
            "dtype": str(plain.dtype).removeprefix("torch."),
            "shape": [*plain.shape],
        }
    if isinstance(value, np.random.Generator) and type(value.bit_generator) in _BIT_GENERATORS.values():
        return {
            _TYPE: "Generator",
            _VALUE: encode(value.bit_generator.state, blobs),
            "kind": type(value.bit_generator).__name__,
        }
    if type(value) is random.Random:
        return {_TYPE: "Random", _VALUE: encode(value.getstate(), blobs)}
    raise Unstorable(kind)


def decode(tree: Any, blobs: list[bytes]) -> Any:
    """Returns the value that `encode` turned into `tree` and `blobs`.

    Raises:
        Exception: Something else has made them; almost anything may be raised, and nothing is called but what makes a
            value of a kind that `encode` knows.
    """
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise TypeError("a list without its kind")
        return tree
    kind, value = tree[_TYPE], tree[_VALUE]
    if kind in _LISTS:
        return _LISTS[kind](decode(item, blobs) for item in _as_list(value))
    if kind == "deque":
        return deque((decode(item, blobs) for item in _as_list(value)), tree["length"])
    if kind == "bytes":
        return _blob_of(value, blobs)
    if kind == "scalar":
        return decode(value, blobs)[()]
    if kind == "array":
        dtype = np.dtype(str(tree["dtype"]))
        if dtype.kind not in _ARRAYS or dtype.shape:
            raise TypeError(f"an array of {dtype}")
        return np.frombuffer(_blob_of(value, blobs), dtype).reshape(_shape(tree["shape"])).copy()
    if kind == "Array":
        texts = {name: str(tree[name]) for name in ("dtype", "stype")}
        return Array(shape=_shape(tree["shape"]), data=_blob_of(value, blobs), **texts)
    if kind == "ArrayRecord":
        return ArrayRecord({str(name): decode(item, blobs) for name, item in _as_list(value)})
    if kind in _RECORDS:
        return _RECORDS[kind](decode(value, blobs))
    if kind in _DICTS or kind == "defaultdict":
        pairs = ((decode(key, blobs), decode(item, blobs)) for key, item in _as_list(value))
        if kind in _DICTS:
            return _DICTS[kind](dict(pairs))
        return defaultdict(None if tree["factory"] is None else _FACTORIES[tree["factory"]], pairs)
    if kind == "tensor":
        import torch

        if tree["dtype"] not in _TENSORS:
            raise TypeError(f"a tensor of {tree['dtype']}")
        data = _blob_of(value, blobs)
        numbers = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        dtype = getattr(torch, tree["dtype"])
        return (numbers.view(dtype) if len(numbers) else numbers.to(dtype)).reshape(_shape(tree["shape"]))
    if kind == "Generator":
        bits = _BIT_GENERATORS[tree["kind"]](0)
        bits.state = decode(value, blobs)
        return np.random.Generator(bits)
    if kind == "Random":
        generator = random.Random()
        generator.setstate(decode(value, blobs))
        return generator
    raise TypeError(f"a value of kind {str(kind)[:50]!r}")


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("a list is missing")
    return value


def _blob_of(number: Any, blobs: list[bytes]) -> bytes:
    if type(number) is not int or not 0 <= number < len(blobs):
        raise IndexError("a member that is not there")
    return blobs[number]


def _shape(sizes: Any) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in _as_list(sizes)):
        raise ValueError("a shape of other than whole numbers")
    return tuple(sizes)


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
            InvalidSetting: Only one of the strategies that wrote and restore the state has `state_dict()`, or the state
                is not one of this strategy's. Nothing is changed then.
        """
        self._check(state)
        self._set(state)

    def _check(self, state: Any) -> None:
        """Refuse a state that this strategy cannot have written, before anything is changed."""
        whose = type(self.strategy).__name__
        if type(state) is not dict or not all(isinstance(name, str) for name in state):
            raise InvalidSetting(f"The checkpoint has no state of {whose}, or a damaged one: restore the file.")
        if self._own != ("state_dict" in state) and (state or self._own):
            raise InvalidSetting(
                f"{whose} has {'a' if self._own else 'no'} state_dict(), and the checkpoint was "
                f"written {'without' if self._own else 'with'} it: continue with the strategy that wrote it."
            )
        if self._own:
            return
        for name, entry in state.items():
            what = {*entry} if type(entry) is dict else set()
            inside = what == {"strategy"} and name in self._inside
            if not inside and (what != {"value"} or not self._may_set(name)):
                raise InvalidSetting(
                    f"The checkpoint sets {name[:100]!r} of {whose}, which is no state that {whose} keeps: go on with "
                    "the strategy that wrote it, or name another file to start over."
                )
        for name, one in self._inside.items():
            one._check(state.get(name, {}).get("strategy", {}))

    def _may_set(self, name: str) -> bool:
        """Returns whether a name is one of an attribute with plain data, and not of a method or another strategy."""
        if not name.isidentifier() or name.startswith("__") or name in self._inside:
            return False
        if name in vars(self.strategy) and isinstance(vars(self.strategy)[name], _GIVEN):
            return False
        of_class = inspect.getattr_static(type(self.strategy), name, None)
        return not callable(of_class) and not hasattr(of_class, "__get__")

    def _set(self, state: dict[str, Any]) -> None:
        if self._own:
            self.strategy.load_state_dict(state["state_dict"])  # type: ignore[attr-defined]
            return
        if self._ran:
            self._take_back(state)
        for name, inside in self._inside.items():
            inside._set(state.get(name, {}).get("strategy", {}))
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
                    "%s.%s is a %s, which a checkpoint cannot hold: after a restart it has its initial value again. "
                    "If it changes over the rounds, give the strategy state_dict() and load_state_dict().",
                    type(self.strategy).__name__,
                    name,
                    error if isinstance(error, Unstorable) else f"{type(value).__name__} that holds itself",
                )
            return None


def _blob(data: bytes, blobs: list[bytes]) -> int:
    blobs.append(data)
    return len(blobs) - 1
