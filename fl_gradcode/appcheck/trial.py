"""A trial: some calls of an app's `train()` in one process, and what each of them did."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from .._flower_internals import inside_a_run, mods_of
from .._seeding import generators_restored, seed_generators
from ..client import LEGACY_CLIENT, RecordingConfig
from ..errors import UnsuitableApp
from ..protocol import NUM_PARTITIONS, PARTITION_ID, Sketch, Sketcher, flatten_update, rounding_of

__all__ = ["Call", "Inputs", "Outcome", "Ran", "Trial", "run_trial"]

_ROUND = "server-round"
_SEED = 0
#: Signs by which updates are compared between processes. The app under test has no reason to deceive.
_KEY = 1


@dataclass(frozen=True)
class Inputs:
    """What `train()` is given.

    Attributes:
        content: The records of the message, as the server would send them in round 1.
        message_type: The message type, "train" or "train.name".
        run_config: Contents of `context.run_config`.
        node_config: Contents of `context.node_config` besides the two numbers of the partition.
        partitions: Number of partitions, which `num-partitions` says.
        weight_key: The metric that holds the number of examples.
    """

    content: RecordDict
    message_type: str = "train"
    run_config: Mapping[str, Any] = field(default_factory=dict)
    node_config: Mapping[str, Any] = field(default_factory=dict)
    partitions: int = 10
    weight_key: str = "num-examples"


@dataclass(frozen=True)
class Call:
    """One call of `train()`.

    Attributes:
        shard: The partition.
        round: The server round.
        seed_of: The shard whose random numbers the call gets; None for its own.
        node: Calls with the same name share a `context.state`; None for a state of its own.
    """

    shard: int
    round: int = 1
    seed_of: int | None = None
    node: str | None = None


@dataclass(frozen=True)
class Trial:
    """Calls in one process, in this order.

    Attributes:
        calls: Name -> call.
        inputs: What each call is given.
        hash_seed: Python's PYTHONHASHSEED in the process, on which the order of sets depends.
        clock: What the process's clock shows: the true time, another date and hour ("other"), or an instant that moves
            on by a millisecond with each look ("steps").
        node: Flower's id of the node.
    """

    calls: Mapping[str, Call]
    inputs: Inputs
    hash_seed: int = 0
    clock: Literal["true", "other", "steps"] = "true"
    node: int = 1


@dataclass(frozen=True)
class Outcome:
    """What one call did.

    Attributes:
        error: The exception that `train()` raised, as one line; empty if it returned.
        sketch: What its update looks like; None after an error.
        weight: Number of examples; None if the metrics do not say it.
        records: Name and kind of each record of the reply, in order.
        uncodable: Why coded vectors cannot carry the reply; empty if they can.
        reads_partition: Whether `partition-id` was read.
        kept: Names of the records in `context.state` afterwards.
        written, read: Files that were opened for writing, and for reading.
        created: Files among those written that were not there before.
        seconds: How long the call took.
    """

    error: str = ""
    sketch: Sketch | None = None
    weight: float | None = None
    records: tuple[tuple[str, str], ...] = ()
    uncodable: str = ""
    reads_partition: bool = False
    kept: tuple[str, ...] = ()
    written: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    created: frozenset[str] = frozenset()
    seconds: float = 0.0


@dataclass(frozen=True)
class Ran:
    """What a trial showed.

    Attributes:
        outcomes: Name of a call -> what it did.
        mods: Names of the mods that the app lists for training, the outermost first.
    """

    outcomes: Mapping[str, Outcome]
    mods: tuple[str, ...]


class _Files:
    """Notes which files are opened; Python never removes an audit hook, so this is for a process that ends soon."""

    def __init__(self) -> None:
        self.written: set[str] = set()
        self.read: set[str] = set()
        self.created: set[str] = set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "sqlite3.connect":
            self._note(str(args[0]), writes=True, reads=True)
        if event == "os.rename" and isinstance(args[1], str | bytes):
            self._note(os.fsdecode(args[1]), writes=True, reads=False)
        if event != "open" or not isinstance(args[0], str | bytes):
            return
        path = os.fsdecode(args[0])
        mode, flags = args[1] or "", args[2] if isinstance(args[2], int) else 0
        if "__pycache__" in path or path.startswith(("/dev/", "/proc/", "/sys/")) or path.endswith((".py", ".pyc")):
            return
        writes = any(letter in mode for letter in "wax+") or bool(flags & 0b11)
        self._note(path, writes=writes, reads=not writes or "+" in mode)

    def _note(self, path: str, *, writes: bool, reads: bool) -> None:
        path = os.path.abspath(path)
        if writes:
            if not os.path.exists(path):
                self.created.add(path)
            self.written.add(path)
        if reads:
            self.read.add(path)

    def hear_torch(self) -> None:
        """Note the files that `torch.save` and `torch.load` open in C++, where Python hears nothing of it."""
        torch: Any = sys.modules.get("torch")
        for name, writes in (("save", True), ("load", False)):
            own = getattr(torch, name, None)
            if own is not None and not hasattr(own, "heard"):
                setattr(torch, name, self._heard(own, place=int(writes), writes=writes))

    def _heard(self, own: Callable[..., Any], *, place: int, writes: bool) -> Callable[..., Any]:
        @functools.wraps(own)
        def heard(*args: Any, **kwargs: Any) -> Any:
            path = args[place] if len(args) > place else kwargs.get("f")
            if isinstance(path, str | os.PathLike):
                self._note(os.fspath(path), writes=writes, reads=not writes)
            return own(*args, **kwargs)

        heard.heard = True  # type: ignore[attr-defined]
        return heard

    def clear(self) -> None:
        """Forget what was opened so far."""
        self.written.clear()
        self.read.clear()
        self.created.clear()


def run_trial(app: Callable[[Message, Context], Message], trial: Trial) -> Ran:
    """Run the calls of a trial in this process, which should be a fresh one.

    Args:
        app: The ClientApp.
        trial: The calls.

    Raises:
        UnsuitableApp: The app has no `@app.train()` function.
    """
    mods = mods_of(app, trial.inputs.message_type)
    if mods is None:
        raise UnsuitableApp(LEGACY_CLIENT)
    files = _Files()
    states: dict[str, RecordDict] = {}
    outcomes: dict[str, Outcome] = {}
    with inside_a_run(), generators_restored():
        for name, call in trial.calls.items():
            node = call.node or name
            config = {PARTITION_ID: call.shard, NUM_PARTITIONS: trial.inputs.partitions}
            context = Context(
                1,
                trial.node,
                RecordingConfig({**trial.inputs.node_config, **config}),
                states.pop(node, RecordDict()),
                dict(trial.inputs.run_config),
            )
            files.clear()
            files.hear_torch()
            outcomes[name] = _called(app, call, trial.inputs, context, files)
            states[node] = context.state
    return Ran(outcomes, tuple(mods))


def _called(
    app: Callable[[Message, Context], Message], call: Call, inputs: Inputs, context: Context, files: _Files
) -> Outcome:
    message = Message(_content_of(inputs, call.round), dst_node_id=context.node_id, message_type=inputs.message_type)
    before = {key: dict(record) for key, record in message.content.array_records.items()}
    seed_generators(_SEED, call.round, call.shard if call.seed_of is None else call.seed_of)
    began = time.perf_counter()
    reply: Any
    try:
        reply = app(message, context)
    except Exception as error:  # whatever an app may raise
        return Outcome(error=f"{type(error).__name__}: {error}", read=frozenset(files.read))
    seconds = time.perf_counter() - began
    written, read, created = map(frozenset, (files.written, files.read, files.created))
    if not isinstance(reply, Message):
        return Outcome(error=f"a TypeError: train() returned a {type(reply).__name__}, not a Message")
    if reply.has_error():
        return Outcome(error=str(reply.error.reason), written=written, read=read, seconds=seconds)
    content = reply.content
    metrics = list(content.metric_records.values())
    weight = metrics[0].get(inputs.weight_key) if metrics else None
    sketch, uncodable = _sketch_of(content, before, inputs.weight_key)
    return Outcome(
        sketch=sketch,
        weight=None if weight is None or isinstance(weight, list) else float(weight),
        records=tuple((name, type(record).__name__) for name, record in content.items()),
        uncodable=uncodable,
        reads_partition=bool(getattr(context.node_config, "was_read", True)),
        kept=tuple(context.state),
        written=written,
        read=read,
        created=created,
        seconds=seconds,
    )


def _content_of(inputs: Inputs, server_round: int) -> RecordDict:
    """Returns the records of the message as they might be in a round; each call may change its own.

    In later rounds the arrays are others, as in a run.
    """
    content: dict[str, Any] = {}
    record: Any
    for name, record in inputs.content.items():
        if isinstance(record, ArrayRecord):
            content[name] = ArrayRecord(dict(record) if server_round == 1 else _moved(record))
        else:
            content[name] = type(record)(dict(record))
            if isinstance(record, ConfigRecord) and _ROUND in record:
                content[name][_ROUND] = server_round
    return RecordDict(content)


def _moved(record: ArrayRecord) -> dict[str, Array]:
    """Returns arrays in which all floats are a little larger; a model may begin with zeros."""
    arrays = dict(record)
    for key, array in arrays.items():
        values = array.numpy() if array.dtype in ("float16", "float32", "float64") else np.zeros(0)
        if values.size:
            arrays[key] = Array(np.asarray(values * 1.01 + 1e-3, values.dtype))
    return arrays


def _sketch_of(content: RecordDict, before: Mapping[str, Any], weight_key: str) -> tuple[Sketch, str]:
    """Returns the sketch of an update, and why coded vectors cannot carry the reply that holds it."""
    sketcher = Sketcher(key=_KEY)
    arrays, metrics = list(content.array_records.items()), list(content.metric_records.items())
    configs = list(content.config_records)
    if len(arrays) != 1 or len(metrics) != 1 or len(before) != 1:
        why = f"it has {len(arrays)} ArrayRecords and {len(metrics)} MetricRecords, and coded vectors carry one of each"
        return sketcher.of_records(content, weight_key), why
    why = f"it has a ConfigRecord, {configs[0]!r}" if configs else ""
    weight = metrics[0][1].get(weight_key)
    if isinstance(weight, list) or weight is None:
        why = why or f"its metrics lack the number of examples, {weight_key!r}"
    try:
        (sent,) = before.values()
        layout, update = flatten_update(sent, dict(arrays[0][1]))
    except ValueError as error:
        return sketcher.of_records(content, weight_key), why or str(error)
    number = 0.0 if not isinstance(weight, int | float) else float(weight)
    return replace(sketcher.of_vector(update, number, layout), rounding=rounding_of(sent)), why
