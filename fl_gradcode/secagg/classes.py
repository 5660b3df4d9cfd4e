"""Classes of shards: the finest units that are ever sent, each of which is masked as a whole.

Shards with equal columns of the encoding matrix always travel together in coded vectors, so their integers are added up
first. With one shard a message, each shard is a class of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..codes import GradientCode, PrimeField
from ..errors import InvalidCode, InvalidSetting
from ..masking import FIELD, INTEGERS, Ring

__all__ = ["Sending", "ShardClasses", "classes_for", "classes_in"]

#: How replies are sent: one coded vector a worker, or one shard a message.
Sending = Literal["coded", "shardwise"]

# Digits of 15 bits of so many shards add up within both rings.
_MOST_SHARDS = 2**15


@dataclass(frozen=True, eq=False)
class ShardClasses:
    """The classes of a code, and who holds them.

    Attributes:
        members: The shards of each class, ascending; classes are in the order of their first shards.
        matrix: What worker i multiplies the blocks of class c by in a coded vector, int64, shape (n, C, m), read-only.
        holders: The workers that are given each class's seed, ascending. They may be more than those with a
            coefficient.
        sending: How replies are sent.
        ring: Where masked sums are computed.
        s: Straggler tolerance.
    """

    members: tuple[tuple[int, ...], ...]
    matrix: NDArray[np.int64]
    holders: tuple[tuple[int, ...], ...]
    sending: Sending
    ring: Ring
    s: int

    @property
    def n(self) -> int:
        """Number of workers."""
        return int(self.matrix.shape[0])

    @property
    def m(self) -> int:
        """Upload reduction: a coded reply has ceil(d / m) elements. With one shard a message it is 1."""
        return int(self.matrix.shape[2]) if self.sending == "coded" else 1

    @property
    def k(self) -> int:
        """Number of shards."""
        return sum(map(len, self.members))

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def supports(self) -> tuple[tuple[int, ...], ...]:
        """The classes whose seeds each worker is given, ascending."""
        held: list[list[int]] = [[] for _ in range(self.n)]
        for number, workers in enumerate(self.holders):
            for worker in workers:
                held[worker].append(number)
        return tuple(map(tuple, held))

    def sent_by(self, worker: int) -> tuple[int, ...]:
        """Returns the classes that enter the coded reply of a worker, ascending."""
        return tuple(np.flatnonzero(self.matrix[worker].any(axis=1)).tolist())

    @cached_property
    def code(self) -> GradientCode:
        """The code over classes instead of shards, which decodes the sum over all classes."""
        if self.ring == FIELD:
            return GradientCode(self.matrix, self.s, "classes", numbers=PrimeField())
        groups = tuple(tuple(np.flatnonzero(column).tolist()) for column in self.matrix[:, :, 0].T)
        return GradientCode(self.matrix.astype(np.float64), self.s, "classes", groups)

    def blocks(self) -> NDArray[Any]:
        """Returns the encoding matrix over shards, shape (n, k, m)."""
        B = np.zeros((self.n, self.k, self.matrix.shape[2]), np.int64)
        for number, shards in enumerate(self.members):
            B[:, list(shards)] = self.matrix[:, number, None]
        return B


def classes_for(
    code: GradientCode, sending: Sending = "coded", *, holders: Sequence[Sequence[int]] | None = None
) -> ShardClasses:
    """Returns the classes of a code.

    Args:
        code: Fractional repetition with m = 1, or an exact code over the prime field. Any code with one shard a
            message, because only its assignment counts.
        sending: How replies are sent.
        holders: For each shard, the workers that have its secret, if they are more than those that compute it.

    Raises:
        InvalidCode: Masks do not work with this code.
        InvalidSetting: A worker computes a shard whose secret it does not have.
    """
    if code.k > _MOST_SHARDS:
        raise InvalidCode(f"k={code.k} shards: secure aggregation takes {_MOST_SHARDS} or fewer.")
    if isinstance(code.numbers, PrimeField):
        ring, B = FIELD, np.asarray(code.blocks, np.int64)
    elif sending == "shardwise":  # coefficients are never used: any assignment will do
        ring, B = INTEGERS, np.asarray(code.blocks != 0, np.int64).max(axis=2, keepdims=True)
    elif not code.exact:
        raise InvalidCode(f"{code!r} is approximate: masks cancel only in the exact sum. Use an exact code.")
    elif code.groups is not None and code.m == 1:
        ring, B = INTEGERS, np.asarray(code.blocks, np.int64)
    else:
        raise InvalidCode(
            f"{code!r} has coefficients over the reals, where masks do not cancel exactly. Use fractional repetition "
            "with m=1, a code over the prime field (reed_solomon), or one shard a message (sending='shardwise')."
        )
    given = [code.holders_of(j) for j in range(code.k)] if holders is None else [tuple(sorted(one)) for one in holders]
    if len(given) != code.k:
        raise InvalidSetting(f"Holders are named for {len(given)} shards; the code has {code.k}.")
    for shard, workers in enumerate(given):
        lacking = sorted({*code.holders_of(shard)} - {*workers})
        if lacking:
            raise InvalidSetting(f"Worker {lacking[0]} computes shard {shard}, and is not among its holders {workers}.")
    members = _equal_columns(B) if sending == "coded" else [(shard,) for shard in range(code.k)]
    matrix = np.ascontiguousarray(B[:, [shards[0] for shards in members]])
    matrix.setflags(write=False)
    # A class's seed comes from the secrets of all its shards.
    known = tuple(tuple(sorted(set.intersection(*(set(given[j]) for j in shards)))) for shards in members)
    return ShardClasses(tuple(members), matrix, known, sending, ring, code.s)


def classes_in(
    members: tuple[tuple[int, ...], ...],
    matrix: NDArray[np.int64],
    holders: tuple[tuple[int, ...], ...],
    sending: str,
    ring: Ring,
    s: int,
) -> ShardClasses:
    """Returns the classes that a manifest states, after recomputing them from its coefficients.

    Raises:
        InvalidSetting: They are not the classes of these coefficients and holders.
        InvalidCode: The coefficients are not those of a code in this ring.
    """
    if sending not in ("coded", "shardwise"):
        raise InvalidSetting(f"sending={sending!r} must be 'coded' or 'shardwise'.")
    shards = sorted(j for one in members for j in one)
    if shards != list(range(len(shards))) or not all(members) or len(shards) > _MOST_SHARDS:
        raise InvalidSetting("the classes do not have each shard exactly once.")
    matrix.setflags(write=False)
    found = ShardClasses(members, matrix, holders, sending, ring, s)  # type: ignore[arg-type]
    columns = _equal_columns(found.blocks()) if sending == "coded" else [(j,) for j in shards]
    if tuple(columns) != members:
        raise InvalidSetting("the classes are not those of its coefficients.")
    if len(holders) != len(members):
        raise InvalidSetting(f"holders are named for {len(holders)} of {len(members)} classes.")
    for number, workers in enumerate(holders):
        able = {*workers}
        if not able or sorted(able) != list(workers) or not able <= {*range(found.n)}:
            raise InvalidSetting(f"the holders {workers} of class {number} are not ascending workers.")
        if not able.issuperset(np.flatnonzero(matrix[:, number].any(axis=1)).tolist()):
            raise InvalidSetting(f"a worker computes class {number}, and is not among its holders.")
    if ring == INTEGERS and (matrix.shape[2] != 1 or matrix.max(initial=0) > 1):
        raise InvalidSetting("over integers modulo 2^32, m is 1 and coefficients are 0 and 1.")
    if sending == "coded":
        _ = found.code  # checks groups and the number of holders
    return found


def _equal_columns(B: NDArray[np.int64]) -> list[tuple[int, ...]]:
    found: dict[bytes, list[int]] = {}
    for shard in range(B.shape[1]):
        found.setdefault(B[:, shard].tobytes(), []).append(shard)
    return [tuple(shards) for shards in found.values()]
