"""The client's half: a class's integers, its masks, and the reply that combines the masked classes of a worker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..codes import combine_mod
from ..errors import SecureRefused
from ..masking import (
    CHECK_WORDS,
    ENTRY_WORDS,
    INTEGERS,
    PARTS,
    Part,
    RoundedSum,
    Stream,
    add_streams,
    digits_of,
    discrete_gaussian,
    mask_streams,
    poison,
)
from .keys import dither_key, noise_key
from .manifest import ClassKeys, ManifestBody

__all__ = ["ClassIntegers", "MaskedReply", "Parts", "ShardResult", "encode", "mask", "masked_reply"]

#: The parts of a vector or a reply, uint32 elements.
Parts = dict[Part, NDArray[np.uint32]]


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What training or evaluation on a shard gave.

    Attributes:
        update: The update, floats, shape (d,), in the order of the manifest's arrays; empty for an evaluation.
        weight: The shard's weight.
        metrics: The metrics times the weight, float64, in the order of the manifest's metrics.
    """

    update: NDArray[np.floating]
    weight: float
    metrics: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MaskedReply:
    """A worker's masked reply.

    Attributes:
        worker: Number of the worker.
        manifest: Digest M of its manifest.
        request: Digest R of the request that it answers.
        number: The class, with one shard a message; None for a coded vector.
        parts: The masked elements.
        kind: "train" or "evaluate".
    """

    worker: int
    manifest: bytes
    request: bytes
    number: int | None
    parts: Parts
    kind: str = "train"

    def payload(self) -> bytes:
        """Returns the elements of all parts, one after another, as little-endian 32-bit words."""
        return b"".join(self.parts[part].astype("<u4", copy=False).data for part in PARTS)

    @classmethod
    def from_payload(
        cls,
        body: ManifestBody,
        payload: bytes | memoryview,
        *,
        worker: int,
        manifest: bytes,
        request: bytes,
        number: int | None,
        kind: str = "train",
    ) -> MaskedReply:
        """Returns the reply whose payload was received.

        Raises:
            ValueError: The payload has another length, or a word that is no element of the ring.
        """
        lengths = {part: length // body.classes.m for part, length in body.lengths(kind).items()}
        words: NDArray[np.uint32] = np.frombuffer(payload, "<u4")
        if words.size != sum(lengths.values()):
            raise ValueError(f"A masked reply has {sum(lengths.values())} words, not {words.size}.")
        if words.max(initial=0) >= body.classes.ring.modulus:
            raise ValueError("A masked reply has a word outside its ring.")
        parts, start = Parts(), 0
        for part in PARTS:
            parts[part] = words[start : start + lengths[part]]
            start += lengths[part]
        return cls(worker, manifest, request, number, parts, kind)


class ClassIntegers:
    """The integers of a class, to which the results of its shards are added one by one, in any order.

    If a shard failed, everything but the count in "status" is poisoned, so that nobody can tell which class it was.
    With integer noise, a shard that failed counts as a zero update with noise, which is another noise than that of the
    update on a holder where it did not fail.

    Args:
        body: The manifest's body.
        number: The class.
        seed: The class's seed.
        request: Digest R of the request.
        kind: "train" or "evaluate".

    Raises:
        SecureRefused: The manifest does not cover requests of this kind.
    """

    def __init__(self, body: ManifestBody, number: int, seed: bytes, request: bytes, kind: str = "train") -> None:
        self._body, self._seed, self._request = body, seed, request
        self._kind, self._layout = kind, body.result(kind)
        self._shards = body.classes.members[number]
        self._missing = {*self._shards}
        self._failed = 0
        self._done = False
        noisy = body.quantiser.noise > 0
        size = self._layout.size
        self._sum = None if noisy else RoundedSum(body.quantiser, size)
        self._noisy = np.zeros(size if noisy else 0, np.int32)
        self._metrics = np.zeros(ENTRY_WORDS * (2 + self._layout.numbers), np.int32)

    def add(self, shard: int, result: ShardResult | None) -> None:
        """Add the result of one of the class's shards, or None if its training failed.

        Raises:
            SecureRefused: The shard is not in the class, or was added before.
        """
        if shard not in self._missing:
            raise SecureRefused(f"Shard {shard} is not one of those that a class still lacks.")
        self._missing.remove(shard)
        if self._sum is None:
            self._add_noisy(shard, result)
        elif not self._added(self._sum, result):
            self._failed += 1

    def _added(self, total: RoundedSum, result: ShardResult | None) -> bool:
        """Add a result, and returns whether all but its update was usable, which is looked at in the end."""
        if result is None or not self._fits(result):
            return False
        digits = digits_of([result.weight, 0.0, *result.metrics.tolist()])
        if digits is None:
            return False
        if self._kind != "evaluate":
            if not total.add(result.update, result.weight):
                return False
        elif not 0 <= result.weight < math.inf:  # nothing is divided by the largest weight
            return False
        self._metrics += digits
        return True

    def _add_noisy(self, shard: int, result: ShardResult | None) -> None:
        """Add a noisy update of weight 1 without metrics: no number leaves that noise does not cover."""
        quantiser, size = self._body.quantiser, self._body.size
        integers = np.zeros(size, np.int32)
        if result is not None and self._fits(result):
            alone = RoundedSum(quantiser, size)
            if alone.add(result.update, 1.0):
                found, _, failed = alone.finish(dither_key(self._seed, self._request, shard))
                if not failed:
                    integers = found
        key = noise_key(self._seed, self._request, shard, integers)
        self._noisy += integers
        self._noisy += discrete_gaussian(key, quantiser.noise, size).astype(np.int32)
        digits = digits_of([1.0, 0.0, *[0.0] * self._layout.numbers])
        assert digits is not None
        self._metrics += digits

    def _fits(self, result: ShardResult) -> bool:
        return (
            result.update.shape == (self._layout.size,)
            and result.update.dtype.kind == "f"
            and result.metrics.shape == (self._layout.numbers,)
        )

    def parts(self) -> Parts:
        """Returns the integers before masking, the same on all holders, each part padded to a multiple of m.

        Raises:
            SecureRefused: A shard is missing: only whole classes are sent. Or this was called before.
        """
        if self._done:
            raise SecureRefused("The integers of a class are made once for a request.")
        self._done = True
        if self._missing:
            raise SecureRefused(f"Shards {sorted(self._missing)} are missing: only whole classes are sent.")
        if self._sum is None:
            update = self._noisy
        else:
            update, clipped, failed = self._sum.finish(dither_key(self._seed, self._request, self._shards[0]))
            self._failed += failed
            digits = digits_of([0.0, float(clipped), *[0.0] * self._layout.numbers])
            assert digits is not None
            self._metrics += digits
            if self._failed:  # holders may fail on different shards, and poison is the same at all: it would cancel
                update[:] = 0
                self._metrics[:] = 0
        counts: dict[Part, NDArray[np.int32]] = {
            "update": update,
            "metrics": self._metrics,
            "check": np.full(CHECK_WORDS, len(self._shards), np.int32),
            "status": np.array([self._failed], np.int32),
        }
        parts, lengths, ring = Parts(), self._body.lengths(self._kind), self._body.classes.ring
        for part in PARTS:
            padded = ring.from_signed(counts[part])
            if padded.size < lengths[part]:
                padded = np.concatenate([padded, np.zeros(lengths[part] - padded.size, np.uint32)])
            if self._failed and part != "status":
                poison(padded, self._seed, self._request, part, ring)
            parts[part] = padded
        return parts


def mask(keys: ClassKeys, integers: Mapping[int, Parts], request: bytes) -> None:
    """Mask the integers of some of a worker's classes in place. Each edge's stream is made once.

    Args:
        keys: The worker's keys.
        integers: What `ClassIntegers.parts` returned, by class.
        request: Digest R of the request.

    Raises:
        SecureRefused: They are masked already. The same mask twice would show by how much it changed them.
    """
    if not all(words.flags.writeable for parts in integers.values() for words in parts.values()):
        raise SecureRefused("These integers are masked already, and a mask is used once.")
    edges = keys.edge_keys(tuple(integers))
    ours = set(integers)
    for part in PARTS:
        streams = [
            Stream(one.key, tuple(ours.intersection(one.plus)), tuple(ours.intersection(one.minus)))
            for one in mask_streams(edges, request, part)
        ]
        add_streams({c: parts[part] for c, parts in integers.items()}, streams, keys.manifest.body.classes.ring)
        for parts in integers.values():
            parts[part].setflags(write=False)


def masked_reply(keys: ClassKeys, request: bytes, integers: Mapping[int, Parts], kind: str = "train") -> MaskedReply:
    """Returns the reply of a worker from the integers of its classes, which are masked in place.

    Args:
        keys: The worker's keys.
        request: Digest R of the request.
        integers: What `ClassIntegers.parts` returned, for all classes that a coded reply combines, or for the one class
            that is sent with one shard a message.
        kind: "train" or "evaluate".

    Raises:
        SecureRefused: These are not the classes that the worker sends.
    """
    classes = keys.manifest.body.classes
    numbers = tuple(integers)
    held = classes.sent_by(keys.worker)
    single = classes.sending == "shardwise"
    if not (len(numbers) == 1 and numbers[0] in held if single else numbers == held):
        raise SecureRefused(f"Worker {keys.worker} does not send a message of classes {list(numbers)}.")
    mask(keys, integers, request)
    if single or classes.ring == INTEGERS:
        (parts,) = integers.values()  # fractional repetition: one class a worker, with coefficient 1
    else:
        coefficients = classes.matrix[keys.worker, list(numbers)].reshape(-1, 1)
        parts = {
            part: combine_mod(
                [block for c in numbers for block in integers[c][part].reshape(classes.m, -1)], coefficients
            ).astype(np.uint32)
            for part in PARTS
        }
    return MaskedReply(keys.worker, keys.manifest.digest, request, numbers[0] if single else None, parts, kind)


def encode(
    keys: ClassKeys,
    request: bytes,
    results: Mapping[int, ShardResult | None],
    *,
    shard: int | None = None,
    kind: str = "train",
) -> MaskedReply:
    """Returns the masked reply of a worker to a request, from all results at once.

    Args:
        keys: The worker's keys.
        request: Digest R of the request.
        results: Results of exactly the shards that the reply is about; None where training failed.
        shard: The shard, with one shard a message.
        kind: "train" or "evaluate".

    Raises:
        SecureRefused: The results are not those of whole classes as the manifest has them.
    """
    body = keys.manifest.body
    classes = body.classes
    if (shard is not None) != (classes.sending == "shardwise"):
        raise SecureRefused(f"The manifest says that replies are {classes.sending}, and the request says otherwise.")
    numbers = classes.sent_by(keys.worker) if shard is None else (shard,)
    if not {*numbers} <= set(keys.seeds):
        raise SecureRefused(f"Worker {keys.worker} does not hold class {numbers[0]}.")
    if set(results) != {j for c in numbers for j in classes.members[c]}:
        raise SecureRefused(f"Shards {sorted(results)} are not the whole classes that worker {keys.worker} sends.")
    integers = {}
    for c in numbers:
        ours = ClassIntegers(body, c, keys.seeds[c], request, kind)
        for j in classes.members[c]:
            ours.add(j, results[j])
        integers[c] = ours.parts()
    return masked_reply(keys, request, integers, kind)
