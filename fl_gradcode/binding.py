"""What a shard's key is bound to, and where a node keeps it: from message, run config and node config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from numpy.typing import NDArray

from . import pack
from .errors import InvalidSetting
from .keyed import KeyContext
from .privacy_records import BUDGET, FOLDER, Asked
from .privacy_settings import privacy_to_json
from .wire import NUM_PARTITIONS

__all__ = ["folder_of", "key_context", "needed"]


def key_context(
    asked: Asked,
    message: Message,
    context: Context,
    model: torch.nn.Module,
    *,
    manifest: str,
    others: Mapping[str, Any],
) -> KeyContext:
    """Everything that the server decides and a shard's update depends on.

    Two requests with one key would be two answers with the same noise: their difference has none. So the weights, the
    rest of the message, the run config, the seed and what is trained all go in.
    """
    weights = hashlib.sha256()
    records: dict[str, Any] = {}
    for name, record in sorted(message.content.items()):
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                values: NDArray[Any] = np.ascontiguousarray(pack.view(array))
                weights.update(repr((name, key, array.dtype, values.dtype.str, tuple(array.shape))).encode())
                weights.update(values.reshape(-1).view(np.uint8).data)
        elif not name.startswith("fl-gradcode."):
            records[name] = dict(record.items())
    start = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = np.ascontiguousarray(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        start.update(repr((name, str(tensor.dtype), [*tensor.shape])).encode())
        start.update(values.data)
    config = {
        "privacy": privacy_to_json(asked.privacy),
        "message": [message.metadata.message_type, records],
        # The message's arrays may be only a part of what training starts from.
        "model": start.hexdigest(),
        # The server seeds dropout and augmentation: with another seed it would get another update, with equal noise.
        "seed": asked.seed,
        "partitions": context.node_config.get(NUM_PARTITIONS),
        "run-config": {key: value for key, value in context.run_config.items() if key != FOLDER},
        "others": dict(others),
        "parameters": [[n, [*p.shape], str(p.dtype), p.requires_grad] for n, p in model.named_parameters()],
        # Without the build (+cpu): kinds of processor differ by rounding, versions may by more.
        "versions": _versions(),
    }
    text = json.dumps(config, sort_keys=True, default=_as_text)
    return KeyContext(
        asked.run,
        asked.round,
        asked.shard,
        weights.digest(),
        hashlib.sha256(text.encode()).digest(),
        hashlib.sha256(manifest.encode()).digest(),
    )


def folder_of(context: Context, worker: int) -> Path | None:
    """The node's folder with its keys and its ledger, or None.

    Raises:
        InvalidSetting: It is no absolute path.
    """
    own, common = context.node_config.get(FOLDER), context.run_config.get(FOLDER)
    if BUDGET in context.node_config and not own:
        raise InvalidSetting(
            f"This node has {BUDGET} and no {FOLDER} in its node config: one that the server names could be an empty "
            "ledger each time. Add it there."
        )
    if own or common:
        path = Path(str(own)) if own else Path(str(common)) / f"node-{worker}"
        if not path.is_absolute():
            raise InvalidSetting(f"{FOLDER}={str(own or common)!r} is a relative path; give an absolute one.")
        return path
    return None


def needed(folder: Path | None, what: str) -> Path:
    """The folder, or a sentence that says how to get one."""
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
