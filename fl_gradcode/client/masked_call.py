"""The client half of a secure round: the node's own rules, the request digest, training, and the masked reply.

What depends on data never shows per node. A shard whose training fails poisons its class, so that the reply has the
same form as any other, and the reason is in the node's log. In clear a node refuses only by its owner's files and its
ledger. `train()` is handed what the request digest binds, and constants.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from .._files import absolute_path, replace_file
from .._flower_internals import message_of_nobody
from .._seeding import seed_generators
from ..enrolment import ALLOW_LIST, EnrolledNode, allow_list, is_enrolled
from ..errors import FlGradcodeError, InvalidSetting, NotCertified, PrivacyRefused, SecureRefused, ShardMismatch
from ..placement import checked_path
from ..privacy import DPSGD, FOLDER, check_own, read_keys
from ..protocol import (
    MASKED,
    NUM_PARTITIONS,
    PARTITION_ID,
    UPDATE,
    Plan,
    Reply,
    as_array,
    flatten_metrics,
)
from ..secagg import (
    AnsweredRequests,
    ClassIntegers,
    ClassKeys,
    Entry,
    Manifest,
    ManifestBody,
    Received,
    ShardResult,
    check_data,
    class_keys,
    content_digest,
    exact_text,
    given_digest,
    masked_reply,
    read_manifest,
    request_digest,
    seeds_of,
)
from .environment import environment_words, versions_of
from .held_shards import SECAGG_DIR, SHARDS, SHARDS_DIR, held_by
from .masked_privacy import MaskedPrivacy
from .recording_config import RecordingConfig
from .rehearsal import ComparedHolders
from .trained_shard import read_reply

__all__ = ["allowed_by", "check_body", "masked_answer", "refusing"]

#: Keys of the node config: the owner's own requirements.
COLLUDERS, MIN_CLASSES, MAX_REQUESTS = "secagg-colluders", "secagg-min-classes", "secagg-max-requests"
MAX_UNCONFIRMED = "secagg-max-unconfirmed"
#: Key of the node config: further keys of it that the app may read, with commas between.
APP_CONFIG = "secagg-app-config"

#: Fields of a plan that are not bound: they are taken from the manifest, or ignored.
_NOT_BOUND = ("rows", "digests", "releases", "give_up_after", "tags", "tagged")
_ANSWERED, _CERTIFIED = "answered", "secagg-certified"
_OURS = "fl-gradcode."
_LONGEST_RUN = 1000  # letters of a run's name

_log = logging.getLogger(__name__)

_Call = Callable[[Message, Context], Message]


@contextmanager
def refusing() -> Iterator[None]:
    """Turn whatever is raised inside into a refusal whose text depends on no data; the reason is logged."""
    try:
        yield
    except FlGradcodeError:
        raise
    except Exception as error:
        _log.error("The node could not answer a request of secure aggregation", exc_info=error)
        raise SecureRefused(f"The node could not answer ({type(error).__name__}); the reason is in its log.") from None


def masked_answer(
    message: Message, context: Context, call_next: _Call, *, folder: Path, worker: int, simulated: bool
) -> Message:
    """Returns the masked reply to a message, or the bytes that were kept if it was answered before.

    Args:
        message: The message.
        context: The node's context.
        call_next: The app's function.
        folder: The node's own folder, with keys, manifest, digest and ledger.
        worker: Number of the worker.
        simulated: Whether the folder is on the server's machine.

    Raises:
        SecureRefused: The rules of the node's owner, its files or its ledger forbid the answer.
        InvalidSetting: A setting or a file of the node cannot be used.
    """
    plan = Plan.find_in(message.content) if message.has_content() else None
    if plan is None or not plan.secure:
        raise SecureRefused(f"This node has a {SECAGG_DIR} and answers nothing unmasked; the message asks for that.")
    owner = context.node_config
    keys = _keys_in(folder, worker, owner, plan.run)
    body = keys.manifest.body
    if plan.secure != keys.manifest.digest.hex():
        raise SecureRefused("The server has another manifest than this node has pinned.")
    holders = ComparedHolders(folder, keys, plan.run, _number(owner, MAX_UNCONFIRMED))
    if plan.kind == "compare":
        holders.compare(plan.tags)
        told = Reply(run=plan.run, round=plan.round, kind=plan.kind, worker=worker, outcome="idle")
        return Message(told.content(), reply_to=message)
    pairs = _asked(plan, body, worker, message.metadata.message_type)
    size = 4 * sum(length // body.classes.m for length in body.lengths(plan.kind).values())
    answered = AnsweredRequests(folder / _ANSWERED, most=_number(owner, MAX_REQUESTS))
    if body.always and plan.tagged:  # the vector that was computed before, now that holders have shown their tags
        request, tags = holders.agreed(plan.label, plan.tags, plan.tagged)
        payload = answered.reply_to(plan.run, plan.kind, plan.round, request)
        if payload is None or payload[size:] != tags:  # two processes may have computed it
            raise SecureRefused(f"This node has no answer to {plan.label} of which it is shown the tags.")
        return _masked(message, plan, keys, request, payload[:size], tags, simulated=simulated)
    private = MaskedPrivacy(plan, body, message, context, _number(owner, COLLUDERS))
    if plan.kind != "rehearse":
        holders.check(plan.tags, plan.tagged)
    number = pairs[0][0] if body.classes.sending == "shardwise" and plan.kind != "rehearse" else None
    _check_shards(keys, pairs, owner)
    content = _in_order(Plan.remove_from(message.content))
    run_config = {key: value for key, value in context.run_config.items() if key not in (FOLDER, SECAGG_DIR)}
    request = request_digest(
        manifest=keys.manifest.digest,
        run=plan.run,
        kind=plan.kind,
        round=plan.round,
        content=content_digest(_received(plan, message.metadata.message_type, content)),
        given=given_digest(seed=plan.seed, run_config=run_config, k=plan.k),
        quantiser=body.quantiser.digest,
        layout=body.result(plan.kind).digest,
    )
    counted = plan.number if plan.kind == "rehearse" else plan.round  # a rehearsal may be repeated in a round
    payload = answered.reply_to(plan.run, plan.kind, counted, request, number)
    if payload is None:
        numbers = body.classes.sent_by(worker) if number is None else (number,)
        integers = {c: ClassIntegers(body, c, keys.seeds[c], request, plan.kind) for c in numbers}
        if plan.kind == "train":  # a rehearsal sends no vector
            held = held_by(owner) if owner.get(SHARDS_DIR) else None
            private.charge(folder, request, pairs, held or {})
        readable = {**_for_app(owner), **private.node_config}
        called = _AppCall(plan, content, message.metadata.message_type, body, readable, run_config, call_next, private)
        for c, shard in pairs:
            result = called.of(shard)
            with np.errstate(all="ignore"):  # the app may have set it to raise, and a refusal would depend on its data
                integers[c].add(shard, result)
        with np.errstate(all="ignore"):
            parts = {c: one.parts() for c, one in integers.items()}
        if plan.kind == "rehearse":
            payload = holders.rehearsed(request, parts)
        else:
            tags = holders.note(plan.label, request, parts)
            payload = masked_reply(keys, request, parts, plan.kind).payload() + tags
        payload = answered.keep(plan.run, plan.kind, counted, request, payload, number)
    if plan.kind == "rehearse":  # its tags are all that leaves
        size = len(payload)
    vector = None if body.always else payload[:size]  # the tags are kept behind the words
    return _masked(message, plan, keys, request, vector, payload[size:], simulated=simulated)


def _masked(
    message: Message,
    plan: Plan,
    keys: ClassKeys,
    request: bytes,
    vector: bytes | None,
    tags: bytes,
    *,
    simulated: bool,
) -> Message:
    """Returns a masked reply, with its words, or with tags alone if it is kept back until holders have compared."""
    reply = Reply(
        run=plan.run,
        round=plan.round,
        kind=plan.kind,
        worker=keys.worker,
        outcome="masked",
        shards=plan.rows[keys.worker].shards,
        manifest=keys.manifest.digest.hex(),
        request=request.hex(),
        simulated=simulated,
        tags=tags.hex(),
    )
    if vector is None:
        return Message(reply.content(), reply_to=message)
    words = as_array(np.frombuffer(vector, "<u4"))
    return Message(reply.content(**{UPDATE: ArrayRecord({MASKED: words})}), reply_to=message)


# What the owner's files say


def _keys_in(folder: Path, worker: int, owner: Mapping[str, Any], run: str) -> ClassKeys:
    """Returns the keys of this node for a run, after checking all that its owner requires.

    Raises:
        SecureRefused: The manifest, its graph, the data or the environment are not what they must be.
        InvalidSetting: A file cannot be read.
    """
    if is_enrolled(folder):
        manifest, seeds = EnrolledNode(folder, worker, allowed_by(owner)).keys_of(run)
    else:
        manifest, seeds = _dealt(folder, worker, owner)
    body = manifest.body
    check_body(folder, body, owner)
    keys = class_keys(manifest, worker, seeds)
    held = held_by(owner) if owner.get(SHARDS_DIR) else None
    check_data(manifest, seeds, held or {})
    return keys


def _dealt(folder: Path, worker: int, owner: Mapping[str, Any]) -> tuple[Manifest, dict[int, bytes]]:
    """Returns the manifest and the seeds that a dealer has made."""
    if owner.get(ALLOW_LIST):
        raise SecureRefused(f"This node's owner has a {ALLOW_LIST}, and a dealer made its keys: no identity is behind.")
    own = read_keys(folder)
    if own.worker != worker:
        raise SecureRefused(f"This node is worker {worker}, and its {SECAGG_DIR} has the keys of worker {own.worker}.")
    manifest = read_manifest(folder)
    return manifest, seeds_of(own, manifest.body.classes)


def allowed_by(owner: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns the allow-list that a node config names, or None."""
    path = owner.get(ALLOW_LIST)
    return allow_list(absolute_path(str(path), ALLOW_LIST)) if path else None


