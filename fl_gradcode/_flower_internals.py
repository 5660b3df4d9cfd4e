"""Everything that reaches past public interfaces, each with its reason: fifteen reaches into Flower, one into imports.

They rely on details that Flower does not promise. All were checked with Flower 1.41.0 and 1.42.0, and
`tests/test_flower_internals.py` looks for each detail in the installed version. When a new version turns that test red,
this is the file to change.

| reach | why there is no other way |
|---|---|
| `clipping_mods_around_or_inside` | a mod is not told which other mods the app lists |
| `mods_around` | as above: a mod that stands before ours would change coded vectors |
| `mods_of`, `has_client_fn`, `is_legacy_server` | an app does not say what it is made of |
| `caller_among` | a strategy is not told what is wrapped around it |
| `isolate_flower_random` | Flower's threads draw from the generator that user code is seeded with |
| `inside_a_run` | Flower builds a `Message` only in a process that it started itself |
| `message_of_nobody` | private training must not see who asks, and a `Message` has no public way to say nothing |
| `number_message` | a grid gives each message its id, and Flower's own grids write it past the public interface too |
| `message_like`, `reply_in_process` | Flower checks each of a round's messages, of which it has thousands |
| `mean_of_replies` | Flower's average reads the headers of all arrays again and checks each of the replies again |
| `with_entry` | as above: the dictionaries of a message check each entry, which takes longer than making the entry |
| `in_a_simulation` | a node is not told whether it has a machine of its own, or is one of many on the server's |
| `WhenImported` | torch must be seeded the moment an app imports it, and importing it here would cost a second |
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, FrameType, ModuleType
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict

__all__ = [
    "CLIPPING_MODS",
    "FLOWER_MODULES_WITH_JITTER",
    "WhenImported",
    "caller_among",
    "clipping_mods_around_or_inside",
    "has_client_fn",
    "in_a_simulation",
    "inside_a_run",
    "is_legacy_server",
    "isolate_flower_random",
    "mean_of_replies",
    "message_like",
    "message_of_nobody",
    "mods_around",
    "mods_of",
    "number_message",
    "reply_in_process",
    "with_entry",
]

# ---- Who is around us: stack walks ----

#: Names of Flower's client mods that clip or noise a reply, in `flwr.clientapp.mod`.
CLIPPING_MODS = ("LocalDpMod", "fixedclipping_mod", "adaptiveclipping_mod")


def clipping_mods_around_or_inside(call_next: Callable[..., Any]) -> list[str]:
    """Returns the names of Flower's clipping mods in the chain of mods that the calling mod belongs to.

    Flower nests mods: each one calls the next. Those before the calling mod are in the frames around it; those after it
    are in the closures of `call_next`, since Flower's `make_ffn` builds the chain from nested functions.

    This runs for each message. A deployed node starts a process for each message, so there is no shorter "once a run";
    and in a simulation one process serves several apps. The walk takes some ten microseconds.

    Args:
        call_next: What the calling mod was given to call.
    """
    return [*_clipping_mods_around(), *_clipping_mods_inside(call_next)]


@lru_cache(maxsize=1)
def _clipping_mods() -> tuple[type[Any], dict[CodeType, str]]:
    """Returns `LocalDpMod`, and the code objects of all clipping mods with their names."""
    from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod

    functions: list[Any] = [LocalDpMod.__call__, fixedclipping_mod, adaptiveclipping_mod]
    return LocalDpMod, {function.__code__: name for function, name in zip(functions, CLIPPING_MODS, strict=True)}


def _clipping_mods_around() -> list[str]:
    local, codes = _clipping_mods()
    found = []
    for frame in _callers():
        if frame.f_code in codes:
            found.append(codes[frame.f_code])
        elif frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), local):
            found.append(local.__name__)  # a subclass with a `__call__` of its own
    return found


def _clipping_mods_inside(call: Any) -> list[str]:
    local, codes = _clipping_mods()
    found: list[str] = []
    seen: set[int] = set()
    left = [call]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        code = getattr(one, "__code__", None)
        if isinstance(one, local):
            found.append(local.__name__)
        elif code in codes:
            found.append(codes[code])
        elif isinstance(one, partial):
            left.append(one.func)
        elif getattr(one, "__closure__", None) and getattr(one, "__module__", "").startswith("flwr."):
            left.extend(cell.cell_contents for cell in one.__closure__ if callable(cell.cell_contents))
    return found


def mods_of(app: Any, message_type: str) -> list[str] | None:
    """Returns the names of the mods through which a message of a type passes in an app, the outermost first.

    Args:
        app: A ClientApp, or any other function, which has no mods.
        message_type: "train" or "train.name".

    Returns None for an app with a client_fn, Flower's legacy interface.
    """
    if getattr(app, "_call", None) is not None:
        return None
    category, _, action = message_type.partition(".")
    call: Any = getattr(app, "_registered_funcs", {}).get(f"{category}.{action or 'default'}")
    names = []
    while call is not None and call.__name__ == "new_ffn" and call.__closure__:
        inside = dict(zip(call.__code__.co_freevars, (cell.cell_contents for cell in call.__closure__), strict=True))
        names.append(_name_of(inside.get("_mod")))
        call = inside.get("_ffn")
    return names


def is_legacy_server(app: Any) -> bool:
    """Returns whether a ServerApp has a server_fn, Flower's legacy interface."""
    return getattr(app, "_server_fn", None) is not None


