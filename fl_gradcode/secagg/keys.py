"""Keys of classes and edges: what each holder of a class derives from the class's seed and the public manifest."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from numpy.typing import NDArray

from ..errors import SecureRefused
from ..masking import KEY_BYTES, derive, fields

__all__ = [
    "agreement_tag",
    "class_seed",
    "data_commitment",
    "dither_key",
    "edge_key",
    "noise_key",
    "private_key",
    "public_key",
]


def class_seed(secrets: Sequence[bytes]) -> bytes:
    """Returns the seed of a class in dealer mode, 32 bytes, which the holders of all its shards derive.

    Args:
        secrets: The secrets of the class's shards in ascending order of the shards, 32 bytes each.
    """
    if not secrets or any(len(secret) != KEY_BYTES for secret in secrets):
        raise ValueError(f"A class's seed needs the secrets of its shards, {KEY_BYTES} bytes each.")
    return derive(b"".join(secrets), "class-seed")


def private_key(seed: bytes, body: bytes, number: int) -> bytes:
    """Returns the X25519 private key of a class, 32 bytes.

    Args:
        seed: The class's seed.
        body: Digest M0 of the manifest's body.
        number: Number of the class.
    """
    return derive(seed, "class-key", body, number)


def public_key(private: bytes) -> bytes:
    """Returns the X25519 public key of a private key, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def edge_key(private: bytes, ours: int, other: int, public_keys: Mapping[int, bytes], manifest: bytes) -> bytes:
    """Returns the key of an edge, 32 bytes, which the holders of either of its classes derive.

    Args:
        private: Private key of class `ours`.
        ours: A class whose seed this node has.
        other: The class at the other end.
        public_keys: Public keys of both classes.
        manifest: Digest M of the manifest.

    Raises:
        SecureRefused: The other public key is a point of small order, which gives no secret.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public_keys[other])
        )
    except ValueError:
        raise SecureRefused(f"The public key of class {other} gives no secret. Make a new manifest.") from None
    low, high = min(ours, other), max(ours, other)
    return derive(shared, "edge", manifest, low, high, public_keys[low], public_keys[high])


def data_commitment(seed: bytes, body: bytes, number: int, digests: Iterable[tuple[int, str]]) -> bytes:
    """Returns the commitment to the data of a class, 32 bytes, which only its holders can check.

    Args:
        seed: The class's seed.
        body: Digest M0 of the manifest's body.
        number: Number of the class.
        digests: For each shard of the class, ascending, its number and the digest of its data.
    """
    key = derive(seed, "commitment", body, number)
    return hmac.digest(key, fields("data", *(field for pair in digests for field in pair)), "sha256")


def dither_key(seed: bytes, request: bytes, shard: int) -> bytes:
    """Returns the key of the rounding of a class, 32 bytes; `shard` is the first one that is rounded together."""
    return derive(seed, "dither", request, shard)


def noise_key(seed: bytes, request: bytes, shard: int, integers: NDArray[np.int32]) -> bytes:
    """Returns the key of a shard's integer noise, 32 bytes.

    It is bound to what the noise is added to. Holders with the same integers draw the same noise. If they differ, or
    training fails on one of them alone, each has noise of its own: the same noise would cancel in the difference of
    their replies, which have the same mask.

    Args:
        seed: The class's seed.
        request: Digest R of the request.
        shard: The shard.
        integers: Its integers without noise, shape (d,).
    """
    return derive(seed, "noise", request, shard, hashlib.sha256(integers.astype("<i4").tobytes()).digest())


def agreement_tag(seed: bytes, request: bytes, worker: int, integers: NDArray[np.uint32]) -> bytes:
    """Returns a holder's tag of the integers that it computed for a class, 32 bytes.

    Holders compare their tags. The worker's number is bound, so that a server cannot show a node its own tag as
    another's.

    Args:
        seed: The class's seed.
        request: Digest R of the request.
        worker: The holder.
        integers: The integers before masking, shape (d,).
    """
    content = integers.astype("<u4").tobytes()
    mac = hmac.new(derive(seed, "tag"), fields(request, worker), hashlib.sha256)
    mac.update(len(content).to_bytes(4, "big"))
    mac.update(content)
    return mac.digest()
