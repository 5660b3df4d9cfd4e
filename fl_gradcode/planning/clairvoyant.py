"""The clairvoyant bound: how short a round could be if all latencies were known and no work were wasted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..latency import Parts
from .schemes import Scheme

__all__ = ["clairvoyant_rounds"]


def clairvoyant_rounds(scheme: Scheme, parts: Parts, *, model_megabytes: float = 0.0) -> NDArray[np.float64] | None:
    """Returns a lower bound of the seconds of each round of a run, shape (rounds,); None if it is not known.

    The bound is that of a server which stores the same shards on the same workers, knows each latency beforehand, and
    asks each worker in one message for just the shards that it should compute. A round needs the model of the one
    before, and such a server leaves no job unfinished when a round ends. So all workers are free when a round begins,
    and the bound of a run is the sum of its rounds'. No scheme with the same assignment and exact rounds is faster.

    In a group of workers that hold the same block of L shards, worker i has computed j of them by
    `fixed_i + transfer_i + j compute_i`. The block is done at the L-th smallest of these times over all i and j, and
    the round when the last block is. With m > 1, each group needs m workers that compute its whole block.

    The bound is not known for schemes that lose data, and for assignments without groups.

    Args:
        scheme: The scheme, with as many workers as `parts`.
        parts: Drawn times of each round, from `Latency.parts`.
        model_megabytes: Size of the model, which each message carries to a worker; a reply carries 1/m of it back.
    """
    megabytes = model_megabytes * (1 + 1 / scheme.m)
    if not scheme.exact:
        return None
    if not scheme.groups:
        alone = scheme.s == 0 and (scheme.loads == 1).all()
        return parts.seconds(1.0, megabytes).max(axis=1) if alone else None
    ends = np.zeros(len(parts.fixed))
    for group in scheme.groups:
        members = list(group)
        load = len(scheme.blocks[members[0]])
        mine = Parts(parts.fixed[:, members], parts.compute[:, members], parts.transfer[:, members])
        if scheme.m > 1:
            done, enough = mine.seconds(float(load), megabytes), scheme.m
        else:
            loads = range(1, load + 1)
            done, enough = np.concatenate([mine.seconds(float(j), megabytes) for j in loads], axis=1), load
        ends = np.maximum(ends, np.partition(done, enough - 1, axis=1)[:, enough - 1])
    return ends
