"""What a shard's key is bound to, and where a node keeps it: from message, run config and node config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
from .privacy_records import Asked
from .privacy_settings import privacy_to_json

__all__ = ["BUDGET", "FOLDER", "budget_of", "folder_of", "key_context", "needed"]

#: Keys of the node config (`FOLDER` also of the run config, where all nodes are on one machine).
FOLDER, BUDGET = "privacy-dir", "max-epsilon"


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
    rest of the message, the run config and what is trained all go in.
    """
    weights = hashlib.sha256()
    records: dict[str, Any] = {}
    for name, record in sorted(message.content.items()):
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                values: NDArray[Any] = np.ascontiguousarray(pack.view(array))
                weights.update(repr((name, key, array.dtype, tuple(array.shape))).encode())
                weights.update(values.reshape(-1).view(np.uint8).data)
        elif not name.startswith("fl-gradcode."):
            records[name] = dict(record.items())
    config = {
        "privacy": privacy_to_json(asked.privacy),
        "message": records,
        "run-config": {key: value for key, value in context.run_config.items() if key != FOLDER},
        "others": dict(others),
        "parameters": [[n, [*p.shape], str(p.dtype), p.requires_grad] for n, p in model.named_parameters()],
        # Without the build (+cpu): kinds of processor differ by rounding, versions may by more.
        "versions": [version(name).partition("+")[0] for name in ("torch", "opacus")],
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


def budget_of(context: Context) -> float:
    """The data owner's own limit, over all runs."""
    value = context.node_config.get(BUDGET, float("inf"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InvalidSetting(f"{BUDGET}={value!r} in the node config must be a number greater than 0.")
    return float(value)


def _as_text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)