def _name_of(mod: object) -> str:
    return getattr(mod, "__name__", type(mod).__name__)


def has_client_fn() -> bool:
    """Returns whether the app that calls has a client_fn, Flower's legacy interface."""
    for frame in _callers():
        app: Any = frame.f_locals.get("self")
        if frame.f_code.co_name == "__call__" and type(app).__name__ == "ClientApp":
            return getattr(app, "_call", None) is not None
    return False


#: Flower's mods that leave messages as they are.
_HARMLESS = {"arrays_size_mod", "message_size_mod"}


def mods_around() -> list[str]:
    """Returns the names of the mods that an app lists before the calling mod, the outermost first.

    Flower calls each mod from a function of `make_ffn`, in whose frame the mod is a variable. Two mods of Flower's that
    only log sizes are left out.
    """
    found = []
    for frame in _callers():
        if frame.f_code.co_name == "__call__" and type(frame.f_locals.get("self")).__name__ == "ClientApp":
            break
        if frame.f_code.co_name == "new_ffn" and frame.f_globals.get("__name__") == "flwr.client.mod.utils":
            found.append(_name_of(frame.f_locals.get("_mod")))
    return [name for name in reversed(found[1:]) if name not in _HARMLESS]


def caller_among(kinds: tuple[type[object], ...]) -> object | None:
    """Returns the innermost caller that is a method of an instance of one of these classes; None: there is none.

    A wrapper around a strategy calls the strategy's `configure_train` from its own, so it is on the stack. Nothing in
    the arguments tells of it: Flower's privacy wrappers change replies only after `configure_train` has returned.

    A strategy that runs Flower's loop itself has nobody between the loop and its methods, and need not ask. In somebody
    else's loop it has to ask in each round, since such a loop says neither when a run begins nor whose run it is.

    Args:
        kinds: Classes to look for, subclasses included.
    """
    for frame in _callers():
        caller: object = frame.f_locals.get("self")
        if isinstance(caller, kinds):
            return caller
    return None


#: Modules that call a ClientApp where all nodes are on the server's machine: Flower's simulation engine, and our tests.
SIMULATING_MODULES = ("flwr.simulation.ray_transport.ray_actor", "fl_gradcode.testing", "fl_gradcode.appcheck.trial")


def in_a_simulation() -> bool:
    """Returns whether the calling code runs in a simulation, where all nodes are processes of the server's machine.

    On a SuperNode, which runs the same apps on somebody else's machine, the caller is another module of Flower.
    """
    return any(frame.f_globals.get("__name__") in SIMULATING_MODULES for frame in _callers())


