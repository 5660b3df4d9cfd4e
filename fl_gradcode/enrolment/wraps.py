"""Wraps: a class's seed, encrypted by its lead holder for another holder under keys of this epoch alone.

Both keys are ephemeral and named in signed hellos. Once they are erased, nobody can open what was recorded, not even
with the identities. The key of a wrap is bound to the class's public key, so that a second seed never meets the key,
and the nonce, of a first one.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from ..errors import SecureRefused
from ..masking import Field, derive, fields

__all__ = ["WRAP_BYTES", "ephemeral_key", "gives_secret", "unwrap", "wrap"]

#: Length of a wrap: a seed of 32 bytes and the tag.
WRAP_BYTES = 48
_NONCE = bytes(12)  # a key encrypts one seed
_ANY = X25519PrivateKey.from_private_bytes(bytes(32))


def ephemeral_key() -> tuple[bytes, bytes]:
    """Returns a new X25519 key: the private and the public half, 32 bytes each."""
    private = X25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()


def gives_secret(public: bytes) -> bool:
    """Returns whether an X25519 public key shares a secret: a point of small order gives everybody the same zeros.

    Private keys are multiples of 8 by construction, and so is the order of such a point: any private key tells.
    """
    try:
        _ANY.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def wrap(seed: bytes, ours: bytes, theirs: bytes, *label: Field) -> bytes:
    """Returns a seed encrypted for another holder, 48 bytes.

    Args:
        seed: The class's seed, 32 bytes.
        ours: Ephemeral X25519 private key of the lead holder.
        theirs: Ephemeral public key of the other holder.
        label: What the wrap is bound to.

    Raises:
        SecureRefused: Their key is a point of small order.
    """
    return ChaCha20Poly1305(_key(ours, theirs, label)).encrypt(_NONCE, seed, fields("wrap", *label))


def unwrap(box: bytes, ours: bytes, theirs: bytes, *label: Field) -> bytes:
    """Returns the seed in a wrap, 32 bytes.

    Args:
        box: The wrap.
        ours: Ephemeral X25519 private key of this holder.
        theirs: Ephemeral public key of the lead holder.
        label: What the wrap is bound to.

    Raises:
        SecureRefused: The wrap is not the lead holder's for this node under this label.
    """
    try:
        return ChaCha20Poly1305(_key(ours, theirs, label)).decrypt(_NONCE, box, fields("wrap", *label))
    except InvalidTag:
        raise SecureRefused("A class's seed was not wrapped for this node in this epoch by its lead holder.") from None


def _key(ours: bytes, theirs: bytes, label: tuple[Field, ...]) -> bytes:
    try:
        shared = X25519PrivateKey.from_private_bytes(ours).exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise SecureRefused("A hello has an ephemeral key that gives no secret.") from None
    return derive(shared, "wrap", *label)
