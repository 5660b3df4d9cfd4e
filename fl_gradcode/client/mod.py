"""The client half of a coded round: it calls the app's `train()` once for each shard and sends one coded reply."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from .._flower_internals import has_client_fn, mods_around
from .._seeding import generators_restored, seed_generators
from ..errors import (
    FlGradcodeError,
    Overflow,
    PrivacyRefused,
    SecureRefused,
    ShardMismatch,
    UnsuitableApp,
    VersionMismatch,
)
from ..privacy import (
    DPSGD,
    Asked,
    CentralNoise,
    IntegerNoise,
    Privacy,
    asked_of,
    call_privately,
    clip,
    guarded_reply,
    privacy_from_json,
    refuse_clipping_mods,
    refuse_statistics,
    refuse_unprotected,
)
from ..protocol import (
    ARRAYS,
    METRICS,
    MOST_WORKERS,
    NUM_PARTITIONS,
    PARTITION_ID,
    UPDATE,
    Layout,
    MetricsLayout,
    Plan,
    Reply,
    Row,
    as_array,
    counters_in,
    difference_between,
    flatten_metrics,
    is_probe,
    is_setup,
    payload_encoding,
    rounding_of,
    with_kind,
)
from .file_watch import watching_files
from .held_shards import SECAGG_DIR, held_by, refuse_other_shards, secagg_folder, secagg_named, told_by
from .recording_config import RecordingConfig
from .trained_shard import TrainedShard, check_answer, read_reply

__all__ = ["LEGACY_CLIENT", "RecordingConfig", "gradient_coding_mod"]

LEGACY_CLIENT = (
    "The ClientApp has a client_fn, Flower's legacy interface (NumPyClient), whose messages hold no arrays that can be "
    "coded. Write a function that takes a Message and returns one, and register it with @app.train()."
)


_log = logging.getLogger(__name__)
_STATE = "fl-gradcode.state"

_Call = Callable[[Message, Context], Message]


def gradient_coding_mod(message: Message, context: Context, call_next: _Call) -> Message:
    """Answers the messages of a `GradientCoding` strategy, as a Flower mod of the client's app.

    Add it to the app and leave `train()` and `evaluate()` as they are:

        app = ClientApp(mods=[gradient_coding_mod])

    The functions are called once for each shard that this node is asked for. They choose their data by
    `context.node_config["partition-id"]`. All holders of a shard must compute the same update, so the result may depend
    on nothing but the message, the shard and the seeded generators. Each shard has a `context.state` of its own; the
    shard with the node's number has the node's, where `@app.query` and plain code find it. A message without a plan, as
    plain strategies send it, passes through unchanged.

    List it first. A mod before it would see coded vectors instead of model arrays; one after it is called once for each
    shard, and sees what it would see in plain Flower. Flower's privacy mods (`fixedclipping_mod`,
    `adaptiveclipping_mod`, `LocalDpMod`) are refused under coded vectors. The two clipping mods work after this one if
    the server asks for one shard a message and the strategy sees each reply.

    Raises:
        UnsuitableApp: This node has no `partition-id`, or one that the plan does not contain, the app lists another mod
            before this one, or the function's reply cannot be coded or lacks the privacy that the server promises.
            Flower sends the error to the server as an error reply.
        PrivacyRefused: This node has a `max-epsilon`, and is asked for an update without noise.
        SecureRefused: This node has a `secagg-dir`, and is asked for anything but a masked reply under its manifest.
    """
    try:
        return _answered(message, context, call_next)
    except (ShardMismatch, VersionMismatch) as error:  # an error reply does not name its worker, so the text does
        raise with_kind(error, f"Worker {context.node_config.get(PARTITION_ID)}: {error}") from None
    except FlGradcodeError as error:
        raise with_kind(error) from error


def _answered(message: Message, context: Context, call_next: _Call) -> Message:
    masked = secagg_named(context)
    if not message.has_content() and not masked:
        return call_next(message, context)
    if message.has_content() and is_probe(message.content):
        holds = () if masked else told_by(context.node_config)
        who = Reply("", 0, "probe", _worker_of(context), "idle", holds=holds)
        return Message(who.content(), reply_to=message)
    if masked:
        return _answered_masked(message, context, call_next)
    if is_setup(message.content):
        raise SecureRefused(
            f"The server sets up keys for masks, and this node has no {SECAGG_DIR} in its node config to keep them in."
        )
    plan = Plan.find_in(message.content)
    if plan is None:
        asked = asked_of(message, context)
        refuse_unprotected(message, context, asked.privacy if asked else None)
        return guarded_reply(asked, message, context, call_next)
    if plan.secure:
        raise SecureRefused(
            f"The server asks for a masked reply, and this node has no {SECAGG_DIR} in its node config to mask with."
        )
    if plan.kind != message.metadata.message_type.split(".")[0] or (plan.kind == "train") != bool(plan.arrays_key):
        raise UnsuitableApp(
            f"The plan says {plan.kind!r}, and the message does not: does the server have this version?"
        )
    if plan.as_returned and plan.privacy:
        raise UnsuitableApp("The plan promises privacy and asks for records as they are returned, which keeps none.")
    privacy = privacy_from_json(plan.privacy) if plan.privacy else None
    if isinstance(privacy, IntegerNoise):
        raise PrivacyRefused("Integer noise is added under masks, and the plan asks for none: say secure= too.")
    refuse_unprotected(message, context, privacy)
    if has_client_fn():
        raise UnsuitableApp(LEGACY_CLIENT)
    refuse_clipping_mods(call_next, as_returned=plan.as_returned)
    _refuse_mods_before()
    with generators_restored():
        return _CodedCall(plan, Plan.remove_from(message.content), message, context, call_next).run()


def _answered_masked(message: Message, context: Context, call_next: _Call) -> Message:
    from .masked_call import masked_answer, refusing  # a plain round needs neither keys nor masks
    from .setup_call import setup_answer

    with refusing():
        if has_client_fn():
            raise UnsuitableApp(LEGACY_CLIENT)
        refuse_clipping_mods(call_next, as_returned=False)
        _refuse_mods_before()
        worker = _worker_of(context)
        folder, simulated = secagg_folder(context, worker)
        if message.has_content() and is_setup(message.content):
            return setup_answer(message, context, folder=folder, worker=worker)
        with generators_restored():
            return masked_answer(message, context, call_next, folder=folder, worker=worker, simulated=simulated)


def _refuse_mods_before() -> None:
    """Refuse an app that lists another mod before ours, where it would see coded vectors in place of model arrays.

    Raises:
        UnsuitableApp: Naming the mods, and where they belong.
    """
    before = mods_around()
    if before:
        names = ", ".join(before)
        raise UnsuitableApp(
            f"The app lists {names} before gradient_coding_mod, where coded vectors would pass through it. List "
            f"gradient_coding_mod first: ClientApp(mods=[gradient_coding_mod, {names}])."
        )


class _CodedCall:
    """Works on one message, shard by shard."""

    def __init__(self, plan: Plan, content: RecordDict, message: Message, context: Context, call_next: _Call) -> None:
        self.plan, self.content, self.message = plan, content, message
        self.context, self.call_next = context, call_next
        self.worker = _worker_of(context)
        if self.worker not in plan.rows and not plan.open:
            raise UnsuitableApp(
                f"This node reports partition-id {self.worker}, but the code has workers 0..{plan.n - 1}. Start "
                f"{plan.n} nodes with partition-id 0..{plan.n - 1}, or build the code for more workers."
                if self.worker >= plan.n or self.worker < 0
                else f"This node reports partition-id {self.worker}, but the server took it for another worker."
            )
        self.privacy = privacy_from_json(plan.privacy) if plan.privacy and plan.arrays_key else None
        self.encoder = _Encoder(plan, self._rounding())
        self.seconds: list[float] = []
        self.arrays: dict[str, dict[str, Array]] = {}  # record name -> arrays as received
        self.given: dict[str, ArrayRecord] = {}  # record name -> the record passed to the user's function
        self.stateful = False
        self.kept_file = ""
        self.fixed_data = False

    def run(self) -> Message:
        """Returns the reply, which holds the coded sum over the shards of this worker's row or says why it does not."""
        row = self.plan.rows.get(self.worker)
        if row is None or not row.shards or self._holds_others(row):
            return self._answer("idle")
        refuse_other_shards(self.plan, self.worker, self.context.node_config)
        started = time.monotonic()
        for shard, coefficients in zip(row.shards, row.coefficients, strict=True):
            if self.seconds and 0 < self.plan.give_up_after < time.monotonic() - started:
                return self._answer("gave-up")
            reply, read_partition = self._call_user(shard)
            check_answer(reply, self.plan.kind, shard)
            if reply.has_error():
                return Message(reply.error, reply_to=self.message)
            if not read_partition and not self.plan.allow_fixed_data:
                if self.plan.arrays_key:
                    return self._answer("fixed-data")
                self.fixed_data = True  # evaluating on one common test set is fine; the server warns
            if self.plan.as_returned:
                return self._answer("returned", (shard,), reply.content)
            content = RecordDict({**reply.content})  # a shallow copy that is emptied to free large arrays early
            del reply
            try:
                before = self.arrays[self.plan.arrays_key] if self.plan.arrays_key else None
                # No variable holds the result: its update must be gone when the next shard is trained.
                with np.errstate(
                    all="ignore"
                ):  # the app may have set it to raise; the server rejects what is not finite
                    self.encoder.add(
                        _protected(
                            read_reply(content, self.plan, shard, before, self.privacy), self.plan, self.privacy
                        ),
                        coefficients,
                    )
            except (ValueError, Overflow) as error:
                raise UnsuitableApp(f"Shard {shard}, {self.plan.label}: {str(error).rstrip('.')}.") from error
        return self._answer("coded", row.shards)

    def _rounding(self) -> float:
        """Returns what rounding the model's arrays may change in an update, as far as that may be told."""
        before = self.content.get(self.plan.arrays_key)
        told = self.plan.figures and self.privacy is None and isinstance(before, ArrayRecord)
        return rounding_of(before) if told and isinstance(before, ArrayRecord) else 0.0

    def _holds_others(self, row: Row) -> bool:
        """Returns whether the node no longer holds a shard that an open plan asks for.

        The reply then reports what the node holds, and the server rebuilds the code.
        """
        held = held_by(self.context.node_config) if self.plan.open else None
        return held is not None and not held.keys() >= {*row.shards}

    def _call_user(self, shard: int) -> tuple[Message, bool]:
        node_config = RecordingConfig({**self.context.node_config, PARTITION_ID: shard, NUM_PARTITIONS: self.plan.k})
        if isinstance(self.privacy, DPSGD):
            return self._call_privately(shard, node_config, self.privacy), node_config.was_read
        own = shard == self.worker
        state = _take_state(self.context.state, shard, own=own)
        context = Context(
            self.context.run_id,
            self.context.node_id,
            node_config,
            state,
            dict(self.context.run_config),
            self.context.series_id,
        )
        message = copy(self.message)
        # The user's function may change its message, but the next shard needs it as received.
        message.content = RecordDict({key: self._as_it_came(key, record) for key, record in self.content.items()})
        started = time.perf_counter()
        seed_generators(self.plan.seed, self.plan.round, shard)
        with watching_files() if self.plan.arrays_key else nullcontext() as files:
            reply = self.call_next(message, context)
        if files is not None and files.rewritten:
            self.kept_file = files.rewritten[0]
        self.seconds.append(time.perf_counter() - started)
        self.stateful |= bool(context.state)
        _put_state(self.context.state, shard, context.state, own=own)
        return reply, node_config.was_read

    def _call_privately(self, shard: int, node_config: RecordingConfig, privacy: DPSGD) -> Message:
        """Call the function under private training, where it is handed nothing that its noise is not bound to."""
        plan, (holders, earlier) = self.plan, self.plan.releases[shard]
        reply_as = json.dumps([plan.arrays_key, plan.weight_key])
        asked = Asked(privacy, plan.run, plan.round, shard, self.worker, holders, earlier, plan.seed, reply_as)

        def records() -> RecordDict:
            seed_generators(plan.seed, plan.round, shard)
            return RecordDict({key: self._as_it_came(key, record) for key, record in self.content.items()})

        context = Context(0, 0, node_config, RecordDict(), self.context.run_config)
        started = time.perf_counter()
        reply = call_privately(self.call_next, self.message, context, asked, records=records)
        self.seconds.append(time.perf_counter() - started)
        return reply

    def _as_it_came(self, key: str, record: Any) -> Any:
        """Returns a copy of a record as received.

        Copying many arrays takes time, so all shards share one copy of an ArrayRecord until a call changes it.
        """
        if not isinstance(record, ArrayRecord):
            values = {name: list(value) if isinstance(value, list) else value for name, value in record.items()}
            return type(record)(values)
        arrays = self.arrays.setdefault(key, dict(record))
        mine = self.given.get(key)
        if mine is None or [*map(id, mine.values())] != [*map(id, arrays.values())] or [*mine] != [*arrays]:
            mine = self.given[key] = ArrayRecord(arrays)
        return mine

    def _answer(self, outcome: str, shards: tuple[int, ...] = (), returned: RecordDict | None = None) -> Message:
        encoder, coded = self.encoder, outcome == "coded"
        reply = Reply(
            run=self.plan.run,
            round=self.plan.round,
            kind=self.plan.kind,
            worker=self.worker,
            outcome=outcome,
            shards=shards,
            layout=encoder.layout or () if coded else (),
            metrics_layout=encoder.metrics_layout or () if coded else (),
            arrays_name=encoder.names[0],
            metrics_name=encoder.names[1],
            figures=tuple(encoder.figures) if coded else (),
            seconds=tuple(self.seconds),
            stateful=self.stateful,
            kept_file=self.kept_file,
            fixed_data=self.fixed_data,
            spent=tuple(encoder.spent) if coded else (),
            environment=encoder.environment if coded else "",
            holds=told_by(self.context.node_config) if self.plan.open else (),
        )
        records = {UPDATE: encoder.record()} if coded else {}
        content = RecordDict({**(returned or {}), **reply.content(**records)})
        return Message(content, reply_to=self.message)