def _callers() -> Iterator[FrameType]:
    """Yields the frames of all callers, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


# ---- Flower's own random numbers ----

#: Modules that draw random waiting times from Python's global generator, in threads beside user code.
FLOWER_MODULES_WITH_JITTER = (
    "flwr.supercore.heartbeat",
    "flwr.supercore.retry.retry_invoker",
    "flwr.supercore.inflatable.inflatable_utils",
)


def isolate_flower_random() -> None:
    """Give Flower's threads a random generator of their own, in place of Python's global one.

    Otherwise a slow holder of a shard, during whose training Flower sends more heartbeats, would draw other numbers
    than a fast holder; and a server would sample other clients in each run.
    """
    for name in FLOWER_MODULES_WITH_JITTER:
        module: Any = sys.modules.get(name)
        if getattr(module, "random", None) is random:
            module.random = random.Random()


# ---- Flower's task identity ----

_IDENTITY = ("_task_id", "_run_id", "_node_id")
_pretending = threading.Lock()
_pretended: list[tuple[Any, ...]] = []  # what was there before, and what is pretended


def message_of_nobody(content: RecordDict, message_type: str) -> Message:
    """Returns a message whose metadata say nothing: not who sent it, to whom, when, or in which run."""
    nobody = Metadata(0, "", 0, 0, "", "", 0.0, _ENDLESS, message_type)
    return Message(content, metadata=nobody)  # type: ignore[call-overload,no-any-return]


_ENDLESS = 1e12  # seconds, so that the reply to a message from 1970 does not come too late


@contextmanager
def inside_a_run(run_id: int = 1) -> Iterator[None]:
    """Pretend that this process is a Flower task, without which no `Message` can be built.

    The identity is the process's, so it is restored when the last of several overlapping uses is left, in whatever
    thread that is.

    Args:
        run_id: Of the pretended run.
    """
    mine = (0, run_id, 1)
    with _pretending:
        if not _pretended:
            from flwr.supercore.task_identity import TaskIdentity

            _pretended.append(tuple(getattr(TaskIdentity, name) for name in _IDENTITY))
        _pretended.append(mine)
        _pretend(mine)
    try:
        yield
    finally:
        with _pretending:
            _pretended.remove(mine)
            _pretend(_pretended[-1])
            if len(_pretended) == 1:
                _pretended.clear()


def number_message(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will answer, as Flower's grids do when they push it.

    Args:
        message: Without an id.
        message_id: Unique in the grid.
    """
    message.metadata.__dict__["_message_id"] = message_id


def _pretend(identity: tuple[Any, ...]) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    for name, value in zip(_IDENTITY, identity, strict=True):
        setattr(TaskIdentity, name, value)


# ---- Many messages that are alike ----

Typed = TypeVar("Typed", bound=MutableMapping[str, Any])


def message_like(first: Message, content: RecordDict, node: int) -> Message:
    """Returns a message of now to another node, with the metadata of a message that was made by Flower's constructor.

    Args:
        first: A message that has not been sent.
        content: The new message's records.
        node: The node that it is for.
    """
    return _made(content, vars(first.metadata), _dst_node_id=node, _created_at=time.time())


def reply_in_process(content: RecordDict, draft: Message) -> Message:
    """Returns `Message(content, reply_to=draft)`, for a draft that was never sent.

    Args:
        content: The reply's records.
        draft: The message that it answers.
    """
    asked, now = vars(draft.metadata), time.time()
    return _made(
        content,
        asked,
        _message_id="",
        _src_node_id=asked["_dst_node_id"],
        _dst_node_id=asked["_src_node_id"],
        _src_task_id=asked["_dst_task_id"],
        _dst_task_id=asked["_src_task_id"],
        _reply_to_message_id=asked["_message_id"],
        _created_at=now,
        _ttl=asked["_ttl"] - (now - asked["_created_at"]),
    )


def _made(content: RecordDict, metadata: dict[str, Any], **other: Any) -> Message:
    its, message = Metadata.__new__(Metadata), Message.__new__(Message)
    vars(its).update(metadata, **other)
    vars(message).update(_metadata=its, _content=content, _error=None)
    return message


