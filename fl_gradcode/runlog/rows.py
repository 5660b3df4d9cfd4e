"""The rows of a ledger as typed values, and their JSON form.

The strategy builds a `RoundRow` for each round; everything that reads a ledger reads `RoundRow`s. In JSON the keys are
the field names in kebab-case. `docs/ledger.md` explains every field for users.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from ..errors import InvalidSetting
from .compact import MANY, SHORT_SCHEMA, expanded, shortened

__all__ = [
    "PHASES",
    "SCHEMA",
    "CodeLine",
    "FilledIn",
    "JobLine",
    "Late",
    "ModeLine",
    "Outcome",
    "PhaseKind",
    "PhaseRow",
    "PhaseSeconds",
    "PrivacyLine",
    "Rejected",
    "RoundRow",
    "SecureLine",
]

#: Version of the row format. A row with another version is refused.
SCHEMA = 1

PhaseKind = Literal["train", "evaluate"]
#: The two phases of a round, in their order.
PHASES: tuple[PhaseKind, ...] = ("train", "evaluate")

Outcome = Literal["exact", "approximate", "stale", "skipped", "raised"]

#: Metadata of a field that is left out of the JSON while it has its default.
_SOMETIMES = {"left out": True}
_LONGEST_VALUE = 60  # characters of a wrong value that an error shows


class _Line:
    """Base of all values in a row: conversion from and to JSON values."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Returns this value as JSON can hold it. A float that is not finite becomes None."""
        return {key: _encoded(value) for key, value in _items(self)}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Returns the value that `to_json` turned into `values`. Unknown keys are ignored.

        Raises:
            InvalidSetting: A field is missing, or its value makes no sense. The message names both.
        """
        kind: Any = cls
        try:
            return cast(Self, _decoder(kind)(values))
        except _Mismatch as error:
            raise InvalidSetting(error.sentence) from None


@dataclass(frozen=True, slots=True)
class CodeLine(_Line):
    """The code of a round.

    Attributes:
        name, n, k, s, m: As of the `GradientCode`.
        exact: False if the code promises estimates only.
    """

    name: str
    n: int
    k: int
    s: int
    m: int
    exact: bool = field(default=True, metadata=_SOMETIMES)

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < 1:
            raise InvalidSetting(
                f"This is no ledger row: code has n={self.n} workers and k={self.k} shards; both must be at least 1."
            )


@dataclass(frozen=True, slots=True)
class ModeLine(_Line):
    """How a round was run.

    Attributes:
        send: "coded" or "shards".
        patience: Patience before a second copy is handed out, with "shards"; else None.
        load: Largest number of shards in one message.
    """

    send: Literal["coded", "shards"]
    patience: float | None
    load: int


@dataclass(frozen=True, slots=True)
class Rejected(_Line):
    """A reply that does not count.

    Attributes:
        worker: Number of the worker; None if it was not known.
        node: Flower's node id.
        kind: Machine-readable kind of the rejection, such as "error" or "duplicate".
        reason: One sentence for people.
    """

    worker: int | None
    node: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Late(_Line):
    """A reply to an earlier phase that came in during this one.

    Attributes:
        worker: Number of the worker; None if it was not known.
        node: Flower's node id.
        from_: The phase that asked, such as "train 3".
        kind, reason: As of `Rejected`, if the reply was an error; else None.
        replica_disagreement: Relative difference to what another holder had sent; None if it was not compared.
    """

    worker: int | None
    node: str
    from_: str
    kind: str | None = field(default=None, metadata=_SOMETIMES)
    reason: str | None = field(default=None, metadata=_SOMETIMES)
    replica_disagreement: float | None = field(default=None, metadata=_SOMETIMES)

    @property
    def asked(self) -> tuple[str, int | None]:
        """The phase that asked: its kind and its round; the round is None if the label has none."""
        kind, _, number = self.from_.partition(" ")
        return kind, int(number) if number.isdecimal() else None


@dataclass(frozen=True, slots=True)
class JobLine(_Line):
    """How long one job took, or has taken so far.

    Attributes:
        worker: Number of the worker; None if it was not known.
        kind: Phase that asked, "train" or "evaluate".
        round: Round that asked; None if it is not known.
        shards: Number of shards of the job.
        seconds: Seconds from send to reply; of an owed reply, so far. None if that was not finite.
        computing: Seconds that the client spent on the shards by its own account; None if it gave none.
    """

    worker: int | None
    kind: str
    round: int | None
    shards: int
    seconds: float | None
    computing: float | None


@dataclass(frozen=True, slots=True)
class FilledIn(_Line):
    """Shards whose last known update stands in for a missing one.

    Attributes:
        shards: Numbers of the shards.
        round: The round that the update is from.
    """

    shards: tuple[int, ...]
    round: int


@dataclass(frozen=True, slots=True)
class PhaseSeconds(_Line):
    """Where the seconds of a phase went. None stands for a number that was not finite.

    Attributes:
        waiting: Seconds between the first message and the end of waiting, on the grid's clock.
        decoding: Seconds of decoding.
        aggregating: Seconds of the wrapped strategy's aggregation.
        verifying: Seconds of waiting after the replies sufficed, for second copies to compare.
    """

    waiting: float | None
    decoding: float | None
    aggregating: float | None = 0.0
    verifying: float | None = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyLine(_Line):
    """What a private run promises, and what it has spent so far on the shard with the highest spending.

    Attributes:
        unit: What is protected, "record" or "shard".
        noise: "shared", "independent" or "central".
        noise_multiplier, clipping_norm, delta, accountant: As set.
        sample_rate, steps: As set for DP-SGD; None with noise after decoding.
        epsilon: Epsilon spent so far in this run. None if it was not finite.
        epsilon_told, epsilon_told_all_runs: Largest epsilon that a client reported, of this run and of all its runs;
            None if no client reported any.
        other_requests: Shard -> two of its holders whose noise was derived from different requests.
    """

    unit: str
    noise: str
    noise_multiplier: float
    clipping_norm: float
    sample_rate: float | None
    steps: int | None
    delta: float
    accountant: str
    epsilon: float | None
    epsilon_told: float | None = None
    epsilon_told_all_runs: float | None = None
    other_requests: Mapping[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureLine(_Line):
    """How the replies of a phase were masked.

    Attributes:
        manifest: Digest of the manifest, as hexadecimal.
        request: Digest of the request whose replies were added up, as the nodes computed it; None if no sum was used.
        clipped: Number of clipped entries in all shards, or of clipped updates if their norm is limited; None if no sum
            was used.
        simulated: Whether a node said that its keys are on the server's machine, where masks protect nothing.
        setup: Who made the keys: "dealer", or the nodes themselves through the server, with identities by an
            "allow-list" or by "first-use".
        epoch: Number of the set-up in the run; None with a dealer.
    """

    manifest: str
    request: str | None = None
    clipped: int | None = None
    simulated: bool = False
    setup: str = "dealer"
    epoch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRow(_Line):
    """What happened in one phase of a round.

    A worker's number is None where the node had not said which worker it is. A float is None where it was not finite,
    or where the field's own description says so.

    Attributes:
        outcome: "exact", "approximate", "stale" (with updates of earlier rounds), "skipped" or "raised".
        ended: Why waiting ended: "decoded", "hopeless", "answered" or "timed out".
        workers: How many workers hold a sampled shard.
        shards: The sampled shards.
        asked: Workers in the order in which they were sent a message.
        held_back: Workers that still owed a reply when the phase began.
        never_sent: Those of them that owed it to the end.
        answered: Workers whose reply counts, in order of arrival.
        unread: Workers whose reply came in time and was not needed.
        used: Workers whose reply entered the sum.
        stragglers: Workers that hold a sampled shard and were not in time.
        rejected: Replies that do not count.
        late: Replies to earlier phases that came in meanwhile.
        rejected_left_out, late_left_out: How many more of them there were, in a row from a file that lacks them.
        lapsed: Workers whose owed reply was given up on.
        joined: Workers whose nodes came during the phase.
        restarted: Workers whose nodes were restarted while they owed a reply.
        decodable_after_replies, decodable_after_seconds: When the replies sufficed; None if they never did.
        decoding_error: Largest entry of `abs(a @ B - 1)`.
        kappa: Noise amplification; None if nothing was decoded.
        rounding_error: Relative error of the update from float rounding, at most; None if nothing was decoded, and over
            a prime field.
        coverage: Share of each sampled shard in the sum.
        quantisation_error: Largest error of an entry of the mean from fixed point; None unless over a prime field or
            under secure aggregation, where clipping comes on top.
        filled_in: Shards whose last known update stands in for a missing one.
        ages: Number of shards with an update of each age in rounds, from 0; empty without bounded staleness.
        replica_disagreement: Largest relative difference between two holders of a shard; None if no shard was received
            from two.
        compared: The shards that were received from two holders.
        model: Whether the wrapped strategy made a model of what was decoded; None unless training was decoded.
        privacy: What was promised and spent; None without privacy, and in evaluation.
        secure: How replies were masked; None without secure aggregation.
        timings: Jobs whose replies came in meanwhile, late ones too.
        owing: Jobs whose replies are not in yet.
        bytes_down, bytes_up: Payload sent, and payload of the replies that were read.
        seconds: Where the time went.
    """

    outcome: Outcome
    ended: str
    workers: int
    shards: tuple[int, ...]
    asked: tuple[int | None, ...]
    held_back: tuple[int | None, ...] = ()
    never_sent: tuple[int | None, ...] = ()
    answered: tuple[int, ...]
    unread: tuple[int | None, ...] = ()
    used: tuple[int, ...]
    stragglers: tuple[int, ...]
    rejected: tuple[Rejected, ...] = ()
    rejected_left_out: int = field(default=0, metadata=_SOMETIMES)
    late: tuple[Late, ...] = ()
    late_left_out: int = field(default=0, metadata=_SOMETIMES)
    lapsed: tuple[int | None, ...] = ()
    joined: tuple[int | None, ...] = ()
    restarted: tuple[int | None, ...] = ()
    decodable_after_replies: int | None = None
    decodable_after_seconds: float | None = None
    decoding_error: float | None
    kappa: float | None = None
    rounding_error: float | None = None
    coverage: tuple[float | None, ...]
    quantisation_error: float | None = None
    filled_in: tuple[FilledIn, ...] = ()
    ages: tuple[int, ...] = field(default=(), metadata=_SOMETIMES)
    replica_disagreement: float | None = None
    compared: tuple[int, ...] = ()
    model: bool | None = None
    privacy: PrivacyLine | None = None
    secure: SecureLine | None = field(default=None, metadata=_SOMETIMES)
    timings: tuple[JobLine, ...] = ()
    owing: tuple[JobLine, ...] = ()
    bytes_down: int
    bytes_up: int
    seconds: PhaseSeconds

    @property
    def in_time(self) -> set[int]:
        """Workers whose good reply was in before the phase ended."""
        return {i for i in (*self.answered, *self.unread, *self.used) if i is not None} - {*self.stragglers}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow(_Line):
    """What happened in one round.

    Attributes:
        run: Name of the run.
        flower_run_id: Flower's id of the run.
        round: Server round, from 1.
        ended_at: When the round ended, in seconds since the epoch; None while it is under way.
        resumed: Whether this is the first round after a resume.
        code: The code of the round.
        holders: Workers that hold each shard; None unless the code is new in this round.
        way: How the round was run; None if no node was asked.
        train, evaluate: The two phases; None if the wrapped strategy asked no node.
        ended_by: The exception that ended the run in this round; None if it went on.
    """

    run: str
    flower_run_id: str
    round: int
    ended_at: float | None = None
    resumed: bool = field(default=False, metadata=_SOMETIMES)
    code: CodeLine
    holders: tuple[tuple[int, ...], ...] | None = field(default=None, metadata=_SOMETIMES)
    way: ModeLine | None = field(default=None, metadata=_SOMETIMES)
    train: PhaseRow | None = None
    evaluate: PhaseRow | None = None
    ended_by: str | None = field(default=None, metadata=_SOMETIMES)

    @property
    def phases(self) -> tuple[PhaseRow, ...]:
        """The phases in which nodes were asked, training first."""
        return tuple(one for one in (self.train, self.evaluate) if one is not None)

    def phase(self, kind: PhaseKind) -> PhaseRow | None:
        """Returns one phase; None if no node was asked in it."""
        return self.train if kind == "train" else self.evaluate

    def to_json(self) -> dict[str, Any]:
        """Returns the row as a ledger file has it. A float that is not finite becomes None.

        A row of more than 200 workers or shards is in the short form of `compact`.
        """
        values = {"schema": SCHEMA, **{key: _encoded(value) for key, value in _items(self)}}
        return shortened(values) if max(self.code.n, self.code.k) > MANY else values

    @classmethod
    def from_json(cls, values: object) -> RoundRow:
        """Returns the row that `to_json` turned into `values`. Unknown keys are ignored.

        Raises:
            InvalidSetting: The values are no row of this schema. The message names the field and its value.
        """
        schema = values.get("schema") if isinstance(values, dict) else None
        if type(schema) is int and schema not in (SCHEMA, SHORT_SCHEMA):
            raise InvalidSetting(
                f"This ledger row has schema {schema}; this version of fl-gradcode reads schemas {SCHEMA} and "
                f"{SHORT_SCHEMA}. Read the ledger with the version that wrote it."
            )
        if isinstance(values, dict) and schema == SHORT_SCHEMA:
            try:
                values = expanded(values)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise InvalidSetting(f"This is no ledger row: its short form cannot be read ({error}).") from None
        if isinstance(values, dict) and schema is None:
            raise InvalidSetting("This is no ledger row: it has no field 'schema'.")
        if isinstance(values, dict) and type(schema) is not int:
            raise InvalidSetting(f"This is no ledger row: schema is {_shown(schema)} and must be {SCHEMA}.")
        return super(RoundRow, cls).from_json(values)


# Conversion. Each type of a field is turned into one function once, since a row of many workers holds many values.


class _Mismatch(Exception):
    """A value that does not fit the type of its field.

    Args:
        what: What is wrong with it.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what, self.path = what, ""

    @property
    def sentence(self) -> str:
        """Returns the error as one sentence."""
        return f"This is no ledger row: {self.path.removeprefix('.') or 'it'} {self.what}."


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _must_be(what: str, value: object) -> _Mismatch:
    return _Mismatch(f"is {_shown(value)} and must be {what}")


