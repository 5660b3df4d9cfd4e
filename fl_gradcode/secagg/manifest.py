"""The public manifest of a secure run: a body that the owners agree on, and the public keys of the classes.

The body is hashed as it is distributed. It holds texts, whole numbers and lists only, in one canonical JSON form, so
that a copy that was parsed and written again has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..codes import GradientCode, P
from ..errors import FlGradcodeError, InvalidSetting, SecureRefused
from ..masking import CHECK_WORDS, ENTRY_WORDS, KEY_BYTES, Quantiser, hash_of, ring_named
from ..privacy import IntegerNoise, Privacy
from .certificate import Certificate, certify, choose_graph
from .classes import Sending, ShardClasses, classes_for, classes_in
from .graph import ClassGraph, split_into_cohorts, vertex_order
from .keys import edge_key, private_key, public_key
from .noise import check_noise, noisy_quantiser, promised, why_not_private
from .request import layout_digest

__all__ = [
    "ClassKeys",
    "Manifest",
    "ManifestBody",
    "ResultLayout",
    "canonical",
    "class_keys",
    "make_body",
    "parsed",
    "read_body",
]

_PROTOCOL = "fl-gradcode/secagg/v1"
_LARGEST = 2**53
_LONGEST = 1 << 26

Item = str | int | list[Any]


def canonical(values: Mapping[str, Item]) -> bytes:
    """Returns an object as canonical JSON: sorted keys, no spaces, ASCII; texts, whole numbers and lists only.

    Raises:
        InvalidSetting: It holds anything else, such as a float, a truth value or a nested object.
    """
    for key, value in values.items():
        if not isinstance(key, str):
            raise InvalidSetting(f"The key {key!r} of a manifest must be a text.")
        _check_item(value)
    return json.dumps(dict(values), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _check_item(value: Any) -> None:
    if isinstance(value, list):
        for one in value:
            _check_item(one)
    elif not (isinstance(value, str) or (type(value) is int and abs(value) < _LARGEST)):
        raise InvalidSetting(f"A manifest holds texts, whole numbers below 2^53 and lists, not {value!r}.")


def parsed(text: bytes) -> dict[str, Any]:
    """Returns the object in canonical JSON.

    Raises:
        InvalidSetting: It is not canonical: written again it would have other bytes, and another digest.
    """
    if len(text) > _LONGEST:
        raise InvalidSetting(f"A manifest has {_LONGEST} bytes or fewer, not {len(text)}.")
    try:
        values = json.loads(text)
        again = canonical(values) if isinstance(values, dict) else b""
    except (ValueError, RecursionError):
        again = b""
    if again != text:
        raise InvalidSetting("The manifest is not canonical JSON. Use the file exactly as it was distributed.")
    found: dict[str, Any] = values
    return found


@dataclass(frozen=True)
class ResultLayout:
    """The layout of a shard's result.

    Attributes:
        weight_key: Name of the metric that is the weight of a shard.
        arrays: Name, dtype and shape of each array; none for an evaluation.
        metrics: Name and length of each metric, -1 for a single number; without the weight.
    """

    weight_key: str
    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]
    metrics: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Number of entries of an update, 0 for an evaluation."""
        return sum(math.prod(shape) for _, _, shape in self.arrays)

    @property
    def numbers(self) -> int:
        """Number of values in a shard's metrics vector, without weight and count of clipped entries."""
        return sum(1 if length < 0 else length for _, length in self.metrics)

    @property
    def digest(self) -> bytes:
        """Digest of the layout, which enters the request digest; 32 bytes."""
        return layout_digest(self.arrays, ((self.weight_key, -1), *self.metrics))