def with_entry(typed: Typed, key: str, value: Any) -> Typed:
    """Returns a copy of a RecordDict or ConfigRecord with one more entry, whose type is right.

    Args:
        typed: It is not changed.
        key: Name of the entry.
        value: The entry.
    """
    other: Any = typed.copy()  # type: ignore[attr-defined]
    vars(other)["_data"][key] = value
    return other  # type: ignore[no-any-return]


def mean_of_replies(
    contents: Sequence[RecordDict], weight_key: str, kind: str, view: Callable[[Array], Any]
) -> RecordDict | None:
    """Returns the records of one reply of which a strategy of Flower that averages makes what it makes of all of these.

    It does so to the last bit: these are the operations of Flower's `aggregate_arrayrecords` and
    `aggregate_metricrecords`, in their order, and the mean of one reply is that reply. They take a third of the time
    here, since the replies are known to be alike and the headers of their arrays have been read.

    Args:
        contents: The records of each shard, with the same names, in the order in which the strategy asked for them.
        weight_key: Metric by which the strategy weighs; empty if it weighs by none.
        kind: "train" or "evaluate".
        view: Gives the values of an array.

    Returns:
        The records, or None if the strategy may refuse these replies, which it is to say itself.
    """
    of_arrays = [name for name, record in contents[0].items() if isinstance(record, ArrayRecord)]
    of_metrics = [name for name, record in contents[0].items() if isinstance(record, MetricRecord)]
    if len(contents) < 2 or len(of_metrics) != 1 or (kind == "train" and len(of_arrays) != 1):
        return None
    means: dict[str, Any] = {}
    sums: dict[str, Any] = {}
    try:
        metrics: list[Any] = [content[of_metrics[0]] for content in contents]
        weights = [record[weight_key] for record in metrics]
        total = sum(weights)
        shares = [weight / total for weight in weights]
        if total / total != 1.0:  # not finite
            return None
        for record, share in zip(metrics, shares, strict=True):
            for name, value in record.items():
                if name == weight_key:
                    continue
                own = [one * share for one in value] if isinstance(value, list) else value * share
                if name not in means:
                    means[name] = own
                elif isinstance(value, list):
                    means[name] = [one + more for one, more in zip(means[name], own, strict=True)]
                else:
                    means[name] += own
        if kind == "train":
            for content, share in zip(contents, shares, strict=True):
                arrays: Any = content[of_arrays[0]]
                for name, array in arrays.items():
                    values: Any = view(array)
                    if values.dtype.kind not in "fiub" or array.dtype == "bfloat16":
                        return None
                    if name in sums:
                        sums[name] += values * share
                    else:
                        sums[name] = values * share
        mean = RecordDict({of_metrics[0]: MetricRecord({weight_key: total, **means})})
        if kind == "train":
            mean[of_arrays[0]] = ArrayRecord({name: Array(np.asarray(values)) for name, values in sums.items()})
    except Exception:  # whatever is wrong with the replies, the strategy's own error says it better
        return None
    return mean


# ---- Python's imports ----


class WhenImported(MetaPathFinder):
    """Calls a function right after a module was imported for the first time.

    While it watches, it stands first in `sys.meta_path`. It finds nothing itself: it lets the other finders find the
    module, and has its loader call the function after the module has run.

    Args:
        name: Of the module.
        action: Called without arguments, once; the watch has ended by then.
    """

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name, self._action = name, action
        self._searching = False

    def watch(self) -> bool:
        """Begin to watch; returns False if it watches already."""
        begins = self not in sys.meta_path
        if begins:
            sys.meta_path.insert(0, self)
        return begins

    def stop(self) -> None:
        """Watch no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Returns the spec that the other finders find for the watched module; None for any other module."""
        if fullname != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            self._act_behind(spec)
        return spec

    def _act_behind(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.stop()
            self._action()

        loader.exec_module = execute_and_act  # of this one spec
