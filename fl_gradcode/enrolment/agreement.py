"""What an owner has agreed to: the manifest's body and the allow-list, pinned in the node's folder before any run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .._files import MEGABYTE, read_file, replace_file
from ..errors import InvalidSetting
from ..privacy import check_own
from ..secagg import ManifestBody
from .identities import IDENTITY_FILE, check_distinct, is_key, read_identity
from .node_state import StateFile

__all__ = ["BODY_FILE", "agree", "agreed_body", "check_identities", "is_agreed", "is_enrolled"]

#: Name of the body in a node's folder.
BODY_FILE = "secagg-body.json"
_DIGEST = "secagg-body-digest"
_LARGEST = 64 * MEGABYTE


def is_enrolled(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a node's folder is one for set-up through the server: it has an identity."""
    return os.path.lexists(Path(folder) / IDENTITY_FILE)


def check_identities(body: ManifestBody, allowed: Sequence[str] | None) -> None:
    """Check the identities that a body names, and that they are those of an allow-list.

    Args:
        body: The body.
        allowed: Public keys of the allow-list in the order of the workers; None if there is none.

    Raises:
        InvalidSetting: They are not.
    """
    named, n = body.identities, body.classes.n
    if named and (len(named) != n or not all(map(is_key, named))):
        raise InvalidSetting(f"The body names {len(named)} identities; its code has {n} workers.")
    check_distinct(named, "The body")
    if allowed is None or tuple(allowed) == named:
        return
    if not named:
        raise InvalidSetting("The body names no identities, and the owner has an allow-list.")
    wrong = next((i for i, (one, other) in enumerate(zip(named, allowed, strict=False)) if one != other), None)
    what = f"has {len(allowed)} workers, the body {n}" if wrong is None else f"has another key of worker {wrong}"
    raise InvalidSetting(f"The owner's allow-list {what}. Compare both with the other owners.")


def agree(folder: str | os.PathLike[str], text: bytes, allowed: Sequence[str] | None) -> ManifestBody:
    """Pins the body that all owners have agreed on in a node's folder.

    Args:
        folder: The node's folder, with its identity.
        text: The body, as it was distributed.
        allowed: Public keys of the owner's own copy of the allow-list; None to trust the first identities that the
            server shows.

    Raises:
        InvalidSetting: The text is no body, its identities are not the allow-list's, or this node's is not among them.
        NotCertified: Its graph does not protect as it says.
    """
    root, body = Path(folder), ManifestBody.from_bytes(text)
    identity = read_identity(root)
    check_identities(body, allowed)
    if body.first_use:
        raise InvalidSetting(f"The body cannot be agreed to without an allow-list: {body.first_use}.")
    if allowed is None and body.identities:
        raise InvalidSetting("The body names identities: compare them with an allow-list of your own.")
    if identity.worker >= body.classes.n:
        raise InvalidSetting(f"This node is worker {identity.worker}; the body's code has {body.classes.n} workers.")
    if body.identities and body.identities[identity.worker] != identity.public:
        raise InvalidSetting(f"The allow-list has another key of worker {identity.worker} than this node's identity.")
    body.certificate()
    file = StateFile(root)
    with file.locked():
        if os.path.lexists(root / _DIGEST) and _digest_in(root) != body.digest:
            # Erases the keys of the body before. What was trusted on first use stays: a server could take the place of
            # all other workers otherwise, after each new body.
            file.write(replace(file.read(), pending=None, sealed=None))
        # Under the lock still: a message that is being answered meanwhile would draw keys for the body before.
        replace_file(root / BODY_FILE, text)
        replace_file(root / _DIGEST, body.digest.hex() + "\n", mode=0o600)
    return body


def is_agreed(folder: str | os.PathLike[str], body: ManifestBody) -> bool:
    """Returns whether a body is still the one that the owner has agreed to."""
    return _digest_in(Path(folder)) == body.digest


def agreed_body(folder: str | os.PathLike[str]) -> ManifestBody:
    """Returns the body that the owner has agreed to.

    Raises:
        InvalidSetting: There is none, it was changed since, or others could exchange the digest.
    """
    root = Path(folder)
    try:
        digest = _digest_in(root)
        text = read_file(root / BODY_FILE, _LARGEST)
    except FileNotFoundError:
        raise InvalidSetting(f"{root} has no body that its owner agreed to: fl-gradcode secure agree.") from None
    except InvalidSetting:
        raise
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"The body in {root} cannot be read ({type(error).__name__}).") from None
    if hashlib.sha256(text).digest() != digest:
        raise InvalidSetting(f"{root / BODY_FILE} is not the body that the owner agreed to. Restore the file.")
    return ManifestBody.from_bytes(text)


def _digest_in(root: Path) -> bytes:
    path = root / _DIGEST
    check_own(path)  # who may exchange it decides what the node masks for
    return bytes.fromhex(path.read_text().strip())