def check_body(folder: Path, body: ManifestBody, owner: Mapping[str, Any]) -> None:
    """Check that this node can mask by a body, and that it protects as the node's owner requires.

    Raises:
        SecureRefused: The body, its graph, or the versions and the environment that it pins are not what they must be.
    """
    if is_enrolled(folder) and body.first_use:
        raise SecureRefused(f"The manifest cannot be used without an allow-list: {body.first_use}.")
    if body.app or (body.identities and not is_enrolled(folder)):
        raise SecureRefused("The manifest asks for what this version cannot do: see fl_gradcode.secagg.")
    _certify(folder, body, body.digest, _number(owner, COLLUDERS), _number(owner, MIN_CLASSES))
    here = versions_of(name for name, _ in body.versions)
    for name, wanted in body.versions:
        if here[name] != wanted:
            raise SecureRefused(f"The manifest pins {name} {wanted}, and this node has {here[name] or 'none'}.")
    missing = sorted({*body.environment} - {*environment_words()})
    if missing:
        raise SecureRefused(f"The manifest pins the environment {missing[0]!r}, which is not this node's.")


def _check_shards(keys: ClassKeys, pairs: list[tuple[int, int]], owner: Mapping[str, Any]) -> None:
    """Check the files of the shards that are asked for against the node's own manifest of its data.

    Raises:
        SecureRefused: A file was changed.
    """
    for _, shard in pairs if owner.get(SHARDS_DIR) else ():
        try:
            checked_path(absolute_path(str(owner[SHARDS_DIR]), SHARDS_DIR), shard)
        except ShardMismatch as error:
            _log.error("%s", error)
            raise SecureRefused(f"The data of shard {shard} are not those of this node's {SHARDS_DIR}.") from None