@cache
def _keys(cls: Any) -> tuple[tuple[str, str, object], ...]:
    """Returns (field name, JSON key, value with which it is left out) of each field of a class."""
    return tuple(
        (one.name, one.name.rstrip("_").replace("_", "-"), one.default if one.metadata == _SOMETIMES else MISSING)
        for one in fields(cls)
    )


def _items(line: _Line) -> Iterator[tuple[str, Any]]:
    kind: Any = type(line)
    for name, key, left_out in _keys(kind):
        value = getattr(line, name)
        if left_out is MISSING or value != left_out:
            yield key, value


def _encoded(value: Any) -> Any:
    """Returns a field's value as JSON can hold it."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_encoded(one) for one in value]
    if isinstance(value, _Line):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _encoded(one) for key, one in value.items()}
    return operator.index(value)  # a whole number of NumPy


_Decoder = Callable[[Any], Any]


@cache
def _decoder(hint: Any) -> _Decoder:
    """Returns the function that turns a JSON value into a value of this type, or raises _Mismatch."""
    if isinstance(hint, type) and is_dataclass(hint):
        return _line_decoder(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (one,) = (_decoder(part) for part in arguments if part is not NoneType)
        return lambda value: None if value is None else one(value)
    if origin is Literal:
        return lambda value: _one_of(arguments, value)
    if origin is tuple and arguments[-1] is ...:
        return _list_decoder(_decoder(arguments[0]), None)
    if origin is tuple:
        return _list_decoder(_decoder(arguments[0]), len(arguments))
    if origin is Mapping:
        return _mapping_decoder(_decoder(arguments[1]))
    raise AssertionError(hint)


def _line_decoder(cls: type) -> _Decoder:
    hints = get_type_hints(cls)
    needed = {one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING}
    parts = [(name, key, _decoder(hints[name]), name in needed) for name, key, _ in _keys(cls)]

    def decode(values: Any) -> Any:
        if not isinstance(values, dict):
            raise _must_be("an object", values)
        made: dict[str, Any] = {}
        key = ""
        try:
            for name, key, decode_field, is_needed in parts:
                if key in values:
                    made[name] = decode_field(values[key])
                elif is_needed:
                    raise _Mismatch("is missing")
        except _Mismatch as error:
            error.path = f".{key}{error.path}"
            raise
        return cls(**made)

    return decode


def _list_decoder(decode_one: _Decoder, length: int | None) -> _Decoder:
    def decode(values: Any) -> Any:
        if not isinstance(values, list | tuple):
            raise _must_be("a list", values)
        if length is not None and len(values) != length:
            raise _must_be(f"a list of {length}", values)
        made: list[Any] = []
        try:
            for value in values:
                made.append(decode_one(value))
        except _Mismatch as error:
            error.path = f"[{len(made)}]{error.path}"
            raise
        return tuple(made)

    return decode


def _mapping_decoder(decode_one: _Decoder) -> _Decoder:
    def decode(values: Any) -> Any:
        if not isinstance(values, dict):
            raise _must_be("an object", values)
        made: dict[int, Any] = {}
        for key, value in values.items():
            try:
                made[int(key)] = decode_one(value)
            except ValueError:
                raise _must_be("an object with whole numbers as keys", values) from None
            except _Mismatch as error:
                error.path = f"[{key}]{error.path}"
                raise
        return made

    return decode


def _one_of(known: tuple[object, ...], value: Any) -> Any:
    if value not in known:
        raise _must_be(f"one of {', '.join(map(str, known))}", value)
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise _must_be("a whole number", value)
    return value


def _number(value: Any) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and -1e300 < value < 1e300:
        return float(value)
    raise _must_be("a finite number", value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _must_be("a text", value)
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _must_be("true or false", value)
    return value


_PLAIN: dict[Any, _Decoder] = {int: _whole, float: _number, str: _text, bool: _truth}
