"""Records about privacy in messages: what a shard's training is asked to promise, and what it reports as spent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict

from .._flower_internals import in_a_simulation
from .._text import printable
from ..errors import InvalidSetting, PrivacyRefused
from ..protocol import PARTITION_ID
from .settings import DPSGD, Privacy, privacy_from_json, privacy_to_json

__all__ = [
    "BUDGET",
    "FOLDER",
    "PRIVACY_KEYS",
    "Asked",
    "Spent",
    "asked_of",
    "budget_of",
    "common_folder",
    "giving",
    "in_config",
    "is_request",
    "max_delta_of",
    "refuse_mode",
    "trusts_server",
]

#: Keys of the node config: the data owner's own limits, and whether the server is trusted to treat holders alike.
BUDGET, MAX_DELTA, HONEST_SERVER = "max-epsilon", "max-delta", "honest-server"
#: Key of the node config: which `grad_sample_mode` the owner allows; all by default.
MODES = "grad-sample-mode"
#: Key of the node config, and of the run config where all nodes are on one machine: folder with keys and ledger.
FOLDER = "privacy-dir"
#: Keys of the node config that private training reads.
PRIVACY_KEYS = (BUDGET, MAX_DELTA, HONEST_SERVER, MODES, FOLDER)

#: Key of both in a `ConfigRecord` of any name. The record that the mod adds to a shard's message has this name too.
_NAME = "fl-gradcode.privacy"


@dataclass(frozen=True)
class Asked:
    """What the training of one shard is asked to promise.

    Attributes:
        privacy: What the run promises.
        run: Name of the run.
        round: Server round.
        shard: Number of the shard.
        worker: Number of the worker whose keys are used.
        holders: Number of workers that hold the shard.
        earlier: Ranges (first, last) of earlier rounds in which holders of the shard were asked.
        seed: The run's seed, from which the mod seeds the generators.
        reply_as: Whatever else of the plan the reply depends on, as one text.
        folder: The run config's folder with keys and ledgers, where the app is not shown it.

    Raises:
        InvalidSetting: A value has another type: a shard 1.0 would find the key of shard 1 and the ledger of another.
    """

    privacy: Privacy
    run: str
    round: int
    shard: int
    worker: int
    holders: int = 1
    earlier: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    reply_as: str = ""
    folder: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.run, str):
            raise InvalidSetting(f"The run that is asked for is {self.run!r}; it must be a text.")
        for name, least in (("round", 0), ("shard", 0), ("worker", 0), ("holders", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InvalidSetting(
                    f"The {name} that is asked for is {value!r}; it must be a whole number >= {least}."
                )

    def add_to(self, content: RecordDict) -> None:
        """Add this to the content of a shard's message."""
        values = {**vars(self), "privacy": privacy_to_json(self.privacy)}
        content[_NAME] = ConfigRecord({_NAME: json.dumps(values)})

    @property
    def earlier_rounds(self) -> Iterator[int]:
        """The earlier rounds one by one; an iterator, since a server may name any number of them."""
        return (number for first, last in self.earlier for number in range(first, last + 1))


@dataclass(frozen=True)
class Spent:
    """What the training of one shard reports as spent.

    Attributes:
        shard: Number of the shard.
        round: Server round.
        context: Digest of what the key was bound to, in hex; the same for all holders. Empty with independent noise.
        epsilon: Spent in this run so far, at `delta`.
        total_epsilon: Spent in all runs that this holder knows of, at `delta`.
        delta: Probability that the bound on epsilon does not cover.
        weight: Weight of the update; public, and the reply has to state the same.
        environment: What it was computed with: kind of device, settings and versions, then threads.
    """

    shard: int
    round: int
    context: str
    epsilon: float
    total_epsilon: float
    delta: float
    weight: float = 0.0
    environment: str = ""

    def to_record(self) -> ConfigRecord:
        """Returns the record for the reply."""
        return ConfigRecord({_NAME: json.dumps(asdict(self))})

    @classmethod
    def find_in(cls, content: RecordDict) -> Spent | None:
        """Returns the report in a shard's reply, in a record of any name; None if there is none.

        Raises:
            ValueError: It cannot be read.
        """
        for record in content.values():
            if isinstance(record, ConfigRecord) and _NAME in record:
                try:
                    found = cls(**json.loads(str(record[_NAME])))
                except (TypeError, RecursionError) as error:
                    raise ValueError(f"a report that cannot be read ({type(error).__name__})") from None
                if not (math.isfinite(found.epsilon) and math.isfinite(found.total_epsilon)):
                    raise ValueError("an epsilon that is not finite")
                return found
        return None


