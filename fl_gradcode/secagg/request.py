"""The request digest R: all that a class's integers depend on, computed by each node from what it received.

All masks, roundings and noise of a reply are bound to R. A server that sends two holders of a class requests that
differ in anything gets replies under unrelated masks, which tell it nothing together.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import SecureRefused
from ..masking import Field, fields, hash_of

__all__ = ["Entry", "Received", "content_digest", "exact_text", "given_digest", "layout_digest", "request_digest"]

_LABEL = "fl-gradcode/secagg/request/v1"
#: A value of a run config.
Value = bool | int | float | str | bytes
_LONGEST = 2**32 - 1


@dataclass(frozen=True)
class Entry:
    """An entry of a received record.

    Attributes:
        key: Its key.
        type: Type of the value, or dtype of the array.
        shape: Shape of the array; empty for other values.
        content: Bytes of the value or the array.
    """

    key: str
    type: str
    shape: tuple[int, ...]
    content: bytes | memoryview


@dataclass(frozen=True)
class Received:
    """A record of a received message.

    Attributes:
        type: Type of the record, such as "ArrayRecord".
        name: Its name in the message.
        entries: Its entries, in the order received.
    """

    type: str
    name: str
    entries: Sequence[Entry]


def content_digest(records: Iterable[Received]) -> bytes:
    """Returns the SHA-256 of all records of a message in the order received, 32 bytes.

    The order and types are bound too, because `train()` sees them.
    """
    digest = hashlib.sha256()
    for record in records:
        digest.update(fields(record.type, record.name, len(record.entries)))
        for entry in record.entries:
            size = memoryview(entry.content).nbytes
            if size > _LONGEST:
                raise SecureRefused(f"An array has {size} bytes; secure aggregation takes {_LONGEST} or fewer.")
            digest.update(fields(entry.key, entry.type, _shape(entry.shape)))
            digest.update(size.to_bytes(4, "big"))
            digest.update(entry.content)
    return digest.digest()


def given_digest(*, seed: int, run_config: Mapping[str, Value], k: int) -> bytes:
    """Returns the SHA-256 of what is given beside the message, 32 bytes.

    Args:
        seed: Seed of the round.
        run_config: The run config; its order has no effect.
        k: Number of shards.
    """
    config: list[Field] = []
    for key, value in sorted(run_config.items()):
        if isinstance(value, float):
            content: Field = exact_text(value)
        else:
            content = value if isinstance(value, bytes | str) else int(value)
        config += [key, type(value).__name__, content]
    return hash_of(seed, k, len(run_config), *config)


def exact_text(value: float) -> str:
    """Returns a text that is different for any two floats that a program can tell apart; NaN has 2^53 - 2 of them."""
    return f"nan {struct.pack('>d', value).hex()}" if math.isnan(value) else value.hex()


def layout_digest(arrays: Iterable[tuple[str, str, Sequence[int]]], metrics: Iterable[tuple[str, int]]) -> bytes:
    """Returns the SHA-256 of the layout of a reply, 32 bytes.

    Args:
        arrays: Name, dtype and shape of each array.
        metrics: Name and length of each metric.
    """
    listed, named = list(arrays), list(metrics)
    parts: list[Field] = [len(listed)]
    for name, dtype, shape in listed:
        parts += [name, dtype, _shape(shape)]
    return hash_of(*parts, len(named), *(field for pair in named for field in pair))


def request_digest(
    *,
    manifest: bytes,
    run: str,
    kind: str,
    round: int,
    content: bytes,
    given: bytes,
    quantiser: bytes,
    layout: bytes,
) -> bytes:
    """Returns the request digest R, 32 bytes.

    There is no number of the attempt: a request that is asked again is the same request.

    Args:
        manifest: Digest M of the manifest.
        run: Name of the run.
        kind: "train" or "evaluate".
        round: Server round.
        content: What `content_digest` returns.
        given: What `given_digest` returns.
        quantiser: Digest of the quantiser.
        layout: What `layout_digest` returns.
    """
    return hash_of(_LABEL, manifest, run, kind, round, content, given, quantiser, layout)


def _shape(shape: Sequence[int]) -> bytes:
    return fields(*map(int, shape))
