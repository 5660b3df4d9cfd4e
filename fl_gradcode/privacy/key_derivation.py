"""Key derivation (HKDF) from a shard's secret and everything that the server decides, and a key's random numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.app import ArrayRecord, Context, Message
from numpy.typing import NDArray

from .._files import absolute_path
from ..errors import InvalidSetting
from ..protocol import NUM_PARTITIONS
from .records import BUDGET, FOLDER, Asked, common_folder, is_request
from .settings import privacy_to_json

__all__ = ["SECRET_BYTES", "KeyContext", "PRFStream", "derived_seed", "folder_of", "key_context", "needed"]

#: Length of a shard's secret.
SECRET_BYTES = 32

_SALT = b"fl-gradcode/dp/v1"
_UNIT = 2.0**-53
# Pairs of normals that are made at a time. More would leave a core's cache; fewer would have a thread that draws beside
# a training step wait for the interpreter at each piece.
_BLOCK = 1 << 17


@dataclass(frozen=True)
class KeyContext:
    """What a key is bound to: the context that HKDF takes as its `info`.

    Attributes:
        run: The library's name of the run, kept when the run is resumed.
        round: Server round.
        shard: Number of the shard.
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

    def derive(self, secret: bytes, purpose: Literal["noise", "sample", "generators", "digest"]) -> bytes:
        """Returns the key for one purpose, 32 bytes, by HKDF-SHA256 (RFC 5869).

        Each field is prefixed by its length, so that no two contexts share an `info`.

        Args:
            secret: The shard's.
            purpose: What the key is used for, and nothing else.
        """
        info = _prefixed(purpose.encode()) + self._fields
        return HKDF(algorithm=SHA256(), length=32, salt=_SALT, info=info).derive(secret)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the context in hex, which tells two requests apart. It stays on the node: it can be guessed at."""
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


class PRFStream:
    """Random numbers from a key by a pseudorandom function (PRF): AES-256 in counter mode.

    The output is read as 64-bit little-endian words. Each call continues where the last one ended.

    Args:
        key: 32 bytes, used for this stream only.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"The key has {len(key)} bytes; AES-256 takes 32.")
        self._next: Callable[[bytes], bytes] = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Returns numbers uniform on [0, 1), float64, shape (n,), multiples of 2^-53."""
        return np.asarray(self._integers(n) * _UNIT, np.float64)

    def normal(self, n: int) -> NDArray[np.float64]:
        """Returns standard normal numbers, float64, shape (n,), at most 8.66 in size (5e-18 of the law lie beyond).

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
        """Returns uniform whole numbers of 53 bits, which float64 holds exactly, shape (n,)."""
        words: NDArray[Any] = np.frombuffer(self._next(bytes(8 * n)), "<u8")
        return words >> np.uint64(11)


def derived_seed(key: bytes, step: int, record: int) -> int:
    """Returns a seed of 64 bits for one record in one step."""
    return int.from_bytes(hashlib.sha256(key + f"{step}/{record}".encode()).digest()[:8], "little")


def _prefixed(field: bytes) -> bytes:
    return len(field).to_bytes(4, "big") + field


def key_context(
    asked: Asked,
    message: Message,
    context: Context,
    model: torch.nn.Module,
    *,
    manifest: str,
    others: Mapping[str, Any],
) -> KeyContext:
    """Returns the key context of a request: everything that the server decides and a shard's update depends on.

    If two requests had one key, their answers would have the same noise, and their difference none. So all that
    `train()` is handed goes in: every record in its order, of whatever kind and name, the run config, the seed and the
    model.

    Args:
        asked: What the shard's training is asked to promise.
        message: As `train()` got it.
        context: As `train()` got it.
        model: As training starts from it.
        manifest: What the shard's data are.
        others: Further values that somebody else decides, as JSON holds them.
    """
    weights = hashlib.sha256()
    records: list[Any] = []
    for name, record in message.content.items():
        if is_request(name):
            continue
        if isinstance(record, ArrayRecord):
            records.append([name, "ArrayRecord", len(record)])
            for key, array in record.items():
                weights.update(
                    repr((name, key, array.dtype, array.stype, tuple(array.shape), len(array.data))).encode()
                )
                weights.update(array.data)
        else:
            records.append([name, type(record).__name__, [[key, value] for key, value in record.items()]])
    start = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values: NDArray[Any] = np.ascontiguousarray(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        start.update(repr((name, str(tensor.dtype), [*tensor.shape])).encode())
        start.update(values.data)
    config = {
        "privacy": privacy_to_json(asked.privacy),
        "message": [message.metadata.message_type, records],
        # The message's arrays may be only a part of what training starts from.
        "model": start.hexdigest(),
        # The server seeds dropout and augmentation: with another seed it would get another update, with equal noise.
        "seed": asked.seed,
        "reply-as": asked.reply_as,
        "partitions": context.node_config.get(NUM_PARTITIONS),
        "run-config": [[key, value] for key, value in context.run_config.items() if key != FOLDER],
        "others": dict(others),
        "parameters": [[n, [*p.shape], str(p.dtype), p.requires_grad] for n, p in model.named_parameters()],
        # Without the build (+cpu): kinds of processor differ by rounding, versions may by more.
        "versions": _versions(),
    }
    text = json.dumps(config, sort_keys=True, default=_as_text)  # lists keep their order
    return KeyContext(
        asked.run,
        asked.round,
        asked.shard,
        weights.digest(),
        hashlib.sha256(text.encode()).digest(),
        hashlib.sha256(manifest.encode()).digest(),
    )


def folder_of(context: Context, asked: Asked) -> Path | None:
    """Returns the node's folder with its keys and its ledger; None if none is configured.

    Args:
        context: The node's.
        asked: The request, which holds the run config's folder where `train()` must not see it.

    Raises:
        InvalidSetting: The path is relative, or only the server names one although the node has a budget or is on a
            machine of its own.
    """
    own = context.node_config.get(FOLDER)
    if BUDGET in context.node_config and not own:
        raise InvalidSetting(
            f"This node has {BUDGET} and no {FOLDER} in its node config: one that the server names could be an empty "
            "ledger each time. Add it there."
        )
    if own:
        return absolute_path(str(own), FOLDER)
    common = asked.folder or common_folder(context)
    return absolute_path(common, FOLDER) / f"node-{asked.worker}" if common else None


def needed(folder: Path | None, what: str) -> Path:
    """Returns the folder.

    Args:
        folder: What `folder_of` returned.
        what: What would be in it, for the error.

    Raises:
        InvalidSetting: There is none; says how to get one.
    """
    if folder is None:
        raise InvalidSetting(
            f"This node has no {FOLDER}, where {what} would be. Make keys with fl-gradcode keys make, bring the node "
            f"its folder, and start it with --node-config '... {FOLDER}=\"/path/to/node-0\"'."
        )
    return folder


@lru_cache(maxsize=1)
def _versions() -> list[str]:
    return [version(name).partition("+")[0] for name in ("torch", "opacus")]


def _as_text(value: object) -> dict[str, str]:
    # As no value of a record is written: bytes and a text never look alike.
    return {type(value).__name__: value.hex() if isinstance(value, bytes) else repr(value)}
