"""Identities of workers: an Ed25519 key each, made once, and the public allow-list of all of them.

A node's own key file is private. The allow-list is public: owners exchange their lines by any channel that the server
does not control, and compare its digest.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .._files import MEGABYTE, make_folder, parse_json, read_file, replace_file
from .._text import printable
from ..errors import InvalidSetting
from ..masking import KEY_BYTES, hash_of
from ..privacy import check_own
from ..protocol import MOST_WORKERS

__all__ = ["ALLOW_LIST", "IDENTITY_FILE", "Identity", "allow_list", "is_signed", "make_identity", "read_identity"]

#: Name of the private key file in a node's folder.
IDENTITY_FILE = "identity.json"
#: Key of the node config: path of the allow-list that the node's owner trusts.
ALLOW_LIST = "secagg-allow-list"

_FORMAT = "fl-gradcode identity 1"
_WORD = "ed25519"
_LARGEST = 4 * MEGABYTE


@dataclass(frozen=True)
class Identity:
    """A worker's identity.

    Attributes:
        worker: Number of the worker.
        private: Ed25519 private key, 32 bytes.
    """

    worker: int
    private: bytes = field(repr=False)

    @property
    def public(self) -> str:
        """The public key, as hexadecimal."""
        return Ed25519PrivateKey.from_private_bytes(self.private).public_key().public_bytes_raw().hex()

    @property
    def line(self) -> str:
        """The worker's line of the allow-list, such as "3 ed25519 9f86...", without its newline."""
        return f"{self.worker} {_WORD} {self.public}"

    def sign(self, content: bytes) -> str:
        """Returns the signature of a content, 64 bytes as hexadecimal."""
        return Ed25519PrivateKey.from_private_bytes(self.private).sign(content).hex()


def is_signed(public: str, signature: str, content: bytes) -> bool:
    """Returns whether a signature is a public key's of this content; both as hexadecimal."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), content)
    except (InvalidSignature, ValueError):
        return False
    return True


def make_identity(folder: str | os.PathLike[str], worker: int) -> Identity:
    """Makes the identity of a worker in its node's folder, which only the owner can read.

    Args:
        folder: The node's folder; made if it is missing.
        worker: Number of the worker, which is the node's `partition-id`.

    Raises:
        InvalidSetting: The folder has an identity already: overwriting it would lock the node out of every allow-list.
    """
    root = Path(folder)
    if not 0 <= worker < MOST_WORKERS:
        raise InvalidSetting(f"Worker {worker}: numbers are from 0 to {MOST_WORKERS - 1}.")
    path = root / IDENTITY_FILE
    if os.path.lexists(path):
        raise InvalidSetting(f"{path} already exists. An identity is made once; use another folder for another one.")
    identity = Identity(worker, secrets.token_bytes(KEY_BYTES))
    make_folder(root)
    root.chmod(0o700)
    content = {"format": _FORMAT, "worker": worker, "private": identity.private.hex()}
    replace_file(path, json.dumps(content) + "\n", mode=0o600)
    return identity


def read_identity(folder: str | os.PathLike[str]) -> Identity:
    """Returns the identity in a node's folder.

    Raises:
        InvalidSetting: The file is missing, damaged, or open to others.
    """
    path = Path(folder) / IDENTITY_FILE
    try:
        check_own(path)
        values = parse_json(read_file(path, _LARGEST))
        identity = Identity(values["worker"], bytes.fromhex(values["private"]))
        if values["format"] != _FORMAT or type(identity.worker) is not int or len(identity.private) != KEY_BYTES:
            raise ValueError
    except FileNotFoundError:
        raise InvalidSetting(f"There is no identity {path}. Make one with fl-gradcode secure identity.") from None
    except InvalidSetting:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidSetting(f"The identity {path} cannot be read ({type(error).__name__}).") from None
    return identity


def allow_list(source: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the public keys of an allow-list file in the order of the workers, as hexadecimal.

    A line has a worker's number, the word "ed25519" and the public key. Empty lines, and whatever follows "#", are left
    out.

    Raises:
        InvalidSetting: The file cannot be read, a line is no such line, or workers 0..n-1 do not each have one key of
            their own.
    """
    path = Path(source)
    try:
        lines = read_file(path, _LARGEST).decode("ascii").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"The allow-list {path} cannot be read ({type(error).__name__}).") from None
    found: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or not words[0].isdigit() or words[1] != _WORD or not is_key(words[2]):
            raise InvalidSetting(
                f"Line {number} of the allow-list {path} is {printable(line, 60)!r}; a line has a worker, "
                f"{_WORD!r} and 64 hexadecimal digits, as fl-gradcode secure identity prints it."
            )
        if int(words[0]) in found:
            raise InvalidSetting(f"The allow-list {path} has two lines of worker {int(words[0])}.")
        found[int(words[0])] = words[2]
    keys = [found[worker] for worker in sorted(found)]
    if sorted(found) != list(range(len(found))) or not found:
        missing = next(worker for worker in range(len(found) + 1) if worker not in found)
        raise InvalidSetting(f"The allow-list {path} has no line of worker {missing}.")
    check_distinct(keys, f"The allow-list {path}")
    return tuple(keys)


def allow_list_digest(keys: Sequence[str]) -> str:
    """Returns the digest of an allow-list that owners compare, as hexadecimal; comments and order do not enter."""
    return hash_of("allow-list", *keys).hex()


def is_key(text: object) -> bool:
    """Returns whether a text is 32 bytes in lower-case hexadecimal."""
    return isinstance(text, str) and len(text) == 2 * KEY_BYTES and not {*text} - {*"0123456789abcdef"}


def check_distinct(keys: Sequence[str], what: str) -> None:
    """Refuse two workers with one identity, who would count as two and are one.

    Raises:
        InvalidSetting: Names the two.
    """
    first: dict[str, int] = {}
    for worker, key in enumerate(keys):
        if key in first:
            raise InvalidSetting(f"{what} has one key for workers {first[key]} and {worker}; each needs its own.")
        first[key] = worker
