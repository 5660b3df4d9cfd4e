"""Keys and the stream that they open: batches and noise that all holders of a shard share and nobody else knows.

A shard's secret never leaves its holders. From it, each purpose (noise, batches) in each round gets a key of its own,
bound to everything that the server decides: with one key for two requests, the difference of two answers would be free
of noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

__all__ = ["SECRET_BYTES", "KeyContext", "KeyedStream"]

#: Of a shard's secret.
SECRET_BYTES = 32

_SALT = b"fl-gradcode/dp/v1"
_UNIT = 2.0**-53
# Pairs of normals that are made at a time: they stay in a core's cache.
_BLOCK = 1 << 14


@dataclass(frozen=True)
class KeyContext:
    """What a key is bound to.

    Attributes:
        run: Our own name of the run, kept over a resume.
        round: The server round.
        shard: The shard.
        weights: SHA-256 of the arrays that training starts from, 32 bytes.
        config: SHA-256 of all else that the server decides, 32 bytes.
        manifest: SHA-256 of what the shard's data are, 32 bytes.
    """

    run: str
    round: int
    shard: int
    weights: bytes
    config: bytes
    manifest: bytes

    def key(self, secret: bytes, purpose: Literal["noise", "sample", "generators", "digest"]) -> bytes:
        """The 32 bytes for one purpose: HKDF-SHA256 of the shard's secret (RFC 5869).

        Fields are prefixed by their lengths, so that no two contexts share an `info`.
        """
        info = _prefixed(purpose.encode()) + self._fields
        return HKDF(algorithm=SHA256(), length=32, salt=_SALT, info=info).derive(secret)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the context, in hex: tells two requests apart. For holders only: it can be guessed at."""
        return hashlib.sha256(self._fields).hexdigest()

    @property
    def _fields(self) -> bytes:
        fields = (
            self.run.encode(),
            str(self.round).encode(),
            str(self.shard).encode(),
            self.weights,
            self.config,
            self.manifest,
        )
        return b"".join(map(_prefixed, fields))


class KeyedStream:
    """Uniform and normal numbers from a key: AES-256 in counter mode, 64-bit little-endian words.

    One stream has one use: each call goes on where the last one ended.

    Args:
        key: 32 bytes, used for nothing else.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"The key has {len(key)} bytes; AES-256 takes 32.")
        self._next: Callable[[bytes], bytes] = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Uniform on [0, 1), shape (n,), multiples of 2^-53."""
        return np.asarray(self._integers(n) * _UNIT, np.float64)

    def normal(self, n: int) -> NDArray[np.float64]:
        """Standard normal, shape (n,), float64, at most 8.66 in size (beyond lie 5e-18 of the law).

        References:
            Box, Muller, "A note on the generation of random normal deviates", Ann. Math. Stat. 29, 1958.
        """
        half = -(-n // 2)
        numbers = self._integers(2 * half)
        pairs = np.empty((2, half))
        out = torch.from_numpy(pairs)  # torch's elementary functions are three times as fast as NumPy's
        for start in range(0, half, _BLOCK):
            stop = min(half, start + _BLOCK)
            radius = torch.from_numpy((numbers[start:stop] + 0.5) * _UNIT).log_().mul_(-2.0).sqrt_()
            angle = torch.from_numpy(numbers[half + start : half + stop] * (2 * np.pi * _UNIT))
            torch.mul(radius, angle.cos(), out=out[0, start:stop])
            torch.mul(radius, angle.sin(), out=out[1, start:stop])
        return pairs.reshape(-1)[:n]

    def _integers(self, n: int) -> NDArray[np.uint64]:
        """Of 53 bits: what float64 holds exactly."""
        words: NDArray[Any] = np.frombuffer(self._next(bytes(8 * n)), "<u8")
        return words >> np.uint64(11)


def _prefixed(field: bytes) -> bytes:
    return len(field).to_bytes(4, "big") + field
