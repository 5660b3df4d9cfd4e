"""What travels for privacy: what a shard's training is asked to promise, and what it says that it spent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict

from ..errors import InvalidSetting
from ..protocol import PARTITION_ID
from .settings import DPSGD, Privacy, privacy_from_json, privacy_to_json

__all__ = ["BUDGET", "FOLDER", "Asked", "Spent", "asked_of", "budget_of", "in_config", "max_delta_of", "trusts_server"]

#: Keys of the node config: the data owner's own limits, and whether the server is taken at its word.
BUDGET, MAX_DELTA, HONEST_SERVER = "max-epsilon", "max-delta", "honest-server"
#: Key of the node config, and of the run config where all nodes are on one machine: where keys and ledger are.
FOLDER = "privacy-dir"

#: Key of what is asked and of what was spent, in records of whatever name; ours to a shard has this name too.
_NAME = "fl-gradcode.privacy"


@dataclass(frozen=True)
class Asked:
    """What one shard's training is asked.

    Attributes:
        privacy: What the run promises.
        run, round, shard: Which.
        worker: Whose keys.
        holders: Of the shard.
        earlier: Ranges (first, last) of rounds in which its holders were asked before.
        seed: From which the server has generators seeded.

    Raises:
        InvalidSetting: Something is of another type: a shard 1.0 would find the key of shard 1 and another ledger.
    """

    privacy: Privacy
    run: str
    round: int
    shard: int
    worker: int
    holders: int = 1
    earlier: tuple[tuple[int, int], ...] = ()
    seed: int = 0

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
        """Into a shard's message."""
        values = {**vars(self), "privacy": privacy_to_json(self.privacy)}
        content[_NAME] = ConfigRecord({_NAME: json.dumps(values)})

    @property
    def earlier_rounds(self) -> Iterator[int]:
        """Each of them, one by one: the server may name any number."""
        return (number for first, last in self.earlier for number in range(first, last + 1))


@dataclass(frozen=True)
class Spent:
    """What one shard's training says.

    Attributes:
        shard, round: Which.
        context: Digest of what the key was bound to; the same for all holders.
        epsilon: Of this run, at `delta`.
        total_epsilon: Of all runs that this holder knows of.
        delta: The other half.
        weight: Of the update: public, and what the reply has to say.
    """

    shard: int
    round: int
    context: str
    epsilon: float
    total_epsilon: float
    delta: float
    weight: float = 0.0

    def to_record(self) -> ConfigRecord:
        """For the reply."""
        return ConfigRecord({_NAME: json.dumps(asdict(self))})

    @classmethod
    def find_in(cls, content: RecordDict) -> Spent | None:
        """That of a shard's reply, under whichever name; None if there is none.

        Raises:
            ValueError: It cannot be read.
        """
        for record in content.values():
            if isinstance(record, ConfigRecord) and _NAME in record:
                found = cls(**json.loads(str(record[_NAME])))
                if not (math.isfinite(found.epsilon) and math.isfinite(found.total_epsilon)):
                    raise ValueError("an epsilon that is not finite")
                return found
        return None


def in_config(privacy: Privacy) -> dict[str, Any]:
    """For a plain strategy's `train_config`, where no `GradientCoding` asks: `ConfigRecord(in_config(DPSGD(...)))`."""
    return {_NAME: privacy_to_json(privacy)}


def asked_of(message: Message, context: Context) -> Asked | None:
    """What this message asks of the shard that `context` names; None if it asks for no privacy.

    From the mod, which knows the round's plan; or from a plain strategy's config, where run and round are Flower's.

    Raises:
        InvalidSetting: It cannot be read, or lacks what a key is bound to.
    """
    record = message.content.get(_NAME)
    if isinstance(record, ConfigRecord):
        try:
            values = json.loads(str(record[_NAME]))
            values["privacy"] = privacy_from_json(values["privacy"])
            values["earlier"] = tuple((int(first), int(last)) for first, last in values["earlier"])
            return Asked(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, InvalidSetting):
                raise
            raise InvalidSetting(f"A request for privacy that cannot be read ({error}).") from None
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


def budget_of(context: Context) -> float:
    """The data owner's own limit, over all runs."""
    value = context.node_config.get(BUDGET, float("inf"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InvalidSetting(f"{BUDGET}={value!r} in the node config must be a number greater than 0.")
    return float(value)


def max_delta_of(context: Context) -> float:
    """The delta at which the data owner's limit is meant, if the server asks for a larger one."""
    value = context.node_config.get(MAX_DELTA, 1e-5)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InvalidSetting(f"{MAX_DELTA}={value!r} in the node config must be a number between 0 and 1.")
    return float(value)


def trusts_server(context: Context) -> bool:
    """Whether holders of a shard are believed to be sent the same; if not, each round counts once for each of them."""
    value = context.node_config.get(HONEST_SERVER, True)
    if not isinstance(value, bool):
        raise InvalidSetting(f"{HONEST_SERVER}={value!r} in the node config must be true or false.")
    return value


def asks_for_privacy(message: Message, context: Context) -> bool:
    """Whether `train()` has to train by `private_training`."""
    asked = asked_of(message, context)
    return asked is not None and isinstance(asked.privacy, DPSGD)
