"""Mask streams: AES-256 in counter mode, one key for each edge, request and part of a reply.

All masks of a request sum to zero. The lower class of an edge adds the edge's stream, and the higher class subtracts
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from ..codes import P
from .labels import KEY_BYTES, derive
from .ring import Ring

__all__ = ["CHECK_WORDS", "PARTS", "Part", "Stream", "add_streams", "counter_mode", "mask_streams", "poison", "stream"]

#: A part of a reply, which has streams of its own.
Part = Literal["update", "metrics", "check", "status"]
#: All parts, in the order in which they are sent.
PARTS: tuple[Part, ...] = ("update", "metrics", "check", "status")
#: Words of the part "check". Wrong masks pass with probability 2^-128, or 2^-124 in the field.
CHECK_WORDS = 4

# Number of words that are made at once. They fit a core's cache together with the vectors that they are added to.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Stream:
    """A stream and the vectors that it enters.

    Attributes:
        key: 32 bytes, used for this stream alone.
        plus: Names of the vectors to which it is added.
        minus: Names of the vectors from which it is subtracted.
    """

    key: bytes
    plus: tuple[int, ...] = ()
    minus: tuple[int, ...] = ()


def counter_mode(key: bytes) -> Any:
    """Returns an AES-256 encryptor in counter mode from counter 0.

    The counter starts at 0 in every stream, which is safe because no key is used for two streams.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"The key has {len(key)} bytes; AES-256 takes {KEY_BYTES}.")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def add_streams(vectors: Mapping[int, NDArray[np.uint32]], streams: Iterable[Stream], ring: Ring) -> None:
    """Add streams to vectors of one length, in place.

    A stream of d elements is read from its key's little-endian 32-bit words. Modulo 2^32, these are its elements. In
    the field, an element is the low 31 bits of its word. A word whose low bits are p stands for no element. All such
    words among the first d are replaced, in ascending position, by words d, d + 1, ... of the stream; replacements that
    are p again are replaced in the same way by the words that follow. The result does not depend on the chunks.

    Args:
        vectors: Vectors of elements, uint32, shape (d,), by name.
        streams: The streams, which name the vectors that they enter.
        ring: The ring.
    """
    length = next(iter(vectors.values())).size
    size = min(_CHUNK, length)
    zeros, buffer = memoryview(bytes(4 * size)), bytearray(4 * size + 15)  # OpenSSL may want a block more
    words: NDArray[np.uint32] = np.frombuffer(buffer, "<u4", size)
    entered = [(one, counter_mode(one.key), list[int]()) for one in streams]
    for start in range(0, length, _CHUNK):
        stop = min(start + _CHUNK, length)
        piece = words[: stop - start]
        for one, cipher, rejected in entered:
            cipher.update_into(zeros[: 4 * piece.size], buffer)
            ring.elements(piece)
            if ring.modulus == P and piece.max() == P:
                rejected += (start + np.flatnonzero(piece == P)).tolist()
            for name in one.plus:
                ring.add(vectors[name][start:stop], piece)  # p counts as 0
            for name in one.minus:
                ring.subtract(vectors[name][start:stop], piece)
    for one, cipher, rejected in entered:
        for position, word in _replacements(rejected, cipher.update):
            element = np.array([word], np.uint32)
            for name in one.plus:
                ring.add(vectors[name][position : position + 1], element)
            for name in one.minus:
                ring.subtract(vectors[name][position : position + 1], element)


def _replacements(rejected: Sequence[int], more: Callable[[bytes], bytes]) -> Iterable[tuple[int, int]]:
    """Yields rejected positions with the elements that replace them in the field."""
    while rejected:
        drawn: NDArray[np.uint32] = np.frombuffer(more(bytes(4 * len(rejected))), "<u4") & np.uint32(P)
        pairs = list(zip(rejected, drawn.tolist(), strict=True))
        yield from ((position, word) for position, word in pairs if word != P)
        rejected = [position for position, word in pairs if word == P]


def stream(key: bytes, length: int, ring: Ring) -> NDArray[np.uint32]:
    """Returns the first elements of a key's stream, shape (length,); a longer stream may differ in replaced ones."""
    total = np.zeros(length, np.uint32)
    add_streams({0: total}, [Stream(key, plus=(0,))], ring)
    return total


def mask_streams(edge_keys: Mapping[tuple[int, int], bytes], request: bytes, part: Part) -> list[Stream]:
    """Returns the streams that mask one part of the vectors of classes.

    Args:
        edge_keys: Key of each edge (c, c') with c < c'.
        request: Digest R of the request, 32 bytes.
        part: The part.
    """
    return [
        Stream(derive(key, "mask", request, part), plus=(low,), minus=(high,)) for (low, high), key in edge_keys.items()
    ]


def poison(vector: NDArray[np.uint32], seed: bytes, request: bytes, part: Part, ring: Ring) -> None:
    """Add a stream that all holders of a class know, and the server does not, to one part of a failed class in place.

    What fails depends on data, so it must not show which class failed. The poisoned sum is uniform, and its check words
    are wrong.
    """
    add_streams({0: vector}, [Stream(derive(seed, "poison", request, part), plus=(0,))], ring)
