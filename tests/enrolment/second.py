"""A second reading of a set-up that shares no code with the library: fields, HKDF, wraps, manifest and statements."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

__all__ = ["Reading"]

_PROTOCOL = b"fl-gradcode/secagg/setup/v1"
_SALT = b"fl-gradcode/secagg/v1"


def lp(*values: bytes | str | int) -> bytes:
    raw = [value if isinstance(value, bytes) else str(value).encode() for value in values]
    return b"".join(struct.pack(">I", len(one)) + one for one in raw)


def hkdf(secret: bytes, info: bytes) -> bytes:
    extracted = hmac.new(_SALT, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


class Reading:
    """What an observer with one node's ephemeral key reads in a set-up's messages.

    Args:
        run, epoch: The set-up.
        body: The body's bytes.
        hellos: As they travel.
        classes: As they travel.
    """

    def __init__(self, run: str, epoch: int, body: bytes, hellos: list[Any], classes: list[Any]) -> None:
        self.m0 = hashlib.sha256(body).digest()
        self.label = (run, self.m0, epoch)
        self.hellos, self.classes = hellos, classes
        self.seen = hashlib.sha256(lp("hellos", *(str(one) for hello in hellos for one in hello))).digest()

    def verify(self) -> None:
        """Check all signatures; raises InvalidSignature."""
        identities = {}
        for worker, identity, ephemeral, signature in self.hellos:
            identities[worker] = identity
            said = lp(_PROTOCOL, "hello", *self.label, worker, bytes.fromhex(identity), bytes.fromhex(ephemeral))
            _verify(identity, signature, said)
        for number, leader, public, commitment, signature in self.classes:
            said = lp(
                _PROTOCOL, "class", *self.label, self.seen, number, leader, bytes.fromhex(public),
                bytes.fromhex(commitment),
            )  # fmt: skip
            _verify(identities[leader], signature, said)

    def verify_confirmation(self, worker: int, manifest: str, signature: str) -> None:
        identity = next(one[1] for one in self.hellos if one[0] == worker)
        said = lp(_PROTOCOL, "confirm", *self.label, self.seen, worker, bytes.fromhex(manifest))
        _verify(identity, signature, said)

    def manifest(self) -> str:
        pairs = [(number, bytes.fromhex(public), bytes.fromhex(one)) for number, _, public, one, _ in self.classes]
        return hashlib.sha256(lp(self.m0, *(value for pair in pairs for value in pair))).hexdigest()

    def opened(self, worker: int, ephemeral: bytes, number: int, box: bytes) -> bytes:
        """The seed in a wrap, by the worker's private ephemeral key."""
        _, leader, public, _, _ = self.classes[number]
        theirs = next(bytes.fromhex(one[2]) for one in self.hellos if one[0] == leader)
        shared = X25519PrivateKey.from_private_bytes(ephemeral).exchange(X25519PublicKey.from_public_bytes(theirs))
        bound = lp("wrap", *self.label, self.seen, number, leader, worker, bytes.fromhex(public))
        return ChaCha20Poly1305(hkdf(shared, bound)).decrypt(bytes(12), box, bound)

    def public_of(self, number: int, seed: bytes) -> str:
        """The public key that a class's seed gives."""
        private = hkdf(seed, lp("class-key", self.m0, number))
        return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def _verify(identity: str, signature: str, content: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(identity)).verify(bytes.fromhex(signature), content)


def ephemeral_of(folder: Path) -> bytes:
    """The private ephemeral key that a node keeps until it has confirmed."""
    return bytes.fromhex(json.loads((folder / "secagg-setup.json").read_text())["pending"]["ephemeral"])