def in_config(privacy: Privacy) -> dict[str, Any]:
    """Returns entries for the `train_config` of a plain strategy: `ConfigRecord(in_config(DPSGD(...)))`."""
    return {_NAME: privacy_to_json(privacy)}


def asked_of(message: Message, context: Context) -> Asked | None:
    """Returns what a message asks of the shard that `context` names; None if it asks for no privacy.

    The mod gives it beside the message. Without the mod it is in a record of its own, or in the config of a plain
    strategy; then run and round are Flower's.

    Raises:
        InvalidSetting: It cannot be read, or lacks what a key is bound to.
    """
    given = _given.get()
    if given is not None:
        return given
    record = message.content.get(_NAME)
    if isinstance(record, ConfigRecord):
        try:
            values = json.loads(str(record[_NAME]))
            values["privacy"] = privacy_from_json(values["privacy"])
            values["earlier"] = tuple((int(first), int(last)) for first, last in values["earlier"])
            return Asked(**values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, InvalidSetting):
                raise
            raise InvalidSetting(f"A request for privacy that cannot be read ({printable(str(error))}).") from None
    for config in message.content.values():
        if isinstance(config, ConfigRecord) and _NAME in config:
            server_round, shard = config.get("server-round"), context.node_config.get(PARTITION_ID)
            if not isinstance(server_round, int) or not isinstance(shard, int):
                raise InvalidSetting(
                    f"Private training needs a server-round in the message's config and a {PARTITION_ID} in the node "
                    f"config; they are {server_round!r} and {shard!r}."
                )
            earlier = ((1, server_round - 1),) if server_round > 1 else ()
            privacy = privacy_from_json(str(config[_NAME]))
            return Asked(privacy, f"flower-{context.run_id}", server_round, shard, shard, 1, earlier)
    return None


@contextmanager
def giving(asked: Asked) -> Iterator[None]:
    """Let `asked_of` return this in the block, whatever the message says."""
    token = _given.set(asked)
    try:
        yield
    finally:
        _given.reset(token)


_given: ContextVar[Asked | None] = ContextVar("fl-gradcode asked", default=None)


def refuse_mode(context: Context, mode: str) -> None:
    """Refuse a way to clip that the node's owner does not allow.

    Raises:
        PrivacyRefused: It is not among those in the node config.
    """
    allowed = str(context.node_config.get(MODES, mode)).replace(",", " ").split()
    if mode not in allowed:
        raise PrivacyRefused(
            f"This node allows {MODES}={' '.join(allowed)!r}, and the server asks for {mode!r}: say "
            f"DPSGD(grad_sample_mode={allowed[0] if allowed else 'hooks'!r})."
        )


def is_request(name: str) -> bool:
    """Returns whether a record is the request itself, whose content a key is bound to field by field."""
    return name == _NAME and _given.get() is None


def budget_of(context: Context) -> float:
    """Returns the data owner's own limit of epsilon over all runs; infinity if there is none."""
    value = context.node_config.get(BUDGET, float("inf"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InvalidSetting(f"{BUDGET}={value!r} in the node config must be a number greater than 0.")
    return float(value)


def max_delta_of(context: Context) -> float:
    """Returns the largest delta at which the data owner's limit is counted, whatever the server asks for."""
    value = context.node_config.get(MAX_DELTA, 1e-5)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InvalidSetting(f"{MAX_DELTA}={value!r} in the node config must be a number between 0 and 1.")
    return float(value)


def trusts_server(context: Context) -> bool:
    """Returns whether the server is trusted to send all holders of a shard the same; else a round counts for each."""
    value = context.node_config.get(HONEST_SERVER, True)
    if not isinstance(value, bool):
        raise InvalidSetting(f"{HONEST_SERVER}={value!r} in the node config must be true or false.")
    return value


def asks_for_privacy(message: Message, context: Context) -> bool:
    """Returns whether `train()` has to use `private_training` for this message."""
    asked = asked_of(message, context)
    return asked is not None and isinstance(asked.privacy, DPSGD)


def common_folder(context: Context) -> str:
    """Returns the folder of all nodes' folders that the run config names, in a simulation; "" if there is none.

    Raises:
        InvalidSetting: The node is on a machine of its own, and its node config names no folder: a server must not
            choose where a node reads and writes.
    """
    named = str(context.run_config.get(FOLDER) or "")
    if not named or in_a_simulation():
        return named
    if context.node_config.get(FOLDER) or BUDGET in context.node_config:  # with a budget, the owner's folder is needed
        return ""
    raise InvalidSetting(
        f"The run config has {FOLDER}, which only simulations use: a server does not choose where a node reads and "
        f"writes. Start the node with --node-config '... {FOLDER}=\"/path/to/node-0\"'."
    )