def _protected(result: TrainedShard, plan: Plan, privacy: Privacy | None) -> TrainedShard:
    """Returns the part of a result that may leave the node under the privacy promise.

    Training metrics reveal something about the data, so only the weight is kept. Under `CentralNoise`, the update is
    clipped, counters stay as they are, and each shard has the same, public weight.
    """
    if privacy is None:
        return result
    if isinstance(privacy, CentralNoise):
        refuse_statistics(name for name, _, _ in result.layout)
        for entries in counters_in(result.layout):
            result.update[entries] = 0  # they would get no noise, and could tell of the data
        clip(result.update, privacy.clipping_norm)
        return replace(result, metrics=MetricRecord({plan.weight_key: 1}))
    kept = {key: value for key, value in result.metrics.items() if key == plan.weight_key}
    return replace(result, metrics=MetricRecord(kept))


class _Encoder:
    """Computes the coded sum of the shards' results, which must all have the same layout.

    Args:
        plan: Plan of the phase.
        rounding: What rounding the model's arrays may change in an update of weight 1.

    Attributes:
        layout: Layout of the arrays; None before the first result.
        metrics_layout: Layout of the metrics; None before the first result.
        names: The user's names of the two records; empty before the first result.
        figures: If the plan asks for them, a few numbers for each shard, by which the server compares its holders.
        spent: With private training, the privacy spent on each shard.
        environment: With private training, what it was computed with.
    """

    def __init__(self, plan: Plan, rounding: float) -> None:
        self._plan, self._rounding = plan, rounding
        self._encoding = payload_encoding(plan.fraction_bits, plan.k)
        self.layout: Layout | None = None
        self.metrics_layout: MetricsLayout | None = None
        self.names = ("", "")
        self.figures: list[tuple[float, ...]] = []
        self.spent: list[tuple[int, str, float, float]] = []
        self.environment = ""
        self._update: NDArray[Any] | None = None
        self._metrics: NDArray[Any] | None = None

    def add(self, result: TrainedShard, coefficients: tuple[float, ...]) -> None:
        """Add one shard's weighted update, weight and weighted metrics; the update may be overwritten.

        Raises:
            ValueError: The layout differs from that of the shards before.
            Overflow: The update or a metric does not fit the fixed point.
        """
        if result.spent is not None:
            spent = result.spent
            self.spent.append((result.shard, spent.context, spent.epsilon, spent.total_epsilon))
            self.environment = spent.environment
        metrics_layout, metrics = flatten_metrics(result.metrics, self._plan.weight_key)
        self._check_layout(result, metrics_layout)
        figures: tuple[float, ...] | None = None
        if self._plan.arrays_key:
            update = result.update
            update *= update.dtype.type(metrics[0])
            self._update, figures = self._encoding.add_update(
                self._update,
                update,
                coefficients,
                describe=self._plan.figures,
                rounding=float(metrics[0]) * self._rounding,
            )
        # All metrics go into the first of the m blocks, because there are few of them. In several blocks the weight
        # would share an entry with a metric, which may be NaN or differ between holders (seconds, for example).
        self._metrics = self._encoding.add_metrics(self._metrics, metrics, coefficients[:1])
        if self._plan.figures:
            self.figures.append(self._encoding.with_metrics(figures, metrics))

    def _check_layout(self, result: TrainedShard, metrics_layout: MetricsLayout) -> None:
        if self.layout is None or self.metrics_layout is None:
            self.layout, self.metrics_layout, self.names = result.layout, metrics_layout, result.names
            return
        other = "those of the shards before it"
        wrong = difference_between(result.layout, metrics_layout, self.layout, self.metrics_layout, other)
        if wrong:
            raise ValueError(wrong)
        if not metrics_layout[0][2]:  # one fractional weight makes the sum of weights fractional
            self.metrics_layout = metrics_layout

    def record(self) -> ArrayRecord:
        """Returns the coded vectors as they are sent."""
        assert self._metrics is not None
        arrays = {METRICS: as_array(self._encoding.sent(self._metrics))}
        if self._update is not None:
            arrays[ARRAYS] = as_array(self._encoding.sent(self._update))
        return ArrayRecord(arrays)


