"""A trial: some calls of an app's `train()` in one process, and what each of them did."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from .._flower_internals import inside_a_run, mods_of
from .._seeding import generators_restored, seed_generators
from ..client import LEGACY_CLIENT, RecordingConfig
from ..errors import UnsuitableApp
from ..protocol import NUM_PARTITIONS, PARTITION_ID, Sketch, Sketcher, flatten_update

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
        clock: Time that the process's clock always shows, in seconds since the epoch; None for the true time.
    """

    calls: Mapping[str, Call]
    inputs: Inputs
    hash_seed: int = 0
    clock: float | None = None


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
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "sqlite3.connect":
            self.written.add(str(args[0]))
            self.read.add(str(args[0]))
        if event != "open" or not isinstance(args[0], str | bytes):
            return
        path = args[0].decode(errors="replace") if isinstance(args[0], bytes) else args[0]
        mode, flags = args[1] or "", args[2] if isinstance(args[2], int) else 0
        if "__pycache__" in path or path.startswith(("/dev/", "/proc/", "/sys/")) or path.endswith((".py", ".pyc")):
            return
        writes = any(letter in mode for letter in "wax+") or bool(flags & 0b11)
        if writes:
            self.written.add(path)
        if not writes or "+" in mode:
            self.read.add(path)

    def clear(self) -> None:
        """Forget what was opened so far."""
        self.written.clear()
        self.read.clear()


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
                1,
                RecordingConfig({**trial.inputs.node_config, **config}),
                states.pop(node, RecordDict()),
                dict(trial.inputs.run_config),
            )
            files.clear()
            outcomes[name] = _called(app, call, trial.inputs, context, files)
            states[node] = context.state
    return Ran(outcomes, tuple(mods))


def _called(
    app: Callable[[Message, Context], Message], call: Call, inputs: Inputs, context: Context, files: _Files
) -> Outcome:
    message = Message(_content_of(inputs, call.round), dst_node_id=1, message_type=inputs.message_type)
    before = {key: dict(record) for key, record in message.content.array_records.items()}
    seed_generators(_SEED, call.round, call.shard if call.seed_of is None else call.seed_of)
    began = time.perf_counter()
    try:
        reply = app(message, context)
    except Exception as error:  # whatever an app may raise
        return Outcome(error=f"{type(error).__name__}: {error}", read=frozenset(files.read))
    seconds = time.perf_counter() - began
    written, read = frozenset(files.written), frozenset(files.read)
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
        seconds=seconds,
    )


def _content_of(inputs: Inputs, server_round: int) -> RecordDict:
    """Returns the records of the message as they would be in a round; each call may change its own."""
    content: dict[str, Any] = {}
    record: Any
    for name, record in inputs.content.items():
        if isinstance(record, ArrayRecord):
            content[name] = ArrayRecord(dict(record))
        else:
            content[name] = type(record)(dict(record))
            if isinstance(record, ConfigRecord) and _ROUND in record:
                content[name][_ROUND] = server_round
    return RecordDict(content)


def _sketch_of(content: RecordDict, before: Mapping[str, Any], weight_key: str) -> tuple[Sketch, str]:
    """Returns the sketch of an update, and why coded vectors cannot carry the reply that holds it."""
    sketcher = Sketcher(_KEY)
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
    return sketcher.of_vector(update, number, layout), why