def _certify(folder: Path, body: ManifestBody, digest: bytes, colluders: int | None, min_classes: int | None) -> None:
    """Certify the graph once for each manifest and requirement: a node starts a process for each message."""
    by = versions_of(["fl-gradcode"])["fl-gradcode"]  # another version may know better
    line, path = f"{digest.hex()} {colluders} {min_classes} {by}", folder / _CERTIFIED
    try:
        check_own(path)
        if path.read_text() == line:
            return
    except FileNotFoundError:
        pass
    try:
        body.certificate(colluders=colluders, min_classes=min_classes)
    except NotCertified as error:
        raise SecureRefused(f"The manifest does not protect as this node's owner requires: {error}") from None
    replace_file(path, line, mode=0o600)


def _number(owner: Mapping[str, Any], key: str) -> int | None:
    value = owner.get(key)
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise InvalidSetting(f"{key}={value!r} of the node config must be a whole number of at least 0.")
    return value


def _for_app(owner: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the app may read of the node config: where its shards are, and what the owner lists."""
    listed = [key.strip() for key in str(owner.get(APP_CONFIG, "")).split(",") if key.strip()]
    return {key: owner[key] for key in (SHARDS_DIR, SHARDS, *listed) if key in owner}


# What the message says


def _asked(plan: Plan, body: ManifestBody, worker: int, message_type: str) -> list[tuple[int, int]]:
    """Returns the (class, shard) pairs that a plan asks for: the whole row of the worker, or one class of it.

    Raises:
        SecureRefused: It asks for anything else. The text depends on the message alone.
    """
    if type(plan.round) is not int or plan.round < 0 or type(plan.run) is not str or type(plan.seed) is not int:
        raise SecureRefused("The plan's run, round and seed must be a text and whole numbers.")
    if len(plan.run) > _LONGEST_RUN:  # it stays in the ledger of answered requests
        raise SecureRefused(f"The run's name has {len(plan.run)} letters; {_LONGEST_RUN} are the most.")
    body.result(plan.kind)
    if plan.kind == "rehearse" and not body.rehearsal:
        raise SecureRefused("The manifest has no rehearsal.")
    if type(plan.number) is not int or (plan.number > 0) != (plan.kind == "rehearse"):
        raise SecureRefused("A rehearsal has a number, a whole one from 1 on, and nothing else has.")
    type_of = {"train": "train", "rehearse": "train", "evaluate": "evaluate"}
    if message_type.split(".")[0] != type_of[plan.kind] or (plan.kind != "evaluate") != bool(plan.arrays_key):
        raise SecureRefused(f"The plan says {plan.kind!r}, and the message does not.")
    if (plan.n, plan.k, plan.weight_key) != (body.classes.n, body.classes.k, body.weight_key):
        raise SecureRefused("The plan has other workers, shards or weights than the manifest.")
    if plan.open or plan.as_returned or plan.figures:
        raise SecureRefused("The plan asks for what secure aggregation does not combine with.")
    asked = plan.rows[worker].shards if worker in plan.rows else ()
    pairs = _turns(body, worker)
    if body.classes.sending == "shardwise" and plan.kind != "rehearse":
        pairs = [(c, shard) for c, shard in pairs if asked == (shard,)]
        if not pairs:
            raise SecureRefused(f"Worker {worker} is not asked for one of its shards.")
    elif sorted(asked) != sorted(shard for _, shard in pairs):
        raise SecureRefused(f"Worker {worker} is not asked for its whole classes.")
    return pairs


def _turns(body: ManifestBody, worker: int) -> list[tuple[int, int]]:
    """Returns the (class, shard) pairs of a worker's row, in the order in which it works on them.

    Holders begin with different shards, so that what an app keeps between shards makes their updates differ.
    """
    pairs = [(c, j) for c in body.classes.sent_by(worker) for j in body.classes.members[c]]
    start = worker % len(pairs) if pairs else 0
    return [*pairs[start:], *pairs[:start]]


def _in_order(content: RecordDict) -> RecordDict:
    """Returns records, and the entries of all but arrays, in the order of their names, as `train()` gets them.

    Flower's messages need not keep it, and whatever `train()` sees must be the same for all holders.

    Raises:
        SecureRefused: A record has a name of this library's.
    """
    ordered: dict[str, Any] = {}
    for name, record in sorted(content.items()):
        if name.startswith(_OURS):
            raise SecureRefused(f"The message has a record {name!r} besides its plan.")
        kind: Any = type(record)
        ordered[name] = record if isinstance(record, ArrayRecord) else kind(dict(sorted(record.items())))
    return RecordDict(ordered)


def _received(plan: Plan, message_type: str, content: RecordDict) -> list[Received]:
    """Returns all that `train()` and its result depend on of a message, for the request digest."""
    bound = {name: value for name, value in sorted(vars(plan).items()) if name not in _NOT_BOUND}
    told = [Entry(name, "plan", (), json.dumps(value).encode()) for name, value in bound.items()]
    found = [Received("Plan", "", [Entry("message-type", "str", (), message_type.encode()), *told])]
    for name, record in content.items():
        entries = [_entry(key, value) for key, value in record.items()]
        found.append(Received(type(record).__name__, name, entries))
    return found


def _entry(key: str, value: Any) -> Entry:
    if isinstance(value, Array):
        return Entry(key, f"{value.dtype}/{value.stype}", tuple(value.shape), value.data)
    if isinstance(value, list):
        kinds, texts = [type(one).__name__ for one in value], [_text(one) for one in value]
        return Entry(key, "list", (len(value),), json.dumps([kinds, texts]).encode())
    return Entry(key, type(value).__name__, (), _text(value).encode())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return exact_text(value)
    return value.hex() if isinstance(value, bytes) else str(value)


# Training and evaluation


class _AppCall:
    """Calls the app's function shard by shard; whatever goes wrong with a shard makes its result None."""

    def __init__(
        self,
        plan: Plan,
        content: RecordDict,
        message_type: str,
        body: ManifestBody,
        node_config: Mapping[str, Any],
        run_config: Mapping[str, Any],
        call_next: _Call,
        private: MaskedPrivacy,
    ) -> None:
        self._plan, self._content, self._type, self._body = plan, content, message_type, body
        self._private = private
        self._node_config, self._run_config, self._call_next = node_config, run_config, call_next

    def of(self, shard: int) -> ShardResult | None:
        """Returns the result of a shard, or None if the function failed; the log has the reason."""
        try:
            return self._result(shard)
        except KeyboardInterrupt:  # the node's owner
            raise
        except (PrivacyRefused, InvalidSetting) as error:
            if isinstance(self._private.privacy, DPSGD):  # by the owner's files and the ledger, before a record is used
                raise
            self._note_failed(shard, error)
            return None
        except BaseException as error:  # sys.exit() for one shard would tell the server of its data otherwise
            self._note_failed(shard, error)
            return None

    def _note_failed(self, shard: int, error: BaseException) -> None:
        """Log that a shard failed, and what follows."""
        follows = "so does the round. The server learns how many shards failed"
        if self._private.covers_failures:
            follows = "counts as a zero update with noise. Nobody else learns of it"
        _log.error("Shard %d, %s: this shard failed, and %s.", shard, self._plan.label, follows, exc_info=error)

    def _result(self, shard: int) -> ShardResult:
        plan, wanted = self._plan, self._body.result(self._plan.kind)
        config = RecordingConfig({**self._node_config, PARTITION_ID: shard, NUM_PARTITIONS: plan.k})
        context = Context(0, 0, config, RecordDict(), dict(sorted(self._run_config.items())))

        def given() -> RecordDict:
            seed_generators(plan.seed, plan.round, shard)
            return _copied(self._content)

        if isinstance(self._private.privacy, DPSGD):
            of_type = message_of_nobody(RecordDict(), self._type)
            reply = self._private.call(self._call_next, given, of_type, context, shard)
        else:
            reply = self._call_next(message_of_nobody(given(), self._type), context)
        if reply.has_error():
            raise ValueError(f"{plan.kind}() answered with an error: {reply.error.reason}")
        if context.state:
            raise ValueError(f"{plan.kind}() kept something in context.state, which other holders cannot know")
        before: dict[str, Array] | None = None
        if plan.kind != "evaluate":
            if not config.was_read and not plan.allow_fixed_data:
                raise ValueError("train() never read partition-id: which data does it use?")
            arrays = self._content[plan.arrays_key]
            if not isinstance(arrays, ArrayRecord):
                raise ValueError(f"the record {plan.arrays_key!r} holds no arrays")
            before = dict(arrays)
        content = RecordDict({**reply.content})
        del reply
        found = read_reply(content, plan, shard, before, self._private.privacy)
        if found.layout != wanted.arrays:
            raise ValueError(f"{plan.kind}() returned arrays {found.layout}; the manifest has {wanted.arrays}")
        kept = self._private.kept(found.metrics) if before is not None else found.metrics
        layout, metrics = flatten_metrics(kept, plan.weight_key)
        named = tuple((name, length) for name, length, _ in layout[1:])
        if named != wanted.metrics:
            raise ValueError(f"{plan.kind}() returned metrics {named}; the manifest has {wanted.metrics}")
        return ShardResult(found.update, float(metrics[0]), metrics[1:])


def _copied(content: RecordDict) -> RecordDict:
    """Returns a copy that the app may change without changing what the next shard gets."""
    copied: dict[str, Any] = {}
    for name, record in content.items():
        kind: Any = type(record)
        copied[name] = kind({key: list(one) if isinstance(one, list) else one for key, one in record.items()})
    return RecordDict(copied)
