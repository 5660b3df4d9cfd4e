"""Labels of keys and digests: length-prefixed fields, and keys derived under them by HKDF.

Each field is prefixed by its length, so two different lists of fields never become the same bytes.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["KEY_BYTES", "Field", "derive", "fields", "hash_of"]

#: Length of every key, seed and digest, in bytes.
KEY_BYTES = 32
#: A field of a label; a text is encoded as UTF-8, and a number as its decimal digits.
Field = bytes | str | int

# Another salt than that of differential privacy: both derive from the same secrets of shards.
_SALT = b"fl-gradcode/secagg/v1"


def fields(*values: Field) -> bytes:
    """Returns the fields, each after its length as 4 bytes, most significant first."""
    return b"".join(_prefixed(value) for value in values)


def _prefixed(value: Field) -> bytes:
    field = value if isinstance(value, bytes) else str(value).encode()
    return len(field).to_bytes(4, "big") + field


def derive(secret: bytes, *label: Field) -> bytes:
    """Returns the key of 32 bytes that a secret has under a label, by HKDF-SHA256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=_SALT, info=fields(*label)).derive(secret)


def hash_of(*values: Field) -> bytes:
    """Returns the SHA-256 of the fields, 32 bytes."""
    return hashlib.sha256(fields(*values)).digest()
