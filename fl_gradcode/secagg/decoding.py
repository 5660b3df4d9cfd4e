"""The server's half: any decodable set of masked replies gives the exact sum, and its check words say so first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._text import numbered
from ..codes import combine_mod
from ..errors import MasksRemain, NotDecodable, OutOfRange, ShardsFailed
from ..masking import CHECK_WORDS, ENTRY_WORDS, INTEGERS, Part, Ring, restored
from .encoding import MaskedReply
from .manifest import Manifest

__all__ = ["DecodedSum", "decode"]

_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class DecodedSum:
    """The sum over all shards of a cohort.

    Attributes:
        shards: The shards, ascending.
        integers: Sum of the shards' integers, int32, shape (d,); empty for an evaluation.
        unit: What an integer stands for: sum of omega times update = integers * unit.
        weight: Sum of the shards' weights; with integer noise their number, which is public.
        largest_weight: Weight by which updates were divided before rounding.
        clipped: Number of clipped entries, or of clipped updates if their norm is limited; None with integer noise,
            under which it is not counted.
        metrics: Sums of the shards' metrics, float64; NaN where a shard's was not finite.
    """

    shards: tuple[int, ...]
    integers: NDArray[np.int32]
    unit: float
    weight: float
    largest_weight: float
    clipped: int | None
    metrics: NDArray[np.float64]

    def mean(self) -> NDArray[np.float64]:
        """Returns the weighted mean of the clipped updates, float64, shape (d,)."""
        mean = self.integers.astype(np.float64)
        mean *= self.unit * self.largest_weight / self.weight
        return mean


def decode(manifest: Manifest, replies: Sequence[MaskedReply]) -> list[DecodedSum]:
    """Returns the sum of each cohort, usually of one.

    The check words are decoded first, and nothing else is looked at unless they show that all masks cancel.

    Args:
        manifest: The manifest.
        replies: Replies to one request, in order of arrival; of a worker's equal replies the first counts.

    Raises:
        NotDecodable: The replies do not determine a sum.
        MasksRemain: The masks do not cancel, or a reply answers another request or manifest.
        ShardsFailed: Some shards failed on their holders.
        OutOfRange: An entry is larger than the manifest allows.
    """
    if not replies:
        raise NotDecodable("No reply has arrived.")
    for reply in replies:
        if reply.manifest != manifest.digest:
            raise MasksRemain(f"Worker {reply.worker} has another manifest.")
        if (reply.request, reply.kind) != (replies[0].request, replies[0].kind):
            raise MasksRemain(f"Worker {reply.worker} answered another request than worker {replies[0].worker}.")
    return [_decoded(manifest, replies, cohort) for cohort in manifest.body.graph.cohorts]


def _decoded(manifest: Manifest, replies: Sequence[MaskedReply], cohort: tuple[int, ...]) -> DecodedSum:
    body = manifest.body
    classes, ring = body.classes, body.classes.ring
    result = body.result(replies[0].kind)
    shards = tuple(sorted(j for c in cohort for j in classes.members[c]))
    chosen, a = _chosen(manifest, replies, cohort)

    def signed(part: Part, length: int) -> NDArray[np.int32]:
        vectors = [reply.parts[part] for reply in chosen]
        if a is None:
            total = _added(vectors, ring)
        else:
            total = combine_mod(vectors, a).astype(np.uint32)
        return ring.to_signed(total)[:length]

    status = int(signed("status", 1)[0])
    if (signed("check", CHECK_WORDS) != len(shards)).any():
        if 0 < status <= len(shards):
            raise ShardsFailed(
                f"{status} of {len(shards)} shards failed on their holders; the reasons are in their logs."
            )
        raise MasksRemain("The masks do not cancel: a worker has other keys, another request or another manifest.")
    if status:
        raise MasksRemain("The count of failed shards contradicts the check words.")
    integers = signed("update", result.size)
    limit = body.quantiser.limit(len(shards))
    if integers.size and not -limit <= int(integers.min()) <= int(integers.max()) <= limit:
        raise OutOfRange(f"An entry of the sum exceeds {limit}, the most that {len(shards)} shards can add up to.")
    noisy = body.quantiser.noise > 0
    weight, clipped, *metrics = restored(signed("metrics", ENTRY_WORDS * (2 + result.numbers))).tolist()
    return DecodedSum(
        shards,
        integers,
        2.0**-body.quantiser.fraction_bits,
        float(len(shards)) if noisy else weight,
        body.quantiser.largest_weight,
        None if noisy else round(clipped),
        np.array(metrics, np.float64),
    )


def _chosen(
    manifest: Manifest, replies: Sequence[MaskedReply], cohort: tuple[int, ...]
) -> tuple[list[MaskedReply], NDArray[np.int64] | None]:
    """Returns replies that determine a cohort's sum and their decoding vectors, or None if they only have to be added.

    Raises:
        NotDecodable: There are none.
    """
    classes = manifest.body.classes
    if classes.sending == "shardwise":
        first = {reply.number: reply for reply in reversed(replies)}
        missing = sorted(set(cohort) - set(first))
        if missing:
            raise NotDecodable(f"No reply of {numbered('shard', missing)} has arrived.")
        return [first[c] for c in cohort], None
    by_worker = {reply.worker: reply for reply in reversed(replies)}
    workers = [w for w in dict.fromkeys(reply.worker for reply in replies) if {*classes.sent_by(w)} & {*cohort}]
    a = classes.code.restrict(cohort).decoding_vector(workers)
    used = [worker for worker in workers if np.any(a[worker])]
    if classes.ring == INTEGERS:
        return [by_worker[worker] for worker in used], None
    return [by_worker[worker] for worker in used], np.asarray(a, np.int64)[used].reshape(len(used), -1)


def _added(vectors: Sequence[NDArray[np.uint32]], ring: Ring) -> NDArray[np.uint32]:
    total = vectors[0].astype(np.uint32)
    for start in range(0, total.size, _CHUNK):
        piece = total[start : start + _CHUNK]
        for vector in vectors[1:]:
            ring.add(piece, vector[start : start + _CHUNK])
    return total