@dataclass(frozen=True, eq=False)
class ManifestBody:
    """What the owners of the nodes agree on.

    Attributes:
        classes: The classes of shards, their coefficients and holders.
        graph: The graph of masks.
        colluders: Number T of workers that may collude with the server.
        min_classes: Fewest classes in a sum.
        quantiser: How updates become integers.
        weight_key: Name of the metric that is the weight of a shard.
        arrays: Name, dtype and shape of each array that `train()` returns.
        metrics: Name and length of each metric, -1 for a single number; without the weight.
        evaluation: The same for what `evaluate()` returns; empty if nodes answer no evaluation.
        rehearsal: Whether the holders of each class compare tags of their integers before a vector leaves in a run, and
            after each round.
        always: Whether they compare them before the vectors of each round leave, which needs no rehearsal.
        identities: Public identity keys of the workers, as hexadecimal; empty in dealer mode.
        app: Digest of the app, empty if it is not pinned.
        versions: Name and version of what the bits of an update depend on.
        environment: Further words that must be equal on all nodes: kind of device, instruction set, threads.
        scope: With integer noise, "shard" or "sum", see `IntegerNoise`; else empty.
        text: The body as distributed.
    """

    classes: ShardClasses
    graph: ClassGraph
    colluders: int
    min_classes: int
    quantiser: Quantiser
    weight_key: str
    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]
    metrics: tuple[tuple[str, int], ...]
    evaluation: tuple[tuple[str, int], ...]
    rehearsal: bool
    always: bool
    identities: tuple[str, ...]
    app: str
    versions: tuple[tuple[str, str], ...]
    environment: tuple[str, ...]
    scope: str
    text: bytes = field(repr=False)

    @cached_property
    def digest(self) -> bytes:
        """Digest M0 of the body as distributed, 32 bytes."""
        return hashlib.sha256(self.text).digest()

    @cached_property
    def layout(self) -> bytes:
        """Digest of the layout of a shard's result of training, which enters the request digest; 32 bytes."""
        return self.result("train").digest

    @property
    def size(self) -> int:
        """Number d of entries of an update."""
        return self.result("train").size

    @property
    def numbers(self) -> int:
        """Number of values in the metrics vector of training, without weight and count of clipped entries."""
        return self.result("train").numbers

    def result(self, kind: str) -> ResultLayout:
        """Returns the layout of what a shard's training ("train", "rehearse") or evaluation ("evaluate") gives.

        Raises:
            SecureRefused: The manifest does not cover requests of this kind.
        """
        if kind in ("train", "rehearse"):
            return ResultLayout(self.weight_key, self.arrays, self.metrics)
        if kind == "evaluate" and self.evaluation:
            return ResultLayout(self.weight_key, (), self.evaluation)
        covered = "training and evaluation" if self.evaluation else "training alone"
        raise SecureRefused(f"The manifest covers {covered}, and the server asks for something else.")

    def lengths(self, kind: str = "train") -> dict[str, int]:
        """Returns the number of elements of each part before combining, a multiple of m."""
        result = self.result(kind)
        plain = {
            "update": result.size,
            "metrics": ENTRY_WORDS * (2 + result.numbers),
            "check": CHECK_WORDS,
            "status": 1,
        }
        m = self.classes.m
        return {part: -(-length // m) * m for part, length in plain.items()}

    def noise(self, *, colluders: int = 0) -> IntegerNoise | None:
        """Returns the integer noise that shards have, as a privacy setting; None if they have none.

        Args:
            colluders: The owner's number of colluders, where it is more than the body's.
        """
        most = max(colluders, self.colluders)
        return promised(self.quantiser, self.classes, self.size, self.scope, most)

    @property
    def first_use(self) -> str:
        """Why identities that come first cannot be trusted under this body; empty if they can."""
        if self.scope != "sum" or self.identities:
            return ""
        return (
            "its noise covers the sum alone, and a server that takes the place of other workers would read single "
            "classes: keys come from a dealer, or with an allow-list"
        )

    def why_not_private(self, privacy: Privacy | None) -> str:
        """Returns why the body does not go with a privacy setting, as the end of a sentence; empty if it does."""
        return why_not_private(
            privacy,
            self.noise(),
            self.quantiser,
            self.classes,
            arrays=(name for name, _, _ in self.arrays),
            metrics=bool(self.metrics),
            evaluation=bool(self.evaluation),
        )

    def certificate(self, *, colluders: int | None = None, min_classes: int | None = None) -> Certificate:
        """Returns the certificate of the graph, computed by this node for its own requirements.

        Args:
            colluders: The owner's number of colluders; by default the body's.
            min_classes: The owner's fewest classes in a sum; by default the body's.

        Raises:
            NotCertified: The graph does not protect against so many colluders.
        """
        return certify(
            self.classes,
            self.graph,
            colluders=self.colluders if colluders is None else max(colluders, self.colluders),
            min_classes=self.min_classes if min_classes is None else max(min_classes, self.min_classes),
        )

    @classmethod
    def from_bytes(cls, text: bytes) -> ManifestBody:
        """Returns the body that canonical JSON holds. Classes are recomputed, and edges follow from the family.

        Call `certificate` before a body is trusted. It can take a second for many workers, so this does not.

        Raises:
            InvalidSetting: The text is not canonical, or not a body.
        """
        values = parsed(text)
        try:
            return _body_of(values, text)
        except FlGradcodeError as error:
            raise InvalidSetting(f"The manifest cannot be used: {error}") from None
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise InvalidSetting(f"The manifest's body is not one of {_PROTOCOL} ({type(error).__name__}).") from None


def make_body(
    code: GradientCode,
    *,
    arrays: Sequence[tuple[str, str, Sequence[int]]],
    metrics: Sequence[tuple[str, int]] = (),
    evaluation: Sequence[tuple[str, int]] = (),
    rehearsal: bool = False,
    agree: Literal["", "always"] = "",
    colluders: int = 1,
    min_classes: int = 3,
    cohorts: int = 1,
    sending: Sending = "coded",
    holders: Sequence[Sequence[int]] | None = None,
    bound: float = 1.0,
    clip: str = "entries",
    headroom: int = 4,
    largest_weight: float = 1.0,
    privacy: IntegerNoise | None = None,
    weight_key: str = "num-examples",
    identities: Sequence[str] = (),
    app: str = "",
    versions: Mapping[str, str] | None = None,
    environment: Sequence[str] = (),
) -> ManifestBody:
    """Returns a manifest's body for a code, with a graph that is certified for `colluders`.

    Args:
        code: Fractional repetition with m = 1, or an exact code over the prime field. Any code with one shard a
            message, because only its assignment counts.
        arrays: Name, dtype and shape of each array that `train()` returns.
        metrics: Name and length of each metric except the weight, -1 for a single number.
        evaluation: The same for what `evaluate()` returns; empty if nodes answer no evaluation.
        rehearsal: See `ManifestBody`.
        agree: "always" for a comparison before the vectors of each round, in place of a rehearsal. More than half of
            the holders of each class then have to answer in each round.
        colluders: Number T of workers that may collude with the server.
        min_classes: Fewest classes in a sum.
        cohorts: Number of separate sums.
        sending: One coded vector a worker, or one shard a message.
        holders: For each shard, the workers that have its secret, if they are more than those that compute it.
        bound, clip, headroom, largest_weight: See `Quantiser`.
        privacy: Integer noise of each shard, which decides bound, clip and largest weight; None: none.
        weight_key, identities, app, versions, environment: See `ManifestBody`.

    Raises:
        InvalidCode: Masks do not work with this code.
        NotCertified: No graph protects against so many colluders.
        InvalidSetting: Another argument cannot be used.
    """
    classes = classes_for(code, sending, holders=holders)
    graph, _ = choose_graph(classes, colluders=colluders, cohorts=cohorts, min_classes=min_classes)
    if privacy is None:
        quantiser = Quantiser(classes.ring, classes.k, bound, clip, headroom, largest_weight)  # type: ignore[arg-type]
    else:
        size = sum(math.prod(shape) for _, _, shape in arrays)
        quantiser = noisy_quantiser(privacy, classes, size, headroom=headroom, colluders=colluders)
    rows = [[[c, *classes.matrix[worker, c].tolist()] for c in classes.sent_by(worker)] for worker in range(classes.n)]
    text = canonical(
        {
            "protocol": _PROTOCOL,
            "n": classes.n,
            "k": classes.k,
            "m": int(classes.matrix.shape[2]),
            "s": classes.s,
            "ring": classes.ring.name,
            "sending": classes.sending,
            "classes": [list(one) for one in classes.members],
            "rows": rows,
            "holders": [list(one) for one in classes.holders],
            "graph": [graph.family, *graph.parameters],
            "cohorts": cohorts,
            "colluders": colluders,
            "min-classes": min_classes,
            "quantiser": [*quantiser.to_list()],
            "check-words": CHECK_WORDS,
            "weight-key": weight_key,
            "arrays": [[name, dtype, [int(x) for x in shape]] for name, dtype, shape in arrays],
            "metrics": [[name, length] for name, length in metrics],
            "evaluation": [[name, length] for name, length in evaluation],
            "rehearsal": _compared(rehearsal, agree),
            "identities": list(identities),
            "app": app,
            "versions": [[name, version] for name, version in sorted((versions or {}).items())],
            "environment": list(environment),
            **({} if privacy is None else {_SCOPE: privacy.scope}),
        }
    )
    return ManifestBody.from_bytes(text)


_KEYS = {
    *("protocol", "n", "k", "m", "s", "ring", "sending", "classes", "rows", "holders", "graph", "cohorts"),
    *("colluders", "min-classes", "quantiser", "check-words", "weight-key", "arrays", "metrics", "identities"),
    *("app", "versions", "environment", "evaluation", "rehearsal"),
}


#: Key of a body with integer noise alone; and what "rehearsal" is if holders compare in each round.
_SCOPE, _ALWAYS = "noise-scope", 2


def _compared(rehearsal: bool, agree: str) -> int:
    """Returns how holders are compared: 0 for not at all, 1 for a rehearsal, 2 for each round."""
    if agree not in ("", "always"):
        raise InvalidSetting(f"agree={agree!r} must be 'always', or '' for no comparison before each round.")
    if agree and rehearsal:
        raise InvalidSetting("agree='always' compares before each round, the first one too: leave rehearsal= out.")
    return _ALWAYS if agree else int(rehearsal)


def _body_of(values: dict[str, Any], text: bytes) -> ManifestBody:
    if set(values) - {_SCOPE} != _KEYS:
        odd = sorted((set(values) - {_SCOPE}) ^ _KEYS)[0]
        raise InvalidSetting(f"its entry {odd!r} is {'not known' if odd in values else 'missing'}.")
    if values["protocol"] != _PROTOCOL or values["check-words"] != CHECK_WORDS:
        raise InvalidSetting(f"it is of protocol {values['protocol']!r}; this version speaks {_PROTOCOL!r}.")
    n, m, s = (_whole(values[name], 0 if name == "s" else 1) for name in ("n", "m", "s"))
    if m > n:
        raise InvalidSetting(f"m={m} is more than its n={n} workers.")
    members = tuple(tuple(_whole(j) for j in shards) for shards in values["classes"])
    if len(values["rows"]) != n:
        raise InvalidSetting(f"it has {len(values['rows'])} rows for {n} workers.")
    matrix = np.zeros((n, len(members), m), np.int64)
    for worker, row in enumerate(values["rows"]):
        for number, *coefficients in row:
            if len(coefficients) != m or not all(type(one) is int and 0 <= one < P for one in coefficients):
                raise InvalidSetting(f"the coefficients of worker {worker} are not {m} elements of 0..{P - 1}.")
            matrix[worker, _whole(number)] = coefficients
    classes = classes_in(
        members,
        matrix,
        tuple(tuple(_whole(i) for i in one) for one in values["holders"]),
        values["sending"],
        ring_named(values["ring"]),
        s,
    )
    if classes.k != values["k"]:
        raise InvalidSetting(f"its classes have {classes.k} shards, not k={values['k']}.")
    cohorts = split_into_cohorts(vertex_order(classes.holders), _whole(values["cohorts"], 1))
    family, *parameters = values["graph"]
    graph = ClassGraph(family, tuple(_whole(one, 1) for one in parameters), cohorts)
    _ = graph.edges  # raises for offsets that are too large
    clip, bound, headroom, largest, noise = values["quantiser"]
    quantiser = Quantiser(
        classes.ring, classes.k, _float_in(bound), clip, headroom, _float_in(largest), _float_in(noise)
    )
    arrays = tuple(
        (_text(name), _text(dtype), tuple(_whole(x) for x in shape)) for name, dtype, shape in values["arrays"]
    )
    metrics, evaluation = (
        tuple((_text(name), _whole(length, -1)) for name, length in values[kind]) for kind in ("metrics", "evaluation")
    )
    scope, compared = values.get(_SCOPE, ""), _whole(values["rehearsal"])
    if compared > _ALWAYS:
        raise InvalidSetting(f"its rehearsal is {compared}: 0 is none, 1 is one, {_ALWAYS} is one in each round.")
    if compared == _ALWAYS and classes.sending != "coded":
        raise InvalidSetting("agree='always' needs coded vectors: with one shard a message, few compute each shard.")
    identities = tuple(map(_text, values["identities"]))
    if scope not in (("shard", "sum") if quantiser.noise else ("",)):
        raise InvalidSetting(f"its {_SCOPE} is {scope!r}: with integer noise it is 'shard' or 'sum', else not there.")
    if quantiser.noise:
        told = bool(metrics or evaluation)
        check_noise(quantiser, classes, scope, metrics=told, rehearsal=compared > 0, cohorts=len(cohorts))
    return ManifestBody(
        classes,
        graph,
        _whole(values["colluders"]),
        _whole(values["min-classes"], 2),
        quantiser,
        _text(values["weight-key"]),
        arrays,
        metrics,
        evaluation,
        compared == 1,
        compared == _ALWAYS,
        identities,
        _text(values["app"]),
        tuple((_text(name), _text(version)) for name, version in values["versions"]),
        tuple(map(_text, values["environment"])),
        scope,
        text,
    )


def _whole(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise InvalidSetting(f"{value!r} must be a whole number of at least {least}.")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidSetting(f"{value!r} must be a text.")
    return value


def _float_in(text: Any) -> float:
    value = float.fromhex(_text(text))
    if value.hex() != text:
        raise InvalidSetting(f"{text!r} must be a float as Python's float.hex() writes it.")
    return value


@dataclass(frozen=True, eq=False)
class Manifest:
    """A body with the public key of each class and its commitment to the class's data.

    Attributes:
        body: The body.
        public_keys: X25519 public key of each class, 32 bytes each.
        commitments: Commitment of each class, 32 bytes each; see `data_commitment`.
    """

    body: ManifestBody
    public_keys: tuple[bytes, ...]
    commitments: tuple[bytes, ...]

    def __post_init__(self) -> None:
        for values in (self.public_keys, self.commitments):
            if len(values) != len(self.body.classes) or any(len(one) != KEY_BYTES for one in values):
                raise InvalidSetting("A manifest has a public key and a commitment of 32 bytes for each class.")

    @cached_property
    def digest(self) -> bytes:
        """Digest M of the manifest, 32 bytes, to which all keys of edges and all requests are bound."""
        return _digest(self.body.digest, list(zip(self.public_keys, self.commitments, strict=True)))

    def to_bytes(self) -> bytes:
        """Returns the manifest as canonical JSON."""
        return canonical(
            {
                "body": self.body.text.decode(),
                "classes": [
                    [key.hex(), commitment.hex()]
                    for key, commitment in zip(self.public_keys, self.commitments, strict=True)
                ],
            }
        )

    @classmethod
    def from_bytes(cls, text: bytes, *, digest: bytes | None = None) -> Manifest:
        """Returns the manifest that canonical JSON holds.

        Args:
            text: The manifest.
            digest: Digest M that it must have, if this node has pinned one.

        Raises:
            InvalidSetting: The text is not a manifest.
            SecureRefused: It has another digest.
        """
        values = parsed(text)
        try:
            if set(values) != {"body", "classes"}:
                raise ValueError
            text = _text(values["body"]).encode()
            pairs = [(bytes.fromhex(key), bytes.fromhex(commitment)) for key, commitment in values["classes"]]
        except FlGradcodeError:
            raise
        except (TypeError, ValueError):
            raise InvalidSetting("The text is not a manifest of secure aggregation.") from None
        # First of all: a stranger's body is not even looked at.
        if digest is not None and _digest(hashlib.sha256(text).digest(), pairs) != digest:
            raise SecureRefused("The manifest is another one than this node has pinned.")
        public_keys, commitments = (tuple(pair[side] for pair in pairs) for side in (0, 1))
        return cls(ManifestBody.from_bytes(text), public_keys, commitments)


def _digest(body: bytes, pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    return hash_of(body, *(one for c, pair in enumerate(pairs) for one in (c, *pair)))


def read_body(text: bytes) -> ManifestBody:
    """Returns the body in a file that holds a manifest, or a body alone.

    Raises:
        InvalidSetting: It holds neither.
    """
    return Manifest.from_bytes(text).body if "body" in parsed(text) else ManifestBody.from_bytes(text)


@dataclass(frozen=True, eq=False)
class ClassKeys:
    """The keys of a worker: seeds of its classes, and from them the keys of edges.

    Attributes:
        manifest: The manifest.
        worker: Number of the worker.
        seeds: Seed of each class that the worker holds, 32 bytes each.
    """

    manifest: Manifest
    worker: int
    seeds: Mapping[int, bytes] = field(repr=False)
    _found: dict[tuple[int, int], bytes] = field(default_factory=dict, repr=False)

    def edge_keys(self, numbers: Sequence[int]) -> dict[tuple[int, int], bytes]:
        """Returns the key of each edge at some of the worker's classes."""
        public = self.manifest.public_keys
        for edge in self.manifest.body.graph.edges_at(numbers):
            if edge not in self._found:
                ours, other = edge if edge[0] in self.seeds else edge[::-1]
                private = private_key(self.seeds[ours], self.manifest.body.digest, ours)
                ends = {ours: public[ours], other: public[other]}
                self._found[edge] = edge_key(private, ours, other, ends, self.manifest.digest)
        return {edge: self._found[edge] for edge in self.manifest.body.graph.edges_at(numbers)}


def class_keys(manifest: Manifest, worker: int, seeds: Mapping[int, bytes]) -> ClassKeys:
    """Returns the keys of a worker, after checking that its seeds are those of the manifest.

    Args:
        manifest: The manifest, whose digest the node has pinned.
        worker: Number of the worker.
        seeds: Seed of each class that it holds.

    Raises:
        SecureRefused: The seeds are not those of the worker's classes.
    """
    supports = manifest.body.classes.supports
    if not 0 <= worker < len(supports) or set(seeds) != {*supports[worker]}:
        raise SecureRefused(f"The seeds of this node are not those of worker {worker} in the manifest.")
    for number, seed in seeds.items():
        if public_key(private_key(seed, manifest.body.digest, number)) != manifest.public_keys[number]:
            raise SecureRefused(f"The manifest has another public key of class {number} than this node's seed gives.")
    return ClassKeys(manifest, worker, dict(seeds))