def _worker_of(context: Context) -> int:
    value = context.node_config.get(PARTITION_ID)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnsuitableApp(
            f"This node's partition-id is {value!r}; it must be its worker number. Start the SuperNode with "
            '--node-config "partition-id=0 num-partitions=..." (the simulation sets it).'
        )
    if not 0 <= value < MOST_WORKERS:
        raise UnsuitableApp(
            f"This node's partition-id is {value}; workers have numbers from 0 to {MOST_WORKERS - 1}. Give it its own."
        )
    return value


def _take_state(state: RecordDict, shard: int, *, own: bool) -> RecordDict:
    """Returns what the app has kept for a shard. The node's own shard has the names that the app gave."""
    prefix = f"{_STATE}.{shard}."
    if own:
        return RecordDict({key: record for key, record in state.items() if not key.startswith(f"{_STATE}.")})
    return RecordDict({key[len(prefix) :]: record for key, record in state.items() if key.startswith(prefix)})


def _put_state(state: RecordDict, shard: int, kept: RecordDict, *, own: bool) -> None:
    prefix = "" if own else f"{_STATE}.{shard}."
    for key in [key for key in state if (not key.startswith(f"{_STATE}.") if own else key.startswith(prefix))]:
        del state[key]
    for key, record in kept.items():
        state[prefix + key] = record
