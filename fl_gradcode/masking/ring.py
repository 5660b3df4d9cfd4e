"""The two rings in which masked sums are computed: integers modulo 2^32, and the field of 2^31 - 1 elements.

Elements are uint32 in both, 0..modulus - 1. All operations work on the whole array at once and in place; callers pass
pieces that fit a core's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..codes import P
from ..errors import InvalidSetting

__all__ = ["FIELD", "INTEGERS", "Ring", "ring_named"]

_P = np.uint32(P)


@dataclass(frozen=True)
class Ring:
    """A ring of masked integers.

    Attributes:
        name: Name in the manifest, "2^32" or "p".
        modulus: Number of elements.
        half: Largest size of a sum that can be told from its negative.
    """

    name: str
    modulus: int
    half: int

    def elements(self, words: NDArray[np.uint32]) -> None:
        """Reduce words of 32 random bits to candidates of elements in place; in the field, a candidate may be p."""
        if self.modulus == P:
            words &= _P

    def add(self, total: NDArray[np.uint32], more: NDArray[np.uint32]) -> None:
        """Add elements to `total` in place; in the field, the number p in `more` counts as 0."""
        total += more
        if self.modulus == P:
            np.minimum(total, total - _P, out=total)  # below p, the difference wraps to a large number

    def subtract(self, total: NDArray[np.uint32], less: NDArray[np.uint32]) -> None:
        """Subtract elements from `total` in place; in the field, the number p in `less` counts as 0."""
        if self.modulus == P:
            self.add(total, _P - less)
        else:
            total -= less

    def from_signed(self, values: NDArray[np.int32]) -> NDArray[np.uint32]:
        """Returns the elements that signed integers stand for; they are at most `half` in size."""
        words = values.view(np.uint32)
        return np.minimum(words, words + _P) if self.modulus == P else words

    def to_signed(self, elements: NDArray[np.uint32]) -> NDArray[np.int32]:
        """Returns the signed integers, at most `half` in size or one below -half, that elements stand for."""
        values = elements.view(np.int32)
        # Elements above p / 2 have bit 30 set.
        return values - (values >> 30) * np.int32(P) if self.modulus == P else values


#: Integers modulo 2^32, for codes whose coefficients are 0 and 1.
INTEGERS = Ring("2^32", 2**32, 2**31 - 1)
#: The field of 2^31 - 1 elements, for codes over it.
FIELD = Ring("p", P, 2**30 - 1)


def ring_named(name: object) -> Ring:
    """Returns the ring with a name.

    Raises:
        InvalidSetting: There is no such ring.
    """
    for ring in (INTEGERS, FIELD):
        if name == ring.name:
            return ring
    raise InvalidSetting(f"The ring {name!r} must be {INTEGERS.name!r} or {FIELD.name!r}.")
