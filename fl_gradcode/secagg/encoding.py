"""The client's half: a class's integers, its masks, and the reply that combines the masked classes of a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..codes import combine_mod
from ..errors import SecureRefused
from .integer_noise import discrete_gaussian
from .keys import dither_key, noise_key
from .manifest import ClassKeys, ManifestBody
from .masks import CHECK_WORDS, PARTS, Part, Stream, add_streams, mask_streams, poison
from .quantiser import digits_of
from .ring import INTEGERS

__all__ = ["MaskedReply", "Parts", "ShardResult", "class_integers", "encode", "masked_classes"]

#: The parts of a vector or a reply, uint32 elements.
Parts = dict[Part, NDArray[np.uint32]]


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What training on a shard gave.

    Attributes:
        update: The update, floats, shape (d,), in the order of the manifest's arrays.
        weight: The shard's weight.
        metrics: The metrics, float64, in the order of the manifest's metrics.
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
    """

    worker: int
    manifest: bytes
    request: bytes
    number: int | None
    parts: Parts

    def payload(self) -> bytes:
        """Returns the elements of all parts, one after another, as little-endian 32-bit words."""
        return b"".join(self.parts[part].astype("<u4").tobytes() for part in PARTS)

    @classmethod
    def from_payload(
        cls, body: ManifestBody, payload: bytes, *, worker: int, manifest: bytes, request: bytes, number: int | None
    ) -> MaskedReply:
        """Returns the reply whose payload was received.

        Raises:
            ValueError: The payload has another length, or a word that is no element of the ring.
        """
        lengths = {part: length // body.classes.m for part, length in body.lengths().items()}
        words: NDArray[np.uint32] = np.frombuffer(payload, "<u4")
        if words.size != sum(lengths.values()):
            raise ValueError(f"A masked reply has {sum(lengths.values())} words, not {words.size}.")
        if words.max(initial=0) >= body.classes.ring.modulus:
            raise ValueError("A masked reply has a word outside its ring.")
        parts, start = Parts(), 0
        for part in PARTS:
            parts[part] = words[start : start + lengths[part]]
            start += lengths[part]
        return cls(worker, manifest, request, number, parts)


def class_integers(
    body: ManifestBody, number: int, results: Mapping[int, ShardResult | None], seed: bytes, request: bytes
) -> Parts:
    """Returns the integers of a class before masking, the same on all its holders.

    If a shard failed, everything but the count in "status" is poisoned, so that nobody can tell which class it was.
    With integer noise, a shard that failed counts as a zero update with noise.

    Args:
        body: The manifest's body.
        number: The class.
        results: Results of its shards; None where training failed.
        seed: The class's seed.
        request: Digest R of the request.

    Returns:
        The parts, each padded with zeros to a multiple of m.
    """
    ring, shards = body.classes.ring, body.classes.members[number]
    ours = [results[j] for j in shards]
    made = (
        _noisy(body, shards, ours, seed, request) if body.quantiser.noise else _plain(body, ours, seed, request, shards)
    )
    failed = 0
    if made is None:
        # Each on its own, to count them.
        failed = sum(_plain(body, [one], seed, request, shards) is None for one in ours)
        failed = failed or len(ours)
        made = np.zeros(body.size, np.int32), np.zeros(0, np.int32)
    update, metrics = made
    counts = {
        "update": update,
        "metrics": metrics,
        "check": np.full(CHECK_WORDS, len(shards), np.int32),
        "status": np.array([failed], np.int32),
    }
    parts, lengths = Parts(), body.lengths()
    for part in PARTS:
        padded = ring.from_signed(counts[part])
        if padded.size < lengths[part]:
            padded = np.concatenate([padded, np.zeros(lengths[part] - padded.size, np.uint32)])
        if failed and part != "status":
            poison(padded, seed, request, part, ring)
        parts[part] = padded
    return parts


def _fits(body: ManifestBody, result: ShardResult | None) -> bool:
    return (
        result is not None
        and result.update.shape == (body.size,)
        and result.update.dtype.kind == "f"
        and result.metrics.shape == (body.numbers,)
    )


def _plain(
    body: ManifestBody, ours: Sequence[ShardResult | None], seed: bytes, request: bytes, shards: Sequence[int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """Returns the class's update, rounded once, and its metrics; None if a shard failed."""
    given = [one for one in ours if one is not None and _fits(body, one)]
    if len(given) < len(ours):
        return None
    rounded = body.quantiser.quantise(
        [one.update for one in given], [one.weight for one in given], dither_key(seed, request, shards[0])
    )
    if rounded is None:
        return None
    update, clipped = rounded
    total: NDArray[np.int32] | None = None
    for place, one in enumerate(given):
        digits = digits_of([one.weight, clipped if place == 0 else 0, *one.metrics.tolist()])
        if digits is None:
            return None
        total = digits if total is None else total + digits
    assert total is not None
    return update, total


def _noisy(
    body: ManifestBody, shards: Sequence[int], ours: Sequence[ShardResult | None], seed: bytes, request: bytes
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Returns the noisy update, of weight 1 a shard and without metrics: no number leaves that noise does not cover."""
    total = np.zeros(body.size, np.int32)
    for shard, one in zip(shards, ours, strict=True):
        if one is not None and _fits(body, one):
            rounded = body.quantiser.quantise([one.update], [1.0], dither_key(seed, request, shard))
            if rounded is not None:
                total += rounded[0]
        noise = discrete_gaussian(noise_key(seed, request, shard), body.quantiser.noise, body.size)
        total += noise.astype(np.int32)
    words = digits_of([float(len(shards)), 0.0, *[0.0] * body.numbers])
    assert words is not None
    return total, words


def masked_classes(keys: ClassKeys, integers: Mapping[int, Parts], request: bytes) -> None:
    """Mask the integers of some of a worker's classes in place. Each edge's stream is made once.

    Args:
        keys: The worker's keys.
        integers: What `class_integers` returned, by class.
        request: Digest R of the request.
    """
    edges = keys.edge_keys(tuple(integers))
    ours = set(integers)
    for part in PARTS:
        streams = [
            Stream(one.key, tuple(ours.intersection(one.plus)), tuple(ours.intersection(one.minus)))
            for one in mask_streams(edges, request, part)
        ]
        add_streams({c: parts[part] for c, parts in integers.items()}, streams, keys.manifest.body.classes.ring)


def encode(
    keys: ClassKeys, request: bytes, results: Mapping[int, ShardResult | None], *, shard: int | None = None
) -> MaskedReply:
    """Returns the masked reply of a worker to a request.

    Args:
        keys: The worker's keys.
        request: Digest R of the request.
        results: Results of exactly the shards that the reply is about; None where training failed.
        shard: The shard, with one shard a message.

    Raises:
        SecureRefused: The results are not those of whole classes as the manifest has them.
    """
    body = keys.manifest.body
    classes = body.classes
    if (shard is not None) != (classes.sending == "shardwise"):
        raise SecureRefused(f"The manifest says that replies are {classes.sending}, and the request says otherwise.")
    numbers = classes.sent_by(keys.worker) if shard is None else (shard,)
    if set(results) != {j for c in numbers if c < len(classes) for j in classes.members[c]}:
        raise SecureRefused(f"Shards {sorted(results)} are not the whole classes that worker {keys.worker} sends.")
    if not {*numbers} <= set(keys.seeds):
        raise SecureRefused(f"Worker {keys.worker} does not hold class {numbers[0]}.")
    integers = {c: class_integers(body, c, results, keys.seeds[c], request) for c in numbers}
    masked_classes(keys, integers, request)
    if shard is not None or classes.ring == INTEGERS:
        (parts,) = integers.values()  # fractional repetition: one class a worker, with coefficient 1
    else:
        coefficients = classes.matrix[keys.worker, list(numbers)].reshape(-1, 1)
        parts = {
            part: combine_mod(
                [block for c in numbers for block in integers[c][part].reshape(classes.m, -1)], coefficients
            ).astype(np.uint32)
            for part in PARTS
        }
    return MaskedReply(keys.worker, keys.manifest.digest, request, shard, parts)
