"""A whole secure round in one process: seeds, manifest, results of shards, and the replies of all workers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fl_gradcode.codes import GradientCode
from fl_gradcode.secagg import (
    ClassIntegers,
    ClassKeys,
    Manifest,
    ManifestBody,
    MaskedReply,
    Parts,
    ShardResult,
    class_keys,
    encode,
    make_body,
)
from fl_gradcode.secagg.keys import private_key, public_key

REQUEST = hashlib.sha256(b"request").digest()


def seed_of(number: int) -> bytes:
    return hashlib.sha256(f"secret{number}".encode()).digest()


def body_of(code: GradientCode, *, size: int = 7, metrics: int = 1, **settings: Any) -> ManifestBody:
    named = [(f"metric-{number}", -1) for number in range(metrics)]
    return make_body(code, arrays=[("w", "float32", (size,))], metrics=named, **settings)


def sealed(body: ManifestBody) -> Manifest:
    """The manifest of a body whose classes have the seeds `seed_of`."""
    numbers = range(len(body.classes))
    keys = tuple(public_key(private_key(seed_of(c), body.digest, c)) for c in numbers)
    return Manifest(body, keys, tuple(bytes(32) for _ in numbers))


def keys_of(manifest: Manifest, worker: int) -> ClassKeys:
    return class_keys(manifest, worker, {c: seed_of(c) for c in manifest.body.classes.supports[worker]})


def results_for(
    body: ManifestBody, *, seed: int = 0, weight: float = 1.0, scale: float = 0.3
) -> dict[int, ShardResult]:
    rng = np.random.default_rng(seed)
    return {
        j: ShardResult(
            (0.3 * rng.standard_normal(body.size)).astype(np.float32), weight, rng.standard_normal(body.numbers)
        )
        for j in range(body.classes.k)
    }


def class_integers(body: ManifestBody, number: int, results: Mapping[int, ShardResult | None]) -> Parts:
    """The integers of a class before masking."""
    made = ClassIntegers(body, number, seed_of(number), REQUEST)
    for shard in body.classes.members[number]:
        made.add(shard, results[shard])
    return made.parts()


def replies_of(
    manifest: Manifest, results: Mapping[int, ShardResult | None], *, request: bytes = REQUEST, kind: str = "train"
) -> list[MaskedReply]:
    """All workers' replies, in the order of workers and then of shards."""
    classes = manifest.body.classes
    replies = []
    for worker in range(classes.n):
        keys = keys_of(manifest, worker)
        if classes.sending == "shardwise":
            for c in classes.sent_by(worker):
                replies.append(encode(keys, request, {c: results[c]}, shard=c, kind=kind))
        else:
            shards = [j for c in classes.sent_by(worker) for j in classes.members[c]]
            replies.append(encode(keys, request, {j: results[j] for j in shards}, kind=kind))
    return replies
